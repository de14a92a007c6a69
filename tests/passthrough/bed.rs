//! A VM with passthrough devices: the daemon, the VMM that may share the devices with it, and the guest's driver.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::rc::Rc;
use std::sync::Arc;

use iommufd_bindings::iommu_ioas_alloc;
use iommufd_ioctls::{IommuFd, IommufdIoas};
use rustix::process::{Pid, Signal, kill_process};
use vfio_ioctls::{VfioDevice, VfioIommufd};
use vhost_device_iommu::vfio::{Cdev, Container, Group};

use crate::common::daemon::Daemon;
use crate::common::guest::{
    Guest, HIGH_LEN, HIGH_RAM, LOW_LEN, LOW_RAM, RING_LEN, RING_RAM, Setup,
};
use crate::common::kept::Keeper;
use crate::common::memory::Region;
use crate::devices::Function;
use crate::host::host_iommu;

/// The backend of the passthrough devices, and the owner of their descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// iommufd. The VMM binds the devices, and the daemon maps all RAM once.
    SharedAll,
    /// iommufd. The VMM binds the devices, and the daemon maps RAM as the guest maps it.
    SharedMapped,
    /// iommufd. The VMM opens and binds the devices by itself, and the daemon takes the open files over, through the helper.
    TakenOver,
    /// iommufd. The daemon opens and binds the devices.
    Owned,
    /// type1. The daemon opens containers and devices.
    Type1,
    /// type1. The daemon inherits open containers and devices.
    Type1Inherited,
}

impl Backend {
    pub fn is_type1(self) -> bool {
        matches!(self, Self::Type1 | Self::Type1Inherited)
    }

    fn has_vmm(self) -> bool {
        matches!(self, Self::SharedAll | Self::SharedMapped | Self::TakenOver)
    }
}

pub const BACKENDS: [Backend; 6] = [
    Backend::SharedAll,
    Backend::SharedMapped,
    Backend::TakenOver,
    Backend::Owned,
    Backend::Type1,
    Backend::Type1Inherited,
];

/// The guest's PCI addresses of the devices, in order.
const SLOTS: [&str; 4] = ["00:06.0", "00:07.0", "00:08.0", "00:09.0"];

/// The endpoint of the n-th device.
pub fn endpoint(n: usize) -> u32 {
    [0x30, 0x38, 0x40, 0x48][n]
}

/// A daemon with passthrough devices, its VMM and a guest.
pub struct Bed {
    pub daemon: Daemon,
    pub guest: Guest,
    stream: UnixStream,
    /// The VMM's descriptors, if it binds the devices.
    vmm: Option<Vmm>,
    /// Containers and devices that the daemon inherits.
    _opened: Vec<(Rc<Container>, Cdev)>,
    /// Takes files out of this process, which is the VMM.
    helper: Option<Helper>,
}

/// A running helper, and the folder of its socket.
struct Helper {
    child: Child,
    folder: tempfile::TempDir,
}

impl Helper {
    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    fn socket(folder: &tempfile::TempDir) -> String {
        folder.path().join("adopt.sock").display().to_string()
    }

    /// Starts the helper for the VM of this file.
    fn start(folder: tempfile::TempDir, config: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
            .args(["adopt", "--socket-path", &Self::socket(&folder), "--config"])
            .arg(config)
            .spawn()
            .expect("the helper starts");
        while !folder.path().join("adopt.sock").exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Self { child, folder }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(self.folder.path().join("adopt.sock"));
    }
}

/// A VMM on rust-vmm's crates, like Cloud Hypervisor. It binds the devices and maps all guest RAM for them.
struct Vmm {
    /// The host's names of the devices.
    names: Vec<String>,
    iommufd: Arc<IommuFd>,
    /// Devices not bound yet.
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
            names: functions.iter().map(|name| (*name).to_owned()).collect(),
            iommufd: Arc::new(IommuFd::new().expect("iommufd")),
            opened: functions.iter().map(open).collect(),
            devices: Vec::new(),
            ioas: None,
        }
    }

    /// The daemon's arguments. The daemon inherits the descriptors.
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

    /// Allocates an address space. Returns its id.
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

/// Opens the devices, and a container for each of their groups.
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
        (
            container.clone(),
            group.device(name, None).expect("a device"),
        )
    };
    functions.iter().map(open).collect()
}

