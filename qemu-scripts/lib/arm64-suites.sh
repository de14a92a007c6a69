# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2154 # test.sh, which sources this file, sets some names
#
# The suites' parts for arm64: test.sh --arch arm64. A suite NAME has one if there is a function arm64_NAME.

# arm64_cargo ARGUMENT...: runs `cargo test --no-run` for arm64, with static programs: they run here under qemu-user, and
# in an arm64 machine whatever C library that has.
arm64_cargo() {
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
        cargo test --locked --no-run --target "$CROSS_TARGET" "$@"
}

# arm64_programs CARGO-ARGUMENT...: prints 'NAME PATH' of each test program that arm64_cargo has already built.
arm64_programs() {
    arm64_cargo "$@" --message-format=json 2>/dev/null |
        sed -nE 's/.*"target":\{[^}]*"name":"([^"]+)".*"profile":\{[^}]*"test":true\}.*"executable":"([^"]+)".*/\1 \2/p'
}

# The kernels of the suite guest: one has to be compiled.
ARM64_GUEST_KERNELS="stable newest stable-16k newest-16k own-64k"

# The daemon runs on this machine, and QEMU emulates the guests' processor.
arm64_guest() {
    step "guest: arm64" cargo test --locked --no-fail-fast --test guest -- --ignored arm::
}

# arm64_guest_short: one guest of arm64, for the suite guest of this machine: a minute. The whole part takes more than
# half an hour.
arm64_guest_short() {
    local packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    if ! have aarch64-linux-gnu-gcc && [ "$(id -u)" != 0 ]; then
        times+=("guest: the arm64 guest is left out, no C compiler for its programs: run 'apt-get install -y $packages' as root")
        return
    fi
    step "guest: prepare arm64" "$SCRIPTS/setup.sh" --arch arm64 --kernels newest
    # shellcheck disable=SC2016 # expanded by the shell that reads the variables
    step "guest: arm64" bash -c 'set -a; . "$0"; exec "$@"' "$CACHE/arm64/env" \
        cargo test --locked --test guest -- --ignored --exact arm::short_newest_strict
}
