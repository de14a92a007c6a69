# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Builds the initramfs of a guest (busybox, the kernel's modules, the programs of guest/*.c and guest/init), that of a
# guest with a disk (in addition more modules, mke2fs, guest/storage), and that of the L1 machine (busybox and l1/init).

GUEST_CFLAGS="-std=gnu11 -O2 -Wall -Wextra -static"

# guest_programs DIR OUT: compiles every DIR/NAME.c to the static program OUT/NAME.
guest_programs() {
    local source name
    for source in "$1"/*.c; do
        [ -e "$source" ] || continue
        name=$(basename "$source" .c)
        # shellcheck disable=SC2086 # a list
        "$ARCH_CC" $GUEST_CFLAGS -o "$2/$name" "$source" || die "cannot compile $source (output above)"
        "$ARCH_TRIPLE-strip" "$2/$name" 2>/dev/null || true
    done
}

# initramfs KERNEL_DIR: sets INITRAMFS to the path of a guest's initramfs, and builds the file if it is missing. The
# file's name has a hash of the parts.
initramfs() {
    local kernel=$1 init=$SCRIPTS/guest/init key stage root release
    [ -e "$init" ] || init=$SCRIPTS/lib/init-boot-only
    release=$(cat "$kernel/release")
    key=$(initramfs_key "$kernel/modules" "$kernel/cards" "$init" "$SCRIPTS/guest")
    INITRAMFS=$ARCH_CACHE/initramfs/$release-$key.cpio
    if [ -e "$INITRAMFS" ]; then
        touch "$INITRAMFS"
        return
    fi
    say "building the initramfs of $release ..."
    stage=$(new_stage)
    root=$stage/root
    mkdir -p "$root"/{bin,lib/modules/viommu}
    guest_programs "$SCRIPTS/guest" "$root/bin"
    cp "$kernel"/modules/* "$root/lib/modules/viommu/"
    # The kernel of L1 has no modules.
    [ ! -e "$kernel/cards" ] || cp -r "$kernel/cards" "$root/lib/modules/"
    initramfs_pack "$stage" "$init"
}

# storage_initramfs KERNEL_DIR: sets INITRAMFS to the path of the initramfs of a guest with a disk. Call initramfs with
# this kernel before: its file is the first part of the new one. Guests of another architecture than this machine's get
# no e2fsprogs.
storage_initramfs() {
    local kernel=$1 base=$INITRAMFS sysroot=$CACHE/sysroot/storage stage root key
    key=$(initramfs_key "$base" "$kernel/storage" "$SCRIPTS/guest/storage" "$sysroot/versions")
    INITRAMFS=$ARCH_CACHE/initramfs/$(cat "$kernel/release")-storage-$key.cpio
    if [ -e "$INITRAMFS" ]; then
        touch "$INITRAMFS"
        return
    fi
    stage=$(new_stage)
    root=$stage/root
    mkdir -p "$root"/{bin,lib/modules/storage,lib/e2fsprogs}
    cp "$kernel"/storage/* "$root/lib/modules/storage/"
    guest_programs "$SCRIPTS/guest/storage" "$root/bin"
    cp "$SCRIPTS/guest/storage/load-storage" "$root/bin/"
    if [ "$ARCH" = amd64 ]; then
        guest_e2fsprogs "$sysroot" "$root"
    fi
    chmod -R u=rwX,go=rX "$root"
    chmod 755 "$root"/bin/*
    {
        cat "$base"
        cpio_of "$root"
    } >"$stage/initramfs"
    mv -f "$stage/initramfs" "$INITRAMFS"
    rm -rf "$stage"
}

# guest_e2fsprogs SYSROOT ROOT: copies SYSROOT's mkfs.ext4 and fsck.ext4 with their libraries to ROOT and makes them
# programs of /bin. Not under their other names, such as mke2fs: busybox's shell would run its own applets of those names.
guest_e2fsprogs() {
    local lib=$2/lib/e2fsprogs name loader=$1/lib64/ld-linux-x86-64.so.2 libraries=$1/usr/lib/x86_64-linux-gnu
    cp -L "$loader" "$lib/"
    for name in mkfs.ext4 fsck.ext4; do
        cp -L "$1/usr/sbin/$name" "$lib/"
        "$loader" --library-path "$libraries" --list "$1/usr/sbin/$name" |
            sed -n "s|.* => \\($libraries/[^ ]*\\) .*|\\1|p" | xargs cp -Lt "$lib"
        printf '#!/bin/sh\nexec %s/ld-linux-x86-64.so.2 --argv0 %s --library-path %s %s/%s "$@"\n' \
            /lib/e2fsprogs "$name" /lib/e2fsprogs /lib/e2fsprogs "$name" >"$2/bin/$name"
    done
}

# l1_initramfs: sets INITRAMFS to the path of the L1 machine's initramfs, which fits every kernel.
l1_initramfs() {
    local stage
    INITRAMFS=$ARCH_CACHE/initramfs/l1-$(initramfs_key "$SCRIPTS/l1/init").cpio
    if [ -e "$INITRAMFS" ]; then
        touch "$INITRAMFS"
        return
    fi
    stage=$(new_stage)
    mkdir -p "$stage/root/bin"
    initramfs_pack "$stage" "$SCRIPTS/l1/init"
}

# initramfs_key PART...: prints the hash of the parts of an initramfs, busybox and this file included.
initramfs_key() {
    # The names count, too: a renamed program changes the initramfs.
    find "$GUEST_BUSYBOX" "$@" "${BASH_SOURCE[0]}" -type f -exec sha256sum {} + 2>/dev/null |
        LC_ALL=C sort | sha256_of | cut -c 1-12 || true
}

# initramfs_pack STAGE INIT: adds busybox and the program INIT to STAGE/root, and packs it into the file INITRAMFS.
initramfs_pack() {
    local stage=$1 init=$2 root=$1/root name
    mkdir -p "$root"/{dev,proc,sys,run,tmp,etc}
    cp "$GUEST_BUSYBOX" "$root/bin/busybox"
    "$CACHE/bin/busybox" --list | while read -r name; do
        # A guest program replaces an applet of its name.
        [ -e "$root/bin/$name" ] || ln -s busybox "$root/bin/$name"
    done
    # Some programs expect `sh` and others here.
    ln -s bin "$root/sbin"
    cp "$init" "$root/init"
    chmod -R u=rwX,go=rX "$root"
    chmod 755 "$root/init"
    cpio_of "$root" >"$stage/initramfs"
    mkdir -p "$ARCH_CACHE/initramfs"
    mv -f "$stage/initramfs" "$INITRAMFS"
    rm -rf "$stage"
    # Other trees may use their own files: remove only those that have been unused for a week.
    find "$ARCH_CACHE/initramfs" -name '*.cpio' -mtime +7 -delete
}

# cpio_of ROOT: prints ROOT as an archive for the kernel. Not compressed: an emulated guest unpacks more slowly than it
# loads.
cpio_of() {
    (cd "$1" && find . | LC_ALL=C sort | "$CACHE/bin/busybox" cpio -o -H newc -R 0:0 2>/dev/null)
}
