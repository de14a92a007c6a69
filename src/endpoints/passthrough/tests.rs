//! The core and the backends of the host's IOMMU together, on a kernel made up for it: whatever
//! fails, the page tables, the core's states and what devices can reach agree.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use crate::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use crate::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use crate::backends::testing::{slot, slot_of};
use crate::backends::type1::{GroupDevice, Type1Group};
use crate::backends::{BackendCapabilities, BackendErrorKind, MemorySlot};
use crate::device::Device;
use crate::ids::{DomainId, EndpointId};
use crate::iommu::{Dma, Iommu, RequestError, Settings};
use crate::locks::{Mutex, Rank};
use crate::topology::{EndpointSpec, GroupName, ReservedRegions, Topology};
use crate::vfio::fake::{Area, FakeKernel, FakeMemory, memfd};
use crate::vfio::{AddressSpaces, Attach, DeviceMemory, Type1};

const A: EndpointId = EndpointId(0x18);
const B: EndpointId = EndpointId(0x20);
/// Two that the host cannot keep apart.
const G1: EndpointId = EndpointId(0x28);
const G2: EndpointId = EndpointId(0x30);
const ALL: [EndpointId; 4] = [A, B, G1, G2];
/// The host's numbers of their groups.
const GROUPS: [u32; 4] = [1, 2, 3, 3];
const D1: DomainId = DomainId(1);
const D2: DomainId = DomainId(2);
const BAR: u64 = 0xe000_0000;

/// How the endpoints are driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Iommufd(Pinning),
    Type1,
}

const WAYS: [Way; 3] = [
    Way::Iommufd(Pinning::All),
    Way::Iommufd(Pinning::Mapped),
    Way::Type1,
];

struct Bed {
    way: Way,
    kernel: FakeKernel,
    iommu: Iommu,
    memory: Vec<MemorySlot>,
    /// The VMM's address spaces, by group; in a type1 container's place its address space.
    spaces: BTreeMap<u32, u32>,
    bar: Arc<FakeMemory>,
}

fn topology() -> Topology {
    let spec = |endpoint: EndpointId, group: Option<&str>| EndpointSpec {
        range: format!("00:{:02x}.0", endpoint.0 >> 3)
            .parse()
            .expect("an address"),
        group: group.map(|name| GroupName::new(name).expect("a name")),
        reserved: Vec::new(),
    };
    let specs = [
        spec(A, None),
        spec(B, None),
        spec(G1, Some("host")),
        spec(G2, Some("host")),
    ];
    let iommu = "00:01.0".parse().expect("an address");
    Topology::new(iommu, ReservedRegions::default(), &specs).expect("a topology")
}

fn settings(bypass_at_boot: bool) -> Settings {
    Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 15,
        bypass_at_boot,
        arena_limit: 4 << 20,
    }
}

fn all_there_is() -> BackendCapabilities {
    BackendCapabilities {
        page_sizes: PageMask::TABLE,
        aperture: IovaRange::ALL,
    }
}

/// Memory of a device where nobody maps anything.
fn no_memory() -> Arc<dyn DeviceMemory> {
    let range = GpaRange::from_len(Gpa(0xf000_0000), 0x1000).expect("not empty");
    Arc::new(FakeMemory::at(1, range))
}

