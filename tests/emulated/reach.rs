//! The disk's server makes forbidden accesses, as a faulty one would. Each is refused, guest memory stays unchanged,
//! and the guest's kernel logs one fault. The kernel logs at most ten in five seconds; the test makes fewer.

use std::time::Duration;

use serde_json::json;

use crate::bed::{self, Bed, DmaMode, Ram, count_uses, new_image};
use crate::vm::{Setup, Table, TestDir, Vm, number, wait_for};

const SOON: Duration = Duration::from_secs(20);
/// An address in the reserved region of MSI writes.
const RESERVED: u64 = 0xfee0_1000;
/// The byte that the server writes.
const BYTE: u8 = 0xa5;
/// The number of bytes of each access.
const LEN: usize = 64;

pub fn check(name: &str, dma_mode: DmaMode) {
    let setup = Setup::with_storage();
    let test_dir = TestDir::new(name);
    let image = new_image(&test_dir, "disk.img");
    let append = "iommu.strict=1";
    let mut bed = Bed::start(
        &setup,
        setup.newest(),
        &test_dir,
        "vm",
        &image,
        dma_mode,
        append,
    );
    let ram = Ram::of(&bed.vm);

    // Addresses that the disk's driver has not mapped, while it uses the disk.
    bed.vm
        .run("dd if=/dev/zero of=/dev/nvme0n1 bs=64k count=16 oflag=direct 2>/dev/null");
    let unmapped = free_page(&mapped(&mut bed));
    for direction in ["read", "write"] {
        refused(&mut bed, &ram, direction, unmapped, None);
        refused(&mut bed, &ram, direction, RESERVED, None);
    }
    // The disk still works.
    bed.vm
        .run("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null");
    check_shared_memory(&mut bed, &ram, dma_mode, &test_dir);
    test_dir.note("accesses outside the driver's mappings are refused");

    // vfio-map takes the place of the driver and makes many mappings.
    let disk = bed::DISK;
    bed.vm.run(&format!(
        "echo {disk} >/sys/bus/pci/devices/{disk}/driver/unbind"
    ));
    bed.vm.run(&format!("vfio_bind {disk}"));
    bed.vm
        .run(&format!("start mapper vfio-map --seed 11 --live 60 {disk}"));
    bed.vm.run("ask mapper churn 300");
    let table = Table::from_dump(&bed.vm.run("ask mapper dump"));
    let with = |wanted: &str| {
        let mut pages = table.0.iter().filter(|(_, (_, access))| access == wanted);
        pages.next().map(|(iova, (gpa, _))| (*iova, *gpa))
    };
    let (both, gpa) = with("rw").expect("a page to read and write");
    let (read_only, read_only_gpa) = with("r-").expect("a page to read");
    allowed(&mut bed, &ram, both, gpa);
    let found = bed
        .server
        .access(&format!("read {read_only:#x} {LEN}"))
        .expect("may be read");
    assert_eq!(found, hex(&ram.bytes(read_only_gpa, LEN)));
    refused(&mut bed, &ram, "write", read_only, Some(read_only_gpa));
    bed.vm.run("ask mapper clear");
    for direction in ["read", "write"] {
        refused(&mut bed, &ram, direction, both, Some(gpa));
    }
    bed.vm.run("ask mapper quit");
    test_dir.note("accesses to read-only and removed mappings are refused");
    drop(bed.vm);
    bed.daemon.stop();
}

/// Checks that the server can write at `iova`, and that this changes guest memory at `gpa` alone.
fn allowed(bed: &mut Bed, ram: &Ram, iova: u64, gpa: u64) {
    bed.vm.qmp("stop", json!({}));
    let before = ram.snapshot();
    let request = format!("write {iova:#x} {BYTE:02x} {LEN}");
    bed.server.access(&request).expect("may be written");
    let mut expected = before;
    let at = usize::try_from(gpa).expect("in memory");
    expected[at..at + LEN].fill(BYTE);
    assert!(
        ram.snapshot() == expected,
        "`{request}` changes {gpa:#x} alone"
    );
    let read = bed.server.access(&format!("read {iova:#x} {LEN}"));
    assert_eq!(read, Ok(hex(&[BYTE; LEN])));
    bed.vm.qmp("cont", json!({}));
}

