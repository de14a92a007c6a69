//! Tests of the core with the backends of the host's IOMMU, on a fake kernel. Whichever call fails, the
//! page tables, the core's states and the memory that devices can reach must agree.

mod failures;
mod kernel;

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
use crate::iommu::{Dma, Iommu, NewEndpoints, RequestError, Settings};
use crate::locks::{Mutex, Rank};
use crate::topology::{EndpointSpec, GroupName, PciAddress, ReservedRegions, Topology};
use crate::vfio::fake::{Area, FakeKernel, FakeMemory, memfd};
use crate::vfio::{AddressSpaces, Attach, DeviceMemory, Type1};

const A: EndpointId = EndpointId(0x18);
const B: EndpointId = EndpointId(0x20);
/// G1 and G2 are in one host group: the host cannot isolate them from each other.
const G1: EndpointId = EndpointId(0x28);
const G2: EndpointId = EndpointId(0x30);
/// A device that is added later.
const C: EndpointId = EndpointId(0x38);
const ALL: [EndpointId; 4] = [A, B, G1, G2];
/// The number of each endpoint's host group, in the order of [`ALL`].
const GROUPS: [u32; 4] = [1, 2, 3, 3];
const D1: DomainId = DomainId(1);
const D2: DomainId = DomainId(2);
const BAR: u64 = 0xe000_0000;

/// The interface through which the daemon programs the host's IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interface {
    Iommufd(Pinning),
    Type1,
}

const INTERFACES: [Interface; 3] = [
    Interface::Iommufd(Pinning::All),
    Interface::Iommufd(Pinning::Mapped),
    Interface::Type1,
];

struct Bed {
    interface: Interface,
    kernel: FakeKernel,
    iommu: Iommu,
    memory: Vec<MemorySlot>,
    /// Address spaces by host group: with iommufd the VMM's, with type1 that of the container.
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

fn all_capabilities() -> BackendCapabilities {
    BackendCapabilities {
        page_sizes: PageMask::TABLE,
        aperture: IovaRange::ALL,
    }
}

/// Device memory that no test maps.
fn no_memory() -> Arc<dyn DeviceMemory> {
    let range = GpaRange::from_len(Gpa(0xf000_0000), 0x1000).expect("not empty");
    Arc::new(FakeMemory::at(1, range))
}

impl Bed {
    /// A bed with a connected VMM and guest RAM.
    fn new(interface: Interface) -> Self {
        Self::booted(interface, true)
    }

