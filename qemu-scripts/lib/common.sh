# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2034 # the scripts that source this file use some names
#
# Functions for every script here: messages, the cache directory and its lock. Source this file, do not run it.

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

# version_at_least VERSION WANTED: whether VERSION is WANTED or newer.
version_at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# sha256_of: prints the hash of standard input.
sha256_of() {
    sha256sum | cut -d ' ' -f 1
}

# cache_open: sets CACHE and creates the directory.
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

# cache_lock: lets one set-up run at a time. The lock is released when the process ends.
cache_lock() {
    exec 9>"$CACHE/lock"
    if ! flock -n 9; then
        say "waiting for another run that is filling $CACHE ..."
        flock 9
    fi
    # No other set-up runs, so a stage that is left here belongs to an interrupted run.
    rm -rf "$CACHE"/tmp.*
}

# new_stage: makes an empty directory for publish() to move into place, and prints its path.
new_stage() {
    mktemp -d "$CACHE/tmp.XXXXXX"
}

# publish STAGE TARGET: renames a finished stage to TARGET, so that TARGET is always complete.
publish() {
    chmod 755 "$1"
    if [ -e "$2" ]; then
        mv -T "$2" "$1.old"
    fi
    mkdir -p "$(dirname "$2")"
    mv -T "$1" "$2"
    rm -rf "$1.old"
}

# write_file TARGET: writes standard input to TARGET in one step.
write_file() {
    cat >"$1.tmp.$$"
    mv -f "$1.tmp.$$" "$1"
}
