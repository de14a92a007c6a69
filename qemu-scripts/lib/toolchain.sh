# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Finds the machine's C compiler, and a Rust toolchain new enough for Cargo.toml: the machine's own, or else Debian's,
# run in place from the cache. Prepares both for builds for arm64, and fetches the program that runs the results here.

RUST_PACKAGES="rustc cargo rustfmt rust-clippy ca-certificates"

# cc_ready [FLAG...]: makes sure that a C compiler can link a program with these flags. Installs one if the user is
# root, and otherwise fails with the command.
# shellcheck disable=SC2119,SC2120 # the caller with arguments is in another file
cc_ready() {
    compiler_ready cc "gcc libc6-dev" "$@"
}

# arch_cc_ready [FLAG...]: the same for ARCH_CC, the compiler for the emulated machines.
arch_cc_ready() {
    case $ARCH in
    amd64) cc_ready "$@" ;;
    arm64) compiler_ready "$ARCH_CC" "gcc-aarch64-linux-gnu libc6-dev-arm64-cross" "$@" ;;
    esac
}

# compiler_ready COMPILER PACKAGES [FLAG...]: PACKAGES are the packages of Debian that have it.
compiler_ready() {
    local compiler=$1 packages=$2 install="apt-get install -y $2"
    shift 2
    compiler_links "$compiler" "$@" && return
    [ "$(id -u)" = 0 ] || die "no $compiler that can link${*:+ with $*}: run '$install' as root"
    say "installing a C compiler ($packages) ..."
    # shellcheck disable=SC2086 # a list
    apt_host_install $packages
    compiler_links "$compiler" "$@" || die "$compiler still cannot link${*:+ with $*}: see what '$install' says"
}

# compiler_links COMPILER [FLAG...]: whether it can.
compiler_links() {
    local compiler=$1 probe status=0
    shift
    have "$compiler" || return 1
    probe=$(mktemp -d)
    echo 'int main(void) { return 0; }' >"$probe/probe.c"
    "$compiler" "$@" -o "$probe/probe" "$probe/probe.c" 2>/dev/null || status=1
    rm -rf "$probe"
    return $status
}

# apt_host_install PACKAGE...: installs packages in the system itself; root only.
apt_host_install() {
    (
        unset APT_CONFIG
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 ||
            { apt-get update >/dev/null && apt-get install -y --no-install-recommends "$@" >/dev/null; }
    ) || die "apt-get install $* failed: see its output above"
}

rust_wanted() {
    sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$TREE/Cargo.toml"
}

# rust_suits: whether the cargo and rustc on PATH are new enough.
rust_suits() {
    local program version
    for program in cargo rustc; do
        version=$("$program" --version 2>/dev/null | cut -d ' ' -f 2)
        [ -n "$version" ] && version_at_least "$version" "$(rust_wanted)" || return 1
    done
}

# rust_wrapper PROGRAM [SETTINGS [ARGUMENTS]]: installs a wrapper of Debian's PROGRAM in CACHE/rust-bin.
rust_wrapper() {
    local name=$1
    shift
    in_sysroot_wrapper "$CACHE/sysroot/rust" "/usr/bin/$name" "$@" | install_wrapper "../rust-bin/$name"
}

# toolchain_ready: puts a cargo that is new enough first on PATH.
toolchain_ready() {
    if ! have cargo && [ -x "${CARGO_HOME:-${HOME:-}/.cargo}/bin/cargo" ]; then
        # rustup sets PATH for login shells only.
        PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    fi
    if rust_suits; then
        say "$(cargo --version) ($(type -P cargo))"
        cc_ready
        return
    fi
    say "no Rust $(rust_wanted) or newer on this machine"
    debian_rust_ready
    cc_ready
}

