# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2034 # the scripts that source this file use some names
#
# Makes a disk with a clean Debian for a machine to boot from: Debian's essential packages, systemd and udev; a second disk
# also has libvirt, and a third one has the libvirt of the backports. dpkg installs them, in a machine of its own. Needs no root.

DEBIAN_ROOT_SUITE=trixie
DEBIAN_ROOT_SIZE=768M
# The essential packages; systemd and udev, which make a bootable system of them; AppArmor's parser.
DEBIAN_PLAIN_PACKAGES="base-files base-passwd bash bsdutils coreutils dash debianutils diffutils dpkg findutils grep
gzip hostname init-system-helpers libc-bin login ncurses-base ncurses-bin perl-base sed sysvinit-utils tar util-linux
systemd-sysv udev apparmor"
DEBIAN_ROOT_PACKAGES=$DEBIAN_PLAIN_PACKAGES
# Seconds for dpkg's work under emulation, which takes a minute on an idle machine.
DEBIAN_ROOT_LIMIT=900
DEBIAN_ROOT_NOTE="a minimal Debian (about 33 MB)"
# The release's libvirt, and the QEMU of its backports: the release's own has no generic vhost-user device.
DEBIAN_LIBVIRT_PACKAGES="libvirt-daemon-system libvirt-clients qemu-system-x86/trixie-backports
qemu-system-common/trixie-backports qemu-system-data/trixie-backports seabios/trixie-backports"

# The libvirt of the backports. apt takes a package from there only if it is named, dependencies too.
DEBIAN_NEWEST_LIBVIRT_PARTS="libvirt-common libvirt0 libvirt-daemon libvirt-daemon-common libvirt-daemon-log
libvirt-daemon-driver-network libvirt-daemon-driver-nodedev libvirt-daemon-driver-nwfilter libvirt-daemon-driver-qemu
libvirt-daemon-driver-secret libvirt-daemon-driver-storage libvirt-daemon-config-network libvirt-daemon-config-nwfilter"

# debian_root_with_libvirt [newest]: makes the disk with libvirt the one that all functions here mean from now on, or the disk
# with the libvirt of the backports.
debian_root_with_libvirt() {
    DEBIAN_ROOT_SIZE=1536M
    DEBIAN_ROOT_PACKAGES="$DEBIAN_PLAIN_PACKAGES $DEBIAN_LIBVIRT_PACKAGES"
    DEBIAN_ROOT_LIMIT=1800
    DEBIAN_ROOT_NOTE="Debian with libvirt (about 100 MB)"
    if [ "${1:-}" = newest ]; then
        local part parts=''
        for part in libvirt-daemon-system libvirt-clients $DEBIAN_NEWEST_LIBVIRT_PARTS; do
            parts+=" $part/trixie-backports"
        done
        DEBIAN_ROOT_PACKAGES="$DEBIAN_PLAIN_PACKAGES${DEBIAN_LIBVIRT_PACKAGES/libvirt-daemon-system libvirt-clients/$parts}"
        DEBIAN_ROOT_NOTE="Debian with the libvirt of its backports (about 100 MB)"
    fi
}

# debian_machine: sets DEBIAN_MACHINE, QEMU's arguments for a machine of ARCH without disks and ports (a later -smp
# overrides the one here), and DEBIAN_APPEND, its kernel's arguments.
debian_machine() {
    DEBIAN_MACHINE=(-nodefaults -no-user-config -no-reboot -display none -accel "tcg,thread=multi" -cpu max -smp 2)
    case $ARCH in
    amd64)
        DEBIAN_MACHINE+=(-machine q35)
        DEBIAN_APPEND="console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check"
        ;;
    arm64)
        DEBIAN_MACHINE+=(-machine "virt,gic-version=3")
        DEBIAN_APPEND="console=ttyAMA0 quiet panic=-1"
        ;;
    esac
}

