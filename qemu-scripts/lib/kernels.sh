# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2034 # the scripts that source this file use some names
#
# Fetches Debian's stock kernels for the guests: the image, and the few modules that the guests load.

KERNELS_DEFAULT="stable newest"
KERNELS_DEFAULT_ARM64="stable newest stable-16k newest-16k"
# The guest loads these modules in this order, each behind its dependencies. A module that is built in or unknown to a
# kernel is left out.
KERNEL_MODULES="virtio_pci virtio_iommu vfio vfio_iommu_type1 vfio_pci e1000e"
# The same for guests with an NVMe disk and ext4; guest/storage/load-storage loads them.
STORAGE_MODULES="crc32c_generic nvme ext4"
# The same for guests with Intel's 82576, a network card with virtual functions. Every initramfs has them, and a test
# loads them.
CARD_MODULES="igb igbvf"
# A kernel whose configuration lacks one of these options cannot be a guest.
KERNEL_OPTIONS="VIRTIO_IOMMU ACPI_VIOT VFIO_PCI VFIO_IOMMU_TYPE1"

# kernel_releases: prints the releases that are complete in the archive, oldest first. Newer kernels are split into
# several packages. When the archive replaces a kernel, it may keep some packages of the old one.
kernel_releases() {
    apt-cache pkgnames linux- | sed -nE "s/^linux-(image|binary|modules|base)-([0-9].*)-$ARCH\$/\\1 \\2/p" |
        awk '{ has[$1, $2] = 1; seen[$2] = 1 }
            END {
                for (r in seen)
                    if (has["image", r] && (!has["binary", r] || (has["modules", r] && has["base", r])))
                        print r
            }' | grep -vE -- '-(cloud|rt)$' | sort -V
}

# kernel_packages REQUEST: prints the packages that hold the kernel, one a line; none if there is no such kernel.
# REQUEST is 'stable' (Debian 13's), 'newest' (the one in its backports) or the beginning of a version; 'stable-16k' and
# 'newest-16k' are arm64's kernels with pages of 16 KiB.
kernel_packages() {
    local suite releases release flavour=$ARCH
    case $1 in
    *-16k) flavour+=-16k ;;
    esac
    case ${1%-16k} in
    stable) suite=trixie ;;
    newest) suite=trixie-backports ;;
    *)
        # Selects by name only: an older kernel's dependencies may be gone, and are not needed.
        releases=$(kernel_releases)
        release=$(grep -E "^${1//./\\.}([.+-]|\$)" <<<"$releases" | tail -n 1) || true
        if [ -z "$release" ]; then
            # shellcheck disable=SC2086 # a list
            say "there is no kernel $1 in $APT_SUITES; available are:" $releases
            return
        fi
        apt-cache pkgnames linux- |
            grep -xF "$(printf "linux-%s-$release-$ARCH\n" base binary image modules)" | sort
        return
        ;;
    esac
    apt-get install --print-uris -qq -t "$suite" "linux-image-$flavour/$suite" | awk '{ print $2 }' |
        grep -E '^linux-(image|binary|modules|base)-[0-9]' | sed 's/_.*//'
}

# module_file DIR NAME: prints the module's file below DIR. Kernels spell names with '-' or '_'.
module_file() {
    find "$1" -name "${2//[_-]/[_-]}.ko*" | head -n 1
}

# module_take TREE OUT NAME: copies the module NAME and its dependencies to OUT, and appends them to OUT/load-order in
# order.
module_take() {
    local tree=$1 out=$2 file plain needs need
    file=$(module_file "$tree" "$3")
    [ -n "$file" ] || return 0
    plain=$(basename "$file")
    plain=${plain%%.ko*}.ko
    [ ! -e "$out/$plain" ] || return 0
    case $file in
    *.xz) "$CACHE/bin/busybox" xz -dc "$file" >"$out/$plain" ;;
    *.gz) "$CACHE/bin/busybox" gzip -dc "$file" >"$out/$plain" ;;
    *.ko) cp "$file" "$out/$plain" ;;
    *) die "cannot unpack $(basename "$file"): a compression these scripts do not know" ;;
    esac
    needs=$(tr '\0' '\n' <"$out/$plain" | sed -n 's/^depends=//p' | tr ',' ' ')
    for need in $needs; do
        [ -n "$(module_file "$tree" "$need")" ] || die "$plain needs the module $need, which its package does not have"
        module_take "$tree" "$out" "$need"
    done
    echo "$plain" >>"$out/load-order"
}

