#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/setup.sh [--arch ARCH] [--kernels "KERNEL..."] [--host-kernel] [--debian] [--libvirt] [--firmware]
#                              [--promtool] [--print]
#
# Fills a cache outside the tree with everything that the guest tests need: QEMU, iasl, busybox, Debian's stock
# kernels and an initramfs for each. Needs no root and no KVM. With a warm cache it does not use the network.
# Writes the paths to CACHE/env (arm64: CACHE/arm64/env), a file of KEY="value" lines.
#
#   --arch ARCH     the architecture of the emulated machines, amd64 or arm64. Default: amd64
#   --kernels LIST  the kernels: 'stable' (Debian 13's), 'newest' (the one in its backports) or the beginning
#                   of a version in the archive, as in "6.12 7". Default: "stable newest". arm64 also has
#                   'stable-16k' and 'newest-16k', with pages of 16 KiB, and there the default is all four; and 'own-64k', which is
#                   compiled from Debian's source (10 minutes) and has pages of 64 KiB
#   --host-kernel   also build the kernel of the L1 machine (see l1.sh) from Debian's source: 170 MB to download,
#                   6 minutes on two processors, 2 GB of disk during the build
#   --debian        also install a clean Debian with systemd (see debian.sh) in a machine of its own: 33 MB to
#                   download, a minute
#   --libvirt       also install a second Debian, with libvirt and a QEMU of its own, and a third with a newer libvirt, and
#                   build a kernel for it that has iommufd and AppArmor (amd64 only): 200 MB to download besides the kernel's
#                   source, a quarter of an hour
#   --firmware      also fetch a UEFI firmware (OVMF; arm64: AAVMF) and make a GRUB for it: 20 MB to download
#   --promtool      also fetch promtool, which tests the alert rules of packaging/monitoring: 20 MB to download
#   --print         also write CACHE/env to standard output
#
# Environment:
#   VIOMMU_CACHE    the cache (default: vhost-device-iommu in XDG_CACHE_HOME or ~/.cache)
#   VIOMMU_MIRROR   the URL of a Debian mirror (default: the first one in the host's APT sources)
#   http_proxy      the proxy, as for other programs

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/arch.sh"
. "$SCRIPTS/lib/apt.sh"
. "$SCRIPTS/lib/tools.sh"
. "$SCRIPTS/lib/kernels.sh"
. "$SCRIPTS/lib/host-kernel.sh"
. "$SCRIPTS/lib/toolchain.sh"
. "$SCRIPTS/lib/initramfs.sh"
. "$SCRIPTS/lib/debian-root.sh"

arch=amd64 kernels=
print=no host_kernel=no debian=no libvirt=no firmware=no promtool=no
while [ $# -gt 0 ]; do
    case $1 in
    --arch)
        [ $# -ge 2 ] || die "--arch needs a value: amd64 or arm64"
        arch=$2
        shift
        ;;
    --kernels)
        [ $# -ge 2 ] || die "--kernels needs a list, as in --kernels \"6.12 7\""
        kernels=$2
        shift
        ;;
    --host-kernel) host_kernel=yes ;;
    --debian) debian=yes ;;
    --libvirt) libvirt=yes ;;
    --firmware) firmware=yes ;;
    --promtool) promtool=yes ;;
    --print) print=yes ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) die "unknown argument '$1': see $0 --help" ;;
    esac
    shift
done

cache_open
arch_open "$arch"
[ $libvirt = no ] || [ "$ARCH" = amd64 ] || die "--libvirt is for amd64 only: leave out --arch $ARCH"
if [ -z "$kernels" ]; then
    kernels=$KERNELS_DEFAULT
    [ "$ARCH" = amd64 ] || kernels=$KERNELS_DEFAULT_ARM64
fi
# First: without a compiler the downloads would be of no use.
arch_cc_ready -static
cache_lock
trap 'rm -rf "$CACHE"/tmp.*' EXIT
apt_open
tools_ready
if [ $promtool = yes ]; then
    tools_promtool
fi
promtool_entry=
if [ -x "$CACHE/bin/promtool" ]; then
    promtool_entry="VIOMMU_PROMTOOL=\"$CACHE/bin/promtool\""
fi
apt_open "$ARCH"
guest_tools_ready

entries=() storage_entries=() skipped=()
for request in $kernels; do
    kernel_ready "$request"
    if [ -z "$KERNEL_DIR" ]; then
        skipped+=("$request")
        continue
    fi
    release=$(cat "$KERNEL_DIR/release")
    initramfs "$KERNEL_DIR"
    # The name is the release's first two numbers: 6.12.107+deb13-amd64 is '6.12', 6.12.107+deb13-arm64-16k '6.12-16k'.
    name=$(echo "$release" | sed -E 's/^([0-9]+\.[0-9]+)[^-]*(-(amd|arm)64)?(-16k)?.*/\1\4/')
    [ "$request" != own-64k ] || name+=-64k
    entries+=("$name:$release:$KERNEL_DIR/vmlinuz:$INITRAMFS")
    storage_initramfs "$KERNEL_DIR"
    storage_entries+=("$name:$release:$KERNEL_DIR/vmlinuz:$INITRAMFS")
