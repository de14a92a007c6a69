//! The kernel's memory for the mappings of a guest, which it charges to the daemon. `drop-in` makes room for it in
//! `MemoryMax`.

use std::collections::BTreeMap;
use std::fs;

use vhost_device_iommu::endpoints::passthrough::{IOMMUFD_RECORD, TYPE1_RECORD};

use crate::bed::{Backend, Bed, endpoint};
use crate::common::daemon::number;
use crate::common::guest::HIGH_RAM;
use crate::common::wire::{OK, RW};
use crate::host::host_iommu;
use crate::words;

const PAGE: u64 = 4096;
/// A whole table of the lowest level.
const TABLE: u64 = 2 << 20;
/// The domain's first address. Far from guest RAM, so that bypass mode has no tables there.
const FIRST: u64 = 0x10_0000_0000;
/// Enough for a mean of the kernel's figures, which count whole pages.
const MAPPINGS: u64 = 5000;
/// What an object takes beside its own bytes if the kernel charges it to a cgroup, at the most. L1's kernel has none.
const ACCOUNTING: u64 = 16;

/// The kernel's memory for objects and for the IOMMU's tables, in bytes.
fn kernel_memory() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let lines: BTreeMap<_, _> = text.lines().filter_map(|l| l.split_once(':')).collect();
    let bytes = |name: &str| {
        let value = lines[name].split_whitespace().next().expect("a number");
        value.parse::<u64>().expect("a number") << 10
    };
    (bytes("SUnreclaim"), bytes("SecPageTables"))
}

/// The bytes of the daemon's page tables.
fn arena(bed: &Bed) -> u64 {
    number(&bed.daemon.status()["arena"]["used_bytes"])
}

/// Asks the daemon for something now and then: the harness takes a test that asks nothing for minutes for one that hangs.
fn show_life(bed: &Bed, n: u64) {
    if n.is_multiple_of(500) {
        bed.daemon.status();
    }
}

/// A guest that maps as many pages as it can fills the kernel's lists with records. It maps the same page again and again:
/// the number does not depend on the guest's memory.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn records_of_mappings_take_what_the_drop_in_counts() {
    if host_iommu().is_amd() {
        // The records are VFIO's and iommufd's own, and QEMU's AMD-Vi takes long for each mapping.
        return;
    }
    let device = &words("VIOMMU_EDU")[0];
    for (backend, records, limit) in [
        (Backend::SharedAll, 1, IOMMUFD_RECORD),
        (Backend::SharedMapped, 2, IOMMUFD_RECORD),
        (Backend::Owned, 1, IOMMUFD_RECORD),
        (Backend::Type1, 1, TYPE1_RECORD),
    ] {
        let mut bed = Bed::new(backend, &[device.as_str()]);
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        let (objects, tables) = kernel_memory();
        for n in 0..MAPPINGS {
            let iova = FIRST + n * PAGE;
            let status = bed.guest.map(1, iova, iova + PAGE - 1, HIGH_RAM, RW);
            assert_eq!(status, OK, "mapping {n}");
            show_life(&bed, n);
        }
        let (objects_now, tables_now) = kernel_memory();
        let objects = objects_now.saturating_sub(objects);
        let tables = tables_now.saturating_sub(tables);
        let each = objects / MAPPINGS;
        eprintln!(
            "{backend:?}: {each} bytes of objects and {} of tables for a mapping",
            tables / MAPPINGS
        );
        let each = each + records * ACCOUNTING;
        assert!(each > 64, "{backend:?}: {each} bytes are too few");
        assert!(each <= limit, "{backend:?}: {each} bytes, not {limit}");
        // Nor far below: the limit of a service would mean nothing.
        assert!(
            each * 8 > limit,
            "{backend:?}: {each} bytes, far below {limit}"
        );
    }
}

/// A guest that maps one page in each 2 MiB fills the host's tables. They have as many frames as the daemon's own.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn host_tables_take_no_more_than_the_daemons_own() {
    const TABLES: u64 = 500;
    let device = &words("VIOMMU_EDU")[0];
    for backend in [Backend::SharedMapped, Backend::Type1] {
        let mut bed = Bed::new(backend, &[device.as_str()]);
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        let (_, before) = kernel_memory();
        let own = arena(&bed);
        for n in 0..TABLES {
            let iova = FIRST + n * TABLE;
            let status = bed.guest.map(1, iova, iova + PAGE - 1, HIGH_RAM, RW);
            assert_eq!(status, OK, "mapping {n}");
            show_life(&bed, n);
        }
        let (_, now) = kernel_memory();
        let (host, own) = (now.saturating_sub(before), arena(&bed) - own);
        eprintln!("{backend:?}: {host} bytes of host tables, {own} of own ones");
        // Not all of them: the kernel may have given others back meanwhile.
        assert!(host >= TABLES * PAGE / 2, "{backend:?}: {host}");
        // A few more, for the levels of a wider address.
        assert!(host <= own + 64 * PAGE, "{backend:?}: {host}, {own}");
    }
}