    /// As [`Self::new`], with the value of `bypass` at boot.
    fn booted(interface: Interface, bypass: bool) -> Self {
        let mut iommu = Iommu::new(settings(bypass), topology()).expect("an arena");
        let kernel = FakeKernel::default();
        let capabilities = all_capabilities();
        let range = GpaRange::from_len(Gpa(BAR), 0x4000).expect("not empty");
        let bar = Arc::new(FakeMemory::at(0, range));
        let none = no_memory();
        let memory_of =
            |n: usize| -> Arc<dyn DeviceMemory> { if n == 1 { bar.clone() } else { none.clone() } };
        let mut spaces = BTreeMap::new();
        match interface {
            Interface::Iommufd(pin) => {
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
            Interface::Type1 => {
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
            interface,
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

    /// The VMM puts all devices into a new address space of its own.
    fn reattach_by_vmm(&mut self) {
        let all = ALL.into_iter().zip(GROUPS);
        let devices: Vec<_> = all
            .map(|(endpoint, group)| self.kernel.device(endpoint.0, group))
            .collect();
        let space = self.kernel.reattach_by_vmm(&devices);
        self.spaces.values_mut().for_each(|it| *it = space);
    }

    /// The areas that the devices of a group can reach, with adjacent areas joined (see [`joined`]).
    fn reached(&self, group: u32) -> Vec<Area> {
        let state = self.kernel.state();
        let space = match self.interface {
            Interface::Iommufd(_) if state.without_space.contains(&group) => return Vec::new(),
            Interface::Iommufd(_) => match state.groups.get(&group).and_then(|g| g.0) {
                // The VMM's own address space maps guest RAM one to one.
                Some(id) if self.spaces[&group] == id => return self.identity(),
                Some(id) => &state.spaces[&id],
                None => return Vec::new(),
            },
            Interface::Type1 => &state.spaces[&self.spaces[&group]],
        };
        let cached = state.cached.get(&group).into_iter().flatten();
        joined(space.values().chain(cached).copied())
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

    /// The areas that a device can reach through `mapping`.
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
            // iommufd maps a DMA buffer of exactly this part, so the offset in the buffer is 0.
            offset: match self.interface {
                Interface::Iommufd(_) => 0,
                Interface::Type1 => part.gpa.0 - BAR,
            },
        });
        ram.chain(bar).collect()
    }

    /// Asserts that the core's states, the page tables and the kernel agree.
    fn check(&self) {
        for (endpoint, group) in ALL.into_iter().zip(GROUPS) {
            let stopped = |(e, g): (EndpointId, u32)| {
                g == group && self.kernel.state().stopped.contains(&e.0)
            };
            if ALL.into_iter().zip(GROUPS).any(stopped) {
                // A stopped device does no DMA until its driver sets it up again.
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
                    // A device reaches all memory that another device of its host group reaches.
                    if mates.iter().any(|m| m.dma != Dma::Blocked) {
                        continue;
                    }
                    Vec::new()
                }
            };
            assert_eq!(self.reached(group), expected, "{endpoint}: {state:?}");
        }
    }

    /// The number of the kernel's address spaces that no device, domain or bypass mode uses.
    fn leaks(&self) -> usize {
        let state = self.kernel.state();
        let domains = match self.interface {
            Interface::Iommufd(_) => self.iommu.domains().filter(|d| !d.bypass).count(),
            Interface::Type1 => 0,
        };
        let bypass = usize::from(self.interface != Interface::Type1);
        let own = match self.interface {
            // And the anchor of the records.
            Interface::Iommufd(_) => ALL.len() + 1,
            Interface::Type1 => 3,
        };
        state.spaces.len().saturating_sub(own + domains + bypass)
    }
}

/// Joins areas that are adjacent in I/O virtual addresses and in their file: a backend may split a mapping
/// anywhere.
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
    /// Removes the memory slot with this index, or adds it if it is absent.
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
        // Spans two memory slots.
        Op::Map(D1, mapping(0x10_0000, 0x4000, 0xe000)),
        // The first mapping is of another device's BAR. The second extends past the end of RAM and fails.
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
fn devices_reach_exactly_what_the_page_tables_map() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
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

#[test]
fn endpoints_of_one_domain_share_one_host_mapping() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
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

/// The specification lets a driver send any range, and demands OK unless the range splits a mapping.
#[test]
fn unmap_of_a_range_that_ends_within_pages_reaches_no_backend_as_it_is() {
    for interface in INTERFACES {
        for (first, last) in [
            (0x0fff, 0x2fff),
            (0x1000, 0x3000),
            (0x0001, 0x3ffe),
            (0x0800, u64::MAX - 1),
        ] {
            let mut bed = Bed::new(interface);
            bed.iommu.attach(A, D1, false).expect("attached");
            for at in [0x1000, 0x2000, 0x5000] {
                bed.iommu.map(D1, &mapping(at, 0x1000, at)).expect("mapped");
            }
            bed.iommu
                .unmap(D1, range(first, last))
                .expect("no mapping is split");
            let state = bed.iommu.endpoint(A).expect("an endpoint");
            assert!(!state.quarantined, "{interface:?} {first:#x}..={last:#x}");
            let left = usize::from(last < 0x5000);
            assert_eq!(bed.reached(1).len(), left, "{interface:?} {first:#x}");
            bed.check();
            let mut outcomes = std::collections::VecDeque::new();
            bed.iommu
                .map(D1, &mapping(0x1000, 0x1000, 0))
                .expect("mapped");
            bed.iommu
                .map(D1, &mapping(0x3000, 0x1000, 0))
                .expect("mapped");
            let parts = [range(0xffe, 0x2100), range(0x2101, 0x4001)];
            bed.iommu.unmap_all(D1, parts, &mut outcomes);
            assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
            bed.check();
        }
    }
}

#[test]
fn permissions_reach_the_host() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
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
        // A domain whose only mapping grants no rights must not fail either.
        let none = Mapping {
            access: Access::NONE,
            ..mapping(0, 0x1000, 0x4000)
        };
        bed.iommu.map(D1, &none).expect("mapped");
        bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    }
}

