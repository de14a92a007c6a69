#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/bench.sh [--json FILE] [--svg FILE] [--rounds N] [--part PART]... [--transport WHICH] [--host-kvm]
#
# Measures the cost of mapping: boots the same guest alternately with QEMU's own virtio-iommu and with the daemon, and
# runs the benchmarks of the daemon's parts. Fetches its requirements first (see setup.sh): no root, no KVM. Takes
# about a quarter of an hour once everything is built; nothing else should run on the machine meanwhile.
#
#   --json FILE     writes the medians as nested keys
#   --svg FILE      draws the cost of mapping for the guest. FILE must end in .svg and gets the plot of the emulated
#                   guest. The plot of the guest with KVM goes to a second file, which ends in -kvm.svg
#   --rounds N      how often the guest boots with each of the two devices (default 5)
#   --part PART     only this part; repeatable:
#                     guest    a guest's dma_map_benchmark, strict and lazy, and VFIO, beside QEMU's own device;
#                              the guest is emulated
#                     kvm      the same with KVM in an emulated machine (see l1.sh): with one processor, and
#                              without the measures that need two
#                     ring     a request through the rings
#                     engine   the page table and the core
#                     interposer  accesses by messages of a device in another process
#                     idle     start, memory and wakeups
#   --transport WHICH
#                   vhost-user (default), or both: the guest also boots with the daemon as a virtio-pci device over
#                   vfio-user, beside the other two
#   --host-kvm      use this machine's own KVM for the part kvm. Not the default: KVM inside a virtual machine may fail
#
# Environment: VIOMMU_CACHE, VIOMMU_MIRROR and http_proxy as for setup.sh.

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/apt.sh"
. "$SCRIPTS/lib/toolchain.sh"

ALL_PARTS="engine ring interposer idle guest kvm"

json='' svg='' rounds=5 host_kvm='' transport=vhost-user parts=()
while [ $# -gt 0 ]; do
    case $1 in
    --json | --svg | --rounds | --part | --transport)
        [ $# -ge 2 ] || die "$1 needs a value: see $0 --help"
        case $1 in
        --json) json=$(realpath -m "$2") ;;
        --svg) svg=$(realpath -m "$2") ;;
        --rounds) rounds=$2 ;;
        --transport) transport=$2 ;;
        --part)
            [[ " $ALL_PARTS " == *" $2 "* ]] || die "unknown part '$2': give one of $ALL_PARTS"
            parts+=("$2")
            ;;
        esac
        shift
        ;;
    --host-kvm) host_kvm=1 ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) die "unknown argument '$1': see $0 --help" ;;
    esac
    shift
done
[[ $svg == '' || $svg == *.svg ]] || die "--svg $svg: give a name that ends in .svg"
[[ $rounds =~ ^[1-9][0-9]*$ ]] || die "--rounds $rounds: give a number from 1"
[[ $transport == vhost-user || $transport == both ]] || die "--transport $transport: give vhost-user or both"
if [ ${#parts[@]} -eq 0 ]; then
    read -ra parts <<<"$ALL_PARTS"
elif [ -n "$json" ] && [ ${#parts[@]} -lt "$(wc -w <<<"$ALL_PARTS")" ]; then
    die "--json needs all parts: leave out --part"
fi
[ -z "$host_kvm" ] || [[ " ${parts[*]} " == *" kvm "* ]] || die "--host-kvm needs the part kvm: add --part kvm"

cache_open
cd "$TREE"
toolchain_ready
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/figures"
export VIOMMU_FIGURES=$work/figures CARGO_TERM_COLOR=never

bench() {
    local name=$1
    shift
    say "--- $name"
    cargo bench --locked --quiet --bench "$name" -- "$@"
}

guest_ready() {
    "$SCRIPTS/setup.sh" --host-kernel --print >"$work/env"
    set -a
    # shellcheck source=/dev/null
    . "$work/env"
    set +a
}

# The files of the emulated machine are lost when it ends, so the benchmark prints its results. L1 gets the built
# program, since it does not know cargo's settings of this environment.
bench_kvm_in_l1() {
    local ran=0 program build=(cargo bench --locked --quiet --no-run --bench guest)
    say "--- guest with KVM, in an emulated machine"
    "${build[@]}"
    program=$(built_program guest "${build[@]}")
    [ -x "$program" ] || die "the benchmark of the guest was not built"
    env -u VIOMMU_FIGURES "$SCRIPTS/l1.sh" --iommu amd --timeout $((300 + 120 * rounds)) -- \
        "$program" --bench --accel kvm --rounds "$rounds" --transport "$transport" --svg - |
        tee "$work/kvm" | grep --line-buffered -v '^<\|^{"kvm":' || ran=$?
    [ $ran = 0 ] || die "the guest with KVM was not measured"
    grep '^{"kvm":' "$work/kvm" >"$VIOMMU_FIGURES/guest-kvm.json" || die "the guest with KVM left no figures"
    if [ -n "$1" ]; then
        grep '^<' "$work/kvm" >"$1" || die "the guest with KVM left no drawing"
    fi
}

for part in "${parts[@]}"; do
    case $part in
    engine)
        bench page_table
        bench iommu
        ;;
    ring) bench ring ;;
    interposer) bench interposer ;;
    idle) bench idle ;;
    guest)
        guest_ready
        bench guest --rounds "$rounds" --transport "$transport" ${svg:+--svg "$svg"}
        ;;
    kvm)
        guest_ready
        kvm_svg=${svg:+${svg%.svg}-kvm.svg}
        if [ -n "$host_kvm" ]; then
            bench guest --accel kvm --rounds "$rounds" --transport "$transport" ${kvm_svg:+--svg "$kvm_svg"}
        else
            bench_kvm_in_l1 "$kvm_svg"
        fi
        ;;
    esac
done
if [ -n "$json" ]; then
    cargo bench --locked --quiet --bench figures >"$json"
    say "figures in $json"
fi
