#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: packaging/deb.sh [--arch ARCH | --binary PROGRAM] [--output DIR]
#
# Makes a Debian package of the program, its units, manual pages, completions and examples. Builds the release program
# unless --binary names one. Needs dpkg-deb and binutils; no root, and no network beyond cargo's. Prints the package's
# path.
#
#   --arch ARCH       build for amd64 or arm64; default: this machine's. For another than this machine's, Rust needs the
#                     target, and the C compiler for it must be installed
#   --binary PROGRAM  package this program
#   --output DIR      put the package there; default: target/debian

set -euo pipefail
PACKAGING=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TREE=$(dirname "$PACKAGING")
NAME=vhost-device-iommu

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# cross ARCH: sets triple for a build for ARCH, and makes cargo link with that architecture's compiler.
cross() {
    local processor compiler variable
    case $1 in
    amd64) processor=x86_64 ;;
    arm64) processor=aarch64 ;;
    *) die "unknown architecture '$1': give amd64 or arm64" ;;
    esac
    triple=$processor-unknown-linux-gnu
    [ "$processor" = "$(uname -m)" ] && return
    compiler=$processor-linux-gnu-gcc
    command -v "$compiler" >/dev/null ||
        die "$compiler not found: run 'apt-get install -y gcc-${processor/_/-}-linux-gnu libc6-dev-$1-cross' as root"
    [ -d "$(cd "$TREE" && rustc --print sysroot)/lib/rustlib/$triple" ] ||
        die "Rust's target $triple not found: run 'rustup target add $triple'"
    variable=CARGO_TARGET_${triple^^}_LINKER
    export "${variable//-/_}=$compiler"
}

arch='' triple='' binary='' output=${CARGO_TARGET_DIR:-$TREE/target}/debian
while [ $# -gt 0 ]; do
    case $1 in
    --arch | --binary | --output)
        [ $# -ge 2 ] || die "$1 needs a value: see $0 --help"
        case $1 in
        --arch) arch=$2 ;;
        --binary) binary=$2 ;;
        --output) output=$2 ;;
        esac
        shift
        ;;
    -h | --help)
        sed -n '/^# Usage:/,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *) die "unknown argument '$1': see $0 --help" ;;
    esac
    shift
done
for tool in dpkg-deb readelf; do
    command -v $tool >/dev/null || die "$tool not found: run 'apt-get install -y dpkg binutils' as root"
done
[ -z "$arch" ] || [ -z "$binary" ] || die "--arch and --binary exclude each other: a program is of one architecture"
if [ -n "$arch" ]; then
    cross "$arch"
fi
if [ -z "$binary" ]; then
    (cd "$TREE" && cargo build --release --locked ${triple:+--target "$triple"} >&2)
    binary=${CARGO_TARGET_DIR:-$TREE/target}/${triple:+$triple/}release/$NAME
fi
[ -x "$binary" ] || die "$binary is no executable file: give --binary a program that was built"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$TREE/Cargo.toml" | head -n 1)
# binutils of this machine read the headers of every machine's programs.
case $(readelf -h "$binary" | sed -n 's/ *Machine: *//p') in
*X86-64) arch=amd64 processor=x86_64 qemu=qemu-system-x86 ;;
*AArch64) arch=arm64 processor=aarch64 qemu=qemu-system-arm ;;
*) die "$binary is for a machine that this script does not know: build it for amd64 or arm64" ;;
esac
strip=strip
if [ "$processor" != "$(uname -m)" ]; then
    strip=$processor-linux-gnu-strip
    command -v "$strip" >/dev/null || die "$strip not found: run 'apt-get install -y binutils-${processor/_/-}-linux-gnu' as root"
fi
# In Debian's order of versions, '~' puts a pre-release before its release.
version=${version/-/\~}

# The package depends on the newest version of the C library whose symbols the program uses.
libc=$(readelf -W --version-info "$binary" | grep -oE 'Name: GLIBC_[0-9.]+' | sed 's/.*_//' | sort -V | tail -n 1)
depends="libc6 (>= ${libc:?the program does not use the C library})"
for library in $(readelf -d "$binary" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
    case $library in
    libc.so.6 | libm.so.6 | libdl.so.2 | libpthread.so.0 | librt.so.1 | ld-linux-*) ;;
    libgcc_s.so.1) depends+=", libgcc-s1 (>= 4.2)" ;;
    *) die "the program needs $library, and this script does not know its package: add it to $0" ;;
    esac