impl Bed {
    /// A VMM has connected and guest RAM is there.
    fn new(way: Way) -> Self {
        let mut iommu = Iommu::new(settings(true), topology()).expect("an arena");
        let kernel = FakeKernel::default();
        let capabilities = all_there_is();
        let range = GpaRange::from_len(Gpa(BAR), 0x4000).expect("not empty");
        let bar = Arc::new(FakeMemory::at(0, range));
        let none = no_memory();
        let memory_of =
            |n: usize| -> Arc<dyn DeviceMemory> { if n == 1 { bar.clone() } else { none.clone() } };
        let mut spaces = BTreeMap::new();
        match way {
            Way::Iommufd(pin) => {
                let mut devices = Vec::new();
                for (n, (&endpoint, &group)) in ALL.iter().zip(&GROUPS).enumerate() {
                    let device = kernel.device(endpoint.0, group);
                    devices.push(PassthroughDevice {
                        endpoint,
                        name: format!("device {n}"),
                        group,
                        shared: true,
                        attach: Box::new(device),
                        memory: memory_of(n),
                    });
                }
                let calls = Arc::new(kernel.clone());
                let backend = Iommufd::new(calls, capabilities, pin, devices);
                iommu.add_backend(Box::new(backend), &ALL).expect("added");
                for (endpoint, group) in ALL.into_iter().zip(GROUPS) {
                    let (_, space) = kernel.vmm_device(endpoint.0, group);
                    spaces.entry(group).or_insert(space);
                }
            }
            Way::Type1 => {
                for group in [1, 2, 3] {
                    let (container, space) = kernel.container();
                    spaces.insert(group, space);
                    let mine: Vec<_> = ALL
                        .iter()
                        .zip(GROUPS)
                        .filter(|(_, g)| *g == group)
                        .map(|(e, _)| *e)
                        .collect();
                    let devices = mine
                        .iter()
                        .map(|&endpoint| GroupDevice {
                            endpoint,
                            name: format!("device {endpoint}"),
                            device: Some(Box::new(kernel.device(endpoint.0, group))),
                        })
                        .collect();
                    let peers = vec![memory_of(1), memory_of(0)];
                    let backend =
                        Type1Group::new(Box::new(container), capabilities, devices, peers);
                    iommu.add_backend(Box::new(backend), &mine).expect("added");
                }
            }
        }
        let mut bed = Self {
            way,
            kernel,
            iommu,
            memory: Vec::new(),
            spaces,
            bar,
        };
        bed.iommu.connect();
        bed.set_memory(vec![
            slot(0, 0x1_0000, 0x3000),
            slot(0x1_0000, 0x1_0000, 0),
            slot(0x10_0000, 0x10_0000, 0),
        ]);
        bed
    }

    fn set_memory(&mut self, memory: Vec<MemorySlot>) {
        self.iommu.set_memory(memory.clone());
        self.memory = memory;
    }

    fn fail_in(&self, calls: u64, errno: i32) {
        let mut state = self.kernel.state();
        let at = state.calls + calls;
        state.fail.push((at, errno));
    }

    /// What the devices of a group can reach, pieces that adjoin in both spaces joined.
    fn reached(&self, group: u32) -> Vec<Area> {
        let state = self.kernel.state();
        let space = match self.way {
            Way::Iommufd(_) if state.adrift.contains(&group) => return Vec::new(),
            Way::Iommufd(_) => match state.groups.get(&group).and_then(|g| g.0) {
                // Identity, by the VMM's doing.
                Some(id) if self.spaces[&group] == id => return self.identity(),
                Some(id) => &state.spaces[&id],
                None => return Vec::new(),
            },
            Way::Type1 => &state.spaces[&self.spaces[&group]],
        };
        joined(space.values().copied())
    }

    fn identity(&self) -> Vec<Area> {
        let whole = |slot: &MemorySlot| Mapping {
            range: IovaRange::new(Iova(slot.range.first().0), Iova(slot.range.last().0))
                .expect("a range"),
            gpa: slot.range.first(),
            access: Access::READ_WRITE,
            mmio: false,
        };
        joined(self.memory.iter().flat_map(|s| self.areas(&whole(s))))
    }

    /// What a mapping lets a device reach.
    fn areas(&self, mapping: &Mapping) -> Vec<Area> {
        if mapping.access == Access::NONE {
            return Vec::new();
        }
        let ram = self.memory.iter().filter_map(|slot| {
            let part = mapping.part_in(slot.range)?;
            Some(Area {
                range: part.range,
                access: part.access,
                file: slot.identity,
                offset: slot.offset + (part.gpa.0 - slot.range.first().0),
            })
        });
        let bar = GpaRange::from_len(Gpa(BAR), 0x4000).and_then(|r| mapping.part_in(r));
        let bar = bar.map(|part| Area {
            range: part.range,
            access: part.access,
            file: self.bar.file(),
            // A DMA buffer begins where it was cut.
            offset: match self.way {
                Way::Iommufd(_) => 0,
                Way::Type1 => part.gpa.0 - BAR,
            },
        });
        ram.chain(bar).collect()
    }

