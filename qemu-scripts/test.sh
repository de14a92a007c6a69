#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/test.sh [--arch ARCH] [--list] [--quick] [SUITE...]
#
# Runs the named test suites, or all of them. Fetches their requirements first (see setup.sh): no root, no KVM.
# The last line is 'N passed, N failed', the sum over all suites; the exit status is 0 only if nothing failed.
#
#   unit         format, lints, documentation, unit tests and every integration test that needs no VM
#   hostile      a malicious driver and a malicious VMM against the daemon
#   guest        stock Linux guests in an unmodified QEMU, with the daemon as their IOMMU
#   passthrough  the daemon on an emulated host with VFIO, iommufd and an IOMMU: VT-d, then AMD-Vi; a few of these tests
#                with Arm's SMMUv3, all of them with --arch arm64
#   emulated     emulated and exported devices: a stock guest with an NVMe disk behind the daemon, device processes
#                killed at any moment, and both kinds of devices on the emulated host of the suite passthrough
#   restart      the daemon is killed and replaced while a driver, or a stock guest under launch, goes on
#   operations   the Debian package in a clean Debian that boots systemd: two daemons as services, started, stopped,
#                killed, watched
#
# One more suite runs only if it is named:
#
#   libvirt      in a Debian of its own, libvirt starts, reboots and ends a VM whose guest drives a device of the host; in
#                another one, a newer libvirt opens the device, and the daemon takes it over
#
#   --arch ARCH  run the suites' parts for this processor: amd64 (the default) or arm64. The parts for arm64 are
#                cross-built, and run under emulation. The run for amd64 leaves most of them out, because they take long
#   --list       print the suites' names, run nothing
#   --quick      leave out the tests that need a VM: guest, passthrough, emulated, the guests of restart, and the services of
#                operations
#
# Environment: VIOMMU_CACHE, VIOMMU_MIRROR and http_proxy as for setup.sh;
#   VIOMMU_GUEST_KERNELS   the stock kernels of the suites with a VM, as for setup.sh --kernels

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/arch.sh"
. "$SCRIPTS/lib/apt.sh"
. "$SCRIPTS/lib/toolchain.sh"
. "$SCRIPTS/lib/arm64-suites.sh"
. "$SCRIPTS/lib/arm64-programs.sh"

ALL_SUITES="unit hostile guest passthrough emulated restart operations"
# Suites that run only if they are named.
MORE_SUITES="libvirt"
NEED_VM="guest passthrough emulated libvirt"
# Seconds for all tests in one boot of L1.
L1_LIMIT=1800

passed=0 failed=0 broken=() broken_logs=()

# step NAME COMMAND...: runs the command, shows its output, and counts the test results in the output.
step() {
    local name=$1 log status=0 p f
    shift
    log=$LOGS/$(tr -d : <<<"${name// /-}").log
    say "--- $name"
    "$@" </dev/null 2>&1 | tee "$log" || status=$?
    read -r p f < <(awk '/^test result: / {
        for (i = 2; i <= NF; i++) {
            if ($i == "passed;") p += $(i - 1)
            if ($i == "failed;") f += $(i - 1)
        }
    } END { print p + 0, f + 0 }' "$log")
    # The command can fail without a failed test: a lint, the format, a build, a killed test program.
    if [ $status -ne 0 ] && [ "$f" -eq 0 ]; then
        f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
    if [ $status -ne 0 ]; then
        broken+=("$name ($log)")
        broken_logs+=("$log")
    fi
}

# The test programs of the suite operations that need no VM.
OPERATIONS_TESTS="control errors hotplug packaging qmp sandbox service"

# plain_tests: prints the integration tests that have no suite of their own, as arguments for cargo.
plain_tests() {
    local file name
    for file in "$TREE"/tests/*.rs "$TREE"/tests/*/main.rs; do
        name=${file#"$TREE/tests/"}
        name=${name%/main.rs}
        name=${name%.rs}
        case $name in
        emulated | guest | hostile | kills | libvirt | operations | passthrough | restart | '*') ;;
        *) [[ " $OPERATIONS_TESTS " == *" $name "* ]] || echo "--test=$name" ;;
        esac
    done
}

