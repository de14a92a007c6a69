#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/debian.sh [OPTION]... [--] COMMAND [ARGUMENT]...
#
# Boots a clean Debian with systemd in a machine of its own, runs a command there as root, and ends with the command's
# exit status. The machine has a stock kernel in QEMU and Debian's essential packages; writes to its disk are lost at
# the end. The command starts in /host, which holds the files of --file. Needs no root and no KVM. Fetches and
# builds missing parts first (see setup.sh --debian).
#
#   --arch ARCH     amd64 (the default) or arm64
#   --file PATH     copy this file to /host; repeatable
#   --set NAME=TEXT an environment variable of the command; repeatable
#   --devices       give the machine an emulated IOMMU (VT-d or SMMUv3) and two edu devices, bound to vfio-pci:
#                   0000:00:10.0, 0000:00:11.0
#   --libvirt       boot the Debian that has libvirt (see setup.sh --libvirt); amd64 only
#   --libvirt-newest
#                   boot the Debian that has the libvirt of the backports, with a kernel of its own, which has iommufd; amd64
#                   only
#   --kvm           load KVM's modules, so that VMs in the machine are not emulated twice (the kernel of --libvirt-newest needs
#                   none); amd64 only
#   --memory SIZE   default: 1G
#   --processors N  default: 2
#   --timeout S     stop the machine after so many seconds, status 124; default: 300
#   --log FILE      keep the messages of its kernel and of systemd there. Default: keep them in a temporary file if
#                   the command fails

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/arch.sh"
. "$SCRIPTS/lib/initramfs.sh"
. "$SCRIPTS/lib/kernels.sh"
. "$SCRIPTS/lib/debian-root.sh"

arch=amd64 memory=1G processors=2 limit=300 log='' with_devices=no with_kvm=no disk=DEBIAN files=() variables=()
while [ $# -gt 0 ]; do
    case $1 in
    --arch | --file | --set | --memory | --processors | --timeout | --log)
        [ $# -ge 2 ] || die "$1 needs a value: see $0 --help"
        case $1 in
        --file)
            [ -r "$2" ] || die "$2 cannot be read; give --file the path of a file"
            files+=("$2")
            ;;
        --arch) arch=$2 ;;
        --set) variables+=("$2") ;;
        --memory) memory=$2 ;;
        --processors) processors=$2 ;;
        --timeout) limit=$2 ;;
        --log) log=$2 ;;
        esac
        shift
        ;;
    --devices) with_devices=yes ;;
    --libvirt) disk=LIBVIRT ;;
    --libvirt-newest) disk=LIBVIRT_NEWEST ;;
    --kvm) with_kvm=yes ;;
    -h | --help)
        usage
        exit 0
        ;;
    --)
        shift
        break
        ;;
    -*) die "unknown option '$1': see $0 --help" ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || die "no command: see $0 --help"

cache_open
arch_open "$arch"
disk_variable=VIOMMU_${disk}_DISK
if [ -z "${!disk_variable:-}" ] || [ "${VIOMMU_ARCH:-amd64}" != "$ARCH" ]; then
    option=--${disk,,}
    setup=$("$SCRIPTS/setup.sh" --arch "$ARCH" "${option%_newest}" --print)
    set -a
    eval "$setup"
    set +a
fi
# NAME:RELEASE:VMLINUZ:INITRAMFS, the oldest kernel first.
IFS=: read -r _ release kernel initramfs <<<"${VIOMMU_STORAGE_KERNELS%% *}"
if [ $disk = LIBVIRT_NEWEST ]; then
    kernel=$VIOMMU_LIBVIRT_KERNEL initramfs=$VIOMMU_LIBVIRT_INITRAMFS
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/viommu-debian-XXXXXX")
qemu=''
# shellcheck disable=SC2317 # called by the trap
stop() {
    if [ -n "$qemu" ]; then
        # timeout passes the signal on.
        kill "$qemu" 2>/dev/null || true
        wait "$qemu" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM
console=${log:-$work/console}
: >"$console"
: >"$work/status"

mkdir -p "$work/init/host"
if [ $with_kvm = yes ] && [ $disk != LIBVIRT_NEWEST ]; then
    kvm_modules "$release" "$work/kernel" "$work/init/kvm"
fi
for file in "${files[@]}"; do
    cp "$file" "$work/init/host/"
done
{
    echo 'cd /host || exit 127'
    for variable in "${variables[@]}"; do
        printf 'export %s=%q\n' "${variable%%=*}" "${variable#*=}"
    done
    printf 'exec'
    printf ' %q' "$@"
    echo
} >"$work/init/host/run"
debian_initramfs "$initramfs" "$SCRIPTS/debian/init" "$work"

debian_machine
case $ARCH in
amd64)
    ports=(-serial chardev:console -serial chardev:output -serial chardev:status)
    iommu=(-device "intel-iommu,intremap=on,aw-bits=48,snoop-control=on")
    iommu_append="intel_iommu=on,sm_off"
    ;;
arm64)
    # The machine has one port for a console.
    ports=(-serial chardev:console -device "pci-serial-2x,chardev1=output,chardev2=status")
    iommu=(-machine "iommu=smmuv3")
    iommu_append=
    ;;
esac
append="$DEBIAN_APPEND audit=0 systemd.show_status=1" devices=()
if [ $with_devices = yes ]; then
    devices=("${iommu[@]}")
    for at in 10.0 11.0; do
        # The mask allows the devices DMA to every address.
        devices+=(-device "edu,dma_mask=0xffffffffffffffff,addr=$at")
    done
    append+=" $iommu_append viommu.vfio=1234:11e8"
fi

# An input that never ends: at its end QEMU would treat the output as closed as well.
mkfifo "$work/idle"
# shellcheck disable=SC2153 # set up by setup.sh
timeout --foreground -k 5 "$limit" "$VIOMMU_QEMU" "${DEBIAN_MACHINE[@]}" -m "$memory" -smp "$processors" \
    -drive "file=${!disk_variable},if=none,id=disk,format=raw,snapshot=on,cache=unsafe" \
    -device nvme,drive=disk,serial=disk "${devices[@]}" \
    -chardev "file,id=console,path=$console" -chardev stdio,id=output,signal=off \
    -chardev "file,id=status,path=$work/status" "${ports[@]}" \
    -kernel "$kernel" -initrd "$work/initramfs" -append "$append" \
    <>"$work/idle" 2>"$work/qemu" &
qemu=$!
ended=0
wait "$qemu" || ended=$?
qemu=

status=$(tr -d '\r\n' <"$work/status")
# In all cases but the first, the command did not start or did not end.
case $ended:$status in
0:[0-9]*) ;;
124:* | 137:*)
    say "the machine was stopped after $limit s: set --timeout to allow more"
    status=124
    ;;
*)
    say "the machine ended before its command did (QEMU's status is $ended)"
    cat "$work/qemu" >&2
    tail -n 20 "$console" >&2
    status=125
    ;;
esac
if [ "$status" != 0 ]; then
    if [ -z "$log" ]; then
        log=$(mktemp "${TMPDIR:-/tmp}/viommu-debian-console-XXXXXX")
        cp "$console" "$log"
    fi
    say "the messages of its kernel and of systemd: $log"
fi
exit "$status"