    /// The core's states, the tables and the kernel agree.
    fn check(&self) {
        for (endpoint, group) in ALL.into_iter().zip(GROUPS) {
            let stopped = |(e, g): (EndpointId, u32)| {
                g == group && self.kernel.state().stopped.contains(&e.0)
            };
            if ALL.into_iter().zip(GROUPS).any(stopped) {
                // No DMA until its driver starts it over.
                continue;
            }
            let state = self.iommu.endpoint(endpoint).expect("an endpoint");
            let mates: Vec<_> = ALL
                .into_iter()
                .zip(GROUPS)
                .filter(|(e, g)| *g == group && *e != endpoint)
                .map(|(e, _)| self.iommu.endpoint(e).expect("an endpoint"))
                .collect();
            let mate_blocks = mates.iter().any(|m| m.quarantined);
            let expected = match (state.dma, state.domain) {
                _ if state.quarantined || mate_blocks => Vec::new(),
                (Dma::Translated, Some(domain)) => joined(
                    self.iommu
                        .mappings(domain, Iova(0))
                        .flat_map(|m| self.areas(&m)),
                ),
                (Dma::Bypass, _) => self.identity(),
                (Dma::Blocked | Dma::Translated, _) => {
                    // What the host cannot keep apart reaches what its mate does.
                    if mates.iter().any(|m| m.dma != Dma::Blocked) {
                        continue;
                    }
                    Vec::new()
                }
            };
            assert_eq!(self.reached(group), expected, "{endpoint}: {state:?}");
        }
    }

    /// Address spaces the kernel has that nothing accounts for.
    fn leaks(&self) -> usize {
        let state = self.kernel.state();
        let domains = match self.way {
            Way::Iommufd(_) => self.iommu.domains().filter(|d| !d.bypass).count(),
            Way::Type1 => 0,
        };
        let bypass = usize::from(self.way != Way::Type1);
        let own = match self.way {
            Way::Iommufd(_) => ALL.len(),
            Way::Type1 => 3,
        };
        state.spaces.len().saturating_sub(own + domains + bypass)
    }
}

/// Neighbours joined, so that it does not matter where a mapping was cut.
fn joined(areas: impl Iterator<Item = Area>) -> Vec<Area> {
    let mut areas: Vec<_> = areas.collect();
    areas.sort_by_key(|a| a.range.first());
    let mut result: Vec<Area> = Vec::new();
    for area in areas {
        if let Some(last) = result.last_mut()
            && last.range.last().0 + 1 == area.range.first().0
            && last.offset + last.range.span() + 1 == area.offset
            && (last.file, last.access) == (area.file, area.access)
        {
            last.range = IovaRange::new(last.range.first(), area.range.last()).expect("a range");
        } else {
            result.push(area);
        }
    }
    result
}

fn mapping(first: u64, len: u64, gpa: u64) -> Mapping {
    Mapping {
        range: IovaRange::from_len(Iova(first), len).expect("not empty"),
        gpa: Gpa(gpa),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).expect("a range")
}

fn kind(result: Result<(), RequestError>) -> BackendErrorKind {
    match result {
        Err(RequestError::Backend(cause)) => cause.kind,
        other => panic!("{other:?}"),
    }
}

#[derive(Clone, Debug)]
enum Op {
    Attach(EndpointId, DomainId, bool),
    Detach(EndpointId, DomainId),
    Map(DomainId, Mapping),
    Unmap(DomainId, IovaRange),
    Bypass(bool),
    Reset,
    /// This slot goes or comes.
    Memory(usize),
    Reconnect,
}

fn run(bed: &mut Bed, op: &Op) -> Result<(), RequestError> {
    match op {
        Op::Attach(endpoint, domain, bypass) => bed.iommu.attach(*endpoint, *domain, *bypass),
        Op::Detach(endpoint, domain) => bed.iommu.detach(*endpoint, *domain),
        Op::Map(domain, mapping) => bed.iommu.map(*domain, mapping),
        Op::Unmap(domain, range) => bed.iommu.unmap(*domain, *range).map(|_| ()),
        Op::Bypass(bypass) => {
            bed.iommu.set_bypass(*bypass);
            Ok(())
        }
        Op::Reset => {
            bed.iommu.reset();
            Ok(())
        }
        Op::Memory(index) => {
            let gpa = [0, 0x1_0000, 0x10_0000][index % 3];
            let mut memory = bed.memory.clone();
            let before = memory.len();
            memory.retain(|s| s.range.first() != Gpa(gpa));
            if memory.len() == before {
                memory.push(slot(
                    gpa,
                    [0x1_0000, 0x1_0000, 0x10_0000][index % 3],
                    0x1000,
                ));
            }
            bed.set_memory(memory);
            Ok(())
        }
        Op::Reconnect => {
            let memory = bed.memory.clone();
            bed.iommu.disconnect();
            bed.iommu.connect();
            bed.iommu.set_memory(memory);
            Ok(())
        }
    }
}

