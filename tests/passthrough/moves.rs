//! Domains with several devices, devices that change domains under load, many mappings, and memory that the VMM
//! removes. Each test checks by DMA which memory the host's IOMMU lets a device reach.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::bed::{BACKENDS, Backend, Bed, endpoint};
use crate::common::guest::{HIGH_LEN, HIGH_RAM, LOW_RAM, Layout};
use crate::common::memory::Region;
use crate::common::rng::Rng;
use crate::common::wire::{self, FAULT, NOENT, NOMEM, OK, READ, RW, TAIL, UNSUPP, WRITE};
use crate::devices::{Edu, Function, TestDev};
use crate::host::host_iommu;
use crate::words;

const PAGE: u64 = 4096;
/// The first guest page that devices write.
const TARGETS: u64 = HIGH_RAM + 0x10_0000;

/// A VM with two test devices.
fn pair(backend: Backend) -> (Bed, Vec<TestDev>) {
    let names = words("VIOMMU_TESTDEV");
    let functions: Vec<_> = names.iter().map(String::as_str).collect();
    let bed = Bed::new(backend, &functions);
    (bed, names.iter().map(|n| TestDev::new(n)).collect())
}

/// Lets the device write 8 bytes at `iova`. Returns whether the IOMMU allowed it. If so, checks that they arrived at
/// `gpa`, and otherwise that nothing did.
fn reaches(bed: &Bed, device: &TestDev, iova: u64, gpa: u64) -> bool {
    let memory = &bed.guest.memory;
    memory.write(gpa, &[0xee; 16]);
    let done = device.write(iova, 8);
    let now = memory.read(gpa, 16);
    let pattern = TestDev::PATTERN.to_le_bytes();
    let arrived = [&pattern[..], &pattern[..], &[0xee; 8]].concat();
    memory.write(gpa, &[0; 16]);
    if done {
        assert_eq!(
            now, arrived,
            "the write at {iova:#x} was allowed, but did not reach {gpa:#x}"
        );
    } else {
        assert_eq!(
            now, [0xee; 16],
            "the write at {iova:#x} was refused, but reached {gpa:#x}"
        );
    }
    done
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn two_devices_share_a_domain() {
    for backend in BACKENDS {
        eprintln!("{backend:?}");
        let (mut bed, devices) = pair(backend);
        let (a, b) = (endpoint(0), endpoint(1));
        // Addresses beyond guest memory, which bypass mode does not reach.
        let at = |page: u64| 0x20_0000_0000 + page * PAGE;
        assert_eq!(bed.guest.attach(1, a), OK);
        assert_eq!(bed.guest.map(1, at(1), at(2) - 1, TARGETS, WRITE), OK);
        // The second device gets the present mapping, and both get the next one.
        assert_eq!(bed.guest.attach(1, b), OK);
        assert_eq!(bed.guest.map(1, at(2), at(3) - 1, TARGETS + PAGE, RW), OK);
        for device in &devices {
            assert!(reaches(&bed, device, at(1), TARGETS));
            assert!(reaches(&bed, device, at(2), TARGETS + PAGE));
            assert!(!reaches(&bed, device, at(3), TARGETS));
        }
        assert_eq!(bed.guest.unmap(1, at(1), at(2) - 1), OK);
        for device in &devices {
            assert!(!reaches(&bed, device, at(1), TARGETS));
            assert!(reaches(&bed, device, at(2), TARGETS + PAGE));
        }
        // One device leaves, and the other stays.
        assert_eq!(bed.guest.detach(1, a), OK);
        assert!(!reaches(&bed, &devices[0], at(2), TARGETS + PAGE));
        assert!(reaches(&bed, &devices[0], TARGETS, TARGETS), "bypass mode");
        assert!(reaches(&bed, &devices[1], at(2), TARGETS + PAGE));
        assert_eq!(bed.guest.detach(1, b), OK);
        assert_eq!(
            bed.guest.unmap(1, 0, u64::MAX),
            NOENT,
            "the domain ended with its last endpoint"
        );
    }
}

/// A device moves between two domains while it writes without a pause. Each write must arrive where one of the
/// domains leads, or nowhere.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_device_moves_between_domains_under_load() {
    for backend in BACKENDS {
        eprintln!("{backend:?}");
        let (mut bed, mut devices) = pair(backend);
        let stays = devices.pop().expect("two");
        let moves = devices.pop().expect("two");
        let (iova, first_page, second_page, third_page) =
            (0x8000, TARGETS, TARGETS + PAGE, TARGETS + 2 * PAGE);
        // The other device keeps the second domain alive.
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.guest.attach(2, endpoint(1)), OK);
        assert_eq!(bed.guest.map(1, iova, iova + PAGE - 1, first_page, RW), OK);
        assert_eq!(bed.guest.map(2, iova, iova + PAGE - 1, second_page, RW), OK);
        assert_eq!(bed.guest.map(2, 0, PAGE - 1, third_page, RW), OK);
        let before = bed.guest.memory.read(LOW_RAM, 0x10_0000);
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let allowed = Arc::new(AtomicU64::new(0));
        let load = {
            let (stop, writes, allowed) = (stop.clone(), writes.clone(), allowed.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let done = moves.write(iova, 8);
                    writes.fetch_add(1, Ordering::Relaxed);
                    allowed.fetch_add(done.into(), Ordering::Relaxed);
                }
                moves
            })
        };
        let pattern = TestDev::PATTERN.to_le_bytes();
        for round in 0..200 {
            let (to, expected, other) = if round % 2 == 0 {
                (2, second_page, first_page)
            } else {
                (1, first_page, second_page)
            };
            assert_eq!(
                bed.guest.attach(to, endpoint(0)),
                OK,
                "{}",
                bed.daemon.log()
            );
            if to == 2 {
                // The first domain had no other device, so it has ended.
                assert_eq!(bed.guest.unmap(1, 0, u64::MAX), NOENT);
            } else {
                assert_eq!(bed.guest.map(1, iova, iova + PAGE - 1, first_page, RW), OK);
            }
            // No later write may reach the memory of the other domain.
            bed.guest.memory.write(other, &[0; 8]);
            bed.guest.memory.write(expected, &[0; 8]);
            let since = writes.load(Ordering::Relaxed);
            while writes.load(Ordering::Relaxed) < since + 2 {
                thread::yield_now();
            }
            assert_eq!(bed.guest.memory.read(other, 8), [0; 8], "round {round}");
            assert_eq!(bed.guest.memory.read(expected, 4), pattern, "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
        load.join().expect("the load");
        let (all, done) = (
            writes.load(Ordering::Relaxed),
            allowed.load(Ordering::Relaxed),
        );
        eprintln!("{all} writes, {done} allowed");
        assert!(reaches(&bed, &stays, 0, third_page));
        assert!(bed.guest.memory.read(LOW_RAM, 0x10_0000) == before);
    }
}

