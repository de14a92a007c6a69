//! The backend behind the core, on a fake kernel as strict as the real one.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::*;
use crate::address::{Access, GpaRange, Iova};
use crate::backends::testing::slot;
use crate::iommu::{Dma, Iommu, RequestError, Settings};
use crate::page_table::{Encoding, Format};
use crate::topology::{EndpointSpec, ReservedRegions, Topology};
use crate::vfio::fake::nesting::FakeIommu;
use crate::vfio::fake::{FakeKernel, FakeMemory};
use crate::vfio::nesting::FirstStage;

const A: EndpointId = EndpointId(0x18);
const B: EndpointId = EndpointId(0x20);
const D1: DomainId = DomainId(1);
const D2: DomainId = DomainId(2);
const RAM: u64 = 0x4000_0000;
const RAM_LEN: u64 = 0x20_0000;
const BASE: u64 = 0xfff_0000_0000;
const ARENA: u64 = 1 << 20;

struct Bed {
    kernel: FakeKernel,
    iommu: Iommu,
}

impl Bed {
    /// Both devices are behind one SMMU, each in a group of its own.
    fn new() -> Self {
        Self::on(FakeIommu::smmu()).expect("it nests")
    }

    fn on(hardware: FakeIommu) -> Result<Self, BackendError> {
        let kernel = FakeKernel::default();
        kernel.state().nesting.iommu = hardware;
        let specs = [A, B].map(|endpoint| EndpointSpec {
            range: format!("00:{:02x}.0", endpoint.0 >> 3)
                .parse()
                .expect("an address"),
            group: None,
            reserved: Vec::new(),
        });
        let iommu_at = "00:01.0".parse().expect("an address");
        let topology = Topology::new(iommu_at, ReservedRegions::default(), &specs);
        let settings = Settings {
            address_width: 48,
            page_sizes: PageMask::TABLE,
            last_domain: 15,
            bypass_at_boot: true,
            arena_limit: ARENA,
            encoding: Encoding {
                format: Format::Vmsav8Stage1,
                base: BASE,
            },
        };
        let mut iommu = Iommu::new(settings, topology.expect("a topology")).expect("an arena");
        let devices = [(A, 1), (B, 2)].map(|(endpoint, group)| {
            kernel.state().bound.push(endpoint.0);
            let bar = GpaRange::from_len(Gpa(0x1000_0000), 0x1000).expect("not empty");
            NestedDevice {
                device: PassthroughDevice {
                    endpoint,
                    name: format!("device {endpoint}"),
                    group,
                    shared: false,
                    attach: Box::new(kernel.device(endpoint.0, group)),
                    memory: Arc::new(FakeMemory::at(0, bar)),
                },
                bound: BoundDevice(endpoint.0),
                instance: 0,
            }
        });
        let tables = WalkedTables {
            file: iommu.arena().fd().try_clone_to_owned().expect("a copy"),
            base: Gpa(BASE),
            bytes: ARENA,
        };
        let spaces: Arc<dyn AddressSpaces> = Arc::new(kernel.clone());
        let nesting: Arc<dyn NestingKernel> = Arc::new(kernel.clone());
        let backend = Nested::new(spaces, &nesting, &tables, devices.into())?;
        iommu
            .add_backend(Box::new(backend), &[A, B])
            .expect("added");
        iommu.connect();
        iommu.set_memory(vec![slot(RAM, RAM_LEN, 0)]);
        iommu.driver_has_started();
        Ok(Self { kernel, iommu })
    }

    fn page(iova: u64) -> Mapping {
        Mapping {
            range: IovaRange::from_len(Iova(iova), 0x1000).expect("not empty"),
            gpa: Gpa(RAM),
            access: Access::READ_WRITE,
            mmio: false,
        }
    }

    /// The address space that a device's group is attached to.
    fn space_of(&self, endpoint: EndpointId) -> Option<u32> {
        let state = self.kernel.state();
        let mut groups = state.groups.values();
        let (space, _) = groups.find(|(_, devices)| devices.contains(&endpoint.0))?;
        *space
    }

    /// The stream table entry of a device; `None` if it is detached.
    fn entry_of(&self, endpoint: EndpointId) -> Option<[u64; 2]> {
        let table = self.space_of(endpoint)?;
        match self.kernel.state().nesting.nested(table)? {
            FirstStage::Smmu(entry) => Some(entry.words()),
            FirstStage::Vtd(_) => None,
        }
    }

    /// The kernel's calls that `act` makes, and the commands that reach the SMMU.
    fn counted(&mut self, act: impl FnOnce(&mut Iommu)) -> (u64, Vec<SmmuCommand>) {
        let calls = self.kernel.state().calls;
        self.kernel.state().nesting.commands.clear();
        act(&mut self.iommu);
        let mut state = self.kernel.state();
        (
            state.calls - calls,
            std::mem::take(&mut state.nesting.commands),
        )
    }

    /// Lets the next call of the kernel fail.
    fn fail_next(&self) {
        let mut state = self.kernel.state();
        let next = state.calls + 1;
        state.fail.push((next, libc::EIO));
    }