fn script() -> Vec<Op> {
    vec![
        Op::Attach(A, D1, false),
        Op::Map(D1, mapping(0x1000, 0x1000, 0x2000)),
        Op::Map(D1, mapping(0x2000, 0x1000, 0x2000)),
        // Over two slots.
        Op::Map(D1, mapping(0x10_0000, 0x4000, 0xe000)),
        // Into the other device, and half-way into nothing.
        Op::Map(D1, mapping(0x20_0000, 0x1000, BAR + 0x1000)),
        Op::Map(D1, mapping(0x30_0000, 0x4000, 0x1_e000)),
        Op::Attach(B, D1, false),
        Op::Memory(1),
        Op::Memory(1),
        Op::Unmap(D1, range(0x1000, 0x1fff)),
        Op::Attach(A, D2, false),
        Op::Map(D2, mapping(0, 0x8000, 0x10_0000)),
        Op::Attach(G1, D2, false),
        Op::Attach(G2, D2, false),
        Op::Attach(G1, D1, false),
        Op::Attach(G2, D1, false),
        Op::Attach(A, DomainId(3), true),
        Op::Memory(2),
        Op::Bypass(false),
        Op::Detach(B, D1),
        Op::Unmap(D1, IovaRange::ALL),
        Op::Reset,
        Op::Bypass(true),
        Op::Memory(2),
    ]
}

#[test]
fn devices_reach_what_the_tables_say() {
    for way in WAYS {
        let mut bed = Bed::new(way);
        bed.check();
        for op in script() {
            let result = run(&mut bed, &op);
            if let Err(error) = &result {
                assert!(
                    matches!(op, Op::Map(_, m) if m.range.first() == Iova(0x30_0000)),
                    "{op:?}: {error}"
                );
            }
            bed.check();
            assert_eq!(bed.leaks(), 0, "{op:?}");
        }
    }
}

/// Fails every call of the kernel's in turn, and every pair of neighbours.
#[test]
fn every_failure_of_the_kernel_leaves_agreement() {
    for way in WAYS {
        // The last is what some calls answer where there was nothing to do, too.
        for (in_a_row, errno) in [
            (1, libc::ENOMEM),
            (2, libc::ENOMEM),
            (3, libc::ENOMEM),
            (1, libc::ENOENT),
            (2, libc::ENOENT),
        ] {
            let mut failed = 0;
            for n in 1.. {
                let mut bed = Bed::new(way);
                for more in 0..in_a_row {
                    bed.fail_in(n + more, errno);
                }
                let last = bed.kernel.state().calls + n;
                for op in script() {
                    let before: Vec<_> = bed.iommu.endpoints(usize::MAX, 9).collect();
                    let result = run(&mut bed, &op);
                    match result {
                        Err(RequestError::Quarantined { .. }) | Ok(()) => {}
                        Err(_) => {
                            let after: Vec<_> = bed.iommu.endpoints(usize::MAX, 9).collect();
                            assert_eq!(after, before, "{way:?} {n} {op:?}");
                            if in_a_row == 1 && bed.kernel.state().calls >= last {
                                // What could not be cleared away at once is with the next switch.
                                bed.iommu.retarget_unattached();
                                assert_eq!(bed.leaks(), 0, "{way:?} {n} {op:?}");
                            }
                        }
                    }
                    // Slots that bypass mode lacks are a known hole; all else agrees.
                    let hit = bed.kernel.state().calls >= last;
                    if hit && matches!(op, Op::Memory(_) | Op::Attach(_, DomainId(3), _)) {
                        break;
                    }
                    bed.check();
                }
                if bed.kernel.state().calls < last {
                    break;
                }
                failed += 1;
                // A new VM finds everything usable, and no address space left behind.
                bed.kernel.state().fail.clear();
                bed.kernel.state().stopped.clear();
                run(&mut bed, &Op::Reconnect).expect("a new VM");
                bed.check();
                for domain in [D1, D2] {
                    bed.iommu.attach(A, domain, false).expect("attached");
                }
                bed.iommu
                    .map(D2, &mapping(0, 0x1000, 0))
                    .expect("mapped again");
                bed.check();
                assert_eq!(bed.leaks(), 0, "{way:?} {n}");
            }
            assert!(failed > 20, "{way:?}: {failed} calls were failed");
        }
    }
}

#[test]
fn one_domain_is_one_host_mapping_whatever_the_endpoints() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::All));
    for endpoint in [A, B] {
        bed.iommu.attach(endpoint, D1, false).expect("attached");
    }
    let before = bed.kernel.state().calls;
    bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
    assert_eq!(bed.kernel.state().calls, before + 1);
    bed.check();
    bed.iommu
        .unmap(D1, range(0, 0xfff))
        .expect("unmapped with one call");
    assert_eq!(bed.kernel.state().calls, before + 2);
}