fn container_arguments(opened: &[(Rc<Container>, Cdev)]) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut passed = Vec::new();
    for ((container, device), slot) in opened.iter().zip(SLOTS) {
        let fd = inheritable(device.as_fd().as_raw_fd());
        arguments.extend(["--vfio-fd".to_owned(), format!("{slot}={fd}")]);
        // Duplicated, since each `--vfio-container-fd` needs a number of its own.
        let container = container
            .as_fd()
            .try_clone_to_owned()
            .expect("a descriptor");
        let fd = inheritable(container.as_raw_fd());
        arguments.extend(["--vfio-container-fd".to_owned(), format!("{slot}={fd}")]);
        passed.push(container);
    }
    // Not closed: the daemon inherits them when it starts. They close with this process.
    passed.into_iter().for_each(std::mem::forget);
    arguments
}

/// Lets child processes inherit a descriptor.
#[expect(unsafe_code, reason = "a descriptor's flags")]
pub fn inheritable(fd: RawFd) -> RawFd {
    // SAFETY: no pointer is passed; the descriptor is open.
    assert!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } >= 0);
    fd
}

impl Bed {
    /// Starts a VM with these devices in bypass mode.
    pub fn new(backend: Backend, functions: &[&str]) -> Self {
        Self::with(backend, functions, "")
    }

    /// Starts a VM with more keys in the daemon's configuration.
    pub fn with(backend: Backend, functions: &[&str], keys: &str) -> Self {
        Self::start(backend, functions, keys, None)
    }

    /// Starts a VM whose daemon leaves its descriptors with `keeper`.
    pub fn kept(backend: Backend, functions: &[&str], keeper: &Keeper) -> Self {
        Self::start(backend, functions, "", Some(keeper))
    }

    /// The same, with more keys.
    pub fn kept_with(backend: Backend, functions: &[&str], keys: &str, keeper: &Keeper) -> Self {
        Self::start(backend, functions, keys, Some(keeper))
    }

    /// The same, and exports the device `function` at `path`: the daemon binds it in any case.
    pub fn exported(
        backend: Backend,
        function: &str,
        keys: &str,
        path: &Path,
        keeper: &Keeper,
    ) -> Self {
        Self::begin(backend, &[function], keys, Some(path), Some(keeper))
    }

    fn start(backend: Backend, functions: &[&str], keys: &str, keeper: Option<&Keeper>) -> Self {
        let vm = Self::begin(backend, functions, keys, None, keeper);
        for function in functions {
            Function::new(function).enable();
        }
        vm
    }

    fn begin(
        backend: Backend,
        functions: &[&str],
        keys: &str,
        export: Option<&Path>,
        keeper: Option<&Keeper>,
    ) -> Self {
        let machine = host_iommu().machine_key();
        let (backend_name, pin) = match backend {
            Backend::SharedAll | Backend::TakenOver | Backend::Owned => ("iommufd", "all"),
            Backend::SharedMapped => ("iommufd", "mapped"),
            Backend::Type1 | Backend::Type1Inherited => ("type1", "all"),
        };
        let mut config = format!(
            "{machine}address = \"00:05.0\"\nhost-iommu = \"{backend_name}\"\npin = \"{pin}\"\n{keys}\n"
        );
        for (function, slot) in functions.iter().zip(SLOTS) {
            config += &format!("[[endpoint]]\naddress = \"{slot}\"\nvfio = \"{function}\"\n");
            if let Some(path) = export {
                config += &format!("export = {path:?}\n");
            }
        }
        let folder = (backend == Backend::TakenOver).then(Helper::folder);
        if let Some(folder) = &folder {
            let socket = Helper::socket(folder);
            config = format!("vfio-from = \"vmm\"\nvfio-helper = \"{socket}\"\n{config}");
        }
        // It opens the devices when the daemon, which has looked at them, runs.
        let mut vmm = (backend.has_vmm() && folder.is_none()).then(|| Vmm::new(functions));
        let opened = match backend {
            Backend::Type1Inherited => open_containers(functions),
            Backend::SharedAll
            | Backend::SharedMapped
            | Backend::TakenOver
            | Backend::Owned
            | Backend::Type1 => Vec::new(),
        };
        let arguments = match &vmm {
            Some(vmm) => vmm.arguments(),
            None => container_arguments(&opened),
        };
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let daemon = match keeper {
            Some(keeper) => Daemon::kept_with_config(keeper, &config, &arguments),
            None => Daemon::with_config_and(&config, &arguments),
        };
        let helper = folder.map(|folder| {
            vmm = Some(Vmm::new(functions));
            Helper::start(folder, &daemon.folder().join("vm.toml"))
        });
        // In QEMU's order: it connects, makes the devices, then the vhost-user device.
        let stream = daemon.stream();
        let ours = stream.try_clone().expect("a descriptor");
        let files: Vec<_> = [
            (LOW_RAM, LOW_LEN),
            (RING_RAM, RING_LEN),
            (HIGH_RAM, HIGH_LEN),
        ]
        .map(|(gpa, len)| (gpa, len, Arc::new(crate::common::memory::memfd(len))))
        .into();
        if let Some(vmm) = &mut vmm
            && export.is_none()
        {
            vmm.bind();
            vmm.attach(&files);
        }
        let regions = files
            .into_iter()
            .map(|(gpa, len, file)| Region::of_file(gpa, len, file, 0));
        let mut guest = Guest::connect_with(ours, Setup::default(), regions.collect());
        guest.driver_ok();
        daemon.wait_for_driver();
        Self {
            daemon,
            guest,
            stream,
            vmm,
            _opened: opened,
            helper,
        }
    }

