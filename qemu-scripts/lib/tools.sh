# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# The programs the guests need on the host: QEMU, iasl and a static busybox, as CACHE/bin/*; and e2fsprogs, for
# the guests themselves.

QEMU_OLDEST=10.2
QEMU_DEVICE=vhost-user-test-device-pci

# qemu_version PROGRAM
qemu_version() {
    "$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'
}

# qemu_suits PROGRAM: new enough, and built with the device that carries ours.
qemu_suits() {
    local version
    version=$(qemu_version "$1")
    [ -n "$version" ] && version_at_least "$version" "$QEMU_OLDEST" || return 1
    # Not a pipe: grep -q would stop reading and QEMU's death by SIGPIPE would count as a failure.
    grep -q "\"$QEMU_DEVICE\"" <<<"$("$1" -device help 2>/dev/null)"
}

# The host's own QEMU when it suits, else the newest of Debian, unpacked beside the system.
tools_qemu() {
    local found sysroot=$CACHE/sysroot/qemu
    found=$(type -P qemu-system-x86_64 || true)
    if [ -n "$found" ] && [ "$found" != "$CACHE/bin/qemu-system-x86_64" ] && qemu_suits "$found"; then
        printf '#!/bin/sh\nexec %s "$@"\n' "$found" | install_wrapper qemu-system-x86_64
        QEMU_ORIGIN=$found
        return
    fi
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading QEMU (about 40 MB) ..."
        apt_sysroot "$sysroot" trixie-backports qemu-system-x86
    fi
    # shellcheck disable=SC2016 # expanded when the wrapper runs
    in_sysroot_wrapper "$sysroot" /usr/bin/qemu-system-x86_64 \
        'export QEMU_MODULE_DIR=$S/usr/lib/x86_64-linux-gnu/qemu' \
        '-L $S/usr/share/qemu -L $S/usr/share/seabios -L $S/usr/lib/ipxe/qemu' |
        install_wrapper qemu-system-x86_64
    QEMU_ORIGIN="Debian's package"
    qemu_suits "$CACHE/bin/qemu-system-x86_64" ||
        die "QEMU $(qemu_version "$CACHE/bin/qemu-system-x86_64" || true) of trixie-backports has no $QEMU_DEVICE (QEMU $QEMU_OLDEST or newer has): put one on PATH that has, or remove $sysroot to fetch the archive's present one"
}

tools_small() {
    local sysroot=$CACHE/sysroot/tools
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading busybox and iasl (about 7 MB) ..."
        apt_sysroot "$sysroot" trixie busybox-static acpica-tools
    fi
    in_sysroot_wrapper "$sysroot" /usr/bin/iasl | install_wrapper iasl
    # Static: it runs on the host and in the guests alike.
    install_wrapper busybox <"$sysroot/usr/bin/busybox"
}

# What makes file systems in guests: its programs go into the initramfs.
tools_storage() {
    local sysroot=$CACHE/sysroot/storage
    if [ ! -e "$sysroot/versions" ]; then
        say "downloading e2fsprogs (about 6 MB) ..."
        apt_sysroot "$sysroot" trixie e2fsprogs
    fi
}

# Fills CACHE/bin and sets QEMU_VERSION.
tools_ready() {
    tools_small
    tools_storage
    tools_qemu
    QEMU_VERSION=$(qemu_version "$CACHE/bin/qemu-system-x86_64")
    say "QEMU $QEMU_VERSION ($QEMU_ORIGIN)"
}