#[test]
fn permissions_reach_the_host() {
    for way in WAYS {
        let mut bed = Bed::new(way);
        bed.iommu.attach(A, D1, false).expect("attached");
        let rights = [
            Access::READ,
            Access::WRITE,
            Access::READ_WRITE,
            Access::NONE,
        ];
        for (n, access) in rights.into_iter().enumerate() {
            let wanted = Mapping {
                access,
                ..mapping(n as u64 * 0x2000, 0x1000, 0x4000)
            };
            bed.iommu.map(D1, &wanted).expect("mapped");
        }
        let held: Vec<_> = bed.reached(1).iter().map(|a| a.access).collect();
        assert_eq!(held, rights[..3]);
        bed.check();
        bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
        assert!(bed.reached(1).is_empty());
        // Nothing but one without rights is no failure either.
        let none = Mapping {
            access: Access::NONE,
            ..mapping(0, 0x1000, 0x4000)
        };
        bed.iommu.map(D1, &none).expect("mapped");
        bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    }
}

#[test]
fn a_move_that_fails_leaves_the_device_where_it_was() {
    for way in WAYS {
        let mut bed = Bed::new(way);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu.attach(B, D2, false).expect("attached");
        for n in 0..4 {
            let (here, there) = (mapping(n << 12, 0x1000, 0x1000), n << 13);
            bed.iommu.map(D1, &here).expect("mapped");
            bed.iommu
                .map(D2, &mapping(there, 0x1000, 0))
                .expect("mapped");
        }
        let before = bed.reached(1);
        bed.fail_in(1, libc::ENOMEM);
        let refused = bed.iommu.attach(A, D2, false);
        assert_eq!(kind(refused), BackendErrorKind::NoMem, "{way:?}");
        assert_eq!(bed.reached(1), before, "{way:?}");
        bed.check();
        // Half-way, where there is such a thing.
        bed.fail_in(3, libc::ENOMEM);
        match (way, bed.iommu.attach(A, D2, false)) {
            (Way::Type1, refused) => {
                assert_eq!(kind(refused), BackendErrorKind::NoMem);
                assert_eq!(bed.reached(1), before);
            }
            (Way::Iommufd(_), moved) => moved.expect("one call"),
        }
        bed.check();
    }
}

#[test]
fn what_is_no_memory_is_refused_with_fault() {
    for way in WAYS {
        let mut bed = Bed::new(way);
        bed.iommu.attach(A, D1, false).expect("attached");
        for gpa in [0x9000_0000, BAR + 0x4000, 0x1_e000] {
            let refused = bed.iommu.map(D1, &mapping(0, 0x4000, gpa));
            assert_eq!(kind(refused), BackendErrorKind::Fault, "{way:?} {gpa:#x}");
            let none = Mapping {
                access: Access::NONE,
                ..mapping(0, 0x4000, gpa)
            };
            let refused = bed.iommu.map(D1, &none);
            assert_eq!(kind(refused), BackendErrorKind::Fault, "{way:?} {gpa:#x}");
            assert!(bed.reached(1).is_empty());
        }
        bed.iommu
            .map(D1, &mapping(0, 0x2000, BAR + 0x1000))
            .expect("memory of another device");
        bed.check();
    }
}

#[test]
fn the_hosts_limits_become_statuses() {
    for way in WAYS {
        for (errno, expected) in [
            (libc::ENOMEM, BackendErrorKind::NoMem),
            (libc::ENOSPC, BackendErrorKind::NoMem),
            (libc::EEXIST, BackendErrorKind::DevErr),
            (libc::EFAULT, BackendErrorKind::Fault),
            (libc::EIO, BackendErrorKind::DevErr),
        ] {
            let mut bed = Bed::new(way);
            bed.iommu.attach(A, D1, false).expect("attached");
            bed.fail_in(1, errno);
            let refused = bed.iommu.map(D1, &mapping(0, 0x1000, 0));
            assert_eq!(kind(refused), expected, "{way:?} {errno}");
            bed.check();
            bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
        }
    }
}

#[test]
fn a_domain_that_leads_nowhere_takes_no_host_device() {
    for way in WAYS {
        let mut bed = Bed::new(way);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu
            .map(D1, &mapping(0, 0x4000, 0x1_0000))
            .expect("mapped");
        run(&mut bed, &Op::Memory(1)).expect("the slot goes");
        bed.check();
        assert!(bed.reached(1).is_empty());
        if let Way::Type1 = way {
            let refused = bed.iommu.attach(B, D1, false);
            assert_eq!(kind(refused), BackendErrorKind::Unsupp);
            bed.check();
        }
        run(&mut bed, &Op::Memory(1)).expect("another slot comes");
        assert_eq!(bed.reached(1).len(), 1);
        bed.check();
    }
}