suite_unit() {
    local part tests
    for part in fmt clippy; do
        cargo "$part" --version >/dev/null 2>&1 ||
            die "this Rust has no cargo $part: install the components rustfmt and clippy of this toolchain, or Debian's packages rustfmt and rust-clippy"
    done
    mapfile -t tests < <(plain_tests)
    step "unit: format" cargo fmt --all --check
    step "unit: lints" cargo clippy --locked --all-targets -- -D warnings
    # Targets that need the daemon are left out. The example device is a package that links the library alone.
    step "unit: lints without the daemon" cargo clippy --locked --no-default-features --all-targets \
        --package vhost-device-iommu --package shadow-device -- -D warnings
    step "unit: documentation" env RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
    step "unit: tests" cargo test --locked --no-fail-fast --lib --bins --examples "${tests[@]}"
    step "unit: examples in the documentation" cargo test --locked --no-fail-fast --doc
}

suite_hostile() {
    step "hostile" cargo test --locked --no-fail-fast --test hostile
    # With a keeper, the daemon relays the VMM's messages. No test may notice that.
    step "hostile: relayed" env VIOMMU_TEST_RELAY=1 cargo test --locked --no-fail-fast \
        --test hostile --test lifecycle --test requests
}

suite_guest() {
    step "guest" cargo test --locked --no-fail-fast --test guest -- --ignored --skip arm:: --skip restart::
    arm64_guest_short
}

# The modules of the test program passthrough that test vfio-user and belong to the suite emulated.
VFIO_USER_TESTS="export:: export_mapped:: igb:: mixed:: virtual_functions::"
# Tests that the machine with VT-d leaves out; README.md gives the reason.
NOT_ON_VTD="export::a_stock_guest igb::a_stock_guest"
# Measures, and needs a machine that does nothing else meanwhile.
BY_HAND="register_speed::"
# The tests for the machine whose VT-d has no snoop control.
NO_SNOOP="coherency::"
# The tests for the arm64 machine below whose SMMU iommufd nests tables.
NESTING="nesting::"

# start_logged NAME COMMAND...: starts a command in the background. Its output goes to NAME.log, its status to
# NAME.status.
start_logged() {
    local name=$1
    shift
    rm -f "$LOGS/$name.status"
    {
        local status=0
        "$@" </dev/null >"$LOGS/$name.log" 2>&1 || status=$?
        echo $status >"$LOGS/$name.status"
    } &
}

# wait_logged NAME: waits for a command that start_logged started; prints its output and returns its status.
wait_logged() {
    while [ ! -s "$LOGS/$1.status" ]; do
        sleep 0.2
    done
    cat "$LOGS/$1.log"
    return "$(cat "$LOGS/$1.status")"
}

# in_l1 SUITE ARGUMENT...: runs the test program passthrough in L1, with VT-d and with AMD-Vi at the same time: the tests
# wait for devices longer than they compute.
in_l1() {
    local suite=$1 iommu program test without build=(cargo test --locked --test passthrough --no-run)
    shift
    step "$suite: build" "${build[@]}"
    program=$(built_program passthrough "${build[@]}")
    if [ -z "$program" ]; then
        return
    fi
    for iommu in vtd amd; do
        without=()
        if [ $iommu = vtd ]; then
            for test in $NOT_ON_VTD; do
                without+=(--skip "$test")
            done
        fi
        start_logged "l1-$suite-$iommu" "$SCRIPTS/l1.sh" --iommu $iommu --timeout "$L1_LIMIT" \
            --log "$LOGS/l1-$suite-$iommu-console.log" -- \
            "$program" --ignored --test-threads=1 --skip "$BY_HAND" "$@" "${without[@]}"
    done
    for iommu in vtd amd; do
        step "$suite: $iommu" wait_logged "l1-$suite-$iommu"
    done
    wait
}

