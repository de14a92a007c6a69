# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2034 # some names are for those that source this
#
# What every script here shares: messages, the cache directory and its lock. Sourced, never run.

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TREE=$(cd "$SCRIPTS/.." && pwd)

say() {
    printf '%s\n' "$*" >&2
}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# usage: prints the comment block at the top of the running script.
usage() {
    sed -n '/^# Usage:/,/^$/s/^# \{0,1\}//p' "$0"
}

# version_at_least VERSION WANTED
version_at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# sha256_of: the hash of standard input.
sha256_of() {
    sha256sum | cut -d ' ' -f 1
}

# Sets CACHE and makes sure that it is there.
cache_open() {
    CACHE=${VIOMMU_CACHE:-${XDG_CACHE_HOME:-${HOME:?is not set: set VIOMMU_CACHE to a directory}/.cache}/vhost-device-iommu}
    mkdir -p "$CACHE" || die "cannot create the cache directory $CACHE: set VIOMMU_CACHE to another one"
    CACHE=$(cd "$CACHE" && pwd)
    case $CACHE in
    *[!A-Za-z0-9_./+@%,=-]*)
        die "the cache directory '$CACHE' has a blank or special character in its name: set VIOMMU_CACHE to another one"
        ;;
    esac
}

# One set-up at a time; the lock goes with the process.
cache_lock() {
    exec 9>"$CACHE/lock"
    if ! flock -n 9; then
        say "waiting for another run that is filling $CACHE ..."
        flock 9
    fi
    # Nobody else is at work, so whatever is left here is a stopped run's.
    rm -rf "$CACHE"/tmp.*
}

# new_stage: prints a fresh directory which publish() later moves into place.
new_stage() {
    mktemp -d "$CACHE/tmp.XXXXXX"
}

# publish STAGE TARGET: what is in TARGET is always whole, as only a finished stage is renamed to it.
publish() {
    chmod 755 "$1"
    if [ -e "$2" ]; then
        mv -T "$2" "$1.old"
    fi
    mkdir -p "$(dirname "$2")"
    mv -T "$1" "$2"
    rm -rf "$1.old"
}

# write_file TARGET: standard input, put in place in one step.
write_file() {
    cat >"$1.tmp.$$"
    mv -f "$1.tmp.$$" "$1"
}
