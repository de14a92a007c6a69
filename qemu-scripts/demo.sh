#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Usage: qemu-scripts/demo.sh
#
# Builds the daemon, makes it the IOMMU of a stock Linux guest in an unmodified QEMU, and shows each step from the
# guest's side and from the daemon's. Fetches its requirements first (see setup.sh): no root, no KVM.
# Ends by itself, with status 0 only if every check passes.
#
# Environment: VIOMMU_CACHE, VIOMMU_MIRROR and http_proxy as for setup.sh.

set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$SCRIPTS/lib/apt.sh"
. "$SCRIPTS/lib/toolchain.sh"
. "$SCRIPTS/lib/guest.sh"

case ${1:-} in
'') ;;
-h | --help)
    usage
    exit 0
    ;;
*) die "unknown argument '$1': see $0 --help" ;;
esac

# The endpoints' addresses, and the region that the configuration reserves for the second one.
FIRST=0000:00:10.0 SECOND=0000:00:11.0
ENDPOINTS=("$FIRST" "$SECOND")
OWN_RESERVED="^0x0000000010000000 0x000000001000ffff (direct|reserved)\$"

wrong=0 daemon='' server='' qemu=''

title() {
    printf '\n== %s\n\n' "$*"
}

indent() {
    sed 's/^/    /'
}

# check CLAIM COMMAND...: prints whether CLAIM holds, that is, whether the command succeeds.
check() {
    local claim=$1
    shift
    if "$@"; then
        printf '[ok]    %s\n' "$claim"
    else
        printf '[WRONG] %s\n' "$claim"
        wrong=$((wrong + 1))
    fi
}

# give_up REASON: ends the demonstration as failed.
give_up() {
    printf '[WRONG] %s\n' "$*"
    wrong=$((wrong + 1))
    exit 1
}

finish() {
    local status=$? pid
    for pid in $qemu $daemon $server; do
        kill "$pid" 2>/dev/null || continue
        await 5 gone "$pid" || kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    if [ $status -ne 0 ] || [ $wrong -ne 0 ]; then
        say "the guest's console, QEMU's output and the daemon's log are in $work"
        exit 1
    fi
    rm -rf "$work"
}

ctl() {
    "$program" ctl "$work/control.sock" "$@"
}

# domain_of ENDPOINT: prints the endpoint's domain as the daemon reports it.
domain_of() {
    ctl status | sed -n "s/^ *$1 .* domain \([0-9]*\)\$/\1/p"
}

