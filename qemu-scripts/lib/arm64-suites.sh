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

# arm64_guest_short: one guest of arm64, for the suite guest of this machine: half a minute. The whole part takes a quarter
# of an hour.
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

# Tests of the program passthrough that arm64 has no form of; docs/testing.md gives the reasons.
NOT_ON_ARM64="coherency:: export::a_stock_guest export_mapped::each_bar igb:: nested:: taken_over::a_qemu
    register_speed:: virtual_functions::"
# What the run for amd64 takes of the suite passthrough: DMA and domains by iommufd and by type1, the kernel's window for
# interrupts, interrupts of an exported device, groups.
ARM64_PASSTHROUGH_FEW="the_machine_is_as_expected data::dma_reaches_mapped_memory_owned
    data::dma_reaches_mapped_memory_type1 moves::probe_returns moves::devices_of_one_group
    export::an_exported_device_obeys"

# How cargo builds the tests for L1. They wait for devices and do not compute, so the crate needs no optimization.
ARM64_L1_BUILD=(--config "profile.test.package.vhost-device-iommu.opt-level=0" --test passthrough)

# arm64_in_l1 NAME L1-ARGUMENT... -- ARGUMENT...: runs the test program passthrough in L1 of arm64, in a step NAME.
arm64_in_l1() {
    local name=$1 program options=() without=() test log
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    program=$(arm64_programs "${ARM64_L1_BUILD[@]}" | sed -n 's/^passthrough //p')
    if [ -z "$program" ]; then
        return
    fi
    for test in $NOT_ON_ARM64; do
        without+=(--skip "$test")
    done
    log=$LOGS/$(tr -d : <<<"${name// /-}")-console.log
    step "$name" "$SCRIPTS/l1.sh" --arch arm64 --timeout "$L1_LIMIT" --log "$log" "${options[@]}" -- \
        "$program" --ignored --test-threads=1 "$@" "${without[@]}"
}

arm64_passthrough() {
    local tests skip=(--skip "$NESTING")
    for tests in $VFIO_USER_TESTS; do
        skip+=(--skip "$tests")
    done
    step "passthrough: build for arm64" arm64_cargo "${ARM64_L1_BUILD[@]}"
    arm64_in_l1 "passthrough: SMMUv3" -- "${skip[@]}"
    arm64_in_l1 "passthrough: SMMUv3 that nests" --iommu smmuv3-nested -- "$NESTING"
    arm64_in_l1 "passthrough: SMMUv3, second stage" --iommu smmuv3-stage2 -- data:: moves::two_devices moves::probe
    arm64_in_l1 "passthrough: two SMMUs" --iommu smmuv3-two -- moves::two_devices moves::a_device_moves moves::removed \
        moves::a_disconnected moves::ten_thousand
    # shellcheck disable=SC2086 # a list
    arm64_in_l1 "passthrough: SMMUv3 by UEFI" --firmware -- $ARM64_PASSTHROUGH_FEW
}

arm64_emulated() {
    step "emulated: build for arm64" arm64_cargo "${ARM64_L1_BUILD[@]}"
    # shellcheck disable=SC2086 # a list
    arm64_in_l1 "emulated: SMMUv3" -- $VFIO_USER_TESTS
}

# arm64_passthrough_short: the part of it that belongs to the suite passthrough of this machine.
arm64_passthrough_short() {
    step "passthrough: build for arm64" arm64_cargo "${ARM64_L1_BUILD[@]}"
    # shellcheck disable=SC2086 # a list
    arm64_in_l1 "passthrough: SMMUv3" -- $ARM64_PASSTHROUGH_FEW
    arm64_in_l1 "passthrough: SMMUv3 that nests" --iommu smmuv3-nested -- "$NESTING"
}
