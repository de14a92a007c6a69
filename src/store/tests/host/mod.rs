//! The backends of the host's devices on the fake kernel, which outlives the processes. A process can die before and after
//! each of its calls, too.

mod deaths;
mod taken_over;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::MmapRegion;

use super::bed::{A, ALL, B, Bed, D1, D2, D3, G1, G2, G3, OK, PAGE, Req, Step, settings, topology};
use super::exhaustive::{Case, cases};
use super::model::Model;
use crate::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use crate::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use crate::backends::testing::slot;
use crate::backends::type1::{GroupDevice, Type1Group};
use crate::backends::{BackendCapabilities, MemorySlot};
use crate::ids::EndpointId;
use crate::iommu::{Dma, Iommu, Predecessor, Settings};
use crate::page_table::crash;
use crate::store::newest;
use crate::vfio::fake::{Area, FakeContainer, FakeDevice, FakeKernel, FakeMemory};
use crate::vfio::{AddressSpaces, Attach, DmaSource, Type1};

const NEVER: u64 = u64::MAX;

/// The interface through which the daemon programs the host's IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interface {
    /// iommufd; the daemon binds the devices.
    Owned(Pinning),
    /// iommufd; the VMM binds the devices.
    Shared(Pinning),
    Type1,
}

const INTERFACES: [Interface; 5] = [
    Interface::Owned(Pinning::All),
    Interface::Owned(Pinning::Mapped),
    Interface::Shared(Pinning::All),
    Interface::Shared(Pinning::Mapped),
    Interface::Type1,
];

/// Areas that devices of groups must reach at any time.
type Watched = Arc<Mutex<Vec<(u32, Area)>>>;

/// The places where the members of the guest's group reach memory, if the host has a group for each.
type Mates = Arc<Vec<Place>>;

/// Where a device reaches memory.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the address space of its group.
    Group(u32),
    /// In the address space of its container.
    Space(u32),
}

/// The kernel, and what a supervisor keeps for the next process.
pub(super) struct Host {
    interface: Interface,
    pub kernel: FakeKernel,
    containers: BTreeMap<u32, (FakeContainer, u32)>,
    pub memory: Vec<MemorySlot>,
    watched: Watched,
    /// Each member of the guest's group is in a group of the host of its own.
    is_split: bool,
    mates: Mates,
    /// The address spaces of the VMM.
    foreign: BTreeSet<u32>,
    /// The supervisor has lost the descriptors: the next process opens others.
    pub has_lost: bool,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.interface)
    }
}

/// A handle to the kernel that belongs to a process.
#[derive(Clone, Debug)]
struct Mortal<T> {
    inner: T,
    kernel: FakeKernel,
    watched: Watched,
    mates: Mates,
}

impl<T> Mortal<T> {
    /// A system call.
    fn call<R>(&self, act: impl FnOnce(&T) -> R) -> R {
        crash::point();
        assert!(!crash::is_dead(), "a dead process makes no calls");
        let outcome = act(&self.inner);
        for (group, area) in self.watched.lock().expect("not poisoned").iter() {
            assert!(reached(&self.kernel, *group).contains(area), "{area:?}");
        }
        check_mates(&self.kernel, &self.mates);
        crash::point();
        outcome
    }
}

/// The members of a group reach one target at most. A type1 container is filled step by step, so one of them may reach a part
/// of it.
fn check_mates(kernel: &FakeKernel, mates: &[Place]) {
    let reached = mates.iter().map(|place| match *place {
        Place::Group(group) => reached(kernel, group),
        Place::Space(space) => kernel.state().spaces[&space].values().copied().collect(),
    });
    let mut reached: Vec<_> = reached.collect();
    reached.sort_unstable_by_key(Vec::len);
    for pair in reached.windows(2) {
        let is_part = pair[0].iter().all(|area| pair[1].contains(area));
        assert!(is_part, "{:?} and {:?}", pair[0], pair[1]);
    }
}

