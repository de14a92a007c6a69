# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2034 # the scripts that source this file use some names
#
# Builds the kernel of the L1 machine of ARCH from Debian's kernel source with l1/kernel.config (arm64:
# l1/kernel-arm64.config), since stock kernels have no iommufd. Uses the machine's C compilers and binutils; all other
# tools are Debian's, run in place. Builds the kernel of arm64 guests with pages of 64 KiB in the same way, with
# guest/kernel-64k.config: Debian has none. The kernel of an emulated host with libvirt has the options of debian/kernel.config
# besides.

HOST_KERNEL_TOOLS="flex bison m4 bc make xz-utils"

# host_kernel_source: prints the newest kernel source package in the archive. Kernels before 7 lack parts of iommufd
# that the tests use.
host_kernel_source() {
    apt-cache pkgnames linux-source- | grep -xE 'linux-source-([7-9]|[1-9][0-9])\.[0-9]+' | sort -V | tail -n 1
}

# The kernel that these functions make: l1, guest-64k inside guest_64k_ready, or libvirt inside libvirt_kernel_there and
# libvirt_kernel_ready.
KERNEL_KIND=l1

# host_kernel_options: prints the path of the file with the options of ARCH's kernel of that kind.
host_kernel_options() {
    local more=$SCRIPTS/debian/kernel.config
    case $KERNEL_KIND:$ARCH in
    guest-64k:*) echo "$SCRIPTS/guest/kernel-64k.config" ;;
    libvirt:*)
        mkdir -p "$ARCH_CACHE/kernels"
        {
            # Kconfig takes the last line of an option, but host_kernel_config wants to find every line.
            grep -vE "^($(sed -n 's/^\(CONFIG_[A-Z0-9_]*=\).*/\1/p' "$more" | paste -sd '|'))" "$SCRIPTS/l1/kernel.config"
            cat "$more"
        } | write_file "$ARCH_CACHE/kernels/libvirt.config"
        echo "$ARCH_CACHE/kernels/libvirt.config"
        ;;
    l1:amd64) echo "$SCRIPTS/l1/kernel.config" ;;
    *) echo "$SCRIPTS/l1/kernel-$ARCH.config" ;;
    esac
}

# host_kernel_config TREE OUT MAKE...: makes OUT/.config from ARCH's options, with every line of them and nothing else.
host_kernel_config() {
    local tree=$1 out=$2 options lost
    shift 2
    options=$(host_kernel_options)
    "$@" -C "$tree" O="$out" KCONFIG_ALLCONFIG="$options" allnoconfig >"$out/log" 2>&1 ||
        { tail -n 20 "$out/log" >&2; die "cannot configure the kernel (output above)"; }
    lost=$(grep '^CONFIG_' "$options" | grep -vxFf "$out/.config" | tr '\n' ' ') || true
    [ -z "$lost" ] || die "this kernel does not take these lines of $options: $lost"
}

# host_kernel_build DEBS STAGE: builds STAGE/{vmlinuz,config,release} from the source package in DEBS.
host_kernel_build() {
    local debs=$1 stage=$2 sysroot=$CACHE/sysroot/kernel-tools tree begun next pid name
    local bin=$stage/bin out=$stage/out image=bzImage
    [ "$ARCH" = amd64 ] || image=Image
    mkdir -p "$bin" "$stage/source" "$out"
    for name in flex bison m4 bc make xz; do
        in_sysroot_wrapper "$sysroot" "/usr/bin/$name" "export M4=$bin/m4 BISON_PKGDATADIR=\$S/usr/share/bison" >"$bin/$name"
        chmod 755 "$bin/$name"
    done
    say "unpacking the kernel's source ..."
    dpkg-deb -x "$debs"/linux-source-*.deb "$stage/source"
    "$bin/xz" -dc "$stage"/source/usr/src/linux-source-*.tar.xz | tar -C "$stage/source" -x
    tree=$(find "$stage/source" -mindepth 1 -maxdepth 1 -type d -name 'linux-source-*')
    # Build without objtool, as on 32 bits: it needs libelf, and no enabled option needs objtool.
    sed -i '/select HAVE_OBJTOOL[[:space:]]/d' "$tree/arch/x86/Kconfig"
    # These settings make the build the same on every machine.
    local make=(env "PATH=$bin:$PATH" KBUILD_BUILD_TIMESTAMP=1970-01-01 KBUILD_BUILD_USER=viommu
        KBUILD_BUILD_HOST=viommu "$bin/make" ARCH="$ARCH_LINUX" CROSS_COMPILE="$ARCH_TRIPLE-" CC="$ARCH_CC" HOSTCC=cc)
    host_kernel_config "$tree" "$out" "${make[@]}"
    say "compiling the kernel, about 6 minutes on two processors ..."
    begun=$SECONDS next=$((SECONDS + 30))
    "${make[@]}" -C "$tree" O="$out" "-j$(nproc)" "$image" >"$out/log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        if [ $SECONDS -ge $next ]; then
            say "    $(grep -cE '^  (CC|AS) ' "$out/log") files compiled, $((SECONDS - begun)) s"
            next=$((SECONDS + 30))
        fi
    done
    wait "$pid" || {
        grep -B 2 -A 10 -E 'rror:|\*\*\*' "$out/log" | head -n 40 >&2
        die "the kernel does not compile (output above)"
    }
    cp "$out/arch/$ARCH_LINUX/boot/$image" "$stage/vmlinuz"
    cp "$out/.config" "$stage/config"
    cp "$out/include/config/kernel.release" "$stage/release"
    # The directory has the form of a stock kernel's, so that initramfs() accepts it.
    mkdir "$stage/modules"
    : >"$stage/modules/load-order"
    rm -rf "$stage/source" "$out" "$bin"
}

