//! A VM whose devices are this machine's: the daemon, a VMM's part in sharing them, and a guest's
//! driver.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;

use iommufd_bindings::iommu_ioas_alloc;
use iommufd_ioctls::{IommuFd, IommufdIoas};
use vfio_ioctls::{VfioDevice, VfioIommufd};
use vhost_device_iommu::vfio::{Cdev, Container, Group};

use crate::common::daemon::Daemon;
use crate::common::guest::{
    Guest, HIGH_LEN, HIGH_RAM, LOW_LEN, LOW_RAM, RING_LEN, RING_RAM, Setup,
};
use crate::common::memory::Region;
use crate::devices::Function;

/// How devices are shared and driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The VMM binds them; RAM is mapped once.
    SharedAll,
    /// The VMM binds them; RAM is mapped as the guest maps it.
    SharedMapped,
    /// The daemon has them by path, through iommufd.
    Owned,
    /// The daemon has them by path, through type1 containers.
    Type1,
    /// The same with containers and devices that somebody else has opened.
    Type1Inherited,
}

impl Way {
    pub fn is_type1(self) -> bool {
        matches!(self, Self::Type1 | Self::Type1Inherited)
    }
}

pub const WAYS: [Way; 5] = [
    Way::SharedAll,
    Way::SharedMapped,
    Way::Owned,
    Way::Type1,
    Way::Type1Inherited,
];

/// The guest's addresses of its devices, in turn.
const SLOTS: [&str; 4] = ["00:06.0", "00:07.0", "00:08.0", "00:09.0"];

/// The endpoint of the n-th device.
pub fn endpoint(n: usize) -> u32 {
    [0x30, 0x38, 0x40, 0x48][n]
}

pub struct Bed {
    pub daemon: Daemon,
    pub guest: Guest,
    stream: UnixStream,
    /// The VMM's side.
    vmm: Option<Vmm>,
    /// Containers and devices opened for the daemon.
    _opened: Vec<(Rc<Container>, Cdev)>,
}

/// A VMM on rust-vmm's crates, as Cloud Hypervisor is one: it binds the devices and lets them reach all of guest RAM.
struct Vmm {
    iommufd: Arc<IommuFd>,
    /// Devices that are not bound yet.
    opened: Vec<File>,
    devices: Vec<VfioDevice>,
    ioas: Option<Arc<IommufdIoas>>,
}

impl Vmm {
    fn new(functions: &[&str]) -> Self {
        let open = |function: &&str| {
            let mut node = File::options();
            let node = node.read(true).write(true);
            node.open(Function::new(function).node()).expect("a device")
        };
        Self {
            iommufd: Arc::new(IommuFd::new().expect("iommufd")),
            opened: functions.iter().map(open).collect(),
            devices: Vec::new(),
            ioas: None,
        }
    }

    /// Arguments for the daemon, which inherits the descriptors.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            "--iommufd-fd".to_owned(),
            inheritable(self.iommufd.as_raw_fd()).to_string(),
        ];
        for (device, slot) in self.opened.iter().zip(SLOTS) {
            let fd = inheritable(device.as_raw_fd());
            arguments.extend(["--vfio-fd".to_owned(), format!("{slot}={fd}")]);
        }
        arguments
    }

    fn bind(&mut self) {
        let ioas = IommufdIoas::new(self.iommufd.clone()).expect("an address space");
        let ioas = Arc::new(ioas);
        let operations = VfioIommufd::new(self.iommufd.clone(), Some(ioas.clone()), None);
        let operations = Arc::new(operations.expect("an iommufd to bind to"));
        let bind = |file| VfioDevice::new_from_fd(file, operations.clone(), false).expect("bound");
        self.devices.extend(self.opened.drain(..).map(bind));
        self.ioas = Some(ioas);
    }

    fn attach(&self, memory: &[(u64, u64, Arc<File>)]) {
        let ioas = self.ioas.as_ref().expect("bound before");
        for (gpa, len, file) in memory {
            ioas.map_file(file.as_raw_fd(), 0, *len, *gpa, true)
                .expect("guest RAM");
        }
        for device in &self.devices {
            device.attach_hwpt(ioas.id()).expect("attached");
        }
    }

    /// A new address space.
    fn alloc(&self) -> u32 {
        let mut alloc = iommu_ioas_alloc {
            size: u32::try_from(size_of::<iommu_ioas_alloc>()).expect("small"),
            ..Default::default()
        };
        let done = self.iommufd.alloc_iommu_ioas(&mut alloc);
        done.expect("an address space");
        alloc.out_ioas_id
    }
}

/// Containers with one group each, and the devices.
fn open_containers(functions: &[&str]) -> Vec<(Rc<Container>, Cdev)> {
    let mut groups: BTreeMap<String, Rc<Container>> = BTreeMap::new();
    let open = |name: &&str| {
        let group = Function::new(name).group();
        let container = groups.entry(group.clone()).or_insert_with(|| {
            let mut container = Container::open("/dev/vfio/vfio".as_ref()).expect("a container");
            let group = Group::open(format!("/dev/vfio/{group}").as_ref()).expect("a group");
            container.set_group(group).expect("a type1 IOMMU");
            Rc::new(container)
        });
        let group = container.group().expect("just set");
        (container.clone(), group.device(name).expect("a device"))
    };
    functions.iter().map(open).collect()
}

