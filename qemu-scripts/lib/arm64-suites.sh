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
