# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck disable=SC2154 # test.sh, which sources this file, sets some names
#
# The parts of the suites unit, restart and operations for arm64: test programs under qemu-user and in a Debian for arm64,
# and the package.

# The test programs that run under qemu-user: the library's own tests, the program's, and integration tests that start the
# daemon for a command only. qemu-user lacks io_submit, with which the daemon signals eventfds: no VM can be served there.
IN_QEMU_USER="vhost_device_iommu vhost-device-iommu cli page_table viot"
# The test programs that run in an arm64 machine, with the daemon in its sandbox.
IN_ARM64_MACHINE="sandbox epoch_model shadow hotplug requests"
# Seconds of the stress of the epochs there.
ARM64_STRESS=60
# Seconds for all tests in one boot of the arm64 machine: six minutes of them are the model of the epochs.
ARM64_LIMIT=2400

# arm64_skipped NAME: prints the tests of the program NAME that cannot run under qemu-user and run in the arm64 machine
# instead: lib/arm64-skips has them, each with the reason.
arm64_skipped() {
    sed -nE "s/^$1 +([a-z0-9_:]+) .*/\\1/p" "$SCRIPTS/lib/arm64-skips"
}

# arm64_daemon: prints the path of the daemon that cargo builds with the tests.
arm64_daemon() {
    echo "${CARGO_TARGET_DIR:-$TREE/target}/$CROSS_TARGET/debug/vhost-device-iommu"
}

# arm64_daemon_wrapped: puts a script in place of the daemon that cargo has built, so that tests can start it here. cargo
# puts the program back at its next call.
arm64_daemon_wrapped() {
    local program
    program=$(arm64_daemon)
    mv -f "$program" "$program.arm64"
    printf '#!/bin/sh\nexec %s %s "$@"\n' "$QEMU_USER" "$program.arm64" >"$program"
    chmod 755 "$program"
}

arm64_unit() {
    local name path program programs tests=() skip
    for name in $IN_QEMU_USER $IN_ARM64_MACHINE; do
        [ ! -e "$TREE/tests/$name.rs" ] && [ ! -e "$TREE/tests/$name" ] || tests+=("--test=$name")
    done
    qemu_user_ready
    step "unit: cross-build" arm64_cargo --lib --bins "${tests[@]}"
    mapfile -t programs < <(arm64_programs --lib --bins "${tests[@]}")
    arm64_daemon_wrapped
    for program in "${programs[@]}"; do
        read -r name path <<<"$program"
        [[ " $IN_QEMU_USER " == *" $name "* ]] || continue
        mapfile -t skip < <(arm64_skipped "$name" | sed 's/^/--skip=/')
        step "unit: $name under qemu-user" "$QEMU_USER" "$path" --exact "${skip[@]}"
    done
    if [ $quick = no ]; then
        arm64_machine "unit: in an arm64 machine" "$IN_ARM64_MACHINE" "${programs[@]}"
    fi
}

# arm64_machine STEP NAMES 'NAME PATH'...: runs the programs of NAMES, and the tests of the others that cannot run under
# qemu-user, in an arm64 machine with four processors, in a step STEP.
arm64_machine() {
    local step=$1 names=$2 program name path daemon built files=() folder
    shift 2
    folder=$LOGS/arm64-$(tr -c 'a-z0-9\n' - <<<"$step")
    daemon=$(arm64_daemon)
    built=$daemon
    # arm64_daemon_wrapped has moved it.
    [ ! -e "$daemon.arm64" ] || built=$daemon.arm64
    mkdir -p "$folder"
    "$ARCH_TRIPLE-strip" -o "$folder/vhost-device-iommu" "$built"
    # The tests start the daemon at the path where cargo has built it.
    cat >"$folder/machine" <<SCRIPT
mkdir -p ${daemon%/*} && cp vhost-device-iommu $daemon || exit
export SHADOW_STRESS_SECONDS=$ARM64_STRESS
status=0
# run PROGRAM ARGUMENT...
run() {
    echo "--- \$*" | cut -c 1-100
    "./\$@" --test-threads=4 || status=1
}
SCRIPT
    for program in "$@"; do
        read -r name path <<<"$program"
        if [[ " $names " == *" $name "* ]]; then
            echo "run $name" >>"$folder/machine"
        elif [ -n "$(arm64_skipped "$name")" ]; then
            echo "run $name --exact $(arm64_skipped "$name" | tr '\n' ' ')" >>"$folder/machine"
        else
            continue
        fi
        "$ARCH_TRIPLE-strip" -o "$folder/$name" "$path"
        files+=(--file "$folder/$name")
    done
    echo "exit \$status" >>"$folder/machine"
    step "$step" "$SCRIPTS/debian.sh" --arch arm64 --processors 4 --memory 2G --timeout "$ARM64_LIMIT" \
        --log "$folder-console.log" --file "$folder/machine" --file "$folder/vhost-device-iommu" "${files[@]}" -- \
        sh machine
}

# The daemon that dies is one for arm64 in the first part, and has a guest of arm64 in the second.
arm64_restart() {
    local programs
    step "restart: cross-build" arm64_cargo --bins --test=restart
    # A daemon that the suite unit has replaced by a script.
    rm -f "$(arm64_daemon).arm64"
    if [ $quick = yes ]; then
        return
    fi
    mapfile -t programs < <(arm64_programs --bins --test=restart | grep '^restart ')
    [ ${#programs[@]} -gt 0 ] || return 0
    arm64_machine "restart: in an arm64 machine" restart "${programs[@]}"
    step "restart: guests" cargo test --locked --no-fail-fast --test guest -- --ignored restart::
}

# arm64_package_is_right PACKAGE: whether it is a package for arm64, and its program is one for that processor.
arm64_package_is_right() {
    local folder machine
    folder=$(mktemp -d)
    dpkg-deb -x "$1" "$folder"
    machine=$(readelf -h "$folder/usr/bin/vhost-device-iommu" | sed -n 's/ *Machine: *//p')
    rm -rf "$folder"
    dpkg-deb --field "$1" Architecture Depends Suggests
    echo "Machine of the program: $machine"
    [ "$machine" = AArch64 ] && [ "$(dpkg-deb --field "$1" Architecture)" = arm64 ]
}

arm64_operations() {
    local package program build=(--test operations)
    # No test here measures speed, so the build is quick.
    step "operations: package" env CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=1 \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 packaging/deb.sh --arch arm64 --output "$LOGS"
    package=$(find "$LOGS" -name '*_arm64.deb')
    [ -n "$package" ] || return 0
    step "operations: the package's processor" arm64_package_is_right "$package"
    if [ $quick = yes ]; then
        return
    fi
    step "operations: build" arm64_cargo "${build[@]}"
    program=$(arm64_programs "${build[@]}" | sed -n 's/^operations //p')
    [ -n "$program" ] || return 0
    "$ARCH_TRIPLE-strip" -o "$LOGS/operations" "$program"
    step "operations: services" "$SCRIPTS/debian.sh" --arch arm64 --devices --timeout "$ARM64_LIMIT" \
        --log "$LOGS/debian-console.log" --file "$package" --file "$LOGS/operations" -- \
        ./operations --ignored --test-threads=1
}
