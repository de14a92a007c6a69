# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Fetches the programs for the host (QEMU, iasl and a static busybox, as CACHE/bin/*), busybox and e2fsprogs for the
# guests, and a UEFI firmware with a boot loader.

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
# hash of the boot loader's modules. For arm64 there is no boot loader.
firmware_there() {
    if [ "$ARCH" = arm64 ]; then
        FIRMWARE=$ARCH_CACHE/sysroot/firmware
        [ -e "$FIRMWARE/versions" ]
        return
    fi
    FIRMWARE=$CACHE/sysroot/firmware-$(sha256_of <<<"$GRUB_MODULES" | cut -c 1-12)
    [ -e "$FIRMWARE/versions" ]
}

# firmware_ready: unpacks ARCH's UEFI firmware. For amd64 it makes FIRMWARE/BOOTX64.EFI, too, a GRUB that runs
# EFI/BOOT/grub.cfg of the disk that it is started from.
firmware_ready() {
    if firmware_there; then
        return
    fi
    local stage
    if [ "$ARCH" = arm64 ]; then
        say "downloading a UEFI firmware for arm64 (about 10 MB) ..."
        apt_sysroot "$FIRMWARE" trixie qemu-efi-aarch64
        return
    fi
    say "downloading OVMF and GRUB (about 20 MB) ..."
    stage=$(new_stage)
    apt_sysroot "$stage/sysroot" trixie ovmf grub-common grub-efi-amd64-bin
    in_sysroot_wrapper "$stage/sysroot" /usr/bin/grub-mkimage >"$stage/grub-mkimage"
    # shellcheck disable=SC2086 # a list
    bash "$stage/grub-mkimage" -d "$stage/sysroot/usr/lib/grub/x86_64-efi" -O x86_64-efi -p /EFI/BOOT \
        -o "$stage/sysroot/BOOTX64.EFI" $GRUB_MODULES || die "cannot make GRUB's image (output above)"
    publish "$stage/sysroot" "$FIRMWARE"
    rm -rf "$stage"
}

# tools_ready: fills CACHE/bin with the host's programs and sets QEMU_VERSION. The APT root of amd64 must be open.
tools_ready() {
    tools_small
    tools_storage
    tools_qemu
    QEMU_VERSION=$(qemu_version "$CACHE/bin/qemu-system-$ARCH_QEMU")
    say "QEMU $QEMU_VERSION ($QEMU_ORIGIN)"
}