# debian_rust_ready: puts Debian's cargo first on PATH.
debian_rust_ready() {
    local bin=$CACHE/rust-bin sysroot=$CACHE/sysroot/rust settings name
    # A subshell, so that the lock ends with the download.
    (
        [ ! -e "$sysroot/versions" ] || exit 0
        cache_lock
        [ ! -e "$sysroot/versions" ] || exit 0
        say "downloading Debian's Rust (about 200 MB) ..."
        apt_open
        # shellcheck disable=SC2086 # a list
        apt_sysroot "$sysroot" trixie-backports $RUST_PACKAGES
    )
    mkdir -p "$bin"
    # A program that runs through a loader cannot find its own path: the wrapper passes the paths of its parts.
    # shellcheck disable=SC2016 # expanded when the wrapper runs
    {
        rust_wrapper rustc '' '--sysroot $S/usr'
        rust_wrapper rustdoc '' '--sysroot $S/usr'
        rust_wrapper clippy-driver 'export SYSROOT=$S/usr'
        rust_wrapper cargo-clippy
        rust_wrapper rustfmt
        rust_wrapper cargo-fmt
    }
    # cargo-clippy and cargo-fmt search these two beside their own program, which is the loader.
    for name in clippy-driver rustfmt; do
        ln -sf "$bin/$name" "$(dirname "$(readlink -f "$sysroot/lib64/ld-linux-x86-64.so.2")")/$name"
    done
    settings="export CARGO=$bin/cargo"
    if [ ! -e /etc/ssl/certs/ca-certificates.crt ]; then
        cat "$sysroot"/usr/share/ca-certificates/mozilla/*.crt | write_file "$CACHE/rust-certificates.crt"
        settings="$settings CARGO_HTTP_CAINFO=\${CARGO_HTTP_CAINFO:-\${SSL_CERT_FILE:-$CACHE/rust-certificates.crt}}"
    fi
    rust_wrapper cargo "$settings"
    PATH=$bin:$PATH
    hash -r
    rust_suits || die "the Rust of trixie-backports ($(rustc --version 2>&1 || true)) does not run or is older than $(rust_wanted): install a newer cargo and rustc and put them on PATH"
    say "$(cargo --version) (Debian's package)"
}

CROSS_TARGET=aarch64-unknown-linux-gnu

# cross_ready: prepares cargo for builds with --target CROSS_TARGET; call toolchain_ready before. False if a part cannot be
# had. CROSS_LACKS then says which part, and the cure.
cross_ready() {
    local install="apt-get install -y gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    CROSS_LACKS=
    if ! have aarch64-linux-gnu-gcc; then
        CROSS_LACKS="no C compiler for arm64: run '$install' as root"
        [ "$(id -u)" = 0 ] || return 1
        say "installing a C compiler for arm64 ..."
        (apt_host_install gcc-aarch64-linux-gnu libc6-dev-arm64-cross) || return 1
    fi
    if ! cross_std_there && have rustup; then
        say "adding Rust's target $CROSS_TARGET ..."
        rustup target add "$CROSS_TARGET" >/dev/null 2>&1 || true
    fi
    if ! cross_std_there; then
        CROSS_LACKS="Rust's standard library for $CROSS_TARGET not found: run 'rustup target add $CROSS_TARGET'"
        # The library must be of the compiler's version, so it needs Debian's compiler. A subshell, so that a failure does
        # not end this script.
        (debian_rust_ready) || return 1
        debian_rust_ready
        cross_std_debian || return 1
    fi
    CROSS_LACKS=
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
}

cross_std_there() {
    [ -d "$(rustc --print sysroot)/lib/rustlib/$CROSS_TARGET/lib" ]
}

# cross_std_debian: unpacks Debian's standard library for CROSS_TARGET beside Debian's compiler.
cross_std_debian() {
    local sysroot=$CACHE/sysroot/rust
    (
        [ ! -e "$sysroot/usr/lib/rustlib/$CROSS_TARGET" ] || exit 0
        cache_lock
        [ ! -e "$sysroot/usr/lib/rustlib/$CROSS_TARGET" ] || exit 0
        say "downloading Debian's Rust library for arm64 (about 40 MB) ..."
        stage=$(new_stage)
        apt_open arm64
        apt_exactly "$stage/debs" "libstd-rust-dev=$(sed -n 's/^libstd-rust-dev //p' "$sysroot/versions")"
        dpkg-deb -x "$stage"/debs/*.deb "$stage/root"
        mv "$stage/root/usr/lib/rustlib/$CROSS_TARGET" "$sysroot/usr/lib/rustlib/"
        rm -rf "$stage"
    ) || return 1
    cross_std_there
}

# qemu_user_ready: sets QEMU_USER to a program that runs static programs for arm64 on this machine. Not the machine's own
# one: versions differ in the system calls that they lack, and the tests know those of one version.
qemu_user_ready() {
    local sysroot=$CACHE/sysroot/qemu-user
    # A subshell, so that the lock ends with the download.
    (
        [ ! -e "$sysroot/versions" ] || exit 0
        cache_lock
        [ ! -e "$sysroot/versions" ] || exit 0
        say "downloading QEMU for programs (about 71 MB) ..."
        apt_open
        apt_sysroot "$sysroot" trixie-backports qemu-user
        find "$sysroot/usr/bin" -type f ! -name qemu-aarch64 -delete
    )
    QEMU_USER=$sysroot/usr/bin/qemu-aarch64
}

# built_program NAME BUILD...: prints the path of the test or bench that the cargo command BUILD has already built.
built_program() {
    local name=$1
    shift
    "$@" --message-format=json 2>/dev/null | grep "\"name\":\"$name\"" |
        sed -nE 's/.*"executable":"([^"]+)".*/\1/p' | tail -n 1 || true
}