#[test]
fn the_vmm_may_send_the_same_memory_again() {
    for way in WAYS {
        let mut bed = Bed::new(way);
        let file = memfd(0x4000);
        let again = file.try_clone().expect("a descriptor");
        bed.set_memory(vec![slot_of(file, 0, 0x4000, 0)]);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu.map(D1, &mapping(0, 0x4000, 0)).expect("mapped");
        let before = bed.kernel.state().calls;
        bed.set_memory(vec![slot_of(again, 0, 0x4000, 0)]);
        assert_eq!(bed.kernel.state().calls, before, "nothing has changed");
        bed.check();
    }
}

#[test]
fn kernels_without_mapping_by_file_take_addresses() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::Mapped));
    bed.kernel.state().old = true;
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu
        .map(D1, &mapping(0, 0x4000, 0xe000))
        .expect("mapped");
    bed.check();
}

/// A VM with the device A, which no VMM has bound yet, and without bypass mode at boot.
fn with_unbound_device(kernel: &FakeKernel) -> Iommu {
    let device = PassthroughDevice {
        endpoint: A,
        name: "0000:65:00.0".into(),
        group: 1,
        shared: true,
        attach: Box::new(kernel.device(A.0, 1)),
        memory: no_memory(),
    };
    let mut iommu = Iommu::new(settings(false), topology()).expect("an arena");
    let calls = Arc::new(kernel.clone());
    let backend = Iommufd::new(calls, all_there_is(), Pinning::All, vec![device]);
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    iommu
}

#[test]
fn a_device_the_vmm_has_not_bound_is_told_of_and_taken_up_later() {
    let kernel = FakeKernel::default();
    let mut iommu = with_unbound_device(&kernel);
    assert!(!iommu.endpoint(A).expect("an endpoint").quarantined);
    iommu.connect();
    let refused = iommu.attach(A, D1, false).expect_err("not bound");
    assert!(
        refused.to_string().contains("before the vhost-user device"),
        "{refused}"
    );
    assert!(iommu.endpoint(A).expect("an endpoint").quarantined);

    // Now the VMM has, and its own address space counts until ours does.
    let (device, space) = kernel.vmm_device(A.0, 1);
    assert!(device.is_bound());
    assert_eq!(kernel.state().groups[&1].0, Some(space));
    iommu.retarget_unattached();
    assert_eq!(kernel.state().groups[&1].0, None, "blocked");
    assert!(!iommu.endpoint(A).expect("an endpoint").quarantined);
    iommu.attach(A, D1, false).expect("attached");
    assert!(kernel.state().groups[&1].0.is_some_and(|id| id != space));
}

#[test]
fn a_vmm_that_connects_before_it_binds_its_devices_is_waited_for() {
    for says_something in [true, false] {
        let kernel = FakeKernel::default();
        let iommu = Arc::new(Mutex::new(Rank::Core, with_unbound_device(&kernel)));
        let worker = crate::device::WorkerSettings {
            longest_poll: std::time::Duration::ZERO,
            max_batch: 64,
            realtime: None,
        };
        let device = Device::new(iommu.clone(), Arc::default(), worker).expect("event descriptors");
        let quarantined = || iommu.lock().endpoint(A).expect("an endpoint").quarantined;
        device.connect();
        assert!(!quarantined(), "nothing was tried yet");
        if says_something {
            let (_, space) = kernel.vmm_device(A.0, 1);
            assert_eq!(kernel.state().groups[&1].0, Some(space));
            device.announce_vmm();
            assert_eq!(kernel.state().groups[&1].0, None, "blocked");
        }
        assert!(!quarantined());
        device.disconnect();
        assert!(!quarantined());
    }
}

#[test]
fn the_vmms_own_address_space_serves_until_it_is_left() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::All));
    let own = bed.spaces[&1];
    let at = |bed: &Bed| bed.kernel.state().groups[&1].0;
    assert_eq!(at(&bed), Some(own));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.detach(A, D1).expect("detached");
    assert_ne!(at(&bed), Some(own), "bypass is ours from now on");
    bed.check();
    bed.iommu.disconnect();
    assert_eq!(at(&bed), None, "the VMM is gone");
}