    fn dma(&self, endpoint: EndpointId) -> Dma {
        self.iommu.endpoint(endpoint).expect("it exists").dma
    }
}

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
}

fn unmap_pages(iommu: &mut Iommu, pages: impl Iterator<Item = u64>) -> Vec<bool> {
    let mut outcomes = std::collections::VecDeque::new();
    let ranges = pages.map(|page| range(page << 12, (page << 12) + 0xfff));
    iommu.unmap_all(D1, ranges, &mut outcomes);
    outcomes.iter().map(Result::is_ok).collect()
}

#[test]
fn map_makes_no_call_and_a_batch_of_unmaps_makes_one() {
    let mut bed = Bed::new();
    bed.iommu.attach(A, D1, false).expect("attached");
    let (calls, _) = bed.counted(|iommu| {
        for page in 0..300 {
            iommu.map(D1, &Bed::page(page << 12)).expect("mapped");
        }
    });
    assert_eq!(calls, 0);
    let (calls, commands) = bed.counted(|iommu| {
        assert_eq!(unmap_pages(iommu, (0..16).map(|n| 2 * n)), [true; 16]);
    });
    let asid = 1;
    let expected: Vec<_> = (0..16)
        .flat_map(|n| SmmuCommand::invalidate_range(asid, Bed::page(n << 13).range, false, true))
        .collect();
    assert_eq!((calls, commands), (1, expected));
    let (calls, commands) = bed.counted(|iommu| {
        let ok = unmap_pages(iommu, (16..116).map(|n| 2 * n));
        assert_eq!(ok, [true; 100]);
    });
    assert_eq!(calls, 1);
    assert_eq!(commands, [SmmuCommand::invalidate_asid(asid)]);
}

#[test]
fn each_target_has_a_table_of_its_own() {
    let mut bed = Bed::new();
    let bypass = bed.space_of(A).expect("bypass mode");
    assert_eq!(bed.space_of(B), Some(bypass));
    let ram_alone = |bed: &Bed| {
        let state = bed.kernel.state();
        let areas = state.spaces[&bypass].values();
        areas.map(|area| area.range).collect::<Vec<_>>()
    };
    assert_eq!(ram_alone(&bed), [range(RAM, RAM + RAM_LEN - 1)]);
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.attach(B, D2, false).expect("attached");
    let context = |endpoint| {
        let [first, _] = bed.entry_of(endpoint).expect("attached");
        assert_eq!(first & 0x3f, 1 | 5 << 1, "the first stage translates");
        first & !0x3f
    };
    assert_eq!(context(A), BASE + ARENA + 64);
    assert_eq!(context(B), BASE + ARENA + 128);
    // The second stage has RAM, and for reading only what the SMMU itself reads.
    let parent = {
        let state = bed.kernel.state();
        let table = bed_space(&state, A);
        state.nesting.space_of(table).expect("a parent")
    };
    let areas: Vec<_> = bed.kernel.state().spaces[&parent]
        .values()
        .copied()
        .collect();
    let whole = |first, len| range(first, first + len - 1);
    let found: Vec<_> = areas.iter().map(|area| (area.range, area.access)).collect();
    assert_eq!(
        found,
        [
            (whole(RAM, RAM_LEN), Access::READ_WRITE),
            (whole(BASE, ARENA), Access::READ),
            (whole(BASE + ARENA, 4096 * 64), Access::READ),
        ]
    );
    bed.iommu.attach(B, D1, false).expect("attached");
    assert_eq!(bed.space_of(A), bed.space_of(B));
    bed.iommu.set_memory(Vec::new());
    assert_eq!(bed.kernel.state().spaces[&parent].len(), 2);
    assert_eq!(ram_alone(&bed), []);
    bed.iommu.disconnect();
    assert_eq!((bed.space_of(A), bed.space_of(B)), (None, None), "blocked");
}

fn bed_space(state: &crate::vfio::fake::KernelState, endpoint: EndpointId) -> u32 {
    let mut groups = state.groups.values();
    let found = groups.find(|(_, devices)| devices.contains(&endpoint.0));
    found.and_then(|(space, _)| *space).expect("attached")
}

#[test]
fn a_failed_invalidation_is_never_answered_with_ok() {
    let mut bed = Bed::new();
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.map(D1, &Bed::page(0x1000)).expect("mapped");
    bed.fail_next();
    let refused = bed.iommu.unmap(D1, range(0x1000, 0x1fff));
    assert!(
        matches!(refused, Err(RequestError::Quarantined { count: 1, .. })),
        "{refused:?}"
    );
    assert_eq!((bed.dma(A), bed.space_of(A)), (Dma::Blocked, None));
    bed.iommu.attach(A, D1, false).expect("attached again");
    assert_eq!(bed.dma(A), Dma::Translated);
    assert!(bed.entry_of(A).is_some());
}