/// The areas that the devices of a group reach through iommufd.
fn reached(kernel: &FakeKernel, group: u32) -> Vec<Area> {
    let state = kernel.state();
    let space = match state.groups.get(&group).and_then(|g| g.0) {
        Some(id) if !state.without_space.contains(&group) => &state.spaces[&id],
        _ => return Vec::new(),
    };
    let cached = state.cached.get(&group).into_iter().flatten();
    space.values().chain(cached).copied().collect()
}

impl AddressSpaces for Mortal<FakeKernel> {
    fn alloc(&self) -> io::Result<u32> {
        self.call(AddressSpaces::alloc)
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        self.call(|kernel| kernel.destroy(ioas))
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()> {
        self.call(|kernel| AddressSpaces::map(kernel, ioas, range, access, source))
    }

    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()> {
        self.call(|kernel| kernel.copy(ioas, range, access, from, first))
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        self.call(|kernel| AddressSpaces::unmap(kernel, ioas, range))
    }
}

impl Attach for Mortal<FakeDevice> {
    fn is_bound(&self) -> bool {
        self.inner.is_bound()
    }

    fn attach(&self, ioas: u32) -> io::Result<()> {
        self.call(|device| device.attach(ioas))
    }

    fn detach(&self) -> io::Result<()> {
        self.call(Attach::detach)
    }

    fn clear_bus_master(&self) -> io::Result<()> {
        self.call(Attach::clear_bus_master)
    }
}

impl Type1 for Mortal<FakeContainer> {
    fn map(
        &self,
        range: IovaRange,
        access: Access,
        memory: &MmapRegion,
        offset: u64,
    ) -> io::Result<()> {
        self.call(|container| container.map(range, access, memory, offset))
    }

    fn unmap(&self, range: IovaRange) -> io::Result<u64> {
        self.call(|container| container.unmap(range))
    }

    fn unmap_all(&self) -> io::Result<()> {
        self.call(Type1::unmap_all)
    }

    fn available(&self) -> io::Result<Option<u32>> {
        self.inner.available()
    }
}

fn group_of(endpoint: EndpointId, is_split: bool) -> u32 {
    match endpoint {
        A => 1,
        B => 2,
        G2 if is_split => 4,
        G3 if is_split => 5,
        _ => 3,
    }
}

/// Two slots. Some mappings of the tests lead into both.
fn memory() -> Vec<MemorySlot> {
    const BORDER: u64 = 0x4_0005 * PAGE;
    vec![slot(0, BORDER, 0), slot(BORDER, 1 << 40, 0x3000)]
}

impl Host {
    fn new(interface: Interface, is_split: bool) -> Self {
        let kernel = FakeKernel::default();
        let last = if is_split { 5 } else { 3 };
        let containers = (1..=last).map(|group| (group, kernel.container()));
        let containers: BTreeMap<_, _> = containers.collect();
        let place = |group| match interface {
            Interface::Type1 => Place::Space(containers[&group].1),
            Interface::Owned(_) | Interface::Shared(_) => Place::Group(group),
        };
        let mates: Vec<_> = (3..=last).map(place).collect();
        let mut host = Self {
            interface,
            kernel: kernel.clone(),
            containers,
            memory: memory(),
            watched: Watched::default(),
            is_split,
            mates: Arc::new(mates),
            foreign: BTreeSet::new(),
            has_lost: false,
        };
        if interface != Interface::Type1 {
            for (_, (_, space)) in std::mem::take(&mut host.containers) {
                kernel.destroy(space).expect("destroyed");
            }
        }
        if matches!(interface, Interface::Owned(_)) {
            kernel.state().bound.extend(ALL.map(|id| id.0));
        }
        host
    }

    fn mortal<T>(&self, inner: T) -> Mortal<T> {
        Mortal {
            inner,
            kernel: self.kernel.clone(),
            watched: self.watched.clone(),
            mates: self.mates.clone(),
        }
    }