/// Random MAP and UNMAP with DMA in between, compared with a model.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn ten_thousand_rounds_agree_with_a_model() {
    const WINDOW: u64 = 256;
    for (backend, rounds) in [
        (Backend::SharedAll, 10_000),
        (Backend::SharedMapped, 2_000),
        (Backend::Owned, 1_000),
        (Backend::Type1, host_iommu().fewer_on_amd(10_000)),
        (Backend::Type1Inherited, 1_000),
    ] {
        let (mut bed, devices) = pair(backend);
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.guest.attach(1, endpoint(1)), OK);
        let mut rng = Rng::new(0x5eed);
        // By first page of a mapping: number of pages, guest-physical address, writable.
        let mut model: BTreeMap<u64, (u64, u64, bool)> = BTreeMap::new();
        let (mut maps, mut unmaps, mut probes) = (0, 0, 0);
        for _ in 0..rounds {
            let first = rng.below(WINDOW);
            let pages = 1 + rng.below(8).min(rng.below(8));
            if rng.below(2) == 0 {
                let overlaps = model
                    .iter()
                    .any(|(f, (n, ..))| first < f + n && *f < first + pages);
                let flags = [READ, WRITE, RW, RW][rng.below(4) as usize];
                let gpa = TARGETS + rng.below(512) * PAGE;
                let status = bed
                    .guest
                    .map(1, first * PAGE, (first + pages) * PAGE - 1, gpa, flags);
                assert_eq!(status == OK, !overlaps);
                if status == OK {
                    model.insert(first, (pages, gpa, flags & WRITE != 0));
                    maps += 1;
                }
            } else {
                let pages = pages * 3;
                let splits = model.iter().any(|(f, (n, ..))| {
                    let inside = first <= *f && f + n <= first + pages;
                    first < f + n && *f < first + pages && !inside
                });
                let status = bed.guest.unmap(1, first * PAGE, (first + pages) * PAGE - 1);
                assert_eq!(status == OK, !splits);
                if status == OK {
                    let before = model.len();
                    model.retain(|f, _| !(first..first + pages).contains(f));
                    unmaps += before - model.len();
                }
            }
            for device in &devices {
                let page = rng.below(WINDOW + 8);
                let hit = model
                    .range(..=page)
                    .next_back()
                    .filter(|(f, (n, ..))| page < **f + n);
                let (gpa, writable) = match hit {
                    Some((f, (_, gpa, writable))) => (gpa + (page - f) * PAGE, *writable),
                    None => (TARGETS, false),
                };
                assert_eq!(
                    reaches(&bed, device, page * PAGE, gpa),
                    writable,
                    "page {page}"
                );
                probes += 1;
            }
        }
        eprintln!("{backend:?}: {maps} mapped, {unmaps} unmapped, {probes} DMAs");
        assert_eq!(bed.daemon.mappings(1).len(), model.len());
    }
}

