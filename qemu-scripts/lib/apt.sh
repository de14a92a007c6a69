# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# A private APT root inside the cache, one for each architecture. It resolves and downloads Debian packages of a release that may differ from
# the host's, checks their signatures, and never touches the host's own package state. Needs no root.

APT_SUITES="trixie trixie-backports"
APT_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# apt_mirror: prints the Debian mirror: VIOMMU_MIRROR, or the first one in the host's APT sources. Prints nothing if
# both are missing. No mirror is built in: the operator of the host decides which servers these scripts contact.
apt_mirror() {
    if [ -n "${VIOMMU_MIRROR:-}" ]; then
        printf '%s\n' "${VIOMMU_MIRROR%/}"
        return
    fi
    local found
    # A source may name a list of mirrors in a file instead ('mirror+file:').
    found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} /etc/apt/mirrors/*.list 2>/dev/null |
        sed 's/#.*//' | grep -oE 'https?://[^] ]+/debian/?( |$)' | tr -d ' ' | head -n 1) || true
    printf '%s\n' "${found%/}"
}

# apt_open [ARCH]: makes the APT root for packages of ARCH (default: amd64) the one that all functions here use. Writes
# its configuration, exports APT_CONFIG, sets APT_ROOT and APT_MIRROR. Does not use the network. A missing mirror is no
# error here: a warm cache does not need one.
apt_open() {
    local tool arch=${1:-amd64} root suite
    root=$CACHE/apt
    [ "$arch" = amd64 ] || root=$CACHE/$arch/apt
    APT_ROOT=$root
    [ "$(uname -m)" = x86_64 ] || die "the emulated machines run on x86-64 only; this machine is $(uname -m)"
    for tool in apt-get apt-cache apt-config dpkg-deb; do
        have "$tool" || die "$tool not found: these scripts get their guests from Debian packages and need a Debian 12 or newer"
    done
    [ -r "$APT_KEYRING" ] || die "$APT_KEYRING not found: run 'apt-get install -y debian-archive-keyring' as root"
    mkdir -p "$root"/lists/partial "$root"/archives/partial "$root"/etc/none "$root"/log
    : >"$root/status"
    : >"$root/etc/preferences"
    APT_MIRROR=$(apt_mirror)
    for suite in ${APT_MIRROR:+$APT_SUITES}; do
        echo "deb [arch=$arch signed-by=$APT_KEYRING] $APT_MIRROR $suite main"
    done | write_file "$root/etc/sources.list"
    {
        # Take over only the host's proxy settings. The host's hooks expect root.
        env -u APT_CONFIG apt-config dump Acquire::http
        env -u APT_CONFIG apt-config dump Acquire::https
        cat <<CONF
Dir::State "$root";
Dir::State::status "$root/status";
Dir::State::lists "$root/lists";
Dir::Cache "$root";
Dir::Cache::archives "$root/archives";
Dir::Log "$root/log";
Dir::Etc "$root/etc";
Dir::Etc::sourcelist "sources.list";
Dir::Etc::sourceparts "none";
Dir::Etc::preferences "preferences";
Dir::Etc::preferencesparts "none";
Dir::Etc::parts "none";
Dir::Etc::main "absent";
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Retries "5";
Acquire::Languages "none";
Debug::NoLocking "true";
CONF
    } | write_file "$root/etc/apt.conf"
    export APT_CONFIG=$root/etc/apt.conf
}

apt_update() {
    local log=$APT_ROOT/log/update
    [ -n "$APT_MIRROR" ] ||
        die "no Debian mirror: the APT sources of this machine name none; set VIOMMU_MIRROR to the URL of one, as in http://HOST/debian"
    say "fetching Debian's package lists from $APT_MIRROR ..."
    rm -f "$APT_ROOT/updated"
    if apt-get update --error-on=any >"$log" 2>&1; then
        cp "$APT_ROOT/etc/sources.list" "$APT_ROOT/updated"
        return
    fi
    sed 's/^/    /' "$log" >&2
    if grep -qE 'NO_PUBKEY|not signed|Missing key' "$log"; then
        die "this machine's debian-archive-keyring is too old to check $APT_SUITES: run 'apt-get install -y debian-archive-keyring' as root (2023.3+deb12u1 or newer is needed)"
    fi
    die "apt-get update failed (output above). Is the network there? Behind a proxy, set http_proxy; for another mirror, set VIOMMU_MIRROR=http://HOST/debian"
}

