#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/l1.sh [OPTION]... [--] COMMAND [ARGUMENT]...
#
# Runs a command as root in an emulated machine with an IOMMU (L1) and ends with the command's exit status. L1 has
# the files of this machine at the same paths. The command may write everywhere; its writes are lost at the end. The
# command gets this environment's PATH, HOME, VIOMMU_* and RUST_*, and starts in the current directory. Needs no
# root and no KVM. Fetches and builds missing parts first (see setup.sh --host-kernel).
#
#   --arch ARCH     amd64 (default) or arm64. L1 of arm64 has busybox's programs in place of this machine's, and runs
#                   COMMAND with busybox's PATH: COMMAND is one of them, or a static program for arm64
#   --iommu KIND    on amd64 vtd (default), vtd-scalable (first-stage tables), vtd-no-snoop (cannot enforce coherency)
#                   or amd; on arm64 smmuv3 (default), smmuv3-stage2 (second-stage tables only), smmuv3-two (both: one
#                   for most devices, and one with the second stage for one iommu-testdev; implies --firmware), or
#                   smmuv3-nested (one below which iommufd nests tables: the firmware's IORT promises CANWBS; implies
#                   --firmware; the first time L1 starts once more before, to read the IORT)
#   --firmware      boot arm64 by UEFI, with ACPI tables. Default: by device tree
#   --memory SIZE   default: 3G
#   --cpus N        default: 2
#   --timeout S     stop the machine after so many seconds, status 124; default: 900
#   --device ARG    one more -device for its QEMU; repeatable
#   --append ARGS   more arguments for its kernel's command line
#   --log FILE      keep its kernel's messages there. Default: keep them in a temporary file if the command fails
#
# These devices are bound to vfio-pci; the command finds their addresses in its environment:
#   VIOMMU_EDU      four edu devices, each in an IOMMU group of its own
#   VIOMMU_EDU_PAIR two more behind one PCI bridge (on arm64: two functions of one slot), in one group
#   VIOMMU_E1000_PAIR two network cards behind another bridge, in one group: their registers are 0 after a reset
#   VIOMMU_TESTDEV  two iommu-testdev, in groups of their own; empty if QEMU has no such device
#   VIOMMU_IGB      on amd64 a network card, Intel's 82576, behind a root port. It can have virtual functions (vfio-pci makes
#                   them). Behind its wire 10.0.2.2 answers pings, and 10.0.2.100 echoes on TCP port 7
#   VIOMMU_IVSHMEM  shared memory of 1 MiB in BAR 2, a target of peer-to-peer DMA
#   VIOMMU_L1       the KIND of --iommu

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/coherent-iort.sh"

# Bound to vfio-pci at boot: edu, iommu-testdev, ivshmem, e1000, igb and its virtual functions.
VFIO_IDS=1234:11e8,1b36:0005,1af4:1110,8086:100e,8086:10c9,8086:10ca
EDU=(10.0 11.0 12.0 13.0)
BRIDGE=18.0
E1000_BRIDGE=19.0
TESTDEV=(15.0 16.0)
IVSHMEM=17.0
IGB_PORT=1b.0

arch=amd64 iommu='' firmware=no memory=3G cpus=2 limit=900 append='' log='' devices=()
while [ $# -gt 0 ]; do
    case $1 in
    --arch | --iommu | --memory | --cpus | --timeout | --device | --append | --log)
        [ $# -ge 2 ] || die "$1 needs a value: see $0 --help"
        case $1 in
        --arch) arch=$2 ;;
        --iommu) iommu=$2 ;;
        --memory) memory=$2 ;;
        --cpus) cpus=$2 ;;
        --timeout) limit=$2 ;;
        --device) devices+=(-device "$2") ;;
        --append) append=$2 ;;
        --log) log=$2 ;;
        esac
        shift
        ;;
    --firmware) firmware=yes ;;
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