suite_passthrough() {
    local tests program build=(cargo test --locked --test passthrough --no-run)
    local skip=(--skip "$NO_SNOOP" --skip "$NESTING")
    for tests in $VFIO_USER_TESTS; do
        skip+=(--skip "$tests")
    done
    in_l1 passthrough "${skip[@]}"
    program=$(built_program passthrough "${build[@]}")
    if [ -n "$program" ]; then
        step "passthrough: VT-d without snoop control" "$SCRIPTS/l1.sh" --iommu vtd-no-snoop --timeout "$L1_LIMIT" -- \
            "$program" --ignored "$NO_SNOOP"
    fi
    if cross_ready; then
        arm64_passthrough_short
    else
        times+=("passthrough: the tests on arm64 are left out: $CROSS_LACKS")
    fi
}

suite_emulated() {
    # The tests start this program, the server of an NVMe disk.
    step "emulated: build the device" cargo build --locked --example nvme
    step "emulated: guests" cargo test --locked --no-fail-fast --test emulated -- --ignored
    step "emulated: kills" cargo test --locked --no-fail-fast --test kills -- --ignored --test-threads=1
    # shellcheck disable=SC2086 # a list
    in_l1 emulated $VFIO_USER_TESTS
}

suite_restart() {
    step "restart: drivers" cargo test --locked --no-fail-fast --test restart
    if [ $quick = no ]; then
        step "restart: guests" cargo test --locked --no-fail-fast --test guest -- --ignored restart::
    fi
}

# Seconds for all tests in the Debian with systemd.
DEBIAN_LIMIT=900

# packaged PROGRAM: builds the package and the test program PROGRAM, as LOGS/PROGRAM. Sets PACKAGE; false if either is missing.
packaged() {
    local build=(cargo test --locked --test "$1" --no-run) program target=${CARGO_TARGET_DIR:-$TREE/target}
    step "$1: build" "${build[@]}"
    program=$(built_program "$1" "${build[@]}")
    # A debug build suffices: no test here measures speed.
    step "$1: package" packaging/deb.sh --binary "$target/debug/vhost-device-iommu" --output "$LOGS"
    PACKAGE=$(find "$LOGS" -name '*.deb')
    [ -n "$program" ] && [ -n "$PACKAGE" ] && strip -o "$LOGS/$1" "$program"
}

suite_operations() {
    local tests
    read -ra tests <<<"$OPERATIONS_TESTS"
    step "operations: a running daemon" cargo test --locked --no-fail-fast "${tests[@]/#/--test=}"
    if [ $quick = yes ] || ! packaged operations; then
        return
    fi
    step "operations: services" "$SCRIPTS/debian.sh" --devices --timeout "$DEBIAN_LIMIT" --log "$LOGS/debian-console.log" \
        --file "$PACKAGE" --file "$LOGS/operations" -- ./operations --ignored --test-threads=1
}

# Seconds for a VM that boots four times in an emulated machine.
LIBVIRT_LIMIT=3600

# in_libvirt NAME DEBIAN ARGUMENT...: runs tests in a Debian that has libvirt.
in_libvirt() {
    local name=$1 debian=$2
    shift 2
    step "libvirt: $name" "$SCRIPTS/debian.sh" "$debian" --devices --kvm --memory 2G --timeout "$LIBVIRT_LIMIT" \
        --log "$LOGS/libvirt-$name-console.log" --file "$PACKAGE" --file "$LOGS/libvirt" --file "$LOGS/vmlinuz" \
        --file "$LOGS/initramfs" -- ./libvirt --ignored --test-threads=1 --nocapture "$@"
}

suite_libvirt() {
    packaged libvirt || return 0
    # The guest's kernel is that of the emulated host, which boots in half the time of a stock one.
    cp "$VIOMMU_LIBVIRT_KERNEL" "$LOGS/vmlinuz"
    cp "$VIOMMU_LIBVIRT_GUEST_INITRAMFS" "$LOGS/initramfs"
    in_libvirt exported --libvirt exported::
    in_libvirt opened --libvirt-newest opened::
}

# suite_function SUITE: prints the function that runs the suite's part for the processor; nothing if there is none.
suite_function() {
    local function=suite_$1
    [ $arch = amd64 ] || function=${arch}_$1
    declare -F "$function" || true
}