#[test]
fn an_unchanged_memory_table_causes_no_kernel_call() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
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
    let mut bed = Bed::new(Interface::Iommufd(Pinning::Mapped));
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
    let backend = Iommufd::new(calls, all_capabilities(), Pinning::All, vec![device]);
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    iommu
}

#[test]
fn an_unbound_device_is_quarantined_until_the_vmm_binds_it() {
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

    // The VMM has bound the device by now, and its own address space applies until the daemon attaches one.
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
fn a_vmm_may_connect_before_it_binds_its_devices() {
    for announces in [true, false] {
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
        if announces {
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
fn the_vmms_address_space_applies_until_the_first_attach() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    let own = bed.spaces[&1];
    let at = |bed: &Bed| bed.kernel.state().groups[&1].0;
    assert_eq!(at(&bed), Some(own));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.detach(A, D1).expect("detached");
    assert_ne!(
        at(&bed),
        Some(own),
        "the daemon's own bypass mode from now on"
    );
    bed.check();
    bed.iommu.disconnect();
    assert_eq!(at(&bed), None, "the VMM is gone");
}

#[test]
fn pin_mapped_keeps_a_bypass_address_space_only_while_it_is_used() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::Mapped));
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
    let backend = Type1Group::new(Box::new(container), all_capabilities(), devices, Vec::new());
    let mut iommu = Iommu::new(settings(false), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    assert!(kernel.state().spaces[&space].is_empty());
}

#[test]
fn devices_moved_by_the_vmm_are_moved_back() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
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

/// As cloud-hypervisor does at each reboot of its guest: after the connection has ended, and before the next one.
#[test]
fn a_vmm_that_attaches_its_devices_again_does_not_keep_them() {
    for bypass in [false, true] {
        let mut bed = Bed::booted(Interface::Iommufd(Pinning::All), bypass);
        let memory = bed.memory.clone();
        for reboot in 0..3 {
            bed.iommu.attach(A, D1, false).expect("attached");
            bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
            bed.check();
            assert!(bed.kernel.state().stopped.is_empty(), "in use");
            // The VMM may take the devices before the daemon has noticed the end of the connection.
            if reboot == 1 {
                bed.reattach_by_vmm();
            }
            bed.iommu.disconnect();
            for endpoint in ALL {
                let stopped = &bed.kernel.state().stopped;
                assert!(stopped.contains(&endpoint.0), "{endpoint}, reboot {reboot}");
            }
            if reboot != 1 {
                bed.reattach_by_vmm();
            }
            bed.iommu.connect();
            bed.set_memory(memory.clone());
            // The next driver has set the bus-master bits.
            bed.kernel.state().stopped.clear();
            bed.check();
            assert_eq!(bed.reached(1).is_empty(), !bypass, "reboot {reboot}");
        }
    }
}

#[test]
fn only_devices_that_the_vmm_has_bound_are_stopped() {
    let kernel = FakeKernel::default();
    let mut iommu = with_unbound_device(&kernel);
    iommu.connect();
    iommu.disconnect();
    assert!(kernel.state().stopped.is_empty());
}

#[test]
fn a_device_bound_to_another_iommufd_is_refused() {
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
    let backend = Iommufd::new(calls, all_capabilities(), Pinning::All, devices);
    let mut iommu = Iommu::new(settings(true), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    let (_, space) = theirs.vmm_device(A.0, 1);
    iommu.connect();
    iommu.set_memory(vec![slot(0, 0x1000, 0)]);
    // The other iommufd then has address spaces with the same IDs as ours.
    for _ in 0..8 {
        theirs.alloc().expect("an address space");
    }
    let refused = iommu.attach(A, D1, false).expect_err("not ours");
    assert!(refused.to_string().contains("another iommufd"), "{refused}");
    assert!(iommu.endpoint(A).expect("an endpoint").quarantined);
    assert_eq!(
        theirs.state().groups[&1].0,
        None,
        "detached, even from the VMM's address space {space}"
    );
    assert!(
        iommu.map(D1, &mapping(0, 0x1000, 0)).is_err(),
        "no such domain"
    );
}

#[test]
fn a_device_left_attached_by_a_former_daemon_is_moved() {
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
    let backend = Iommufd::new(calls, all_capabilities(), Pinning::All, devices);
    let mut iommu = Iommu::new(settings(true), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    iommu.connect();
    iommu.set_memory(vec![slot(0, 0x1000, 0)]);
    let at = kernel.state().groups[&1].0.expect("bypass mode");
    assert_ne!(at, old, "whatever a former daemon left there");
    assert_eq!(kernel.state().spaces[&at].len(), 1, "all of RAM");
}

#[test]
fn bypass_mode_that_lacks_memory_is_filled_or_refused() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.attach(B, D1, false).expect("attached");
    let mut memory = bed.memory.clone();
    memory.push(slot(0x100_0000, 0x1000, 0));
    bed.fail_in(1, libc::ENOMEM);
    bed.set_memory(memory);
    // The next endpoint that enters bypass mode reaches all memory.
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
fn mappings_are_not_copied_from_bypass_mode_while_it_is_used() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    let files = |bed: &Bed| bed.kernel.state().mapped_by_file;
    bed.iommu.attach(A, D1, false).expect("attached");
    let before = files(&bed);
    bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
    assert_eq!(files(&bed), before, "a copy");
    // Moves B from the VMM's address space into the daemon's bypass mode.
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

/// A new device of a second kernel, its backend, and its address space if it has a container.
fn added_device(interface: Interface) -> (FakeKernel, Box<dyn crate::backends::DmaBackend>, u32) {
    let kernel = FakeKernel::default();
    match interface {
        Interface::Iommufd(pin) => {
            kernel.state().bound.push(C.0);
            let device = PassthroughDevice {
                endpoint: C,
                name: "a new device".into(),
                group: 1,
                shared: false,
                attach: Box::new(kernel.device(C.0, 1)),
                memory: no_memory(),
            };
            let calls = Arc::new(kernel.clone());
            let backend = Iommufd::new(calls, all_capabilities(), pin, vec![device]);
            (kernel, Box::new(backend), 0)
        }
        Interface::Type1 => {
            let (container, space) = kernel.container();
            let device = GroupDevice {
                endpoint: C,
                name: "a new device".into(),
                device: Some(Box::new(kernel.device(C.0, 1))),
            };
            let backend = Type1Group::new(
                Box::new(container),
                all_capabilities(),
                vec![device],
                vec![],
            );
            (kernel, Box::new(backend), space)
        }
    }
}

/// While the kernel pins guest RAM for the new device, the guest's requests are served and the VMM changes its memory.
/// The device then reaches the memory that the VM has at the end.
#[test]
fn hot_adding_a_device_keeps_no_request_waiting() {
    use std::sync::mpsc;
    use std::time::Duration;

    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        let (kernel, backend, container) = added_device(interface);
        let gate = Arc::new(crate::vfio::fake::MapGate::default());
        kernel.state().gate = Some(gate.clone());
        let iommu = Arc::new(Mutex::new(Rank::Core, bed.iommu));
        let adder = {
            let iommu = iommu.clone();
            std::thread::spawn(move || {
                let new = NewEndpoints {
                    range: PciAddress::from_endpoint_id(C).into(),
                    group: None,
                    reserved: ReservedRegions::default(),
                    room: 8,
                };
                Iommu::add_filled(&iommu, &new, backend).map_err(|(cause, _)| cause.to_string())
            })
        };
        assert!(gate.wait_for_call(), "{interface:?}: nothing is mapped");
        let memory = vec![bed.memory[0].clone(), slot(0x20_0000, 0x4000, 0)];
        let (done, served) = mpsc::channel();
        let guest = {
            let (iommu, memory) = (iommu.clone(), memory.clone());
            std::thread::spawn(move || {
                let request = iommu.lock().map(D1, &mapping(0x1000, 0x1000, 0));
                iommu.lock().set_memory(memory);
                done.send(request).expect("the test waits");
            })
        };
        // Only a hang takes as long.
        let request = served.recv_timeout(Duration::from_secs(30));
        gate.open();
        guest.join().expect("the guest's thread");
        assert_eq!(adder.join().expect("the operator's thread"), Ok(()));
        assert_eq!(request, Ok(Ok(())), "{interface:?}: the guest waited");

        assert!(iommu.lock().probe(C).is_ok());
        let state = kernel.state();
        let space = match interface {
            Interface::Iommufd(_) => state.groups[&1].0.expect("attached"),
            Interface::Type1 => container,
        };
        let mut reached: Vec<_> = state.spaces[&space].values().map(|a| a.file).collect();
        let mut expected: Vec<_> = memory.iter().map(|slot| slot.identity).collect();
        reached.sort_unstable();
        expected.sort_unstable();
        assert_eq!(reached, expected, "{interface:?}");
    }
}

/// While the kernel unpins guest RAM of a removed device, the guest's requests are served, also in the domain in which
/// the device was. The device then reaches nothing.
#[test]
fn removing_a_device_keeps_no_request_waiting() {
    use std::collections::BTreeSet;
    use std::sync::mpsc;
    use std::time::Duration;

    for (interface, is_attached) in INTERFACES.into_iter().zip([true, false, true]) {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        let (kernel, backend, container) = added_device(interface);
        let iommu = Arc::new(Mutex::new(Rank::Core, bed.iommu));
        let range = PciAddress::from_endpoint_id(C).into();
        let new = NewEndpoints {
            range,
            group: None,
            reserved: ReservedRegions::default(),
            room: 8,
        };
        let added = Iommu::add_filled(&iommu, &new, backend);
        added.map_err(|(cause, _)| cause).expect("added");
        if is_attached {
            iommu.lock().attach(C, D1, false).expect("attached");
        }
        let gate = Arc::new(crate::vfio::fake::MapGate::default());
        kernel.state().gate = Some(gate.clone());
        let remover = {
            let iommu = iommu.clone();
            std::thread::spawn(move || {
                let silent = BTreeSet::from([C]);
                let removed = Iommu::remove_emptied(&iommu, range, &silent);
                removed.map(|backends| backends.len())
            })
        };
        assert!(gate.wait_for_call(), "{interface:?}: nothing is unmapped");
        let (done, served) = mpsc::channel();
        let guest = {
            let iommu = iommu.clone();
            std::thread::spawn(move || {
                let mut core = iommu.lock();
                let mapped = core.map(D1, &mapping(0x1000, 0x1000, 0));
                let unmapped = core.unmap(D1, mapping(0x1000, 0x1000, 0).range).map(drop);
                done.send((mapped, unmapped)).expect("the test waits");
            })
        };
        // Only a hang takes as long.
        let requests = served.recv_timeout(Duration::from_secs(30));
        gate.open();
        guest.join().expect("the guest's thread");
        let removed = remover.join().expect("the operator's thread");
        assert_eq!(removed.expect("removed"), 1);
        assert_eq!(
            requests,
            Ok((Ok(()), Ok(()))),
            "{interface:?}: the guest waited"
        );

        assert!(iommu.lock().probe(C).is_err());
        assert_eq!(iommu.lock().domains().next().expect("D1").endpoints, [A]);
        let state = kernel.state();
        match interface {
            Interface::Iommufd(_) => assert_eq!(state.groups[&1].0, None),
            Interface::Type1 => assert!(state.spaces[&container].is_empty()),
        }
    }
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
        4 => (domain.clone(), 0u64..24, 0u64..12)
            .prop_map(|(d, first, more)| Op::Unmap(d, range(first << 12, ((first + more) << 12) | 0xfff))),
        4 => (domain, 0u64..0x1_8000, 0u64..0xc000)
            .prop_map(|(d, first, more)| Op::Unmap(d, range(first, first + more))),
        1 => any::<bool>().prop_map(Op::Bypass),
        1 => Just(Op::Reset),
        2 => (0usize..3).prop_map(Op::Memory),
        1 => Just(Op::Reconnect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_requests_leave_a_consistent_state(
        interface in (0usize..3).prop_map(|n| INTERFACES[n]),
        ops in proptest::collection::vec(any_op(), 1..60),
    ) {
        let mut bed = Bed::new(interface);
        for op in ops {
            let outcome = run(&mut bed, &op);
            // No call fails here, so no request of the guest may cost it an endpoint.
            let quarantined = matches!(outcome, Err(RequestError::Quarantined { .. }));
            prop_assert!(!quarantined, "{:?}: {:?}", op, outcome);
            bed.check();
            prop_assert_eq!(bed.leaks(), 0);
        }
    }
}