case $arch in
amd64)
    iommu=${iommu:-vtd}
    [ $firmware = no ] || die "--firmware is for --arch arm64 only"
    machine=q35
    # On a busy machine the kernel's check of its timer would fail.
    kernel_append="console=ttyS0 tsc=reliable no_timer_check"
    ;;
arm64)
    iommu=${iommu:-smmuv3}
    machine=virt,gic-version=3
    kernel_append="console=ttyAMA0"
    ;;
*) die "unknown architecture '$arch': give amd64 or arm64" ;;
esac
l1_arguments=(--arch "$arch" --memory "$memory" --cpus "$cpus" "${devices[@]/#-device/--device}")
case $arch:$iommu in
amd64:vtd)
    iommu_device=intel-iommu,intremap=on,aw-bits=48,snoop-control=on
    kernel_append+=" intel_iommu=on,sm_off"
    ;;
amd64:vtd-no-snoop)
    iommu_device=intel-iommu,intremap=on,aw-bits=48,snoop-control=off
    kernel_append+=" intel_iommu=on,sm_off"
    ;;
amd64:vtd-scalable)
    iommu_device=intel-iommu,intremap=on,scalable-mode=on,fsts=on,snoop-control=on
    kernel_append+=" intel_iommu=on,sm_on"
    ;;
amd64:amd)
    iommu_device=amd-iommu,dma-remap=on,intremap=on
    # QEMU reports its IOAPIC at 00:14.0. Linux turns interrupt remapping on only if it finds the south bridge
    # there, or at least a device of its class.
    devices+=(-blockdev "null-co,node-name=none,size=512"
        -device "virtio-blk-pci,drive=none,addr=14.0,class=0x0601")
    ;;
arm64:smmuv3) iommu_device=arm-smmuv3,primary-bus=pcie.0,stage=nested ;;
arm64:smmuv3-two)
    iommu_device=arm-smmuv3,primary-bus=pcie.0,stage=nested
    # A second root complex; only the firmware tells the kernel of it.
    firmware=yes
    ;;
arm64:smmuv3-nested)
    iommu_device=arm-smmuv3,primary-bus=pcie.0,stage=nested
    # A device tree has no CANWBS.
    firmware=yes
    ;;
arm64:smmuv3-stage2) iommu_device=arm-smmuv3,primary-bus=pcie.0,stage=2 ;;
*) die "unknown IOMMU '$iommu' for $arch: see $0 --help" ;;
esac

parts=(--arch "$arch" --host-kernel)
if [ "${VIOMMU_ARCH:-amd64}" != "$arch" ]; then
    VIOMMU_HOST_KERNEL=''
fi
if [ "$arch" = arm64 ]; then
    # No guest runs inside, and each stock kernel is a large download.
    parts+=(--kernels newest)
fi
if [ $firmware = yes ]; then
    parts+=(--firmware)
fi
if [ -z "${VIOMMU_HOST_KERNEL:-}" ] || { [ $firmware = yes ] && [ -z "${VIOMMU_UEFI:-}" ]; }; then
    setup=$("$SCRIPTS/setup.sh" "${parts[@]}" --print)
    set -a
    eval "$setup"
    set +a
fi
if [ $firmware = yes ]; then
    devices+=(-bios "$VIOMMU_UEFI")
fi

# The IORT names the buses of the machine, so it is read from one with the same devices.
initramfs=$VIOMMU_L1_INITRAMFS
if [ "$iommu" = smmuv3-nested ]; then
    key=$({
        cat "$0" "$SCRIPTS/lib/coherent-iort.sh"
        echo "${VIOMMU_QEMU_VERSION:-}" "$VIOMMU_UEFI" "${l1_arguments[@]}"
    } | sha256_of | cut -c 1-12)
    coherent=$(dirname "$VIOMMU_L1_INITRAMFS")/iort-$key.cpio
    if [ ! -e "$coherent" ]; then
        iort=$(mktemp)
        "$0" "${l1_arguments[@]}" --iommu smmuv3 --firmware --timeout "$limit" -- \
            base64 /sys/firmware/acpi/tables/IORT | base64 -d >"$iort" || die "L1 could not read its IORT (output above)"
        coherent_iort "$iort" "$coherent.$$"
        mv "$coherent.$$" "$coherent"
        rm "$iort"
    fi
    touch "$coherent"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/viommu-l1-XXXXXX")