#[test]
fn no_mapping_leads_to_the_tables_and_no_ram_lies_there() {
    let mut bed = Bed::new();
    bed.iommu.attach(A, D1, false).expect("attached");
    for gpa in [
        BASE,
        BASE + ARENA - 0x1000,
        BASE + ARENA,
        BASE + ARENA + 0x1000,
    ] {
        let there = Mapping {
            gpa: Gpa(gpa),
            ..Bed::page(0x1000)
        };
        bed.iommu.map(D1, &there).expect_err("refused");
    }
    // Nothing was stored by the refused requests.
    bed.iommu.map(D1, &Bed::page(0x1000)).expect("free");
    let over = slot(BASE + ARENA - 0x1000, 0x1000, 0);
    let ram = slot(RAM, RAM_LEN, 0);
    bed.iommu.set_memory(vec![ram, over]);
    let spaces = &bed.kernel.state().spaces;
    let areas: Vec<_> = spaces.values().flat_map(|space| space.values()).collect();
    assert!(
        areas
            .iter()
            .all(|area| { area.access == Access::READ || area.range.last().0 < BASE })
    );
}

#[test]
fn an_asid_is_used_again_only_after_its_translations_are_gone() {
    let mut bed = Bed::new();
    bed.iommu.attach(A, D1, false).expect("attached");
    let (_, commands) = bed.counted(|iommu| iommu.detach(A, D1).expect("detached"));
    assert_eq!(commands, [SmmuCommand::invalidate_asid(1)]);
    bed.iommu.attach(A, D2, false).expect("attached");
    let context = |bed: &Bed| bed.entry_of(A).expect("attached")[0] & !0x3f;
    assert_eq!(context(&bed), BASE + ARENA + 64, "the same one");

    // The invalidation is the last call of a DETACH.
    let (calls, _) = bed.counted(|iommu| iommu.detach(A, D2).expect("detached"));
    bed.iommu.attach(A, D1, false).expect("attached");
    let next = bed.kernel.state().calls + calls;
    bed.kernel.state().fail.push((next, libc::EIO));
    bed.iommu.detach(A, D1).expect("detached");
    assert_eq!(bed.iommu.condemned_spaces(), 1);
    bed.iommu.attach(A, D2, false).expect("attached");
    assert_eq!(context(&bed), BASE + ARENA + 128, "another one");
}

#[test]
fn an_attach_that_fails_leaves_the_endpoint_where_it_was() {
    let mut bed = Bed::new();
    bed.iommu.attach(A, D1, false).expect("attached");
    let before = bed.entry_of(A);
    let (calls, _) = bed.counted(|iommu| iommu.attach(A, D2, false).expect("attached"));
    bed.iommu.attach(A, D1, false).expect("attached");
    for failing in 1..=calls {
        let mut bed = Bed::new();
        bed.iommu.attach(A, D1, false).expect("attached");
        let next = bed.kernel.state().calls + failing;
        bed.kernel.state().fail.push((next, libc::ENOMEM));
        match bed.iommu.attach(A, D2, false) {
            // Only the destruction of what is not used any more has failed.
            Ok(()) => assert_eq!(bed.dma(A), Dma::Translated),
            Err(_) => assert_eq!(bed.entry_of(A), before, "call {failing}"),
        }
    }
}

#[test]
fn an_iommu_that_cannot_nest_is_refused_with_the_reason() {
    for (hardware, reason) in [
        (FakeIommu::OneStage, "an SMMUv3"),
        (FakeIommu::vtd(), "an SMMUv3"),
    ] {
        let Err(refused) = Bed::on(hardware) else {
            panic!("it nests");
        };
        assert!(refused.message.contains(reason), "{}", refused.message);
    }
    let FakeIommu::Smmu(hardware, _) = FakeIommu::smmu() else {
        unreachable!("an SMMU");
    };
    assert!(
        Bed::on(FakeIommu::Smmu(hardware, false)).is_err(),
        "no CANWBS"
    );
}

#[test]
fn descriptors_are_valid_only_while_their_domain_exists() {
    let mut contexts = Contexts::new(Gpa(BASE), 8).expect("memory");
    assert_eq!(Contexts::bytes(8), 256 * 64);
    let describe = |asid| ContextDescriptor {
        table: Gpa(0x5000),
        asid,
        input_bits: 48,
        output_bits: 44,
    };
    let word = |contexts: &Contexts, asid: u64| {
        let mut bytes = [0; 8];
        rustix::io::pread(contexts.fd().as_fd(), &mut bytes, asid * 64).expect("read");
        u64::from_le_bytes(bytes)
    };
    for n in 1..=255 {
        let at = contexts
            .descriptor(DomainId(n), describe)
            .expect("one of 255");
        assert_eq!(at, Gpa(BASE + u64::from(n) * 64));
    }
    let refused = contexts
        .descriptor(DomainId(0), describe)
        .expect_err("no more");
    assert_eq!(refused.kind, BackendErrorKind::NoMem);
    assert_eq!(word(&contexts, 7) & 1 << 31, 1 << 31, "valid");
    assert_eq!(contexts.invalidate(DomainId(7)), Some(7));
    assert_eq!(word(&contexts, 7), 0);
    contexts
        .descriptor(DomainId(0), describe)
        .expect_err("not released");
    contexts.release(7);
    let again = contexts.descriptor(DomainId(0), describe);
    assert_eq!(again.expect("released"), Gpa(BASE + 7 * 64));
}
