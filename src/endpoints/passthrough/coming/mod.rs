//! Tests of the core with devices whose files come from the VMM while it runs, and go with it, on a fake kernel.

mod lost;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use crate::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use crate::backends::testing::slot;
use crate::backends::{BackendCapabilities, MemorySlot};
use crate::ids::{DomainId, EndpointId};
use crate::iommu::{Dma, Iommu, Predecessor, RequestError, Settings};
use crate::topology::{EndpointSpec, GroupName, ReservedRegions, Topology};
use crate::vfio::fake::{FakeDevice, FakeKernel, FakeMemory};
use crate::vfio::{AddressSpaces, Attach, DmaSource, VmmFiles};

const A: EndpointId = EndpointId(0x18);
const B: EndpointId = EndpointId(0x20);
const D1: DomainId = DomainId(1);
const RAM: u64 = 0x10_0000;

/// The files of the VMM: whether this process has them, and whether the VMM gives them when it is asked.
#[derive(Clone, Default)]
struct Coming {
    kernel: FakeKernel,
    has_iommufd: Arc<AtomicBool>,
    /// A bit for each endpoint's device.
    has_device: Arc<AtomicU32>,
    gives: Arc<AtomicU32>,
    /// Those that have come, and that nobody has accepted.
    arrived: Arc<AtomicU32>,
    /// A fetch ends before anything comes.
    is_slow: Arc<AtomicBool>,
    fetches: Arc<AtomicU32>,
}

/// The host's number of the group of an endpoint's device.
fn group_of(endpoint: EndpointId, is_pair: bool) -> u32 {
    if is_pair { A.0 } else { endpoint.0 }
}

fn bit(endpoint: EndpointId) -> u32 {
    1 << (endpoint.0 >> 3)
}