# host_kernel_there: sets HOST_KERNEL_DIR; false if the kernel has not been built yet.
host_kernel_there() {
    # The key leaves out the archive's newest version: a kernel that exists is used without the network.
    HOST_KERNEL_DIR=$ARCH_CACHE/kernels/$KERNEL_KIND-$({
        grep '^CONFIG_' "$(host_kernel_options)"
        declare -f host_kernel_build host_kernel_config
    } | sha256_of | cut -c 1-12)
    [ -e "$HOST_KERNEL_DIR/versions" ]
}

# host_kernel_ready: the same, but builds the kernel if it is missing.
host_kernel_ready() {
    local package debs stage
    ! host_kernel_there || return 0
    # The tools run on this machine, and the source fits every architecture.
    apt_open
    if [ ! -e "$CACHE/sysroot/kernel-tools/versions" ]; then
        say "downloading the tools that compile a kernel (about 10 MB) ..."
        # shellcheck disable=SC2086 # a list
        apt_sysroot "$CACHE/sysroot/kernel-tools" trixie $HOST_KERNEL_TOOLS
    fi
    debs=$CACHE/kernels/debs/source
    if [ ! -e "$debs/complete" ]; then
        apt_lists_ready
        package=$(host_kernel_source)
        [ -n "$package" ] || die "there is no linux-source-7 or newer in $APT_SUITES: set VIOMMU_MIRROR to a mirror that has one"
        say "downloading $package (about 170 MB) ..."
        rm -rf "$debs"
        apt_exactly "$debs" "$package"
        : >"$debs/complete"
    fi
    apt_open "$ARCH"
    stage=$(new_stage)
    host_kernel_build "$debs" "$stage"
    apt_versions "$debs" >"$stage/versions"
    publish "$stage" "$HOST_KERNEL_DIR"
}

# guest_64k_ready: sets KERNEL_DIR to the kernel of arm64 guests with pages of 64 KiB, and builds it if it is missing.
guest_64k_ready() {
    local KERNEL_KIND=guest-64k HOST_KERNEL_DIR
    [ "$ARCH" = arm64 ] || die "the kernel own-64k is one for arm64: give --arch arm64"
    host_kernel_ready
    KERNEL_DIR=$HOST_KERNEL_DIR
    # Without modules for a disk, as without others.
    mkdir -p "$KERNEL_DIR/storage"
    : >"$KERNEL_DIR/storage/load-order"
}

# libvirt_kernel_there: sets LIBVIRT_KERNEL_DIR to the kernel of an emulated host with libvirt; false if it has not been built
# yet.
libvirt_kernel_there() {
    local KERNEL_KIND=libvirt HOST_KERNEL_DIR status=0
    host_kernel_there || status=$?
    LIBVIRT_KERNEL_DIR=$HOST_KERNEL_DIR
    return $status
}

# libvirt_kernel_ready: the same, but builds the kernel if it is missing.
libvirt_kernel_ready() {
    local KERNEL_KIND=libvirt HOST_KERNEL_DIR
    host_kernel_ready
    LIBVIRT_KERNEL_DIR=$HOST_KERNEL_DIR
    # Without modules for a disk, as without others.
    mkdir -p "$LIBVIRT_KERNEL_DIR/storage"
    : >"$LIBVIRT_KERNEL_DIR/storage/load-order"
}
