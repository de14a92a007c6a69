//! A file system on the disk. A strict and a lazy guest each make it, fill it, unmount it, mount it again and compare
//! the files. Then a guest without an IOMMU compares them once more.

use std::path::PathBuf;

use crate::bed::{self, Bed, DmaMode, Server, new_image};
use crate::vm::{Kernel, LONG_ANSWER, Setup, TestDir};

/// Makes files of many sizes: random data, many small files, a sparse file.
const FILL: &str = "cd /mnt && dd if=/dev/urandom of=random bs=1M count=12 2>/dev/null && \
    mkdir small && for n in $(seq 60); do head -c $((n * 331)) random >small/$n || exit; done && \
    cp -r /lib/modules programs && dd if=random of=sparse bs=4k seek=3000 count=7 2>/dev/null && \
    cd / && sync";
/// Prints the checksums of all files, by name.
const SUMS: &str = "cd /mnt && find . -type f | sort | xargs sha256sum; cd /";
/// Drops the guest's caches.
const DROP_CACHES: &str = "echo 3 >/proc/sys/vm/drop_caches";

pub fn check(name: &str, dma_mode: DmaMode) {
    let setup = Setup::with_storage();
    let test_dir = TestDir::new(name);
    let strict = make_and_compare(&setup, setup.newest(), &test_dir, "strict", dma_mode);
    let lazy = make_and_compare(&setup, setup.oldest(), &test_dir, "lazy", dma_mode);
    let servers = [
        ("plain-strict", &strict.0, "mapped"),
        ("plain-lazy", &lazy.0, "messages"),
    ]
    .map(|(name, image, dma)| Server::start(&test_dir, name, image, dma));
    let mut vm = bed::without_iommu(&setup, setup.newest(), &test_dir, "plain", &servers);
    let groups = vm.run("ls /sys/kernel/iommu_groups | wc -l");
    assert_eq!(groups, ["0"], "this guest has no IOMMU");
    for (disk, (_, sums)) in ["/dev/nvme0n1", "/dev/nvme1n1"]
        .into_iter()
        .zip([&strict, &lazy])
    {
        vm.run(&format!("mkdir -p /mnt && mount -t ext4 {disk} /mnt"));
        let found = vm.run_within(SUMS, LONG_ANSWER);
        vm.run("umount /mnt");
        // The kernel may number the disks in either order.
        assert!(found == strict.1 || found == lazy.1, "{disk}: {found:?}");
        assert!(!sums.is_empty());
    }
    test_dir.note("the files are the same without an IOMMU");
}

/// Makes a file system in a guest of this mode, fills it, and compares it after it is mounted again. Returns the disk
/// and the checksums.
fn make_and_compare(
    setup: &Setup,
    kernel: &Kernel,
    test_dir: &TestDir,
    mode: &str,
    dma_mode: DmaMode,
) -> (PathBuf, Vec<String>) {
    let image = new_image(test_dir, &format!("{mode}.img"));
    let (strict, group_type) = match mode {
        "strict" => (1, "DMA"),
        _ => (0, "DMA-FQ"),
    };
    let append = format!("iommu.strict={strict}");
    let mut bed = Bed::start(setup, kernel, test_dir, mode, &image, dma_mode, &append);
    let vm = &mut bed.vm;
    let group = format!("/sys/bus/pci/devices/{}/iommu_group/type", bed::DISK);
    assert_eq!(vm.run(&format!("cat {group}")), [group_type]);
    assert_eq!(bed.daemon.status().dma_of(bed::DISK), "translated");

    vm.run_within("mkfs.ext4 -q /dev/nvme0n1", LONG_ANSWER);
    vm.run("mkdir -p /mnt && mount -t ext4 /dev/nvme0n1 /mnt");
    vm.run_within(FILL, LONG_ANSWER);
    let written = vm.run_within(SUMS, LONG_ANSWER);
    assert!(written.len() > 65, "{written:?}");
    test_dir.note(&format!("{mode}: {} files", written.len()));
    vm.run("umount /mnt");
    vm.run(DROP_CACHES);
    vm.run_within("fsck.ext4 -fn /dev/nvme0n1", LONG_ANSWER);
    vm.run(DROP_CACHES);
    vm.run("mount -t ext4 /dev/nvme0n1 /mnt");
    let kept = vm.run_within(SUMS, LONG_ANSWER);
    assert_eq!(kept, written, "{mode}: after mounting again");
    vm.run("umount /mnt");
    bed::assert_no_errors(vm);

    let status = bed.daemon.status();
    assert_eq!(status.refusals(), Vec::<String>::new());
    assert!(status.requests("map", "ok") > 100, "{}", status.0);
    assert_eq!(status.0["faults"]["delivered"], 0);
    assert_eq!(status.0["faults"]["dropped"], 0);
    test_dir.note(&format!(
        "{mode}: the files are the same after mounting again"
    ));
    bed.stop();
    (image, written)
}