    /// Closes the VMM's connection and waits until the daemon has noticed.
    pub fn disconnect(&mut self) {
        self.stream.shutdown(Shutdown::Both).expect("connected");
        let daemon = &self.daemon;
        daemon.wait_for("the VMM's end", || daemon.status()["connected"] == false);
    }

    /// The VMM has gone. Calls `between` when nobody has its devices any more, and starts another one.
    pub fn replace_vmm(&mut self, between: impl FnOnce()) {
        let vmm = self.vmm.take().expect("a VMM");
        let devices = vmm.names.clone();
        drop(vmm);
        between();
        let names: Vec<_> = devices.iter().map(String::as_str).collect();
        let mut vmm = Vmm::new(&names);
        vmm.bind();
        let regions = self.guest.memory.regions.iter();
        let files: Vec<_> = regions.map(|r| (r.gpa, r.len, r.file.clone())).collect();
        vmm.attach(&files);
        self.vmm = Some(vmm);
        self.reconnect();
        for name in &devices {
            Function::new(name).enable();
        }
    }

    /// Calls `run` while no helper answers, and starts another one.
    pub fn without_helper(&mut self, run: impl FnOnce(&mut Self)) {
        let mut helper = self.helper.take().expect("a helper");
        let folder = std::mem::replace(&mut helper.folder, Helper::folder());
        std::fs::remove_file(folder.path().join("adopt.sock")).expect("removed");
        drop(helper);
        run(self);
        let config = self.daemon.folder().join("vm.toml");
        self.helper = Some(Helper::start(folder, &config));
    }

    /// Stops the helper with SIGSTOP, or lets it go on with SIGCONT.
    pub fn signal_helper(&self, signal: Signal) {
        let helper = self.helper.as_ref().expect("a helper");
        kill_process(Pid::from_child(&helper.child), signal).expect("it runs");
    }

    /// Connects another VMM with a new guest in the same memory.
    pub fn reconnect(&mut self) {
        self.stream = self.daemon.stream();
        let stream = self.stream.try_clone().expect("a descriptor");
        let regions = self.guest.memory.regions.drain(..).collect();
        self.guest = Guest::connect_with(stream, Setup::default(), regions);
        self.guest.clear_rings();
        self.guest.driver_ok();
        self.daemon.wait_for_driver();
    }

    /// The number of objects in the iommufd that the VMM and the daemon share, or `None` if they share none. The
    /// kernel gives new objects the lowest free ids.
    pub fn shared_objects(&self) -> Option<u32> {
        const MORE: u32 = 64;
        let vmm = self.vmm.as_ref()?;
        let ids: Vec<_> = (0..MORE).map(|_| vmm.alloc()).collect();
        for &id in &ids {
            vmm.iommufd.destroy_iommu_object(id).expect("destroyed");
        }
        ids.iter().max().map(|last| last - MORE)
    }

    /// A copy of guest memory.
    pub fn memory(&self) -> Vec<Vec<u8>> {
        let regions = self.guest.memory.regions.iter();
        regions
            .map(|r| self.guest.memory.read(r.gpa, r.len as usize))
            .collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // The daemon must end first: it blocks the devices. Closing the VMM's descriptors then frees the devices
        // for the next test.
        if self.daemon.exit_status().is_none() {
            self.daemon.terminate();
        }
        self.daemon.wait_for_end();
        self.vmm.take();
    }
}
