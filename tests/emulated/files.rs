//! A file system on the disk: made, filled, unmounted, mounted again and compared, with a strict and
//! a lazy guest; then compared once more by a guest without an IOMMU.

use std::path::PathBuf;

use crate::bed::{self, Bed, Manner, Server, new_image};
use crate::vm::{Kernel, LONG_ANSWER, Setup, Vm, Workplace};

/// What makes files of many sizes: random data, many small files, a sparse one.
const FILL: &str = "cd /mnt && dd if=/dev/urandom of=random bs=1M count=12 2>/dev/null && \
    mkdir small && for n in $(seq 60); do head -c $((n * 331)) random >small/$n || exit; done && \
    cp -r /lib/modules programs && dd if=random of=sparse bs=4k seek=3000 count=7 2>/dev/null && \
    cd / && sync";
/// What all files are, by name.
const SUMS: &str = "cd /mnt && find . -type f | sort | xargs sha256sum; cd /";
const FORGET: &str = "echo 3 >/proc/sys/vm/drop_caches";

pub fn check(name: &str, manner: Manner) {
    let setup = Setup::with_storage();
    let place = Workplace::new(name);
    let strict = made_and_kept(&setup, setup.newest(), &place, "strict", manner);
    let lazy = made_and_kept(&setup, setup.oldest(), &place, "lazy", manner);
    let servers = [
        ("plain-strict", &strict.0, "mapped"),
        ("plain-lazy", &lazy.0, "messages"),
    ]
    .map(|(name, image, dma)| Server::start(&place, name, image, dma));
    let mut vm = bed::without_iommu(&setup, setup.newest(), &place, "plain", &servers);
    let groups = vm.run("ls /sys/kernel/iommu_groups | wc -l");
    assert_eq!(groups, ["0"], "this guest has no IOMMU");
    for (disk, (_, sums)) in ["/dev/nvme0n1", "/dev/nvme1n1"]
        .into_iter()
        .zip([&strict, &lazy])
    {
        vm.run(&format!("mkdir -p /mnt && mount -t ext4 {disk} /mnt"));
        let found = vm.run_within(SUMS, LONG_ANSWER);
        vm.run("umount /mnt");
        // Which of the disks is the first is the kernel's choice.
        assert!(found == strict.1 || found == lazy.1, "{disk}: {found:?}");
        assert!(!sums.is_empty());
    }
    place.note("the same without an IOMMU");
}

/// Makes a file system in a guest of this mode. Returns the disk, and what is on it.
fn made_and_kept(
    setup: &Setup,
    kernel: &Kernel,
    place: &Workplace,
    mode: &str,
    manner: Manner,
) -> (PathBuf, Vec<String>) {
    let image = new_image(place, &format!("{mode}.img"));
    let (strict, group_type) = match mode {
        "strict" => (1, "DMA"),
        _ => (0, "DMA-FQ"),
    };
    let append = format!("iommu.strict={strict}");
    let mut bed = Bed::start(setup, kernel, place, mode, &image, manner, &append);
    let vm = &mut bed.vm;
    let group = format!("/sys/bus/pci/devices/{}/iommu_group/type", bed::DISK);
    assert_eq!(vm.run(&format!("cat {group}")), [group_type]);
    assert_eq!(bed.daemon.status().dma_of(bed::DISK), "translated");

    vm.run_within("mkfs.ext4 -q /dev/nvme0n1", LONG_ANSWER);
    vm.run("mkdir -p /mnt && mount -t ext4 /dev/nvme0n1 /mnt");
    vm.run_within(FILL, LONG_ANSWER);
    let written = vm.run_within(SUMS, LONG_ANSWER);
    assert!(written.len() > 65, "{written:?}");
    place.note(&format!("{mode}: {} files", written.len()));
    vm.run("umount /mnt");
    vm.run(FORGET);
    vm.run_within("fsck.ext4 -fn /dev/nvme0n1", LONG_ANSWER);
    vm.run(FORGET);
    vm.run("mount -t ext4 /dev/nvme0n1 /mnt");
    let kept = vm.run_within(SUMS, LONG_ANSWER);
    assert_eq!(kept, written, "{mode}: after it was mounted again");
    vm.run("umount /mnt");
    nothing_went_wrong(vm);

    let status = bed.daemon.status();
    assert_eq!(status.refusals(), Vec::<String>::new());
    assert!(status.requests("map", "ok") > 100, "{}", status.0);
    assert_eq!(status.0["faults"]["delivered"], 0);
    assert_eq!(status.0["faults"]["dropped"], 0);
    place.note(&format!("{mode}: the same after it was mounted again"));
    bed.stop();
    (image, written)
}

/// The guest's kernel has nothing to say against the disk.
fn nothing_went_wrong(vm: &mut Vm) {
    let complaints = "dmesg | grep -iE 'i/o error|nvme.*(timeout|abort|reset)|ext4-fs error|virtio_iommu.* fault '";
    let (lines, _) = vm.try_run(complaints, LONG_ANSWER);
    assert_eq!(lines, Vec::<String>::new());
}