done
[ ${#entries[@]} -gt 0 ] || die "none of the kernels '$kernels' can be used"
mapfile -t entries < <(printf '%s\n' "${entries[@]}" | sort -t : -k 2,2V -u)
mapfile -t storage_entries < <(printf '%s\n' "${storage_entries[@]}" | sort -t : -k 2,2V -u)

if [ $host_kernel = yes ]; then
    host_kernel_ready
fi
# CACHE/env names the L1 machine whenever its kernel exists, also without --host-kernel.
host_entries=
if host_kernel_there; then
    initramfs "$HOST_KERNEL_DIR"
    host_entries="VIOMMU_HOST_KERNEL=\"$HOST_KERNEL_DIR/vmlinuz\"
VIOMMU_HOST_KERNEL_RELEASE=\"$(cat "$HOST_KERNEL_DIR/release")\"
VIOMMU_L2_INITRAMFS=\"$INITRAMFS\""
    l1_initramfs
    host_entries+="
VIOMMU_L1_INITRAMFS=\"$INITRAMFS\""
fi

if [ $debian = yes ]; then
    IFS=: read -r _ _ image storage <<<"${storage_entries[0]}"
    debian_root_ready "$image" "$storage"
fi
debian_entry=
if debian_root_there; then
    debian_entry="VIOMMU_DEBIAN_DISK=\"$DEBIAN_ROOT/disk\""
fi

libvirt_entries=
if [ "$ARCH" = amd64 ]; then
    IFS=: read -r _ _ image storage <<<"${storage_entries[0]}"
    for which in '' newest; do
        debian_root_with_libvirt $which
        if [ $libvirt = yes ]; then
            debian_root_ready "$image" "$storage"
        fi
        if debian_root_there; then
            libvirt_entries+="VIOMMU_LIBVIRT_${which:+NEWEST_}DISK=\"$DEBIAN_ROOT/disk\"
"
        fi
    done
    if [ $libvirt = yes ]; then
        libvirt_kernel_ready
    fi
    if libvirt_kernel_there; then
        initramfs "$LIBVIRT_KERNEL_DIR"
        libvirt_entries+="VIOMMU_LIBVIRT_KERNEL=\"$LIBVIRT_KERNEL_DIR/vmlinuz\"
VIOMMU_LIBVIRT_GUEST_INITRAMFS=\"$INITRAMFS\"
"
        storage_initramfs "$LIBVIRT_KERNEL_DIR"
        libvirt_entries+="VIOMMU_LIBVIRT_INITRAMFS=\"$INITRAMFS\""
    fi
fi

if [ $firmware = yes ]; then
    firmware_ready
fi
firmware_entries=
if firmware_there; then
    case $ARCH in
    amd64)
        firmware_entries="VIOMMU_OVMF_CODE=\"$FIRMWARE/usr/share/OVMF/OVMF_CODE_4M.fd\"
VIOMMU_OVMF_VARS=\"$FIRMWARE/usr/share/OVMF/OVMF_VARS_4M.fd\"
VIOMMU_GRUB=\"$FIRMWARE/BOOTX64.EFI\""
        ;;
    arm64)
        firmware_entries="VIOMMU_UEFI=\"$FIRMWARE/usr/share/qemu-efi-aarch64/QEMU_EFI.fd\"
VIOMMU_GRUB=\"$FIRMWARE/BOOTAA64.EFI\""
        ;;
    esac
fi

# shellcheck disable=SC2046 # a list
cat "$CACHE"/sysroot/*/versions "$ARCH_CACHE"/kernels/*/versions $(compgen -G "$ARCH_CACHE/debian/*/versions") | sort -u |
    write_file "$ARCH_CACHE/versions"
write_file "$ARCH_CACHE/env" <<ENV
VIOMMU_ARCH="$ARCH"
VIOMMU_QEMU="$CACHE/bin/qemu-system-$ARCH_QEMU"
VIOMMU_QEMU_VERSION="$QEMU_VERSION"
VIOMMU_IASL="$CACHE/bin/iasl"
VIOMMU_BUSYBOX="$CACHE/bin/busybox"
VIOMMU_KERNELS="${entries[*]}"
VIOMMU_STORAGE_KERNELS="${storage_entries[*]}"
$host_entries
$debian_entry
$libvirt_entries
$firmware_entries
$promtool_entry
ENV

for entry in "${entries[@]}"; do
    IFS=: read -r name release _ <<<"$entry"
    say "kernel $name ($release)"
done
if [ -n "$host_entries" ]; then
    say "kernel of L1 ($(cat "$HOST_KERNEL_DIR/release"))"
fi
say "ready: $ARCH_CACHE/env"
if [ $print = yes ]; then
    cat "$ARCH_CACHE/env"
fi
# The caller has named a kernel that is missing: fail at the end.
[ ${#skipped[@]} -eq 0 ] || die "left out: ${skipped[*]}"