/// Many mappings of a page each, with holes between them, and one UNMAP for all.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn many_mappings_and_one_unmap_of_all() {
    // Between the regions for interrupts of Arm's hosts and those of x86.
    let at = |n: u64| (0x1000_0000 + n * 2 * PAGE, TARGETS + (n % 1024) * PAGE);
    for (backend, count) in [
        (Backend::SharedAll, host_iommu().fewer_on_amd(65_536)),
        (Backend::SharedMapped, host_iommu().fewer_on_amd(16_384)),
        (Backend::Type1, host_iommu().fewer_on_amd(16_384)),
    ] {
        eprintln!("{backend:?}");
        let limit = DmaEntryLimit::set(count);
        let (mut bed, devices) = pair(backend);
        drop(limit);
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        for first in (0..count).step_by(32) {
            map_batch(&mut bed, (first..first + 32).map(at));
        }
        if backend.is_type1() {
            let (iova, gpa) = at(count);
            let refused = bed.guest.map(1, iova, iova + PAGE - 1, gpa, RW);
            assert_eq!(refused, NOMEM);
            let log = bed.daemon.log();
            assert!(log.contains("dma_entry_limit"), "{log}");
        }
        for n in (0..count).step_by(997) {
            let (iova, gpa) = at(n);
            assert!(reaches(&bed, &devices[0], iova, gpa));
            assert!(!reaches(&bed, &devices[0], iova + PAGE, gpa));
        }
        assert_eq!(bed.guest.unmap(1, 0, u64::MAX), OK);
        for n in (0..count).step_by(997) {
            let (iova, gpa) = at(n);
            assert!(!reaches(&bed, &devices[0], iova, gpa));
        }
        let (iova, gpa) = at(count);
        assert_eq!(bed.guest.map(1, iova, iova + PAGE - 1, gpa, RW), OK);
        assert!(reaches(&bed, &devices[0], iova, gpa));
    }
}

/// Sets the limit of mappings for containers that are opened while this exists.
struct DmaEntryLimit(String);

impl DmaEntryLimit {
    const PATH: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

    fn set(limit: u64) -> Self {
        let before = fs::read_to_string(Self::PATH).expect("a parameter");
        fs::write(Self::PATH, limit.to_string()).expect("it can be set");
        Self(before)
    }
}

impl Drop for DmaEntryLimit {
    fn drop(&mut self) {
        fs::write(Self::PATH, self.0.trim()).expect("it can be set");
    }
}

/// Maps pages in domain 1 with one kick.
fn map_batch(bed: &mut Bed, pages: impl Iterator<Item = (u64, u64)>) {
    let mut sent = 0;
    for (iova, gpa) in pages {
        let request = wire::map(1, iova, iova + PAGE - 1, gpa, RW);
        bed.guest
            .submit(&request, &Layout::plain(request.len(), TAIL));
        sent += 1;
    }
    bed.guest.kick();
    for _ in 0..sent {
        let (_, reply) = bed.guest.complete();
        assert_eq!(reply.status(), OK, "{}", bed.daemon.log());
    }
}

