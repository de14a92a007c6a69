#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/bench.sh [--json FILE] [--svg FILE] [--rounds N] [--part PART...]
#
# Measures. Boots the same guest by turns with QEMU's own virtio-iommu and with the daemon, and the parts of the
# daemon alone. Fetches what it needs first (see setup.sh): no root, no KVM. Takes about a quarter of an hour once
# everything is built; nothing else should run on the machine meanwhile.
#
#   --json FILE     writes the medians as nested keys
#   --svg FILE      draws what mapping costs the guest
#   --rounds N      how often each of the two boots (default 5)
#   --part PART     only this part; more than one may be given:
#                     guest    a guest's dma_map_benchmark, strict and lazy, and VFIO, beside QEMU's own device
#                     ring     a request through the rings
#                     engine   the page table and the core
#                     idle     start, memory and wakeups
#
# Environment: VIOMMU_CACHE, VIOMMU_MIRROR and http_proxy as for setup.sh.

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/apt.sh"
. "$SCRIPTS/lib/toolchain.sh"

ALL_PARTS="engine ring idle guest"

json='' svg='' rounds=5 parts=()
while [ $# -gt 0 ]; do
    case $1 in
    --json | --svg | --rounds | --part)
        [ $# -ge 2 ] || die "$1 needs a value: see $0 --help"
        case $1 in
        --json) json=$(realpath -m "$2") ;;
        --svg) svg=$(realpath -m "$2") ;;
        --rounds) rounds=$2 ;;
        --part)
            [[ " $ALL_PARTS " == *" $2 "* ]] || die "there is no part '$2'; there is: $ALL_PARTS"
            parts+=("$2")
            ;;
        esac
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) die "unknown argument '$1': see $0 --help" ;;
    esac
    shift
done
[[ $rounds =~ ^[1-9][0-9]*$ ]] || die "--rounds $rounds: give a number from 1"
if [ ${#parts[@]} -eq 0 ]; then
    read -ra parts <<<"$ALL_PARTS"
elif [ -n "$json" ] && [ ${#parts[@]} -lt 4 ]; then
    die "--json is for all parts; leave out --part"
fi

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

for part in "${parts[@]}"; do
    case $part in
    engine)
        bench page_table
        bench iommu
        ;;
    ring) bench ring ;;
    idle) bench idle ;;
    guest)
        "$SCRIPTS/setup.sh" --host-kernel --print >"$work/env"
        set -a
        # shellcheck source=/dev/null
        . "$work/env"
        set +a
        bench guest --rounds "$rounds" ${svg:+--svg "$svg"}
        ;;
    esac
done
if [ -n "$json" ]; then
    cargo bench --locked --quiet --bench figures >"$json"
    say "figures in $json"
fi
