//! A core with one backend and one endpoint, and the bare system calls beside it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use vhost_device_iommu::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::backends::iommufd::{Iommufd, PassthroughDevice, Pinning};
use vhost_device_iommu::backends::type1::{GroupDevice, Type1Group};
use vhost_device_iommu::backends::{BackendCapabilities, DmaBackend, MemorySlot};
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Dma, Iommu, Settings};
use vhost_device_iommu::page_table::Encoding;
use vhost_device_iommu::topology::{
    EndpointSpec, PciRange, ReservedKind, ReservedRegion, ReservedRegions, Topology,
};
use vhost_device_iommu::vfio::{
    AddressSpaces, Attach, Cdev, Container, DeviceMemory, DmaSource, Group, IommuFd,
};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::bare::{Bare, Kind};
use crate::common::memory::memfd;
use crate::devices::Function;
use crate::no_kernel::NoKernel;
use crate::{Interface, Side};

/// Length of guest RAM, which begins at guest-physical address 0.
pub const RAM_LEN: u64 = 64 << 20;

const ENDPOINT: EndpointId = EndpointId(0x30);
const DOMAIN: DomainId = DomainId(1);
const CAPABILITIES: BackendCapabilities = BackendCapabilities {
    page_sizes: PageMask::TABLE,
    aperture: IovaRange::ALL,
};

pub struct Bed {
    iommu: Iommu,
    /// System calls on the same address space; `None` without a kernel.
    bare: Option<Bare>,
    /// Maximum number of mappings in the address space.
    room: u64,
}

impl Bed {
    pub fn without_kernel(interface: Interface) -> Self {
        let attach: Box<dyn Attach> = Box::new(NoKernel);
        let backend: Box<dyn DmaBackend> = match interface {
            Interface::Type1 => Box::new(type1(Box::new(NoKernel), attach, Arc::new(NoKernel))),
            Interface::Map | Interface::Copy => Box::new(iommufd(
                interface,
                Arc::new(NoKernel),
                attach,
                Arc::new(NoKernel),
            )),
        };
        Self {
            iommu: core(backend, &ram()),
            bare: None,
            room: u64::MAX,
        }
    }

    /// A bed with a device of this machine, attached to the domain.
    pub fn with_device(interface: Interface, function: &str) -> Self {
        let ram = ram();
        let device = Function::new(function);
        let (iommu, fd, kind, room) = match interface {
            Interface::Type1 => {
                let mut container = Container::open(Path::new("/dev/vfio/vfio")).expect("VFIO");
                let group = format!("/dev/vfio/{}", device.group());
                let group = Group::open(group.as_ref()).expect("the group");
                container.set_group(group).expect("type1");
                let group = container.group().expect("the group");
                let cdev = group.device(function, None).expect("the device");
                let info = container.info().expect("type1");
                let room = info.available.map_or(u64::MAX, u64::from);
                let fd = container.as_fd().try_clone_to_owned().expect("a copy");
                let attach = Box::new(cdev.clone());
                let backend = type1(Box::new(container), attach, Arc::new(cdev));
                (core(Box::new(backend), &ram), fd, Kind::Type1, room)
            }
            Interface::Map | Interface::Copy => {
                let mut node = File::options();
                let node = node.read(true).write(true).open("/dev/iommu");
                let fd = OwnedFd::from(node.expect("iommufd"));
                let copy = fd.try_clone().expect("a copy");
                let iommufd_file = IommuFd::from(copy);
                let cdev = Cdev::open(device.node().as_ref()).expect("the device");
                cdev.bind(&iommufd_file, None).expect("bound");
                let kernel = Arc::new(RecordingIommufd {
                    iommufd: iommufd_file,
                    made: Mutex::default(),
                });
                let attach = Box::new(cdev.clone());
                let backend = iommufd(interface, kernel.clone(), attach, Arc::new(cdev));
                let iommu = core(Box::new(backend), &ram);
                let made = kernel.made.lock().expect("nobody panicked").clone();
                let kind = match (interface, made.as_slice()) {
                    (Interface::Copy, &[from, ioas]) => Kind::Copy { ioas, from },
                    (Interface::Map, &[ioas]) => Kind::Map { ioas },
                    _ => panic!("{} made the address spaces {made:?}", interface.title()),
                };
                (iommu, fd, kind, u64::MAX)
            }
        };
        let ram = Arc::new(ram);
        let mut bed = Self {
            iommu,
            bare: Some(Bare { fd, kind, ram }),
            room,
        };
        bed.check();
        bed
    }

    /// Maximum number of mappings in the address space.
    pub fn room(&self) -> u64 {
        self.room
    }

    pub fn map(&mut self, side: Side, mapping: &Mapping) {
        match (side, &self.bare) {
            (Side::Bare, Some(bare)) => bare.map(mapping),
            (Side::Bare, None) | (Side::Daemon, _) => {
                self.iommu.map(DOMAIN, mapping).expect("mapped");
            }
        }
    }