apt_lists_ready() {
    cmp -s "$APT_ROOT/etc/sources.list" "$APT_ROOT/updated" 2>/dev/null || apt_update
}

# apt_retry COMMAND...: runs the command; if it fails, fetches new package lists and runs it once more. The archive
# replaces packages, so a failure may only mean that the lists are old.
apt_retry() {
    local log=$APT_ROOT/log/fetch
    apt_lists_ready
    "$@" >"$log" 2>&1 && return
    say "the download failed; trying again with new package lists ..."
    apt_update
    "$@" >"$log" 2>&1 && return
    sed 's/^/    /' "$log" >&2
    die "cannot download packages (output above)"
}

# apt_closure DIR SUITE PACKAGE...: downloads the packages and their dependencies as DIR/*.deb.
apt_closure() {
    local dir=$1 suite=$2
    shift 2
    mkdir -p "$dir/partial"
    apt_retry apt-get install -y --download-only -o "Dir::Cache::archives=$dir" -t "$suite" "$@"
    rm -rf "$dir/partial" "$dir/lock"
}

# apt_exactly DIR PACKAGE...: downloads these packages without dependencies as DIR/*.deb.
apt_exactly() {
    local dir=$1
    shift
    mkdir -p "$dir"
    apt_retry env -C "$dir" apt-get download "$@"
}

# apt_versions DIR: prints a line 'package version' for each DIR/*.deb.
apt_versions() {
    local deb
    for deb in "$1"/*.deb; do
        # shellcheck disable=SC2016 # dpkg-deb's own variables
        dpkg-deb --show --showformat='${Package} ${Version}\n' "$deb"
    done
}

# apt_sysroot TARGET SUITE PACKAGE...: unpacks the packages and their dependencies below TARGET, and writes
# TARGET/versions.
apt_sysroot() {
    local target=$1 suite=$2 stage deb link
    shift 2
    stage=$(new_stage)
    apt_closure "$stage/debs" "$suite" "$@"
    say "unpacking $(find "$stage/debs" -name '*.deb' | wc -l) packages ..."
    mkdir -p "$stage"/usr/{bin,sbin,lib,lib64}
    for link in bin sbin lib lib64; do
        ln -s "usr/$link" "$stage/$link"
    done
    for deb in "$stage"/debs/*.deb; do
        dpkg-deb -x "$deb" "$stage"
    done
    apt_versions "$stage/debs" >"$stage/versions"
    rm -rf "$stage/debs"
    publish "$stage" "$target"
}

# in_sysroot_wrapper SYSROOT PROGRAM [SETTINGS [ARGUMENTS]]: prints a script that runs SYSROOT's PROGRAM in place with
# SYSROOT's own loader and libraries. Not a script for Debian's sh, which would drop variables with a '-' in their
# name; Cargo uses such variables, and bash keeps them.
in_sysroot_wrapper() {
    cat <<WRAPPER
#!/bin/bash
S=$1
${3:-}
exec \$S/lib64/ld-linux-x86-64.so.2 --argv0 "\$0" --library-path \$S/usr/lib/x86_64-linux-gnu \$S$2 ${4:-} "\$@"
WRAPPER
}

# install_wrapper NAME: writes standard input to the executable file CACHE/bin/NAME.
install_wrapper() {
    mkdir -p "$CACHE/bin"
    cat >"$CACHE/bin/$1.tmp.$$"
    chmod 755 "$CACHE/bin/$1.tmp.$$"
    mv -f "$CACHE/bin/$1.tmp.$$" "$CACHE/bin/$1"
}