work=$(readlink -f "$work")
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
case $work in
*' '*) die "the temporary directory '$work' has a blank in its name: set TMPDIR to another one" ;;
/dev/* | /proc/* | /run/* | /sys/*) die "the temporary directory '$work' is not visible in L1: set TMPDIR to one outside /dev, /proc, /run and /sys" ;;
esac
console=${log:-$work/console}
if [ "$iommu" = smmuv3-nested ]; then
    initramfs=$work/initramfs
    cat "$coherent" "$VIOMMU_L1_INITRAMFS" >"$initramfs"
fi

# full_addresses SLOT...: prints the slots of the root bus as full PCI addresses.
full_addresses() {
    printf '0000:00:%s ' "$@" | sed 's/ $//'
}
export VIOMMU_L1=$iommu
VIOMMU_EDU=$(full_addresses "${EDU[@]}")
# The buses behind the bridges; all other devices are on the root bus.
VIOMMU_EDU_PAIR="0000:01:01.0 0000:01:02.0"
VIOMMU_E1000_PAIR="0000:02:01.0 0000:02:02.0"
VIOMMU_TESTDEV=
VIOMMU_IVSHMEM=$(full_addresses $IVSHMEM)
export VIOMMU_EDU VIOMMU_EDU_PAIR VIOMMU_E1000_PAIR VIOMMU_TESTDEV VIOMMU_IVSHMEM
# The mask allows the devices DMA to every address.
edu=edu,dma_mask=0xffffffffffffffff
for at in "${EDU[@]}"; do
    devices+=(-device "$edu,bus=pcie.0,addr=$at")
done
bridge=pcie-pci-bridge several=
if [ "$arch" = arm64 ]; then
    # QEMU's SMMU refuses devices behind a PCI bridge, whose requests it cannot tell apart. Behind a root port there is one
    # slot; its functions cannot be told apart either, since they lack ACS.
    bridge=pcie-root-port several=,multifunction=on
    VIOMMU_EDU_PAIR="0000:01:00.0 0000:01:00.1"
    VIOMMU_E1000_PAIR="0000:02:00.0 0000:02:00.1"
fi
# places PAIR: prints the slots and functions of the pair's devices.
places() {
    sed -E 's/0000:[0-9]+:0?([0-9]+\.[0-9])/\1/g' <<<"$1"
}
read -r edu_a edu_b < <(places "$VIOMMU_EDU_PAIR")
read -r card_a card_b < <(places "$VIOMMU_E1000_PAIR")
# shellcheck disable=SC2054 # the commas are QEMU's
devices+=(-device "$bridge,id=pair,bus=pcie.0,addr=$BRIDGE${several:+,chassis=1}"
    -device "$edu,bus=pair,addr=$edu_a$several" -device "$edu,bus=pair,addr=$edu_b$several"
    -device "$bridge,id=cards,bus=pcie.0,addr=$E1000_BRIDGE${several:+,chassis=2}"
    -device "e1000,bus=cards,addr=$card_a$several,romfile=" -device "e1000,bus=cards,addr=$card_b$several,romfile="
    -object memory-backend-memfd,id=peer,size=1M,share=on
    -device "ivshmem-plain,memdev=peer,bus=pcie.0,addr=$IVSHMEM")
# shellcheck disable=SC2153 # set up by setup.sh
if grep -q '"iommu-testdev"' <<<"$("$VIOMMU_QEMU" -device help 2>/dev/null)"; then
    VIOMMU_TESTDEV=$(full_addresses "${TESTDEV[@]}")
    places=("bus=pcie.0,addr=${TESTDEV[0]}" "bus=pcie.0,addr=${TESTDEV[1]}")
    if [ "$iommu" = smmuv3-two ]; then
        VIOMMU_TESTDEV="$(full_addresses "${TESTDEV[0]}") 0000:41:00.0"
        places[1]=bus=far-port,addr=0.0
        devices+=(-device "pxb-pcie,id=far,bus_nr=64,bus=pcie.0,addr=1a.0"
            -device arm-smmuv3,primary-bus=far,stage=2
            -device "pcie-root-port,id=far-port,bus=far,chassis=3,addr=0.0")
    fi
    for at in "${places[@]}"; do
        devices+=(-device "iommu-testdev,$at")
    done
fi

VIOMMU_IGB=
if [ "$arch" = amd64 ]; then
    VIOMMU_IGB=0000:03:00.0
    # shellcheck disable=SC2054 # the commas are QEMU's
    devices+=(-device "pcie-root-port,id=igb-port,bus=pcie.0,chassis=4,addr=$IGB_PORT"
        -netdev "user,id=wire,restrict=on,guestfwd=tcp:10.0.2.100:7-cmd:cat"
        -device "igb,bus=igb-port,addr=0.0,netdev=wire,mac=52:54:00:12:34:56,romfile=efi-e1000.rom")
fi
export VIOMMU_IGB

# The script that L1 runs. A file, because the kernel's command line has limits of length and quoting.
{
    for name in $(compgen -e); do
        case $name in
        PATH) [ "$arch" != amd64 ] || printf 'export PATH=%q\n' "$PATH" ;;
        HOME | LANG | LC_* | VIOMMU_* | RUST_*) printf 'export %s=%q\n' "$name" "${!name}" ;;
        esac
    done
    printf 'unset TMPDIR\ncd %q || exit 127\nexec' "$PWD"
    printf ' %q' "$@"
    echo
} >"$work/run"
: >"$work/status"
: >"$console"
# An input that never ends: at its end QEMU would treat the output as closed as well.
mkfifo "$work/idle"

kernel_append+=" panic=-1 vfio-pci.ids=$VFIO_IDS vfio-pci.enable_sriov=1"

# The only serial port is the console: L1 has its files and its output through virtio. QEMU's virtio devices bypass
# the IOMMU unless an option says otherwise.
timeout --foreground -k 5 "$limit" "$VIOMMU_QEMU" -nodefaults -no-user-config -no-reboot -display none \
    -machine "$machine" -accel tcg,thread=multi -cpu max -smp "$cpus" -m "$memory" \
    -device "$iommu_device" \
    -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
    -device virtio-serial-pci,max_ports=4 \
    -chardev stdio,id=output,signal=off -device virtserialport,chardev=output,name=output \
    -chardev "file,id=status,path=$work/status" -device virtserialport,chardev=status,name=status \
    -chardev "file,id=console,path=${console//,/,,}" -serial chardev:console \
    "${devices[@]}" \
    -kernel "$VIOMMU_HOST_KERNEL" -initrd "$initramfs" \
    -append "$kernel_append l1.run=$work/run $append" \
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
    say "L1 was stopped after $limit s: set --timeout to allow more"
    status=124
    ;;
*)
    say "L1 ended before its command did (QEMU's status: $ended; message of its init: ${status:-none})"
    cat "$work/qemu" >&2
    tail -n 20 "$console" >&2
    status=125
    ;;
esac
if [ "$status" != 0 ]; then
    if [ -z "$log" ]; then
        log=$(mktemp "${TMPDIR:-/tmp}/viommu-l1-console-XXXXXX")
        cp "$console" "$log"
    fi
    say "the messages of L1's kernel: $log"
fi
exit "$status"
