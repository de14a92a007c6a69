#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/bench-nvme.sh [--rounds N] [--seconds N] [--append ARGS]
#
# Measures, in a guest, an NVMe disk that another process emulates: without an IOMMU and behind the daemon, with each
# way of reaching guest memory. Uses release builds; the disk is a file in memory if there is /dev/shm. Prints a
# table of medians, with the lowest and the highest in brackets.
#
#   --rounds N      number of rounds; each round boots the guest once for each way (default 5)
#   --seconds N     how long each measurement takes (default 3)
#   --append ARGS   arguments for the guest's kernel (default iommu.strict=0)
#
# Environment: VIOMMU_CACHE, VIOMMU_MIRROR and http_proxy as for setup.sh.

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/apt.sh"
. "$SCRIPTS/lib/toolchain.sh"
. "$SCRIPTS/lib/guest.sh"

WAYS="plain-mapped plain-messages mappings messages shadow"
# NAME:ARGUMENTS of disk-load before its time, in the order they are measured.
LOADS="read:read_sequential_131072_8 write:write_sequential_131072_8
    read-4k:read_random_4096_16 write-4k:write_random_4096_16 read-1:read_random_4096_1"

rounds=5 seconds=3 append=iommu.strict=0
while [ $# -gt 0 ]; do
    case $1 in
    --rounds | --seconds | --append)
        [ $# -ge 2 ] || die "$1 needs a value"
        printf -v "${1#--}" %s "$2"
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

give_up() {
    die "$*; logs are in $work"
}

finish() {
    local status=$? pid
    for pid in $qemu $daemon $server; do
        kill "$pid" 2>/dev/null || continue
        wait "$pid" 2>/dev/null || true
    done
    [ $status -ne 0 ] || rm -rf "$work"
    rm -rf "$disks"
}

# configure WAY: writes the daemon's configuration for this way, if it needs the daemon, and sets server_arguments to
# the server's arguments.
configure() {
    local device=
    server_arguments=(--dma messages)
    case $1 in
    plain-mapped) server_arguments=(--dma mapped) ;;
    plain-messages) ;;
    mappings)
        server_arguments=(--dma mapped)
        device="vfio-user = { listen = '$work/listen.sock', connect = '$work/disk.sock', isolation = 'mappings' }"
        ;;
    messages) device="vfio-user = { listen = '$work/listen.sock', connect = '$work/disk.sock' }" ;;
    shadow)
        server_arguments=(--dma "shadow=$work/shadow.sock" --endpoint 00:06.0)
        device="shadow = '$work/shadow.sock'"
        ;;
    esac
    rm -f "$work/vm.toml"
    [ -z "$device" ] || cat >"$work/vm.toml" <<TOML
socket = "$work/iommu.sock"
address = "00:05.0"
memory = "256M"

[[endpoint]]
address = "00:06.0"
$device
TOML
}

# measure WAY: boots a guest and prints 'WAY LOAD REQUESTS-A-SECOND BYTES' for each load.
measure() {
    local way=$1 direct load name words arguments=() done_ us
    configure "$way"
    rm -f "$disks/disk" && truncate -s 256M "$disks/disk"
    "$built/examples/nvme" serve --socket "$work/disk.sock" --disk "$disks/disk" "${server_arguments[@]}" \
        >"$work/server.log" 2>&1 &
    server=$!
    await 10 test -S "$work/disk.sock" || give_up "the disk's server has made no socket within 10 s"
    direct="{\"driver\":\"vfio-user-pci\",\"addr\":\"06.0\",\"socket\":{\"type\":\"unix\",\"path\":\"$work/disk.sock\"}}"
    if [ -e "$work/vm.toml" ]; then
        "$program" viot "$work/vm.toml" -o "$work/vm.viot"
        mapfile -t arguments < <("$program" qemu-args "$work/vm.toml" --viot "$work/vm.viot" 2>/dev/null)
        "$program" --config "$work/vm.toml" >"$work/daemon.log" 2>&1 &
        daemon=$!
        await 10 test -S "$work/iommu.sock" || give_up "the daemon has made no socket within 10 s"
        [ "$way" != shadow ] || arguments+=(-device "$direct")
    else
        arguments=(-machine "q35,memory-backend=memory" -m 256M
            -object "memory-backend-memfd,id=memory,size=256M,share=on" -device "$direct")
    fi
    guest_start "$work" "$image" "$initramfs" "$append" "${arguments[@]}"
    guest_disk
    # Write everything once: reads of unwritten blocks would be reads of holes.
    must_guest "dd if=/dev/zero of=/dev/nvme0n1 bs=1M count=256 oflag=direct 2>/dev/null"
    for load in $LOADS; do
        name=${load%%:*}
        IFS=_ read -ra words <<<"${load#*:}"
        must_guest "disk-load ${words[*]} $((seconds * 1000)) /dev/nvme0n1"
        read -r done_ us <<<"$ANSWER"
        echo "$way $name $((done_ * 1000000 / us)) ${words[2]}"
    done
    kill "$qemu"
    wait "$qemu" 2>/dev/null || true
    qemu=
    kill $daemon "$server"
    # shellcheck disable=SC2086 # there may be none
    wait $daemon "$server" 2>/dev/null || true
    daemon='' server=''
    exec {to_guest}>&- {from_guest}>&-
}

# cell WAY LOAD: the median, lowest and highest figure: MB/s for large requests, requests a second for small ones.
cell() {
    awk -v way="$1" -v load="$2" '$1 == way && $2 == load { print ($4 > 4096 ? $3 * $4 / 1e6 : $3) }' "$work/figures" |
        sort -n | awk '{ v[NR] = $1 } END { printf "%.0f (%.0f to %.0f)", v[int((NR + 1) / 2)], v[1], v[NR] }'
}

cache_open
cd "$TREE"
toolchain_ready
setup=$("$SCRIPTS/setup.sh" --print)
set -a
eval "$setup"
set +a
say "building ..."
cargo build --release --locked --bins --example nvme
built=${CARGO_TARGET_DIR:-$TREE/target}/release
program=$built/vhost-device-iommu
IFS=: read -r _ release image initramfs <<<"${VIOMMU_STORAGE_KERNELS##* }"
work=$(mktemp -d "${TMPDIR:-/tmp}/viommu-bench-XXXXXX")
disks=$(mktemp -d "/dev/shm/viommu-bench-XXXXXX" 2>/dev/null || mktemp -d "$work/disks-XXXXXX")
qemu='' daemon='' server=''
trap finish EXIT
trap 'exit 130' INT TERM

for ((round = 1; round <= rounds; round++)); do
    for way in $WAYS; do
        say "round $round of $rounds: $way"
        measure "$way" >>"$work/figures"
    done
done

echo "Linux $release ($append), QEMU $VIOMMU_QEMU_VERSION, $rounds rounds of $seconds s:"
echo
echo "| way | read 128 KiB, 8 at once, MB/s | write, MB/s | read 4 KiB, 16 at once, a second | write, a second | read 4 KiB, one by one, a second |"
echo "|---|---|---|---|---|---|"
for way in $WAYS; do
    printf '| %s |' "$way"
    for load in $LOADS; do
        printf ' %s |' "$(cell "$way" "${load%%:*}")"
    done
    echo
done