# kvm_modules RELEASE TREE OUT: copies KVM's modules of a stock kernel for amd64 from its packages to OUT, with their order in
# OUT/load-order. The emulated processor has AMD's virtualization. TREE is a directory for the packages' files.
kvm_modules() {
    local deb
    mkdir -p "$2" "$3"
    for deb in "$ARCH_CACHE"/kernels/debs/*/linux-*"$1"_*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -C "$2" -x --wildcards '*/kvm*.ko*' '*/ccp.ko*' '*/irqbypass.ko*' 2>/dev/null || true
    done
    module_take "$2" "$3" kvm-amd
    [ -s "$3/load-order" ] || die "the packages of the kernel $1 are no longer in $ARCH_CACHE/kernels/debs: remove $ARCH_CACHE/kernels/*, and run setup.sh again"
}

# kernel_lacks CONFIG: prints the first of KERNEL_OPTIONS that the configuration lacks.
kernel_lacks() {
    local option
    for option in $KERNEL_OPTIONS; do
        if ! grep -qE "^CONFIG_$option=[ym]" "$1"; then
            echo "CONFIG_$option"
            return
        fi
    done
}

# kernel_unpack DEBS TARGET: makes TARGET/{vmlinuz,config,release,lacks,modules/,storage/,cards/,versions} from the packages in
# DEBS.
kernel_unpack() {
    local debs=$1 target=$2 stage tree deb name
    stage=$(new_stage)
    tree=$stage/tree
    mkdir -p "$tree" "$stage"/{modules,storage,cards}
    for deb in "$debs"/*.deb; do
        dpkg-deb -x "$deb" "$tree"
    done
    find "$tree" -type f -name 'vmlinuz*' -exec cp {} "$stage/vmlinuz" \;
    find "$tree" -type f \( -path '*/boot/config-*' -o -path '*/modules/*/config' \) -exec cp {} "$stage/config" \;
    find "$tree" -type d -path '*/modules/*/kernel' | sed -n '1s|.*/modules/\(.*\)/kernel|\1|p' >"$stage/release"
    for name in vmlinuz config release; do
        [ -s "$stage/$name" ] || die "no $name in $(basename -a "$debs"/*.deb | tr '\n' ' ')"
    done
    kernel_lacks "$stage/config" >"$stage/lacks"
    if [ ! -s "$stage/lacks" ]; then
        for name in $KERNEL_MODULES; do
            module_take "$tree" "$stage/modules" "$name"
        done
        for name in $STORAGE_MODULES; do
            module_take "$tree" "$stage/storage" "$name"
        done
        for name in $CARD_MODULES; do
            module_take "$tree" "$stage/cards" "$name"
        done
    fi
    apt_versions "$debs" >"$stage/versions"
    rm -rf "$tree"
    publish "$stage" "$target"
}

# kernel_ready REQUEST: sets KERNEL_DIR. Prints a message and sets it to nothing if there is no such kernel, or if it
# cannot be a guest.
kernel_ready() {
    local request=$1 dir debs packages
    case $request in
    *[!A-Za-z0-9.+-]* | '') die "'$request' is no kernel: see --kernels in qemu-scripts/setup.sh --help" ;;
    esac
    KERNEL_DIR=
    if [ "$request" = own-64k ]; then
        guest_64k_ready
        return
    fi
    dir=$ARCH_CACHE/kernels/$request-$(echo "$KERNEL_MODULES / $STORAGE_MODULES / $CARD_MODULES / $KERNEL_OPTIONS" | sha256_of | cut -c 1-12)
    if [ ! -e "$dir/versions" ]; then
        debs=$ARCH_CACHE/kernels/debs/$request
        if [ ! -e "$debs/complete" ]; then
            apt_lists_ready
            packages=$(kernel_packages "$request")
            [ -n "$packages" ] || return 0
            say "downloading the $request kernel ($(echo "$packages" | tail -n 1), about 120 MB) ..."
            rm -rf "$debs"
            # shellcheck disable=SC2086 # a list
            apt_exactly "$debs" $packages
            : >"$debs/complete"
        fi
        say "unpacking the $request kernel ..."
        kernel_unpack "$debs" "$dir"
    fi
    if [ -s "$dir/lacks" ]; then
        say "the kernel $(cat "$dir/release") is left out: it is built without $(cat "$dir/lacks")"
        return 0
    fi
    KERNEL_DIR=$dir
}