impl Coming {
    fn check(&self, has: bool) -> io::Result<()> {
        if has {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn kernel(&self) -> io::Result<&FakeKernel> {
        self.check(self.has_iommufd.load(Ordering::Relaxed))?;
        Ok(&self.kernel)
    }

    /// What the VMM gives comes now.
    fn come(&self) {
        self.arrived
            .store(self.gives.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl VmmFiles for Coming {
    fn is_open(&self) -> bool {
        self.kernel().is_ok()
    }

    fn fetch(&self) {
        self.fetches.fetch_add(1, Ordering::Relaxed);
        if !self.is_slow.load(Ordering::Relaxed) {
            self.come();
        }
    }

    fn accept(&self) {
        let arrived = self.arrived.swap(0, Ordering::Relaxed);
        self.has_device.fetch_or(arrived, Ordering::Relaxed);
        self.has_iommufd.fetch_or(arrived != 0, Ordering::Relaxed);
    }

    fn release(&self) {
        self.has_iommufd.store(false, Ordering::Relaxed);
        self.has_device.store(0, Ordering::Relaxed);
        self.arrived.store(0, Ordering::Relaxed);
    }
}

impl AddressSpaces for Coming {
    fn alloc(&self) -> io::Result<u32> {
        self.kernel()?.alloc()
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        self.kernel()?.destroy(ioas)
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()> {
        self.kernel()?.map(ioas, range, access, source)
    }

    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()> {
        self.kernel()?.copy(ioas, range, access, from, first)
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        self.kernel()?.unmap(ioas, range)
    }
}

struct ComingDevice {
    files: Coming,
    endpoint: EndpointId,
    device: FakeDevice,
}

impl ComingDevice {
    fn get(&self) -> io::Result<&FakeDevice> {
        let has = self.files.has_device.load(Ordering::Relaxed) & bit(self.endpoint) != 0;
        self.files.check(has)?;
        Ok(&self.device)
    }
}

impl Attach for ComingDevice {
    fn is_bound(&self) -> bool {
        self.get().is_ok_and(Attach::is_bound)
    }

    fn attach(&self, ioas: u32) -> io::Result<()> {
        self.get()?.attach(ioas)
    }

    fn detach(&self) -> io::Result<()> {
        self.get()?.detach()
    }

    fn clear_bus_master(&self) -> io::Result<()> {
        self.get()?.clear_bus_master()
    }
}

fn settings(bypass_at_boot: bool) -> Settings {
    Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 15,
        bypass_at_boot,
        arena_limit: 4 << 20,
        encoding: Default::default(),
    }
}

/// Both endpoints, in one group or not.
fn topology(is_pair: bool) -> Topology {
    let group = is_pair.then(|| GroupName::new("pair").expect("a name"));
    let spec = |endpoint: EndpointId| EndpointSpec {
        range: format!("00:{:02x}.0", endpoint.0 >> 3)
            .parse()
            .expect("an address"),
        group: group.clone(),
        reserved: Vec::new(),
    };
    let at = "00:01.0".parse().expect("an address");
    Topology::new(at, ReservedRegions::default(), &[spec(A), spec(B)]).expect("a topology")
}

/// Puts the backend of both devices behind the core.
fn add_backend(iommu: &mut Iommu, files: &Coming, pinning: Pinning, is_pair: bool) {
    let bar = GpaRange::from_len(Gpa(0xf000_0000), 0x1000).expect("not empty");
    let device = |endpoint: EndpointId| PassthroughDevice {
        endpoint,
        name: format!("device {endpoint}"),
        group: group_of(endpoint, is_pair),
        shared: true,
        attach: Box::new(ComingDevice {
            files: files.clone(),
            endpoint,
            device: files.kernel.device(endpoint.0, group_of(endpoint, is_pair)),
        }),
        memory: Arc::new(FakeMemory::at(1, bar)),
    };
    let capabilities = BackendCapabilities {
        page_sizes: PageMask::TABLE,
        aperture: IovaRange::ALL,
    };
    let devices = vec![device(A), device(B)];
    let backend = Iommufd::new(Arc::new(files.clone()), capabilities, pinning, devices);
    let backend = backend.with_vmm_files(Box::new(files.clone()));
    iommu
        .add_backend(Box::new(backend), &[A, B])
        .expect("added");
}

/// A VM whose VMM has bound two devices, each in a group of its own with the endpoint's number, or both in the group of the
/// first.
struct Bed {
    files: Coming,
    iommu: Iommu,
    /// The VMM's address spaces.
    vmm: Vec<u32>,
    pinning: Pinning,
    is_pair: bool,
    ram: MemorySlot,
}

impl Bed {
    fn new(pinning: Pinning, bypass: bool) -> Self {
        Self::with_devices(pinning, bypass, false)
    }

    /// Both devices are in one group.
    fn of_pair(pinning: Pinning) -> Self {
        Self::with_devices(pinning, true, true)
    }

    fn with_devices(pinning: Pinning, bypass: bool, is_pair: bool) -> Self {
        let files = Coming::default();
        let mut iommu = Iommu::new(settings(bypass), topology(is_pair)).expect("an arena");
        iommu.keep_journal();
        add_backend(&mut iommu, &files, pinning, is_pair);
        let mut bed = Self {
            files,
            iommu,
            vmm: Vec::new(),
            pinning,
            is_pair,
            ram: slot(RAM, 0x10_0000, 0),
        };
        bed.start_vmm();
        bed
    }

    /// The process dies, and the next one takes over. Guest memory is where it was, or not.
    fn die(&mut self, is_memory_same: bool) {
        let arena = self.iommu.arena().memory().clone();
        let store = self.iommu.store().memory().clone();
        let mut next = Iommu::successor(settings(true), topology(self.is_pair)).expect("an arena");
        next.keep_journal();
        add_backend(&mut next, &self.files, self.pinning, self.is_pair);
        next.connect();
        if !is_memory_same {
            self.ram = slot(RAM, 0x10_0000, 0);
        }
        next.set_memory(vec![self.ram.clone()]);
        let restored = next.restore(Predecessor {
            arena: arena.words(),
            store: store.words(),
        });
        restored.expect("restored");
        self.iommu = next;
    }

    /// A VMM connects, and has bound its devices. It gives none.
    fn start_vmm(&mut self) {
        self.files.gives.store(0, Ordering::Relaxed);
        let bind = |endpoint: EndpointId| {
            let group = group_of(endpoint, self.is_pair);
            self.files.kernel.vmm_device(endpoint.0, group).1
        };
        self.vmm = vec![bind(A), bind(B)];
        self.iommu.connect();
    }

    fn share_memory(&mut self) {
        self.iommu.set_memory(vec![self.ram.clone()]);
    }

    fn give(&self, endpoints: &[EndpointId]) {
        let bits = endpoints
            .iter()
            .fold(0, |bits, endpoint| bits | bit(*endpoint));
        self.files.gives.store(bits, Ordering::Relaxed);
    }

    /// The address space of an endpoint's device.
    fn space_of(&self, endpoint: EndpointId) -> Option<u32> {
        let state = self.files.kernel.state();
        let group = group_of(endpoint, self.is_pair);
        state.groups.get(&group).and_then(|(at, _)| *at)
    }

    /// The address spaces that are not the VMM's.
    fn ours(&self) -> Vec<u32> {
        let state = self.files.kernel.state();
        let spaces = state.spaces.keys().copied();
        spaces.filter(|space| !self.vmm.contains(space)).collect()
    }

    fn page(&self, iova: u64) -> Mapping {
        Mapping {
            range: IovaRange::from_len(Iova(iova), 0x1000).expect("a page"),
            gpa: Gpa(RAM),
            access: Access::READ_WRITE,
            mmio: false,
        }
    }

    fn is_quarantined(&self, endpoint: EndpointId) -> bool {
        let mut endpoints = self.iommu.endpoints(9, 9);
        let state = endpoints.find(|state| state.id == endpoint);
        state.expect("an endpoint").quarantined
    }
}

#[test]
fn nothing_is_made_and_nobody_quarantined_before_the_files_come() {
    for pinning in [Pinning::All, Pinning::Mapped] {
        let mut bed = Bed::new(pinning, true);
        bed.share_memory();
        assert_eq!(bed.ours().len(), 0);
        assert!(!bed.is_quarantined(A) && !bed.is_quarantined(B));
        assert_eq!(
            bed.files.fetches.load(Ordering::Relaxed),
            0,
            "nobody needs them yet"
        );
        assert_eq!(bed.space_of(A), Some(bed.vmm[0]), "as the VMM has it");

        // Without its file, an endpoint enters no domain. The failure changes nothing.
        let refused = bed.iommu.attach(A, D1, false);
        assert!(
            matches!(refused, Err(RequestError::Backend(_))),
            "{refused:?}"
        );
        assert!(!bed.is_quarantined(A));
        assert_eq!(bed.ours().len(), 0);

        bed.give(&[A]);
        bed.iommu.attach(A, D1, false).expect("it has come");
        bed.iommu.map(D1, &bed.page(0x1000)).expect("mapped");
        let space = bed.space_of(A).expect("attached");
        assert!(bed.ours().contains(&space));
        let mapped = bed.files.kernel.state().spaces[&space].len();
        assert_eq!(mapped, 1, "the domain's mapping alone");
        // The other one has not come, and stays with the VMM.
        assert_eq!(bed.space_of(B), Some(bed.vmm[1]));
        bed.iommu.attach(B, D1, false).expect_err("it has not come");
        bed.give(&[A, B]);
        bed.iommu.attach(B, D1, false).expect("it has come");
        assert_eq!(bed.space_of(B), Some(space));
    }
}

/// Before the driver starts, the core blocks all endpoints; and with `bypass` off it blocks those without a domain.
#[test]
fn a_device_that_comes_is_blocked_if_its_endpoint_is() {
    let mut bed = Bed::new(Pinning::All, true);
    bed.give(&[A, B]);
    bed.files.come();
    bed.iommu.await_driver();
    assert_eq!((bed.space_of(A), bed.space_of(B)), (None, None));
    bed.share_memory();
    bed.iommu.driver_has_started();
    bed.iommu.retarget_unattached();
    let bypass = bed.space_of(A).expect("bypass mode");
    assert!(bed.ours().contains(&bypass));

    let mut bed = Bed::new(Pinning::All, false);
    bed.share_memory();
    bed.give(&[A, B]);
    // One endpoint asks, and the devices of both come.
    bed.iommu.attach(A, D1, false).expect("it has come");
    assert_eq!(
        bed.space_of(B),
        None,
        "it leaves the VMM's address space at once"
    );
    let endpoint = bed.iommu.endpoints(9, 9).find(|state| state.id == B);
    assert_eq!(endpoint.expect("an endpoint").dma, Dma::Blocked);
}

/// The helper answers after the ATTACH that has asked it has failed.
#[test]
fn a_device_that_comes_late_is_where_its_endpoint_is() {
    for (pinning, bypass) in [
        (Pinning::All, true),
        (Pinning::All, false),
        (Pinning::Mapped, false),
    ] {
        let mut bed = Bed::new(pinning, bypass);
        bed.share_memory();
        bed.files.is_slow.store(true, Ordering::Relaxed);
        bed.give(&[A, B]);
        bed.iommu.attach(A, D1, false).expect_err("it is late");
        bed.files.come();
        let at_the_vmm = [Some(bed.vmm[0]), Some(bed.vmm[1])];
        assert_eq!([bed.space_of(A), bed.space_of(B)], at_the_vmm);
        assert!(!bed.files.is_open(), "not before somebody moves the device");
        bed.iommu.files_came();
        assert!(bed.files.is_open());
        // The VMM's address space is bypass mode.
        let expected = if bypass { at_the_vmm } else { [None, None] };
        assert_eq!([bed.space_of(A), bed.space_of(B)], expected);
        assert!(!bed.is_quarantined(A) && !bed.is_quarantined(B));
        bed.iommu.attach(A, D1, false).expect("it has come");
        assert!(bed.ours().contains(&bed.space_of(A).expect("attached")));
    }
}

#[test]
fn a_device_that_cannot_be_moved_when_it_comes_late_is_quarantined() {
    let mut bed = Bed::new(Pinning::All, false);
    bed.share_memory();
    bed.give(&[A, B]);
    bed.files.come();
    bed.files.kernel.state().asleep.push(A.0);
    bed.iommu.files_came();
    assert!(bed.is_quarantined(A) && !bed.is_quarantined(B));
    assert!(bed.files.kernel.state().stopped.contains(&A.0));
    assert_eq!(bed.space_of(B), None);
}

#[test]
fn with_the_vmm_everything_goes_and_the_next_one_starts_anew() {
    for pinning in [Pinning::All, Pinning::Mapped] {
        let mut bed = Bed::new(pinning, true);
        for _ in 0..3 {
            bed.share_memory();
            bed.give(&[A, B]);
            bed.iommu.attach(A, D1, false).expect("it has come");
            bed.iommu.map(D1, &bed.page(0x1000)).expect("mapped");
            bed.iommu.disconnect();
            assert!(!bed.files.is_open(), "given up");
            assert_eq!(bed.ours().len(), 0, "with the records' own one");
            assert_eq!(bed.space_of(A), None);
            assert!(bed.files.kernel.state().stopped.contains(&A.0));
            // The VMM's end.
            {
                let mut state = bed.files.kernel.state();
                state.groups.clear();
                state.bound.clear();
                state.spaces.clear();
            }
            bed.start_vmm();
            assert!(!bed.is_quarantined(A) && !bed.is_quarantined(B));
            bed.iommu
                .attach(A, D1, false)
                .expect_err("not before it is given");
        }
    }
}
