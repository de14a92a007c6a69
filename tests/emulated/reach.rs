//! The disk's server reaches for what it may not, as one that has gone wrong would: each time it is
//! refused, guest memory stays as it is, and the guest's kernel logs one fault. It logs no more than
//! ten in five seconds; there are fewer here.

use std::time::Duration;

use serde_json::json;

use crate::bed::{self, Bed, Manner, Ram, new_image, uses_of};
use crate::vm::{Setup, Table, Vm, Workplace, number, wait_for};

const SOON: Duration = Duration::from_secs(20);
/// Where interrupts are written: a reserved region.
const RESERVED: u64 = 0xfee0_1000;
/// What the server writes, and how much.
const BYTE: u8 = 0xa5;
const LEN: usize = 64;

pub fn check(name: &str, manner: Manner) {
    let setup = Setup::with_storage();
    let place = Workplace::new(name);
    let image = new_image(&place, "disk.img");
    let append = "iommu.strict=1";
    let mut bed = Bed::start(&setup, setup.newest(), &place, "vm", &image, manner, append);
    let ram = Ram::of(&bed.vm);

    // While its driver uses it: addresses that this has not mapped.
    bed.vm
        .run("dd if=/dev/zero of=/dev/nvme0n1 bs=64k count=16 oflag=direct 2>/dev/null");
    let unmapped = free_page(&mapped(&mut bed));
    for order in ["read", "write"] {
        refused(&mut bed, &ram, order, unmapped, None);
        refused(&mut bed, &ram, order, RESERVED, None);
    }
    // And it still works.
    bed.vm
        .run("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null");
    what_the_server_has(&mut bed, &ram, manner, &place);
    place.note("refused beside the driver's mappings");

    // Mappings to choose from, with a program in the place of the driver.
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
        .order(&format!("read {read_only:#x} {LEN}"))
        .expect("may be read");
    assert_eq!(found, hex(&ram.bytes(read_only_gpa, LEN)));
    refused(&mut bed, &ram, "write", read_only, Some(read_only_gpa));
    bed.vm.run("ask mapper clear");
    for order in ["read", "write"] {
        refused(&mut bed, &ram, order, both, Some(gpa));
    }
    bed.vm.run("ask mapper quit");
    place.note("refused where nothing is mapped, only reading is, and no longer");
    drop(bed.vm);
    bed.daemon.stop();
}

/// The server may write there, and that is what changes in guest memory, and nothing else.
fn allowed(bed: &mut Bed, ram: &Ram, iova: u64, gpa: u64) {
    bed.vm.qmp("stop", json!({}));
    let before = ram.snapshot();
    let order = format!("write {iova:#x} {BYTE:02x} {LEN}");
    bed.server.order(&order).expect("may be written");
    let mut expected = before;
    let at = usize::try_from(gpa).expect("in memory");
    expected[at..at + LEN].fill(BYTE);
    assert!(ram.snapshot() == expected, "{order} changes {gpa:#x} alone");
    let read = bed.server.order(&format!("read {iova:#x} {LEN}"));
    assert_eq!(read, Ok(hex(&[BYTE; LEN])));
    bed.vm.qmp("cont", json!({}));
}

/// The server may not, and the guest hears of it once. `gpa` is memory that the address has led to,
/// or leads to for others.
fn refused(bed: &mut Bed, ram: &Ram, order: &str, iova: u64, gpa: Option<u64>) {
    let (text, kind) = match order {
        "read" => (format!("read {iova:#x} {LEN}"), "R"),
        _ => (format!("write {iova:#x} {BYTE:02x} {LEN}"), "W"),
    };
    // With the guest stopped nothing but the server can change its memory. Nor can it be told.
    bed.vm.qmp("stop", json!({}));
    let before = ram.snapshot();
    let dropped = faults(bed, "dropped");
    let why = bed.server.order(&text).expect_err("it may not");
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
    bed.server.order(&text).expect_err("it still may not");
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

/// How often the guest's driver has told of such an access at this address.
fn log_lines(vm: &mut Vm, iova: u64, kind: &str) -> usize {
    let lines = vm.run("dmesg | grep -E 'virtio_iommu.* fault ' || true");
    let wanted = format!(" at {iova:#x} [{kind}]");
    lines.iter().filter(|line| line.contains(&wanted)).count()
}

/// What the daemon holds for the disk.
fn mapped(bed: &mut Bed) -> Table {
    let domain = bed.daemon.status().domain_of(bed::DISK);
    bed.daemon.tables().remove(&domain).expect("its domain")
}

/// A page between mappings, or beside them.
fn free_page(table: &Table) -> u64 {
    let mut pages = table.0.keys().rev().map(|page| page - 4096);
    pages
        .find(|page| !table.0.contains_key(page))
        .expect("a hole")
}

/// With messages, the server's process has no guest memory at all. Elsewhere it has, so that this
/// can be seen.
fn what_the_server_has(bed: &mut Bed, ram: &Ram, manner: Manner, place: &Workplace) {
    let pid = bed.server.pid();
    let (fds, maps) = uses_of(pid, &ram.0);
    place.note(&format!(
        "the server: {fds} descriptors of guest memory, {maps} mappings"
    ));
    match manner {
        Manner::Messages => assert_eq!((fds, maps), (0, 0)),
        Manner::Mappings | Manner::Shadow => assert!(fds > 0 && maps > 0),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