    fn group_of(&self, endpoint: EndpointId) -> u32 {
        group_of(endpoint, self.is_split)
    }

    /// The VMM binds its devices.
    fn bind_by_vmm(&mut self) {
        if let Interface::Shared(_) = self.interface {
            let spaces =
                || -> BTreeSet<u32> { self.kernel.state().spaces.keys().copied().collect() };
            let own = spaces();
            for endpoint in ALL {
                self.kernel.vmm_device(endpoint.0, self.group_of(endpoint));
            }
            self.foreign = spaces().difference(&own).copied().collect();
        }
    }

    /// Adds the backends of a process. `is_first` if no process was before it.
    pub(super) fn add_backends(&self, iommu: &mut Iommu, is_first: bool) {
        let capabilities = BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        };
        let is_left = !is_first && !self.has_lost;
        match self.interface {
            Interface::Owned(pinning) | Interface::Shared(pinning) => {
                let shared = matches!(self.interface, Interface::Shared(_));
                let devices = ALL.map(|endpoint| PassthroughDevice {
                    endpoint,
                    name: format!("device {endpoint}"),
                    group: self.group_of(endpoint),
                    shared,
                    attach: Box::new(
                        self.mortal(self.kernel.device(endpoint.0, self.group_of(endpoint))),
                    ),
                    memory: Arc::new(FakeMemory::at(
                        0,
                        GpaRange::from_len(Gpa(u64::MAX << 13), 0x1000).expect("not empty"),
                    )),
                });
                let kernel = Arc::new(self.mortal(self.kernel.clone()));
                let mut backend = Iommufd::new(kernel, capabilities, pinning, devices.into());
                if is_left && !shared {
                    backend = backend.with_bound_before(&ALL);
                }
                iommu.add_backend(Box::new(backend), &ALL).expect("added");
            }
            Interface::Type1 => {
                for (&group, (container, _)) in &self.containers {
                    let mine: Vec<_> = ALL
                        .into_iter()
                        .filter(|e| self.group_of(*e) == group)
                        .collect();
                    let devices = mine.iter().map(|&endpoint| GroupDevice {
                        endpoint,
                        name: format!("device {endpoint}"),
                        device: Some(Box::new(self.mortal(self.kernel.device(endpoint.0, group)))),
                    });
                    let container = Box::new(self.mortal(container.clone()));
                    let backend =
                        Type1Group::new(container, capabilities, devices.collect(), Vec::new());
                    let backend = backend.of_group(group, is_left);
                    iommu.add_backend(Box::new(backend), &mine).expect("added");
                }
            }
        }
        iommu.set_memory(self.memory.clone());
    }

    fn areas(&self, mapping: &Mapping) -> Vec<Area> {
        let parts = self.memory.iter().filter_map(|slot| {
            let part = mapping.part_in(slot.range)?;
            Some(Area {
                range: part.range,
                access: part.access,
                file: slot.identity,
                offset: slot.offset + (part.gpa.0 - slot.range.first().0),
            })
        });
        parts.collect()
    }

    fn identity(&self) -> Vec<Area> {
        let whole = |slot: &MemorySlot| Mapping {
            range: slot.range.identity(),
            gpa: slot.range.first(),
            access: Access::READ_WRITE,
            mmio: false,
        };
        self.memory
            .iter()
            .flat_map(|s| self.areas(&whole(s)))
            .collect()
    }

    fn reached(&self, group: u32) -> Vec<Area> {
        match self.interface {
            Interface::Type1 => {
                let state = self.kernel.state();
                state.spaces[&self.containers[&group].1]
                    .values()
                    .copied()
                    .collect()
            }
            Interface::Owned(_) | Interface::Shared(_) => {
                let at = self.kernel.state().groups.get(&group).and_then(|g| g.0);
                if at.is_some_and(|at| self.foreign.contains(&at)) {
                    return self.identity();
                }
                reached(&self.kernel, group)
            }
        }
    }