arch=amd64 list=no quick=no suites=()
while [ $# -gt 0 ]; do
    case $1 in
    --arch)
        [ $# -ge 2 ] || die "--arch needs a value: see $0 --help"
        case $2 in
        amd64 | arm64) arch=$2 ;;
        *) die "unknown architecture '$2': give amd64 or arm64" ;;
        esac
        shift
        ;;
    --list) list=yes ;;
    --quick) quick=yes ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*) die "unknown option '$1': see $0 --help" ;;
    *)
        [[ " $ALL_SUITES $MORE_SUITES " == *" $1 "* ]] || die "unknown suite '$1': give one of $ALL_SUITES $MORE_SUITES"
        suites+=("$1")
        ;;
    esac
    shift
done
all=()
for suite in $ALL_SUITES; do
    if [ -n "$(suite_function "$suite")" ]; then
        all+=("$suite")
    fi
done
if [ $list = yes ]; then
    printf '%s\n' "${all[@]}"
    exit 0
fi
for suite in "${suites[@]}"; do
    [ -n "$(suite_function "$suite")" ] || die "the suite $suite has no part for $arch: give one of ${all[*]}"
done
if [ ${#suites[@]} -eq 0 ]; then
    suites=("${all[@]}")
fi

cache_open
arch_open $arch
cd "$TREE"
LOGS=${CARGO_TARGET_DIR:-$TREE/target}/test-logs
rm -rf "$LOGS"
mkdir -p "$LOGS"
: >"$LOGS/begun"
export CARGO_TERM_COLOR=never

toolchain_ready
if [ $arch != amd64 ]; then
    cross_ready || die "$CROSS_LACKS"
fi
setup=()
if [ $quick = no ]; then
    for suite in "${suites[@]}"; do
        case $suite in
        unit) [ $arch = amd64 ] || setup+=(--print --debian) ;;
        guest) setup+=(--print --firmware) ;;
        restart)
            setup+=(--print)
            [ $arch = amd64 ] || setup+=(--debian)
            ;;
        passthrough | emulated) setup+=(--print --host-kernel) ;;
        operations) setup+=(--print --debian --promtool) ;;
        libvirt) setup+=(--print --libvirt) ;;
        esac
    done
fi
if [ ${#setup[@]} -gt 0 ]; then
    [ $arch = amd64 ] || setup+=(--arch $arch)
    if [ $arch = arm64 ] && [[ " ${suites[*]} " == *" guest "* ]]; then
        : "${VIOMMU_GUEST_KERNELS:=$ARM64_GUEST_KERNELS}"
    fi
    "$SCRIPTS/setup.sh" ${VIOMMU_GUEST_KERNELS:+--kernels "$VIOMMU_GUEST_KERNELS"} "${setup[@]}" >"$LOGS/env"
    set -a
    # shellcheck source=/dev/null
    . "$LOGS/env"
    set +a
else
    # With iasl, some unit tests check the VIOT table, too, and with promtool the alert rules.
    if [ -x "$CACHE/bin/iasl" ]; then
        export VIOMMU_IASL=$CACHE/bin/iasl
    fi
    if [ -x "$CACHE/bin/promtool" ]; then
        export VIOMMU_PROMTOOL=$CACHE/bin/promtool
    fi
fi

times=()
for suite in "${suites[@]}"; do
    if [ $quick = yes ] && [[ " $NEED_VM " == *" $suite "* ]]; then
        times+=("$suite: left out by --quick")
        continue
    fi
    say "=== $suite"
    begun=$SECONDS
    "$(suite_function "$suite")"
    times+=("$suite: $((SECONDS - begun)) s")
done

echo
printf '%s\n' "${times[@]}"
for name in "${broken[@]}"; do
    echo "FAILED: $name"
done
# Print the messages of each failed test again: its output is far above.
for log in "${broken_logs[@]}"; do
    grep -a -A 3 "panicked at" "$log" | grep -a -v "^stack backtrace" | head -n 40 || true
done
if [ ${#broken[@]} -gt 0 ]; then
    # A failed guest test leaves its directory.
    find "${TMPDIR:-/tmp}" -maxdepth 1 -name 'viommu-guest-*' -newer "$LOGS/begun" \
        -printf "a guest's serial console, and QEMU's and the daemon's logs: %p\\n" || true
fi
echo "$passed passed, $failed failed"
[ ${#broken[@]} -eq 0 ]