#[test]
fn pinning_what_is_mapped_keeps_all_of_ram_only_while_it_is_used() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::Mapped));
    let spaces = |bed: &Bed| bed.kernel.state().spaces.len();
    let empty = spaces(&bed);
    bed.iommu.attach(A, D1, false).expect("attached");
    assert_eq!(spaces(&bed), empty + 1, "the domain's");
    bed.iommu.detach(A, D1).expect("detached");
    assert_eq!(spaces(&bed), empty + 1, "that of bypass mode");
    bed.check();
    bed.iommu.attach(A, D1, false).expect("attached");
    assert_eq!(spaces(&bed), empty + 1, "the domain's");
    bed.iommu.attach(B, D1, false).expect("attached");
    bed.iommu.attach(A, D2, true).expect("attached");
    assert_eq!(spaces(&bed), empty + 2, "both");
    bed.check();
}

#[test]
fn a_container_that_is_handed_over_is_emptied() {
    let kernel = FakeKernel::default();
    let (container, space) = kernel.container();
    let ram = slot(0, 0x1000, 0);
    container
        .map(range(0x5000, 0x5fff), Access::READ_WRITE, &ram.memory, 0)
        .expect("mapped by somebody else");
    let devices = vec![GroupDevice {
        endpoint: A,
        name: "a device".into(),
        device: None,
    }];
    let backend = Type1Group::new(Box::new(container), all_there_is(), devices, Vec::new());
    let mut iommu = Iommu::new(settings(false), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    assert!(kernel.state().spaces[&space].is_empty());
}

#[test]
fn a_device_that_does_not_answer_for_a_moment_is_stopped() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::All));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
    bed.kernel.state().asleep.push(A.0);
    let detached = bed.iommu.detach(A, D1);
    assert!(
        matches!(detached, Err(RequestError::Quarantined { .. })),
        "{detached:?}"
    );
    assert!(bed.kernel.state().stopped.contains(&A.0));
    // Once it answers, blocked is blocked.
    bed.kernel.state().asleep.clear();
    bed.kernel.state().stopped.clear();
    bed.iommu.set_bypass(false);
    bed.iommu.reset();
    assert!(bed.reached(1).is_empty());
    bed.check();
}

#[test]
fn what_the_vmm_has_moved_since_is_moved_back() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::All));
    bed.iommu.set_bypass(false);
    assert!(bed.reached(1).is_empty());
    let vmm = bed.spaces[&1];
    bed.kernel.state().groups.insert(1, (Some(vmm), vec![A.0]));
    bed.iommu.retarget_unattached();
    assert!(bed.reached(1).is_empty(), "blocked");
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.kernel.state().groups.insert(1, (Some(vmm), vec![A.0]));
    bed.iommu.reset();
    assert!(bed.reached(1).is_empty(), "blocked");
}

#[test]
fn a_device_bound_to_another_iommufd_is_found_out() {
    let ours = FakeKernel::default();
    let theirs = FakeKernel::default();
    let devices = vec![PassthroughDevice {
        endpoint: A,
        name: "0000:65:00.0".into(),
        group: 1,
        shared: true,
        attach: Box::new(theirs.device(A.0, 1)),
        memory: no_memory(),
    }];
    let calls = Arc::new(ours.clone());
    let backend = Iommufd::new(calls, all_there_is(), Pinning::All, devices);
    let mut iommu = Iommu::new(settings(true), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    let (_, space) = theirs.vmm_device(A.0, 1);
    iommu.connect();
    iommu.set_memory(vec![slot(0, 0x1000, 0)]);
    // A number of ours is one of theirs, too.
    for _ in 0..8 {
        theirs.alloc().expect("an address space");
    }
    let refused = iommu.attach(A, D1, false).expect_err("not ours");
    assert!(refused.to_string().contains("another iommufd"), "{refused}");
    assert!(iommu.endpoint(A).expect("an endpoint").quarantined);
    assert_eq!(theirs.state().groups[&1].0, None, "not even in {space}");
    assert!(
        iommu.map(D1, &mapping(0, 0x1000, 0)).is_err(),
        "no such domain"
    );
}

#[test]
fn devices_bound_before_any_vmm_are_where_nobody_knows() {
    let kernel = FakeKernel::default();
    let (device, old) = kernel.vmm_device(A.0, 1);
    let devices = vec![PassthroughDevice {
        endpoint: A,
        name: "0000:65:00.0".into(),
        group: 1,
        shared: true,
        attach: Box::new(device),
        memory: no_memory(),
    }];
    let calls = Arc::new(kernel.clone());
    let backend = Iommufd::new(calls, all_there_is(), Pinning::All, devices);
    let mut iommu = Iommu::new(settings(true), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    iommu.connect();
    iommu.set_memory(vec![slot(0, 0x1000, 0)]);
    let at = kernel.state().groups[&1].0.expect("bypass mode");
    assert_ne!(at, old, "whatever a former daemon left there");
    assert_eq!(kernel.state().spaces[&at].len(), 1, "all of RAM");
}

#[test]
fn addresses_only_the_host_reserves_make_attach_unsupported() {
    for way in WAYS {
        let mut bed = Bed::new(way);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
        bed.iommu.attach(B, D2, false).expect("attached");
        bed.fail_in(1, libc::EADDRINUSE);
        let refused = bed.iommu.attach(B, D1, false);
        assert_eq!(kind(refused), BackendErrorKind::Unsupp, "{way:?}");
        bed.check();
    }
}

#[test]
fn bypass_mode_that_lacks_memory_is_filled_or_refused() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::All));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.attach(B, D1, false).expect("attached");
    let mut memory = bed.memory.clone();
    memory.push(slot(0x100_0000, 0x1000, 0));
    bed.fail_in(1, libc::ENOMEM);
    bed.set_memory(memory);
    // The next one that goes there has it all.
    bed.iommu.detach(A, D1).expect("detached");
    bed.check();
    let mut memory = bed.memory.clone();
    memory.push(slot(0x200_0000, 0x1000, 0));
    bed.fail_in(1, libc::ENOMEM);
    bed.fail_in(2, libc::ENOMEM);
    bed.set_memory(memory);
    let refused = bed.iommu.detach(B, D1);
    assert!(
        matches!(refused, Err(RequestError::Quarantined { .. })),
        "{refused:?}"
    );
    assert!(bed.reached(2).is_empty());
}

