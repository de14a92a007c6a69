//! Tests of the core with the backends of the host's IOMMU, on a fake kernel. Whichever call fails, the
//! page tables, the core's states and the memory that devices can reach must agree.

mod arriving;
mod failures;
mod kernel;
mod mappings;
mod plugging;
mod vmm;

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
use crate::page_table::Encoding;
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
        encoding: Encoding::default(),
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
                    let backend = backend.of_group(group, false);
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