# debian_root_there: sets DEBIAN_ROOT, the directory with the disk; false if the disk has not been made yet.
debian_root_there() {
    # The key leaves out the archive's newest versions: a disk that exists is used without the network.
    DEBIAN_ROOT=$ARCH_CACHE/debian/$({
        echo "$DEBIAN_ROOT_SUITE $DEBIAN_ROOT_SIZE $DEBIAN_ROOT_PACKAGES"
        declare -f debian_root_stage debian_root_install
        cat "$SCRIPTS/debian/install"
    } | sha256_of | cut -c 1-12)
    [ -e "$DEBIAN_ROOT/versions" ]
}

# debian_root_ready KERNEL INITRAMFS: the same, but makes the disk, with this kernel and its initramfs for disks, if it
# is missing.
debian_root_ready() {
    local stage
    ! debian_root_there || return 0
    stage=$(new_stage)
    say "downloading $DEBIAN_ROOT_NOTE ..."
    # shellcheck disable=SC2086 # a list
    apt_closure "$stage/debs" "$DEBIAN_ROOT_SUITE" $DEBIAN_ROOT_PACKAGES
    debian_root_stage "$stage"
    say "installing it in a machine of its own ..."
    debian_root_install "$stage" "$1" "$2"
    apt_versions "$stage/debs" >"$stage/versions"
    rm -rf "$stage"/{debs,root,initramfs,init,console}
    publish "$stage" "$DEBIAN_ROOT"
}

# debian_root_stage STAGE: makes the file system STAGE/disk. It has the contents of all packages in STAGE/debs, and the
# packages themselves in /debs.
debian_root_stage() {
    local stage=$1 root=$1/root deb link sysroot=$CACHE/sysroot/storage
    mkdir -p "$root"/{dev,proc,sys,run,tmp,debs} "$root/var/lib/dpkg/info"
    for link in bin sbin lib lib64; do
        # The loader of arm64 is in lib.
        [ "$ARCH:$link" != arm64:lib64 ] || continue
        mkdir -p "$root/usr/$link"
        ln -s "usr/$link" "$root/$link"
    done
    for deb in "$stage"/debs/*.deb; do
        dpkg-deb -x "$deb" "$root"
    done
    : >"$root/var/lib/dpkg/status"
    cp "$stage"/debs/*.deb "$root/debs/"
    truncate -s "$DEBIAN_ROOT_SIZE" "$stage/disk"
    "$sysroot/lib64/ld-linux-x86-64.so.2" --library-path "$sysroot/usr/lib/x86_64-linux-gnu" \
        "$sysroot/usr/sbin/mke2fs" -q -t ext4 -O ^has_journal -d "$root" "$stage/disk" ||
        die "cannot make the file system of a minimal Debian (output above)"
}

# debian_root_install STAGE KERNEL INITRAMFS: boots a machine in which dpkg installs the packages on STAGE/disk.
debian_root_install() {
    local stage=$1
    debian_initramfs "$3" "$SCRIPTS/debian/install" "$stage"
    debian_machine
    timeout -k 5 "$DEBIAN_ROOT_LIMIT" "$CACHE/bin/qemu-system-$ARCH_QEMU" "${DEBIAN_MACHINE[@]}" -m 1G \
        -drive "file=$stage/disk,if=none,id=disk,format=raw,cache=unsafe" -device nvme,drive=disk,serial=disk \
        -serial "file:$stage/console" -kernel "$2" -initrd "$stage/initramfs" -append "$DEBIAN_APPEND" </dev/null || true
    if ! grep -q '^debian: installed' "$stage/console"; then
        tail -n 30 "$stage/console" >&2
        die "a minimal Debian cannot be installed (output above)"
    fi
}

# debian_initramfs INITRAMFS INIT STAGE: makes STAGE/initramfs: INITRAMFS with INIT as its first program.
debian_initramfs() {
    mkdir -p "$3/init"
    cp "$2" "$3/init/init"
    chmod 755 "$3/init/init"
    cat "$1" >"$3/initramfs"
    cpio_of "$3/init" >>"$3/initramfs"
}