#[test]
fn nothing_is_copied_from_bypass_mode_while_it_is_used() {
    let mut bed = Bed::new(Way::Iommufd(Pinning::All));
    let files = |bed: &Bed| bed.kernel.state().mapped_by_file;
    bed.iommu.attach(A, D1, false).expect("attached");
    let before = files(&bed);
    bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
    assert_eq!(files(&bed), before, "a copy");
    // Out of the VMM's address space, and into ours.
    bed.iommu.attach(B, D1, false).expect("attached");
    bed.iommu.detach(B, D1).expect("detached");
    let before = files(&bed);
    bed.iommu
        .map(D1, &mapping(0x1000, 0x1000, 0))
        .expect("mapped");
    assert_eq!(
        files(&bed),
        before + 1,
        "its pages may have been discarded since"
    );
    bed.check();
}

fn any_op() -> impl Strategy<Value = Op> {
    let endpoint = (0usize..4).prop_map(|n| ALL[n]);
    let domain = (1u32..4).prop_map(DomainId);
    let target = prop_oneof![
        4 => (0u64..32).prop_map(|n| n << 12),
        2 => (0x100u64..0x110).prop_map(|n| n << 12),
        1 => (0u64..6).prop_map(|n| BAR + (n << 12)),
    ];
    let access = prop_oneof![
        Just(Access::READ_WRITE),
        Just(Access::READ),
        Just(Access::WRITE),
        Just(Access::NONE)
    ];
    let any_mapping =
        (0u64..24, 1u64..6, target, access).prop_map(|(first, pages, gpa, access)| Mapping {
            access,
            ..mapping(first << 12, pages << 12, gpa)
        });
    prop_oneof![
        4 => (endpoint.clone(), domain.clone(), proptest::bool::weighted(0.1))
            .prop_map(|(e, d, b)| Op::Attach(e, d, b)),
        2 => (endpoint, domain.clone()).prop_map(|(e, d)| Op::Detach(e, d)),
        8 => (domain.clone(), any_mapping).prop_map(|(d, m)| Op::Map(d, m)),
        4 => (domain, 0u64..24, 0u64..12)
            .prop_map(|(d, first, more)| Op::Unmap(d, range(first << 12, ((first + more) << 12) | 0xfff))),
        1 => any::<bool>().prop_map(Op::Bypass),
        1 => Just(Op::Reset),
        2 => (0usize..3).prop_map(Op::Memory),
        1 => Just(Op::Reconnect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_requests_leave_agreement(
        way in (0usize..3).prop_map(|n| WAYS[n]),
        ops in proptest::collection::vec(any_op(), 1..60),
    ) {
        let mut bed = Bed::new(way);
        for op in ops {
            let _ = run(&mut bed, &op);
            bed.check();
            prop_assert_eq!(bed.leaks(), 0);
        }
    }
}