/// After the reply to REM_MEM_REG, no byte of the slot may be reachable.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn removed_memory_is_unmapped_before_the_reply() {
    for backend in BACKENDS {
        eprintln!("{backend:?}");
        let (mut bed, devices) = pair(backend);
        let hot = HIGH_RAM + HIGH_LEN;
        bed.guest.add_region(Region::new(hot, 4 << 20));
        // The second device stays in bypass mode. It passes through a domain first: before its first
        // ATTACH, a VMM that has bound the device controls its DMA.
        assert_eq!(bed.guest.attach(2, endpoint(1)), OK);
        assert_eq!(bed.guest.detach(2, endpoint(1)), OK);
        assert!(
            reaches(&bed, &devices[1], hot, hot),
            "bypass mode reaches the new slot"
        );
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.guest.map(1, 0, PAGE - 1, hot, RW), OK);
        // A mapping across the border of two slots.
        let (first, last) = (0x10_0000, 0x10_0000 + 4 * PAGE - 1);
        assert_eq!(bed.guest.map(1, first, last, hot - 2 * PAGE, RW), OK);
        assert!(reaches(&bed, &devices[0], 0, hot));
        assert!(reaches(&bed, &devices[0], first + 3 * PAGE, hot + PAGE));

        let region = bed.guest.remove_region(hot);
        for (device, iova) in [
            (&devices[0], 0),
            (&devices[0], first + 2 * PAGE),
            (&devices[0], first + 3 * PAGE),
            (&devices[1], hot),
            (&devices[1], hot + PAGE),
        ] {
            assert!(!device.write(iova, 8), "{iova:#x}");
        }
        let written = region.read_all().iter().any(|byte| *byte != 0);
        assert!(!written, "a device has written to the removed memory");
        assert!(reaches(&bed, &devices[0], first + PAGE, hot - PAGE));
        assert_eq!(bed.guest.map(1, 0x40_0000, 0x40_0fff, hot, RW), FAULT);
        // With iommufd another device joins the present address space. With type1 the daemon would have to fill a
        // new container, also with mappings of memory that does not exist.
        let expected = if backend.is_type1() { UNSUPP } else { OK };
        assert_eq!(bed.guest.attach(1, endpoint(1)), expected, "{backend:?}");

        // The VMM adds other memory there, and the guest's mappings lead to it.
        bed.guest.add_region(Region::new(hot, 4 << 20));
        assert!(reaches(&bed, &devices[0], 0, hot));
        assert!(reaches(&bed, &devices[0], first + 3 * PAGE, hot + PAGE));
        assert_eq!(bed.guest.unmap(1, 0, u64::MAX), OK);
        assert!(!reaches(&bed, &devices[0], 0, hot));
    }
}

/// Devices of one group must share a domain, since the host's IOMMU does not separate them.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn devices_of_one_group_stay_in_one_domain() {
    let names = words("VIOMMU_EDU_PAIR");
    let functions: Vec<_> = names.iter().map(String::as_str).collect();
    for backend in BACKENDS {
        eprintln!("{backend:?}");
        let mut bed = Bed::new(backend, &functions);
        let edus: Vec<_> = names.iter().map(|n| Edu::new(n)).collect();
        Function::bridge_of(&names[0]).enable();
        let (a, b) = (endpoint(0), endpoint(1));
        let guest = &mut bed.guest;
        guest.memory.write(TARGETS, &[7; PAGE as usize]);
        assert_eq!(guest.attach(1, a), OK);
        assert_eq!(guest.attach(2, b), UNSUPP, "the devices share a group");
        assert_eq!(guest.attach(1, b), OK);
        assert_eq!(guest.map(1, 0, PAGE - 1, TARGETS, READ), OK);
        assert_eq!(guest.map(1, PAGE, 2 * PAGE - 1, TARGETS + PAGE, WRITE), OK);
        for edu in &edus {
            guest.memory.write(TARGETS + PAGE, &[0; PAGE as usize]);
            edu.read(0);
            edu.write(PAGE);
            assert!(guest.memory.read(TARGETS + PAGE, PAGE as usize) == [7; PAGE as usize]);
        }
        // One device moves. The other is blocked until it follows.
        assert_eq!(guest.attach(2, a), OK);
        assert_eq!(
            guest.map(2, PAGE, 2 * PAGE - 1, TARGETS + 2 * PAGE, WRITE),
            OK
        );
        edus[0].write(PAGE);
        assert_eq!(guest.memory.read(TARGETS + 2 * PAGE, 4), [7; 4]);
        assert_eq!(guest.attach(2, b), OK);
        guest.memory.write(TARGETS + 2 * PAGE, &[0; PAGE as usize]);
        edus[1].write(PAGE);
        assert_eq!(guest.memory.read(TARGETS + 2 * PAGE, 4), [7; 4]);
        assert_eq!(guest.detach(2, a), OK);
        assert_eq!(guest.detach(2, b), OK);
        guest.memory.write(TARGETS + 2 * PAGE, &[0; PAGE as usize]);
        edus[0].write(TARGETS + 2 * PAGE);
        assert_eq!(
            guest.memory.read(TARGETS + 2 * PAGE, 4),
            [7; 4],
            "bypass mode"
        );
    }
}