    pub fn unmap(&mut self, side: Side, range: IovaRange) {
        match (side, &self.bare) {
            (Side::Bare, Some(bare)) => {
                bare.unmap(range);
            }
            (Side::Bare, None) | (Side::Daemon, _) => {
                self.iommu.unmap(DOMAIN, range).expect("unmapped");
            }
        }
    }

    /// Checks that both sides work on the same address space.
    fn check(&mut self) {
        let page = Mapping {
            range: IovaRange::from_len(Iova(0x1000), 0x1000).expect("not empty"),
            gpa: Gpa(0x5000),
            access: Access::READ_WRITE,
            mmio: false,
        };
        self.map(Side::Daemon, &page);
        if let Some(bare) = &self.bare {
            assert_eq!(bare.unmap(page.range), 0x1000);
            bare.map(&page);
        }
        self.unmap(Side::Daemon, page.range);
        if let Some(bare) = &self.bare {
            bare.map(&page);
            assert_eq!(bare.unmap(page.range), 0x1000);
        }
    }
}

/// Guest RAM whose pages are already allocated.
fn ram() -> MemorySlot {
    let file = Arc::new(memfd(RAM_LEN));
    let mapped = FileOffset::from_arc(file.clone(), 0);
    let memory = MmapRegion::from_file(mapped, RAM_LEN as usize).expect("memory");
    let slice = memory.as_volatile_slice();
    for page in (0..RAM_LEN as usize).step_by(4096) {
        slice.write_obj(1u8, page).expect("inside");
    }
    MemorySlot {
        range: GpaRange::from_len(Gpa(0), RAM_LEN).expect("not empty"),
        memory: Arc::new(memory),
        file,
        block_len: 4096,
        is_shared_memory: true,
        offset: 0,
        identity: (0, 1),
    }
}

/// A core whose endpoint is attached to the domain.
fn core(backend: Box<dyn DmaBackend>, ram: &MemorySlot) -> Iommu {
    let at = "00:06.0".parse().expect("an address");
    let msi = ReservedRegion {
        range: IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).expect("not empty"),
        kind: ReservedKind::Msi,
    };
    let spec = EndpointSpec {
        range: PciRange::new(at, at).expect("one function"),
        group: None,
        reserved: vec![msi],
    };
    let iommu = "00:05.0".parse().expect("an address");
    let topology = Topology::new(iommu, ReservedRegions::default(), &[spec]).expect("a topology");
    let settings = Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 0xffff,
        bypass_at_boot: false,
        arena_limit: 64 << 20,
        encoding: Encoding::default(),
    };
    let mut iommu = Iommu::new(settings, topology).expect("an arena");
    iommu.add_backend(backend, &[ENDPOINT]).expect("added");
    iommu.connect();
    iommu.set_memory(vec![ram.clone()]);
    iommu.attach(ENDPOINT, DOMAIN, false).expect("attached");
    let state = iommu.endpoint(ENDPOINT).expect("an endpoint");
    assert_eq!(state.dma, Dma::Translated);
    iommu
}

fn type1(
    kernel: Box<dyn vhost_device_iommu::vfio::Type1>,
    device: Box<dyn Attach>,
    memory: Arc<dyn DeviceMemory>,
) -> Type1Group {
    let device = GroupDevice {
        endpoint: ENDPOINT,
        name: "the device".into(),
        device: Some(device),
    };
    Type1Group::new(kernel, CAPABILITIES, vec![device], vec![memory])
}

fn iommufd(
    interface: Interface,
    kernel: Arc<dyn AddressSpaces>,
    attach: Box<dyn Attach>,
    memory: Arc<dyn DeviceMemory>,
) -> Iommufd {
    let device = PassthroughDevice {
        endpoint: ENDPOINT,
        name: "the device".into(),
        group: 0,
        shared: false,
        attach,
        memory,
    };
    let pin = match interface {
        Interface::Copy => Pinning::All,
        Interface::Map | Interface::Type1 => Pinning::Mapped,
    };
    Iommufd::new(kernel, CAPABILITIES, pin, vec![device])
}

/// The kernel's iommufd; records the address spaces that it makes.
struct RecordingIommufd {
    iommufd: IommuFd,
    made: Mutex<Vec<u32>>,
}

impl AddressSpaces for RecordingIommufd {
    fn alloc(&self) -> io::Result<u32> {
        let ioas = self.iommufd.alloc()?;
        self.made.lock().expect("nobody panicked").push(ioas);
        Ok(ioas)
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        self.iommufd.destroy(ioas)
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()> {
        self.iommufd.map(ioas, range, access, source)
    }

    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()> {
        self.iommufd.copy(ioas, range, access, from, first)
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        self.iommufd.unmap(ioas, range)
    }
}