done
depends+=", systemd (>= 252)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

# put MODE SOURCE TARGET: installs a file in the package.
put() {
    install -D -m "$1" "$2" "$root/$3"
}

# put_page SOURCE: installs a manual page, compressed without a time stamp, so that the package is reproducible.
put_page() {
    local name=${1##*/} section=${1##*.}
    mkdir -p "$root/usr/share/man/man$section"
    gzip -9nc "$1" >"$root/usr/share/man/man$section/$name.gz"
}

put 755 "$binary" usr/bin/$NAME
"$strip" --strip-unneeded "$root/usr/bin/$NAME"
put 644 "$PACKAGING/systemd/$NAME@.service" usr/lib/systemd/system/$NAME@.service
put 644 "$PACKAGING/systemd/$NAME@.socket" usr/lib/systemd/system/$NAME@.socket
put 644 "$PACKAGING/systemd/$NAME-adopt@.socket" "usr/lib/systemd/system/$NAME-adopt@.socket"
put 644 "$PACKAGING/systemd/$NAME-adopt@.service" "usr/lib/systemd/system/$NAME-adopt@.service"
put 644 "$PACKAGING/systemd/viommu.slice" usr/lib/systemd/system/viommu.slice
put 755 "$PACKAGING/systemd/$NAME-generator" usr/lib/systemd/system-generators/$NAME-generator
put 644 "$PACKAGING/systemd/sysusers.conf" usr/lib/sysusers.d/$NAME.conf
put 644 "$PACKAGING/systemd/tmpfiles.conf" usr/lib/tmpfiles.d/$NAME.conf
put 644 "$PACKAGING/udev/70-$NAME.rules" usr/lib/udev/rules.d/70-$NAME.rules
put 644 "$PACKAGING/completions/$NAME" usr/share/bash-completion/completions/$NAME
put 644 "$PACKAGING/completions/_$NAME" usr/share/zsh/vendor-completions/_$NAME
put 644 "$PACKAGING/completions/$NAME.fish" usr/share/fish/vendor_completions.d/$NAME.fish
put_page "$TREE/docs/$NAME.1"
put_page "$TREE/docs/$NAME.toml.5"
for file in "$TREE"/docs/examples/*.toml; do
    put 644 "$file" "usr/share/doc/$NAME/examples/$(basename "$file")"
done
for file in prometheus-rules.yml grafana-dashboard.json; do
    put 644 "$PACKAGING/monitoring/$file" usr/share/$NAME/$file
done
put 644 "$PACKAGING/debian/copyright" usr/share/doc/$NAME/copyright
put 644 "$TREE/LICENSE-BSD-3-Clause" usr/share/doc/$NAME/LICENSE-BSD-3-Clause
put 644 "$TREE/docs/operations.md" usr/share/doc/$NAME/operations.md
gzip -9nc "$TREE/CHANGELOG.md" >"$root/usr/share/doc/$NAME/changelog.gz"
mkdir -p "$root/etc/$NAME" "$root/DEBIAN"

for script in postinst prerm postrm; do
    put 755 "$PACKAGING/debian/$script" DEBIAN/$script
done
(cd "$root" && find usr -type f -exec md5sum {} + | LC_ALL=C sort -k 2 >DEBIAN/md5sums)
cat >"$root/DEBIAN/control" <<CONTROL
Package: $NAME
Version: $version
Architecture: $arch
Maintainer: The $NAME authors <$NAME@localhost>
Installed-Size: $(du -sk --exclude=DEBIAN "$root" | cut -f 1)
Depends: $depends
Suggests: $qemu (>= 10.2)
Section: admin
Priority: optional
Description: virtio-iommu for virtual machines, in a process of its own
 A vhost-user backend for virtio-iommu. Each virtual machine has a daemon, which
 is its IOMMU. The daemon checks the guest's requests and holds the mappings of
 the guest's devices. Those devices are emulated by other processes, or are
 devices of the host.
CONTROL
# Set all modes: the builder's umask must not matter.
chmod -R u=rwX,go=rX "$root"
mkdir -p "$output"
package=$output/${NAME}_${version}_$arch.deb
# Fixed time stamps make the package reproducible.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(stat -c %Y "$TREE/Cargo.toml")} \
    dpkg-deb --root-owner-group -Zxz --build "$root" "$package" >/dev/null
echo "$package"