/// PROBE returns the regions that the host reserves, and no mapping may cover them.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn probe_returns_the_reserved_regions_of_the_host() {
    let name = words("VIOMMU_EDU")[0].clone();
    let host = host_iommu();
    for backend in BACKENDS {
        let mut bed = Bed::new(backend, &[&name]);
        let regions: Vec<_> = bed
            .guest
            .probe(endpoint(0))
            .iter()
            .map(|r| (r.start, r.end, r.subtype))
            .collect();
        let untranslated = host.untranslated();
        let others = untranslated.map(|(first, last)| (first, last, 0));
        let expected: Vec<_> = host
            .reported_around_msi()
            .into_iter()
            .chain(others)
            .collect();
        assert_eq!(regions, expected, "{backend:?}");
        let guest = &mut bed.guest;
        assert_eq!(guest.attach(1, endpoint(0)), OK);
        for (first, last) in [host.msi()].into_iter().chain(untranslated) {
            let page = first & !(PAGE - 1);
            assert_ne!(guest.map(1, page, page + PAGE - 1, TARGETS, RW), OK);
            let page = (last + 1) & !(PAGE - 1);
            if page < 1 << 48 {
                assert_eq!(guest.map(1, page, page + PAGE - 1, TARGETS, RW), OK);
            }
        }
    }
}

/// ATTACH to a domain with a mapping in a region that the host reserves for the device.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_device_whose_regions_clash_is_refused() {
    let name = words("VIOMMU_EDU")[0].clone();
    // By default the configuration reserves the region for all endpoints, so this test reserves none.
    let (first, last) = host_iommu().msi();
    let msi = format!("{first:#x}..={last:#x}:msi");
    let (keys, iova, region) = if host_iommu().is_amd() {
        let region = "0xfd00000000..=0xffffffffff:reserved";
        ("", 0xfd_0000_0000, region)
    } else {
        ("reserved = []", first, msi.as_str())
    };
    let keys = format!("{keys}\n[[endpoint]]\naddress = \"00:0a.0\"\n");
    let emulated = 0x50;
    for backend in BACKENDS {
        let mut bed = Bed::with(backend, &[&name], &keys);
        assert_eq!(bed.guest.attach(1, emulated), OK);
        assert_eq!(bed.guest.map(1, iova, iova + PAGE - 1, TARGETS, RW), OK);
        assert_eq!(bed.guest.attach(1, endpoint(0)), UNSUPP, "{backend:?}");
        let log = bed.daemon.log();
        let mapping = format!("{iova:#x}..={:#x}", iova + PAGE - 1);
        assert!(log.contains(region) && log.contains(&mapping), "{log}");
        assert_eq!(bed.guest.unmap(1, iova, iova + PAGE - 1), OK);
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK, "{backend:?}");
        assert_ne!(bed.guest.map(1, iova, iova + PAGE - 1, TARGETS, RW), OK);
        // A domain without a passthrough device may map any address, one with such a device only memory.
        assert_eq!(bed.guest.attach(2, emulated), OK);
        assert_eq!(bed.guest.map(2, 0, PAGE - 1, 0x9_0000_0000, RW), OK);
        assert_eq!(bed.guest.attach(2, endpoint(0)), UNSUPP, "{backend:?}");
    }
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_disconnected_vmm_leaves_nothing_reachable() {
    for backend in BACKENDS {
        eprintln!("{backend:?}");
        let (mut bed, devices) = pair(backend);
        let iova = 0x20_0000_0000;
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.guest.map(1, iova, iova + PAGE - 1, TARGETS, RW), OK);
        assert!(reaches(&bed, &devices[0], iova, TARGETS));
        assert!(reaches(&bed, &devices[1], TARGETS, TARGETS), "bypass mode");
        bed.disconnect();
        assert!(!reaches(&bed, &devices[0], iova, TARGETS));
        assert!(!reaches(&bed, &devices[1], TARGETS, TARGETS));
        bed.reconnect();
        for device in &devices {
            assert!(!reaches(&bed, device, iova, TARGETS));
            assert!(reaches(&bed, device, TARGETS, TARGETS), "bypass mode");
        }
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.guest.map(1, iova, iova + PAGE - 1, TARGETS, RW), OK);
        assert!(reaches(&bed, &devices[0], iova, TARGETS));
    }
}