# guest_pages DUMP: prints every page that the program in the guest has mapped, as 'IOVA GPA ACCESS'.
guest_pages() {
    local kind a b access index i
    local -A gpa
    while read -r kind a b access index; do
        case $kind in
        b) gpa[$a]=$((16#$b)) ;;
        m)
            for ((i = 0; i < b; i++)); do
                printf '%#x %#x %s\n' $((16#$a + i * 4096)) "${gpa[$((index + i))]}" "$access"
            done
            ;;
        esac
    done <<<"$1" | sort
}

# daemon_pages DOMAIN: prints every page that the daemon holds for the domain, in the same form.
daemon_pages() {
    local line i
    local form='^ *(0x[0-9a-f]+)\.\.=(0x[0-9a-f]+) +-> (0x[0-9a-f]+) +([r-][w-])'
    while IFS= read -r line; do
        [[ $line =~ $form ]] || continue
        for ((i = 0; BASH_REMATCH[1] + i <= BASH_REMATCH[2]; i += 4096)); do
            printf '%#x %#x %s\n' $((BASH_REMATCH[1] + i)) $((BASH_REMATCH[3] + i)) "${BASH_REMATCH[4]}"
        done
    done < <(ctl mappings --domain "$1") | sort
}

# requests KIND: prints how many requests of this kind succeeded, according to the status text in STATUS.
requests() {
    sed -n "s/^  $1 .*\bok \([0-9]*\).*/\1/p" <<<"$STATUS"
}

# no_refusals: whether STATUS shows MAP and UNMAP requests, and no request of any kind that was refused.
no_refusals() {
    ! grep -E '^  (attach|detach|map|unmap|probe) ' <<<"$STATUS" | grep -qvE '^  [a-z]+ +(none|ok [0-9]+)$' &&
        [ -n "$(requests map)" ] && [ -n "$(requests unmap)" ]
}

cache_open
cd "$TREE"
title "Getting ready"
toolchain_ready
setup=$("$SCRIPTS/setup.sh" --print)
set -a
eval "$setup"
set +a
say "building the daemon and the NVMe device ..."
cargo build --release --locked --bins --example nvme
built=${CARGO_TARGET_DIR:-$TREE/target}/release
program=$built/vhost-device-iommu

# Not below the tree: a socket's path has a length limit.
work=$(mktemp -d "${TMPDIR:-/tmp}/viommu-demo-XXXXXX")
trap finish EXIT
trap 'exit 130' INT TERM
# Oldest first.
entry=${VIOMMU_KERNELS##* }
IFS=: read -r _ release image initramfs <<<"$entry"
IFS=: read -r _ _ _ storage_initramfs <<<"${VIOMMU_STORAGE_KERNELS##* }"

title "One file for the VM"
cat >"$work/vm.toml" <<TOML
socket = "$work/iommu.sock"
control = "$work/control.sock"
address = "00:05.0"     # the IOMMU
memory = "512M"

[[endpoint]]
address = "${FIRST#0000:}"

[[endpoint]]
address = "${SECOND#0000:}"
reserved = [{ first = 0x10000000, last = 0x1000ffff, kind = "reserved" }]
TOML
indent <"$work/vm.toml"

"$program" viot "$work/vm.toml" -o "$work/vm.viot"
mapfile -t arguments < <("$program" qemu-args "$work/vm.toml" --viot "$work/vm.viot" 2>/dev/null)
[ ${#arguments[@]} -gt 0 ] || give_up "no QEMU arguments"
echo
echo "The daemon's program makes two things from this file: the ACPI table that tells the guest which devices are"
echo "behind the IOMMU, and the arguments that an unmodified QEMU needs:"
echo
printf '%s %s\n' "${arguments[@]}" | indent

title "The daemon and QEMU $VIOMMU_QEMU_VERSION with Linux $release start"
"$program" --config "$work/vm.toml" >"$work/daemon.log" 2>&1 &
daemon=$!
await 10 test -S "$work/iommu.sock" || give_up "the daemon does not start: $(cat "$work/daemon.log")"

begun=$SECONDS
guest_start "$work" "$image" "$initramfs" "" "${arguments[@]}" -device edu,addr=10.0 -device edu,addr=11.0
must_guest "uname -r"
check "the guest runs $ANSWER, up after $((SECONDS - begun)) s" test "$ANSWER" = "$release"
check "a VM is connected to the daemon" grep -q '^[^ ]*: a VM is connected' <<<"$(ctl status)"

title "The guest's own driver finds the IOMMU and asks for its endpoints"
must_guest "vfio_bind ${ENDPOINTS[*]}"
must_guest "dmesg | grep -iE 'viot|virtio_iommu|iommu group' | sed 's/^<[0-9]*>//'"
indent <<<"$ANSWER"
echo
guest "test -e /sys/bus/virtio/drivers/virtio_iommu/virtio0" && bound=yes || bound=no
check "the stock driver virtio_iommu is bound to the device" test "$bound" = yes
groups=()
for endpoint in "${ENDPOINTS[@]}"; do
    at=/sys/bus/pci/devices/$endpoint/iommu_group
    must_guest "basename \$(readlink $at)"
    group=$ANSWER
    groups+=("$group")
    must_guest "cat $at/reserved_regions"
    regions=$ANSWER
    must_guest "cat $at/type"
    echo
    echo "$endpoint is in IOMMU group $group (type $ANSWER); the guest leaves these addresses alone:"
    indent <<<"$regions"
    check "the interrupt window is among them" grep -q '^0x00000000fee00000 0x00000000feefffff msi$' <<<"$regions"
    if [ "$endpoint" = "$SECOND" ]; then
        check "and so is the region that the file reserves for this endpoint" grep -qE "$OWN_RESERVED" <<<"$regions"
    else
        check "and no other region is" test "$(wc -l <<<"$regions")" -eq 1
    fi
done
echo
check "each endpoint has a group of its own" test "${groups[0]}" != "${groups[1]}"

title "The daemon reports the same"
STATUS=$(ctl status)
indent <<<"$STATUS"
echo
for endpoint in "${ENDPOINTS[@]}"; do
    check "$endpoint is attached to a domain and its DMA is translated" \
        grep -qE "^ *$endpoint +attached +translated +domain [0-9]+\$" <<<"$STATUS"
done

title "A program in the guest makes and removes mappings through VFIO"
must_guest "start mapper vfio-map --seed 7 --live 40 $FIRST"
must_guest "ask mapper churn 400"
echo "the program (400 mappings made at random, some removed again):"
indent <<<"$ANSWER"
must_guest "ask mapper dump"
guest_pages "$ANSWER" >"$work/guest-pages"
domain=$(domain_of "$FIRST")
[ -n "$domain" ] || give_up "$FIRST has no domain: $(ctl status)"
daemon_pages "$domain" >"$work/daemon-pages"
echo
echo "the daemon, the first lines of its domain $domain:"
ctl mappings --domain "$domain" | sed -n '1,6p' | indent
echo
check "the program has $(wc -l <"$work/guest-pages") pages mapped" test -s "$work/guest-pages"
check "the daemon holds exactly these: same addresses, same memory, same permissions" \
    cmp -s "$work/guest-pages" "$work/daemon-pages"
read -r iova gpa _ <"$work/guest-pages"
translation=$(ctl translate "$FIRST" "$iova")
echo
echo "the daemon translates $iova for the device:"
indent <<<"$translation"
check "that is the guest's own page, at $gpa" grep -q "guest-physical $gpa\\b" <<<"$translation"

title "The program removes everything"
must_guest "ask mapper clear"
indent <<<"$ANSWER"
STATUS=$(ctl status)
sed -n '/^domains/,$p' <<<"$STATUS" | indent
echo
held=$(daemon_pages "$domain" | wc -l)
check "the daemon holds no mapping of it any more" test "$held" -eq 0
check "$(requests map) MAP and $(requests unmap) UNMAP requests were carried out, no request was refused" no_refusals
translation=$(ctl translate "$FIRST" "$iova")
check "the device would reach nothing at $iova now: ${translation}" grep -q '^fault' <<<"$translation"
must_guest "ask mapper quit"
given_back() { [ "$(ctl status | grep -c 'attached *translated')" -eq ${#ENDPOINTS[@]} ]; }
check "the program releases the device, which is back in its default domain" await 10 given_back

title "The guest powers off"
guest_end
vm_gone() { grep -q '^[^ ]*: no VM is connected' <<<"$(ctl status)"; }
check "QEMU has ended; the daemon lives and waits for the next VM" await 10 vm_gone
kill "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
check "after SIGTERM the daemon ends with status 0" test $status -eq 0

disk=0000:00:06.0
guest_memory() { find "/proc/$1/fd" -printf '%l\n' 2>/dev/null | grep -c memory-backend-memfd; }
faults() { guest "dmesg | grep 'virtio_iommu.* fault .* at $outside '" && [ "$(wc -l <<<"$ANSWER")" -eq 2 ]; }

# disk_part KEY WAY: a guest with a disk behind the IOMMU. KEY is the configuration's key of the socket, and so the
# transport of the IOMMU; WAY names it.
disk_part() {
    local sum access answer outside=0x1000000 done
    title "A disk that another process emulates, behind the IOMMU $2"
    cat >"$work/disk.toml" <<TOML
$1 = "$work/iommu.sock"
control = "$work/control.sock"
address = "00:05.0"
memory = "256M"

[[endpoint]]
address = "${disk#0000:}"
vfio-user = { listen = "$work/$1-disk-iommu.sock", connect = "$work/$1-disk.sock", isolation = "messages" }
TOML
    indent <"$work/disk.toml"
    echo
    echo "The VMM's own vfio-user client connects to the daemon, and the daemon to the disk's server. Each access of the"
    echo "server to guest memory is a message, which the daemon carries out or refuses."
    truncate -s 64M "$work/$1-disk.img"
    "$built/examples/nvme" serve --socket "$work/$1-disk.sock" --disk "$work/$1-disk.img" --dma messages \
        --access-socket "$work/$1-disk.access" >"$work/$1-disk.log" 2>&1 &
    server=$!
    await 10 test -S "$work/$1-disk.sock" || give_up "the disk's server does not start: $(cat "$work/$1-disk.log")"
    "$program" viot "$work/disk.toml" -o "$work/disk.viot"
    mapfile -t arguments < <("$program" qemu-args "$work/disk.toml" --viot "$work/disk.viot" 2>/dev/null)
    "$program" --config "$work/disk.toml" >"$work/daemon.log" 2>&1 &
    daemon=$!
    await 10 test -S "$work/iommu.sock" || give_up "the daemon does not start: $(cat "$work/daemon.log")"
    guest_start "$work" "$image" "$storage_initramfs" "iommu.strict=1" "${arguments[@]}"
    guest_disk
    must_guest "mkfs.ext4 -q /dev/nvme0n1 && mkdir /mnt && mount -t ext4 /dev/nvme0n1 /mnt"
    must_guest "head -c 8000000 /dev/urandom >/mnt/file && sha256sum /mnt/file"
    sum=$ANSWER
    must_guest "umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/nvme0n1 /mnt"
    must_guest "dmesg | grep -E 'nvme|EXT4' | sed 's/^<[0-9]*>//'"
    echo
    indent <<<"$ANSWER"
    must_guest "sha256sum /mnt/file"
    echo
    check "a file of 8 MB on ext4 is the same after it was mounted again" test "$ANSWER" = "$sum"
    STATUS=$(ctl status)
    check "the disk's DMA is translated: $(requests map) mappings were made for it so far" \
        grep -qE "^ *$disk +attached +translated" <<<"$STATUS"
    check "QEMU has guest memory open, the disk's server has not" \
        test "$(guest_memory "$qemu" || true)" -gt 0 -a "$(guest_memory "$server" || true)" -eq 0

    title "The disk's server accesses memory that is not mapped for it"
    for access in "read $outside 16" "write $outside a5 16"; do
        # shellcheck disable=SC2086 # words
        answer=$("$built/examples/nvme" access "$work/$1-disk.access" $access 2>/dev/null) && done=yes || done=no
        echo "the server tries to $access: $answer"
        check "the access is refused" test "$done" = no
    done
    await 10 faults || true
    echo
    echo "the guest's kernel:"
    sed 's/^<[0-9]*>//' <<<"$ANSWER" | indent
    check "it has logged one fault for each access" faults
    must_guest "echo more >/mnt/another && sync && cat /mnt/another"
    check "and it still uses the disk" test "$ANSWER" = more
    guest_end
    kill "$daemon" "$server"
    wait "$daemon" "$server" || true
    daemon='' server=''
}

disk_part socket "(vhost-user)"
# The daemon serves the whole PCI device, and QEMU needs no vhost-user device.
disk_part vfio-user-socket "(virtio-pci over vfio-user)"

echo
[ $wrong -eq 0 ] || exit 1
echo "Every check passed."
