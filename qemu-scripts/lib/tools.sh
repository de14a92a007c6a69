# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Fetches the programs for the host (QEMU, iasl and a static busybox, as CACHE/bin/*), busybox and e2fsprogs for the
# guests, a UEFI firmware with a boot loader, and promtool.

QEMU_OLDEST=10.2
QEMU_DEVICE=vhost-user-test-device-pci

# qemu_version PROGRAM: prints its version.
qemu_version() {
    "$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'
}

# qemu_suits PROGRAM: whether it is new enough and has the generic vhost-user device.
qemu_suits() {
    local version
    version=$(qemu_version "$1")
    [ -n "$version" ] && version_at_least "$version" "$QEMU_OLDEST" || return 1
    # Not a pipe: grep -q would stop reading, and the death of QEMU by SIGPIPE would count as a failure.
    grep -q "\"$QEMU_DEVICE\"" <<<"$("$1" -device help 2>/dev/null)"
}

# tools_qemu: takes the host's own QEMU for ARCH if it is suitable, or else unpacks Debian's newest beside the system.
tools_qemu() {
    local found sysroot=$CACHE/sysroot/qemu package=qemu-system-x86 program=qemu-system-$ARCH_QEMU
    if [ "$ARCH" = arm64 ]; then
        sysroot=$CACHE/sysroot/qemu-arm package=qemu-system-arm
    fi
    found=$(type -P "$program" || true)
    if [ -n "$found" ] && [ "$found" != "$CACHE/bin/$program" ] && qemu_suits "$found"; then
        printf '#!/bin/sh\nexec %s "$@"\n' "$found" | install_wrapper "$program"
        QEMU_ORIGIN=$found
        return
    fi
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading QEMU (about 40 MB) ..."
        apt_sysroot "$sysroot" trixie-backports "$package"
    fi
    # shellcheck disable=SC2016 # expanded when the wrapper runs
    in_sysroot_wrapper "$sysroot" "/usr/bin/$program" \
        'export QEMU_MODULE_DIR=$S/usr/lib/x86_64-linux-gnu/qemu' \
        '-L $S/usr/share/qemu -L $S/usr/share/seabios -L $S/usr/lib/ipxe/qemu' |
        install_wrapper "$program"
    QEMU_ORIGIN="Debian's package"
    qemu_suits "$CACHE/bin/$program" ||
        die "QEMU $(qemu_version "$CACHE/bin/$program" || true) of trixie-backports has no $QEMU_DEVICE (QEMU $QEMU_OLDEST or newer has it): put such a QEMU on PATH, or remove $sysroot to fetch the archive's present one"
}

tools_small() {
    local sysroot=$CACHE/sysroot/tools
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading busybox and iasl (about 7 MB) ..."
        apt_sysroot "$sysroot" trixie busybox-static acpica-tools
    fi
    in_sysroot_wrapper "$sysroot" /usr/bin/iasl | install_wrapper iasl
    # The static busybox runs on the host and in the guests of its architecture.
    install_wrapper busybox <"$sysroot/usr/bin/busybox"
}

# guest_tools_ready: sets GUEST_BUSYBOX, a static busybox that runs in machines of ARCH. The APT root of ARCH must be open.
guest_tools_ready() {
    GUEST_BUSYBOX=$CACHE/bin/busybox
    if [ "$ARCH" = amd64 ]; then
        return
    fi
    local sysroot=$ARCH_CACHE/sysroot/busybox
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading busybox for $ARCH (about 1 MB) ..."
        apt_sysroot "$sysroot" trixie busybox-static
    fi
    GUEST_BUSYBOX=$sysroot/usr/bin/busybox
}

# tools_promtool: fetches the program that checks and tests rules of Prometheus.
tools_promtool() {
    local sysroot=$CACHE/sysroot/promtool
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading promtool (about 20 MB) ..."
        apt_sysroot "$sysroot" trixie promtool
    fi
    in_sysroot_wrapper "$sysroot" /usr/bin/promtool | install_wrapper promtool
}

# tools_storage: fetches the programs that make file systems in guests; they go into the initramfs.
tools_storage() {
    local sysroot=$CACHE/sysroot/storage
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading e2fsprogs (about 6 MB) ..."
        apt_sysroot "$sysroot" trixie e2fsprogs
    fi
}

# The modules of the boot loader: a FAT partition of a disk, a kernel, ACPI tables, messages on a serial line.
GRUB_MODULES="part_msdos part_gpt fat normal configfile search search_fs_file acpi linux boot serial terminal echo"

# firmware_there: whether ARCH's firmware and boot loader are in the cache; sets FIRMWARE to their folder. Its name has a
# hash of the boot loader's modules.
firmware_there() {
    FIRMWARE=$ARCH_CACHE/sysroot/firmware-$(sha256_of <<<"$GRUB_MODULES" | cut -c 1-12)
    [ -e "$FIRMWARE/versions" ]
}

# firmware_ready: unpacks ARCH's UEFI firmware, and makes FIRMWARE/BOOTX64.EFI (arm64: BOOTAA64.EFI), a GRUB that runs
# EFI/BOOT/grub.cfg of the disk that it is started from. The APT root of ARCH must be open.
firmware_ready() {
    if firmware_there; then
        return
    fi
    local stage tools deb
    stage=$(new_stage)
    if [ "$ARCH" = amd64 ]; then
        say "downloading OVMF and GRUB (about 20 MB) ..."
        apt_sysroot "$stage/sysroot" trixie ovmf grub-common grub-efi-amd64-bin
        grub_image "$stage" "$stage/sysroot" x86_64-efi BOOTX64.EFI
    else
        say "downloading a UEFI firmware for $ARCH and GRUB (about 20 MB) ..."
        # This program runs here, and makes images for every architecture.
        tools=$stage/tools
        apt_open
        apt_sysroot "$tools" trixie grub-common
        apt_open "$ARCH"
        apt_exactly "$stage/debs" qemu-efi-aarch64 grub-efi-arm64-bin
        mkdir "$stage/sysroot"
        for deb in "$stage"/debs/*.deb; do
            dpkg-deb -x "$deb" "$stage/sysroot"
        done
        apt_versions "$stage/debs" >"$stage/sysroot/versions"
        grub_image "$stage" "$tools" arm64-efi BOOTAA64.EFI
    fi
    publish "$stage/sysroot" "$FIRMWARE"
    rm -rf "$stage"
}

# grub_image STAGE TOOLS PLATFORM NAME: makes STAGE/sysroot/NAME with TOOLS' grub-mkimage of STAGE/sysroot's modules.
grub_image() {
    in_sysroot_wrapper "$2" /usr/bin/grub-mkimage >"$1/grub-mkimage"
    # shellcheck disable=SC2086 # a list
    bash "$1/grub-mkimage" -d "$1/sysroot/usr/lib/grub/$3" -O "$3" -p /EFI/BOOT \
        -o "$1/sysroot/$4" $GRUB_MODULES || die "cannot make GRUB's image (output above)"
}

# tools_ready: fills CACHE/bin with the host's programs and sets QEMU_VERSION. The APT root of amd64 must be open.
tools_ready() {
    tools_small
    tools_storage
    tools_qemu
    QEMU_VERSION=$(qemu_version "$CACHE/bin/qemu-system-$ARCH_QEMU")
    say "QEMU $QEMU_VERSION ($QEMU_ORIGIN)"
}
