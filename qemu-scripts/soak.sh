#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/soak.sh [--hours H] [--seed N]
#
# Runs a daemon under everything at once: a guest that maps, unmaps and moves endpoints, two device servers with a
# client each, two shadow readers, operators who ask and who add and remove endpoints, and kills of all these
# processes. The guest compares the daemon's mappings and domains with its own at intervals, and stamped pages show
# every access through a mapping that is gone. The daemon's descriptors, threads and memory must not grow. Needs
# neither root nor KVM nor a VM.
#
#   --hours H   the duration, a decimal fraction too; default: 1
#   --seed N    the seed of the random numbers; default: the process ID
#
# A line for each interval shows the counts so far and the daemon's descriptors, threads and memory. All output is in
# target/test-logs/soak.log, too. The exit status is 0 only if every check passes.

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/apt.sh"
. "$SCRIPTS/lib/toolchain.sh"

hours=1
while [ $# -gt 0 ]; do
    case $1 in
    --hours | --seed)
        [ $# -ge 2 ] || die "$1 needs a value: see $0 --help"
        [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "'$2' is no number: see $0 --help"
        case $1 in
        --hours) hours=$2 ;;
        --seed) export VIOMMU_KILLS_SEED=$2 ;;
        esac
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) die "unknown argument '$1': see $0 --help" ;;
    esac
    shift
done
VIOMMU_SOAK_SECONDS=$(awk -v hours="$hours" 'BEGIN { printf "%d", hours * 3600 }')
export VIOMMU_SOAK_SECONDS CARGO_TERM_COLOR=never

cache_open
cd "$TREE"
toolchain_ready
build=(cargo test --locked --test kills --no-run)
"${build[@]}"
program=$(built_program kills "${build[@]}")
[ -n "$program" ] || die "cargo has built no test program: see its messages above"
logs=${CARGO_TARGET_DIR:-$TREE/target}/test-logs
mkdir -p "$logs"
"$program" soak::everything_together --ignored --exact --nocapture </dev/null 2>&1 | tee "$logs/soak.log"