fn container_arguments(opened: &[(Rc<Container>, Cdev)]) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut passed = Vec::new();
    for ((container, device), slot) in opened.iter().zip(SLOTS) {
        let fd = inheritable(device.as_fd().as_raw_fd());
        arguments.extend(["--vfio-fd".to_owned(), format!("{slot}={fd}")]);
        // A number stands for one thing.
        let container = container
            .as_fd()
            .try_clone_to_owned()
            .expect("a descriptor");
        let fd = inheritable(container.as_raw_fd());
        arguments.extend(["--vfio-container-fd".to_owned(), format!("{slot}={fd}")]);
        passed.push(container);
    }
    // The daemon inherits them when it is started; these copies go with the test.
    passed.into_iter().for_each(std::mem::forget);
    arguments
}

/// Lets children inherit a descriptor.
#[expect(unsafe_code, reason = "a descriptor's flags")]
fn inheritable(fd: RawFd) -> RawFd {
    // SAFETY: no pointer is passed; the descriptor is open.
    assert!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } >= 0);
    fd
}

impl Bed {
    /// A VM with these devices of the host, in bypass mode.
    pub fn new(way: Way, functions: &[&str]) -> Self {
        Self::with(way, functions, "")
    }

    /// With more keys for its configuration.
    pub fn with(way: Way, functions: &[&str], keys: &str) -> Self {
        let (host_iommu, pin) = match way {
            Way::SharedAll | Way::Owned => ("iommufd", "all"),
            Way::SharedMapped => ("iommufd", "mapped"),
            Way::Type1 | Way::Type1Inherited => ("type1", "all"),
        };
        let mut config = format!(
            "address = \"00:05.0\"\nhost-iommu = \"{host_iommu}\"\npin = \"{pin}\"\n{keys}\n"
        );
        for (function, slot) in functions.iter().zip(SLOTS) {
            config += &format!("[[endpoint]]\naddress = \"{slot}\"\nvfio = \"{function}\"\n");
        }
        let mut vmm =
            matches!(way, Way::SharedAll | Way::SharedMapped).then(|| Vmm::new(functions));
        let opened = match way {
            Way::Type1Inherited => open_containers(functions),
            Way::SharedAll | Way::SharedMapped | Way::Owned | Way::Type1 => Vec::new(),
        };
        let arguments = match &vmm {
            Some(vmm) => vmm.arguments(),
            None => container_arguments(&opened),
        };
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let daemon = Daemon::with_config_and(&config, &arguments);
        // As QEMU does it: it connects, makes the devices, and then the vhost-user device.
        let stream = daemon.stream();
        let ours = stream.try_clone().expect("a descriptor");
        let files: Vec<_> = [
            (LOW_RAM, LOW_LEN),
            (RING_RAM, RING_LEN),
            (HIGH_RAM, HIGH_LEN),
        ]
        .map(|(gpa, len)| (gpa, len, Arc::new(crate::common::memory::memfd(len))))
        .into();
        if let Some(vmm) = &mut vmm {
            vmm.bind();
            vmm.attach(&files);
        }
        let regions = files
            .into_iter()
            .map(|(gpa, len, file)| Region::of_file(gpa, len, file, 0));
        let mut guest = Guest::connect_with(ours, Setup::default(), regions.collect());
        guest.driver_ok();
        for function in functions {
            Function::new(function).enable();
        }
        Self {
            daemon,
            guest,
            stream,
            vmm,
            _opened: opened,
        }
    }

    /// The VMM hangs up, and the daemon has noticed.
    pub fn hang_up(&mut self) {
        self.stream.shutdown(Shutdown::Both).expect("connected");
        let daemon = &self.daemon;
        daemon.wait_for("the VMM's end", || daemon.status()["connected"] == false);
    }

    /// Another VMM comes, with a guest of its own.
    pub fn connect_again(&mut self) {
        self.stream = self.daemon.stream();
        let stream = self.stream.try_clone().expect("a descriptor");
        let regions = self.guest.memory.regions.drain(..).collect();
        self.guest = Guest::connect_with(stream, Setup::default(), regions);
        self.guest.forget_rings();
        self.guest.driver_ok();
    }

    /// How many objects there are in the iommufd that the VMM and the daemon share, if they do: so
    /// many of the lowest numbers are not given out.
    pub fn shared_objects(&self) -> Option<u32> {
        const MORE: u32 = 64;
        let vmm = self.vmm.as_ref()?;
        let ids: Vec<_> = (0..MORE).map(|_| vmm.alloc()).collect();
        for &id in &ids {
            vmm.iommufd.destroy_iommu_object(id).expect("destroyed");
        }
        ids.iter().max().map(|last| last - MORE)
    }

    /// All of guest memory, to compare later.
    pub fn memory(&self) -> Vec<Vec<u8>> {
        let regions = self.guest.memory.regions.iter();
        regions
            .map(|r| self.guest.memory.read(r.gpa, r.len as usize))
            .collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // The daemon first, which puts the devices where they can do no harm; then the VMM's
        // descriptors, so that the next VMM finds the devices free.
        if self.daemon.exit_status().is_none() {
            self.daemon.terminate();
        }
        self.daemon.wait_for_end();
        self.vmm.take();
    }
}
