# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2034 # the scripts that source this file use the names
#
# The architectures of the emulated machines. The machine that runs these scripts is amd64 in all cases.

# arch_open ARCH: sets what differs between machines of ARCH:
#   ARCH         Debian's name: amd64 or arm64
#   ARCH_CACHE   the directory in the cache for all that is of this architecture: kernels, initramfs, disks
#   ARCH_QEMU    QEMU's name
#   ARCH_TRIPLE  the prefix of the tools that compile for it; Debian's libraries are in a directory of that name
#   ARCH_CC      the C compiler
#   ARCH_LINUX   the kernel's name
arch_open() {
    case $1 in
    amd64)
        ARCH_CACHE=$CACHE ARCH_QEMU=x86_64 ARCH_LINUX=x86 ARCH_CC=cc ARCH_TRIPLE=x86_64-linux-gnu
        ;;
    arm64)
        ARCH_CACHE=$CACHE/arm64 ARCH_QEMU=aarch64 ARCH_LINUX=arm64
        ARCH_TRIPLE=aarch64-linux-gnu
        ARCH_CC=$ARCH_TRIPLE-gcc
        ;;
    *) die "unknown architecture '$1': give amd64 or arm64" ;;
    esac
    ARCH=$1
    mkdir -p "$ARCH_CACHE"
}