    /// Checks that the devices reach what the core says. `lost` is how many address spaces may have been lost.
    pub(super) fn check(&self, iommu: &Iommu, lost: usize) {
        for endpoint in ALL {
            let group = self.group_of(endpoint);
            let state = iommu.endpoint(endpoint).expect("an endpoint");
            let others = ALL
                .into_iter()
                .filter(|e| *e != endpoint && self.group_of(*e) == group);
            let mates: Vec<_> = others.map(|e| iommu.endpoint(e).expect("one")).collect();
            let expected = match (state.dma, state.domain) {
                _ if state.quarantined || mates.iter().any(|m| m.quarantined) => Vec::new(),
                (Dma::Translated, Some(domain)) => iommu
                    .mappings(domain, Iova(0))
                    .flat_map(|m| self.areas(&m))
                    .collect(),
                (Dma::Bypass, _) => self.identity(),
                _ if mates.iter().any(|m| m.dma != Dma::Blocked) => continue,
                (Dma::Blocked | Dma::Translated, _) => Vec::new(),
            };
            assert_eq!(self.reached(group), expected, "{endpoint}: {state:?}");
        }
        if self.interface == Interface::Type1 {
            return;
        }
        let state = self.kernel.state();
        let own: Vec<_> = state
            .spaces
            .iter()
            .filter(|(id, _)| !self.foreign.contains(id))
            .collect();
        // The anchor, bypass mode, and each domain.
        let used = 2 + iommu.domains().filter(|d| !d.bypass).count();
        // The anchor and its copies are of memory without a file.
        let has_guest_memory =
            |areas: &BTreeMap<u64, Area>| areas.values().any(|area| area.file != (0, 0));
        let filled = own
            .iter()
            .filter(|(_, areas)| has_guest_memory(areas))
            .count();
        assert!(filled < used, "{filled} address spaces have mappings");
        assert!(own.len() <= used + lost, "{} address spaces", own.len());
    }
}

/// The bed after `case.before`.
fn prepared(case: &Case, interface: Interface) -> (Bed, Model) {
    prepared_with(case, interface, memory())
}

/// As [`prepared`], with this guest memory.
fn prepared_with(case: &Case, interface: Interface, memory: Vec<MemorySlot>) -> (Bed, Model) {
    let mut host = Host::new(interface, false);
    host.memory = memory;
    prepared_on(case, host)
}

/// As [`prepared`], on a host that serves nobody yet.
fn prepared_on(case: &Case, mut host: Host) -> (Bed, Model) {
    let bed = Bed::on_host(|iommu| {
        host.add_backends(iommu, true);
        host.bind_by_vmm();
        host
    });
    let (mut bed, mut model) = (bed, Model::default());
    for step in &case.before {
        assert!(bed.step(step, NEVER).0);
        for (request, status) in &bed.answers {
            assert_eq!(*status, Some(OK), "{}: {request:?}", case.name);
        }
        bed.check(&mut model);
    }
    (bed, model)
}

fn finish(case: &Case, bed: &mut Bed, model: &mut Model) {
    if !matches!(case.step, Step::Batch(_) | Step::Bypass(_)) {
        model.reset();
    }
    bed.check(model);
}

/// The core goes on, and a reset leaves nothing behind.
fn go_on(bed: &mut Bed, model: &mut Model) {
    let more = [
        Req::Attach(A, D1, false),
        Req::Unmap(D1, 0, 1 << 36),
        Req::Map(D1, 1, 2, 7),
        Req::Map(D1, 600, 1, 7),
        Req::Unmap(D1, 600, 1),
    ];
    for request in more {
        assert!(bed.step(&Step::Batch(vec![request]), NEVER).0);
    }
    bed.check(model);
    bed.step(&Step::Reset, NEVER);
    model.reset();
    bed.check(model);
}

fn answers(bed: &Bed) -> Vec<(Req, Option<u8>)> {
    let answers = bed.answers.iter().copied();
    answers
        .filter(|(r, _)| !matches!(r, Req::Probe(_)))
        .collect()
}