/// Checks that an access at `iova` is refused, changes no guest memory, and is reported to the guest once. `gpa` is
/// memory that the address led to before, or leads to for the other kind of access.
fn refused(bed: &mut Bed, ram: &Ram, direction: &str, iova: u64, gpa: Option<u64>) {
    let (text, kind) = match direction {
        "read" => (format!("read {iova:#x} {LEN}"), "R"),
        _ => (format!("write {iova:#x} {BYTE:02x} {LEN}"), "W"),
    };
    // While the guest is stopped, only the server can change its memory. The device drops the fault record.
    bed.vm.qmp("stop", json!({}));
    let before = ram.snapshot();
    let dropped = faults(bed, "dropped");
    let why = bed.server.access(&text).expect_err("the access is refused");
    wait_for("the fault", SOON, || {
        (faults(bed, "dropped") > dropped).then_some(())
    });
    assert!(
        ram.snapshot() == before,
        "`{text}` has changed guest memory"
    );
    bed.vm.qmp("cont", json!({}));
    assert_eq!(faults(bed, "dropped"), dropped + 1, "`{text}`: {why}");

    let delivered = faults(bed, "delivered");
    let page = |gpa| ram.bytes(gpa, 4096);
    let before = gpa.map(page);
    let logged = log_lines(&mut bed.vm, iova, kind);
    bed.server
        .access(&text)
        .expect_err("the access is refused again");
    wait_for("the guest's log", SOON, || {
        (log_lines(&mut bed.vm, iova, kind) > logged).then_some(())
    });
    assert_eq!(gpa.map(page), before, "`{text}` has changed guest memory");
    assert_eq!(log_lines(&mut bed.vm, iova, kind), logged + 1, "`{text}`");
    assert_eq!(faults(bed, "delivered"), delivered + 1, "`{text}`");
}

fn faults(bed: &mut Bed, what: &str) -> u64 {
    number(&bed.daemon.status().0["faults"], what)
}

/// The number of faults that the guest's driver has logged for such an access at this address.
fn log_lines(vm: &mut Vm, iova: u64, kind: &str) -> usize {
    let lines = vm.run("dmesg | grep -E 'virtio_iommu.* fault ' || true");
    let wanted = format!(" at {iova:#x} [{kind}]");
    lines.iter().filter(|line| line.contains(&wanted)).count()
}

/// The daemon's mappings of the disk's domain.
fn mapped(bed: &mut Bed) -> Table {
    let domain = bed.daemon.status().domain_of(bed::DISK);
    bed.daemon.tables().remove(&domain).expect("its domain")
}

/// The address of a page that is not mapped.
fn free_page(table: &Table) -> u64 {
    let mut pages = table.0.keys().rev().map(|page| page - 4096);
    pages
        .find(|page| !table.0.contains_key(page))
        .expect("a hole")
}

/// Checks that a server with messages has no guest memory in its process. In the other modes it must have some, which
/// shows that the check works.
fn check_shared_memory(bed: &mut Bed, ram: &Ram, dma_mode: DmaMode, test_dir: &TestDir) {
    let pid = bed.server.pid();
    let (fds, maps) = count_uses(pid, &ram.0);
    test_dir.note(&format!(
        "the server: {fds} descriptors of guest memory, {maps} mappings"
    ));
    match dma_mode {
        DmaMode::Messages => assert_eq!((fds, maps), (0, 0)),
        DmaMode::Mappings | DmaMode::Shadow => assert!(fds > 0 && maps > 0),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
