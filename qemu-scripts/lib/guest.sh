# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Boots a guest that a script controls. The sourcing script must define give_up REASON, which ends the script, and set
# VIOMMU_QEMU.

BOOT_LIMIT=180 ANSWER_LIMIT=120
# Seconds after which a silent guest gets its command again.
NUDGE=15
# The number of the last command.
guest_number=0

# guest_start DIR KERNEL INITRAMFS APPEND QEMU-ARGUMENT...: boots a guest, and returns when it accepts commands. Sets
# qemu, to_guest and from_guest. Logs go to DIR.
guest_start() {
    local dir=$1 image=$2 initramfs=$3 append=$4 begun=$SECONDS line
    shift 4
    rm -f "$dir"/agent.{in,out}
    mkfifo "$dir/agent.in" "$dir/agent.out"
    # Opened for both directions, so that no open waits for the other side.
    exec {to_guest}<>"$dir/agent.in" {from_guest}<>"$dir/agent.out"
    "$VIOMMU_QEMU" -nodefaults -no-user-config -no-reboot -display none -accel tcg -cpu max "$@" \
        -chardev "file,id=console,path=$dir/console.log" -serial chardev:console \
        -chardev "pipe,id=agent,path=$dir/agent" -serial chardev:agent \
        -kernel "$image" -initrd "$initramfs" -append "console=ttyS0 panic=-1 $append" \
        </dev/null >"$dir/qemu.log" 2>&1 &
    qemu=$!
    while :; do
        kill -0 "$qemu" 2>/dev/null || give_up "QEMU has ended: $(cat "$dir/qemu.log")"
        [ $((SECONDS - begun)) -lt $BOOT_LIMIT ] || give_up "the guest is not up after $BOOT_LIMIT s"
        if read -r -t 1 line <&"$from_guest" && [ "${line%$'\r'}" = "= ready" ]; then
            break
        fi
    done
}

# guest_send COMMAND: sends the command with its number and its length, so that the guest detects lost characters; see
# guest/init.
guest_send() {
    local LC_ALL=C numbered="$guest_number $1"
    printf '%d %s\n' ${#numbered} "$numbered" >&"$to_guest"
}

# guest_end: powers the guest off and waits for QEMU.
guest_end() {
    local command="poweroff -f"
    guest_number=$((guest_number + 1))
    guest_send "$command"
    if ! await $NUDGE gone "$qemu"; then
        echo >&"$to_guest"
        guest_send "$command"
    fi
    await 60 gone "$qemu" || give_up "QEMU does not end"
    wait "$qemu" || give_up "QEMU failed"
    qemu=
    exec {to_guest}>&- {from_guest}>&-
}

# guest COMMAND: runs the command in the guest and sets ANSWER to its output; false if the command fails.
guest() {
    local line part= begun=$SECONDS
    ANSWER=
    guest_number=$((guest_number + 1))
    guest_send "$1"
    while [ $((SECONDS - begun)) -lt $ANSWER_LIMIT ]; do
        if ! IFS= read -r -t $NUDGE line <&"$from_guest"; then
            part+=$line
            # End the line of which the guest may have received a part, and send the command again.
            echo >&"$to_guest"
            guest_send "$1"
            continue
        fi
        line=$part${line%$'\r'}
        part=
        case $line in
        '|'*) ANSWER+=${ANSWER:+$'\n'}${line#|} ;;
        '= garbled') guest_send "$1" ;;
        "= $guest_number 0") return 0 ;;
        "= $guest_number "*) return 1 ;;
        # The answer to an earlier command.
        '= '*) ANSWER= ;;
        esac
    done
    give_up "the guest does not answer '$1'"
}

# must_guest COMMAND: the same, but ends the script if the command fails.
must_guest() {
    guest "$1" || give_up "'$1' failed in the guest: $ANSWER"
}

# guest_disk: loads the drivers of an NVMe disk, and waits for the disk.
guest_disk() {
    must_guest "load-storage"
    must_guest "for _ in \$(seq 100); do [ -e /dev/nvme0n1 ] && break; sleep 0.1; done; [ -e /dev/nvme0n1 ]"
}

# await SECONDS COMMAND...: repeats the command until it succeeds; false after SECONDS.
await() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

# gone PID: whether the process has ended.
gone() {
    ! kill -0 "$1" 2>/dev/null
}
