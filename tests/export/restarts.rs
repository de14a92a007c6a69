//! A later process goes on with an exported device and its client. The steps between two processes are tested with the server
//! itself (`src/vfio_user/server/kept/tests/`); here is what the device must know.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_iommu::config::Config;
use vhost_device_iommu::endpoints::exported::{KeptExport, bind_export};
use vhost_device_iommu::endpoints::kind::OpenDevice;
use vhost_device_iommu::endpoints::status::FigureValue;
use vhost_device_iommu::export::{ExportedDevice, HotResetRegistry};
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::process::life::Life;
use vhost_device_iommu::process::peer_event::PeerEvent;
use vhost_device_iommu::topology::PciAddress;
use vhost_device_iommu::vfio::AffectedDevice;
use vhost_device_iommu::vfio_user::message::{Command, DmaMapBody, DmaUnmapBody};
use vhost_device_iommu::vfio_user::server::{
    ClientFiles, DeviceRecord, IrqAction, IrqSet, IrqSetData, ServedDevice,
};
use vhost_device_iommu::vfio_user::version::{Capabilities, Version};

use crate::bed::{BAR, CLIENT_TEXT, CONFIG, MSI, ROM, RecordingDevice, eventually};
use crate::common::memory::memfd;
use crate::connection::{Connection, VERSION, region, version_body};
use crate::resets::function;

struct DeviceLife {
    keeper: Arc<Keeper>,
    _manager: UnixDatagram,
    device: ExportedDevice,
}

impl DeviceLife {
    fn new(hardware: &RecordingDevice) -> Self {
        let (manager, ours) = UnixDatagram::pair().expect("sockets");
        let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
        let device = ExportedDevice::new("device".into(), Box::new(hardware.clone()));
        Self {
            device: device
                .expect("a device")
                .kept_with(keeper.clone(), "vfio.device"),
            keeper,
            _manager: manager,
        }
    }

    /// The process dies. What it has recorded, and the files that the record names, are left.
    fn die(mut self) -> (DeviceRecord, ClientFiles) {
        let record = self.device.take_record().expect("it has changed");
        let claim = |name: &String| Some((name.clone(), self.keeper.claim(name)?));
        let files: ClientFiles = record.names.iter().filter_map(claim).collect();
        // Not dropped: that would stop the device.
        std::mem::forget(self.device);
        (record, files)
    }

    fn set_events(&mut self, index: u32, start: u32, count: usize) {
        let event = || {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
            Some(PeerEvent::new(event.expect("an eventfd")).expect("an eventfd"))
        };
        let set = IrqSet {
            index,
            action: IrqAction::Trigger,
            start,
            data: IrqSetData::Eventfds((0..count).map(|_| event()).collect()),
        };
        assert_eq!(self.device.set_irqs(set), Ok(()));
    }

    fn map(&mut self, address: u64) -> Result<(), i32> {
        let window = DmaMapBody {
            argsz: 32.into(),
            flags: 3.into(),
            offset: 0.into(),
            address: address.into(),
            size: 0x1000.into(),
        };
        self.device.dma_map(&window, None)
    }

    fn unmap(&mut self, address: u64) -> Result<(), i32> {
        self.device.dma_unmap(&DmaUnmapBody {
            argsz: 24.into(),
            flags: 0.into(),
            address: address.into(),
            size: 0x1000.into(),
        })
    }
}

#[test]
fn a_device_goes_on_with_its_interrupts_and_windows() {
    let hardware = RecordingDevice::new();
    hardware.state().bytes[CONFIG as usize][4] = 7;
    let mut first = DeviceLife::new(&hardware);
    first
        .device
        .negotiate(&Version::default(), &mut Capabilities::default())
        .expect("taken");
    // The kernel fixes the number of MSIs with the first request.
    first.set_events(MSI, 0, 2);
    assert_eq!(first.map(0x1000), Ok(()));
    assert_eq!(first.map(0x3000), Ok(()));
    hardware.changes();
    let (record, files) = first.die();
    assert_eq!((record.names.len(), files.len()), (2, 2));

    let mut second = DeviceLife::new(&hardware);
    second
        .device
        .resume(&record.bytes, &files)
        .expect("resumed");
    second.device.go_on();
    assert_eq!(hardware.changes(), [""; 0], "the kernel has the interrupts");
    assert_eq!(hardware.state().resets, 0);
    assert_eq!(hardware.state().bytes[CONFIG as usize][4], 7, "it does DMA");
    assert!(hardware.raise(MSI, 1));
    assert_eq!(second.map(0x1000), Err(libc::EEXIST));
    assert_eq!(second.unmap(0x3000), Ok(()));
    // Two more: all are set anew, with the eventfds of the first life.
    second.set_events(MSI, 2, 2);
    assert_eq!(
        hardware.changes(),
        [
            "kind 1 action 0x20 from 0: all 0",
            "kind 1 action 0x20 from 0: events eeee"
        ]
    );
    // The third life.
    let (record, files) = second.die();
    assert_eq!(record.names.len(), 4);
    let mut third = DeviceLife::new(&hardware);
    third.device.resume(&record.bytes, &files).expect("resumed");
    assert_eq!(third.map(0x3000), Ok(()));
    // Its client goes.
    third.device.release();
    assert_eq!(hardware.changes(), ["kind 1 action 0x20 from 0: all 0"]);
    assert_eq!(hardware.state().resets, 1);
    assert_eq!(hardware.state().bytes[CONFIG as usize][4], 0);
}

#[test]
fn a_record_that_does_not_fit_the_device_is_refused() {
    let hardware = RecordingDevice::new();
    let mut first = DeviceLife::new(&hardware);
    first.set_events(MSI, 0, 2);
    let (record, files) = first.die();
    let text = String::from_utf8(record.bytes).expect("text");
    for (from, to) in [
        ("\"used\":[1", "\"used\":[3,77"),
        ("\"fixed\":[[1", "\"fixed\":[[3"),
        ("\"windows\":[]", "\"windows\":[[5,4]]"),
        ("\"windows\":[]", "\"windows\":[[0,9],[9,10]]"),
        ("\"windows\":[]", "\"more\":[]"),
    ] {
        assert!(text.contains(from), "{text}");
        let damaged = text.replace(from, to);
        let mut next = DeviceLife::new(&hardware);
        let refused = next.device.resume(damaged.as_bytes(), &files);
        refused.expect_err(to);
    }
    let mut next = DeviceLife::new(&hardware);
    let missing = next.device.resume(text.as_bytes(), &ClientFiles::new());
    missing.expect_err("no eventfds");
}

/// Each change of what a later process must know is recorded.
#[test]
fn each_change_makes_a_record() {
    let mut life = DeviceLife::new(&RecordingDevice::new());
    assert!(life.device.take_record().is_none());
    let (client, mut answer) = (Version::default(), Capabilities::default());
    let taken = life.device.negotiate(&client, &mut answer);
    assert_eq!(taken, Ok(()));
    assert!(life.device.take_record().is_some(), "a client");
    assert_eq!(life.map(0x1000), Ok(()));
    assert!(life.device.take_record().is_some(), "a window more");
    assert_eq!(life.unmap(0x1000), Ok(()));
    let record = life.device.take_record().expect("a window less");
    assert!(String::from_utf8_lossy(&record.bytes).contains("\"windows\":[]"));
    life.set_events(MSI, 0, 1);
    assert!(life.device.take_record().is_some(), "interrupts");
    let mut into = [0; 4];
    assert_eq!(life.device.read_region(CONFIG, 0, &mut into), Ok(4));
    assert!(life.device.take_record().is_none(), "nothing has changed");
    std::mem::forget(life.device);
}

/// A client goes on, or there is none that could: a device with what its last client may have made of it is reset.
#[test]
fn a_device_whose_client_nobody_goes_on_with_is_reset() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = format!(
        "address = \"00:05.0\"\n[[endpoint]]\naddress = \"00:06.0\"\nvfio = \"0000:65:00.0\"\nexport = {:?}\n",
        folder.path().join("export")
    );
    let config = Config::from_text(Path::new("vm.toml"), &text).expect("a configuration");
    let endpoint = config.devices.exported[0].endpoint;
    for is_left in [true, false] {
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let kept = KeptExport {
            keeper: Arc::new(Keeper::new(ours, []).expect("a keeper")),
            life: Arc::new(Life::new(true)),
            is_left,
            kept_as: "vfio.device".into(),
        };
        let hardware = RecordingDevice::new();
        hardware.state().bytes[CONFIG as usize][4] = 7;
        let device = Box::new(hardware.clone());
        let registry = HotResetRegistry::default();
        let bound = bind_export(&config, endpoint, device, &registry, Some(kept));
        let mut bound = bound.expect("bound");
        bound.serve().expect("served");
        let resets = hardware.state().resets;
        let command = hardware.state().bytes[CONFIG as usize][4];
        drop(bound);
        let expected = if is_left { (1, 0) } else { (0, 7) };
        assert_eq!((resets, command), expected, "is_left: {is_left}");
    }
}

/// The bus of a device whose client goes on is not reset, although that client has not negotiated with this process.
#[test]
fn a_device_that_goes_on_is_not_reset_with_its_bus() {
    let hardware = RecordingDevice::new();
    let mut first = DeviceLife::new(&hardware);
    first
        .device
        .negotiate(&Version::default(), &mut Capabilities::default())
        .expect("taken");
    let (record, files) = first.die();
    let registry = HotResetRegistry::default();
    let bus = [0, 1].map(|devfn| AffectedDevice {
        function: function(devfn),
        is_unused: false,
        group: None,
    });
    let on_bus = |hardware: &RecordingDevice, devfn| {
        hardware.state().resets_alone = false;
        hardware.state().bus = bus.to_vec();
        let device = ExportedDevice::new("device".into(), Box::new(hardware.clone()));
        let device = device.expect("a device");
        device
            .with_hot_reset(&registry, function(devfn))
            .expect("registered")
    };
    let mut resumed = on_bus(&hardware, 0);
    let other = RecordingDevice::new();
    let mut mate = on_bus(&other, 1);
    resumed.resume(&record.bytes, &files).expect("resumed");
    let taken = mate.negotiate(&Version::default(), &mut Capabilities::default());
    assert_eq!(taken, Ok(()));
    mate.release();
    let resets = || hardware.state().hot_resets + other.state().hot_resets;
    assert_eq!(resets(), 0, "a client has the other device");
    resumed.release();
    eventually("the reset of the bus", || resets() == 1);
}

/// A register that counts or that a read clears must not be accessed twice for one access of the client.
#[test]
fn only_accesses_without_effects_are_repeated() {
    let life = DeviceLife::new(&RecordingDevice::new());
    let can = |command, index| {
        let body = region(0, index, 4, &[]);
        life.device.can_repeat(Some(command), &body)
    };
    assert!(can(Command::RegionRead, CONFIG) && can(Command::RegionWrite, CONFIG));
    assert!(can(Command::RegionRead, ROM) && !can(Command::RegionWrite, ROM));
    assert!(!can(Command::RegionRead, BAR) && !can(Command::RegionWrite, BAR));
    assert!(!can(Command::RegionWriteMulti, CONFIG));
    assert!(can(Command::DeviceReset, 0) && can(Command::DmaMap, 0));
    assert!(!life.device.can_repeat(Some(Command::RegionRead), &[]));
}

/// The addresses of two functions of one slot, in the guest. Each has its namesake of the host's bus 65.
const FUNCTIONS: [&str; 2] = ["00:06.0", "00:06.1"];

/// Two devices of one group that can be reset only together.
struct Pair {
    config: Config,
    devices: [RecordingDevice; 2],
}

impl Pair {
    fn new(folder: &Path) -> Self {
        let mut text = "address = '00:05.0'\nhost-iommu = 'type1'\n".to_owned();
        for (n, at) in FUNCTIONS.iter().enumerate() {
            let path = folder.join(n.to_string());
            text += &format!(
                "[[endpoint]]\naddress = '{at}'\nvfio = '0000:65:00.{n}'\nexport = {path:?}\n"
            );
        }
        let affected = |devfn| AffectedDevice {
            function: function(devfn),
            is_unused: false,
            group: Some(7),
        };
        let group = Arc::new(memfd(0x1000).into());
        let device = || {
            let device = RecordingDevice::new();
            device.state().resets_alone = false;
            device.state().bus = vec![affected(0), affected(1)];
            device.state().group = Some(Arc::clone(&group));
            device
        };
        Self {
            config: Config::from_text(Path::new("vm.toml"), &text).expect("a configuration"),
            devices: [device(), device()],
        }
    }

    /// A daemon begins to serve the devices, with what the one before has left.
    fn live(&self, keeper: &Arc<Keeper>, is_left: bool) -> (Vec<OpenDevice>, Arc<Life>) {
        let life = Arc::new(Life::new(true));
        let registry = HotResetRegistry::default();
        let bind = |(at, device): (&&str, &RecordingDevice)| {
            let kept = KeptExport {
                keeper: keeper.clone(),
                life: life.clone(),
                is_left,
                kept_as: format!("vfio.device-{at}").replace(':', "-"),
            };
            let at: PciAddress = at.parse().expect("an address");
            let device = Box::new(device.clone());
            bind_export(&self.config, at, device, &registry, Some(kept)).expect("bound")
        };
        let mut bound: Vec<_> = FUNCTIONS.iter().zip(&self.devices).map(bind).collect();
        for device in &mut bound {
            device.serve().expect("served");
        }
        (bound, life)
    }

    fn hot_resets(&self) -> u32 {
        let counts = self.devices.iter().map(|d| d.state().hot_resets);
        counts.sum()
    }
}

/// A device without a client must not be reset together with one whose client goes on.
#[test]
fn a_device_that_nobody_goes_on_with_waits_for_its_neighbour() {
    let folder = tempfile::tempdir().expect("a folder");
    let pair = Pair::new(folder.path());
    let (_manager, ours) = UnixDatagram::pair().expect("sockets");
    let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
    let (first, _) = pair.live(&keeper, false);
    let path = folder.path().join("1");
    let mut client = Connection::new(UnixStream::connect(path).expect("connected"));
    let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
    assert_eq!(answer.errno(), 0);
    // Its threads wait for messages, which do not come before the next one has taken them over.
    std::mem::forget(first);

    // Other hardware: that of the first life would be released by its threads, too.
    let folder = tempfile::tempdir().expect("a folder");
    let pair = Pair::new(folder.path());
    let names = keeper.names();
    let file = |name: &String| keeper.claim(name).expect("kept").try_clone();
    let left = names
        .iter()
        .map(|name| (name.clone(), file(name).expect("a copy")));
    let (_manager, ours) = UnixDatagram::pair().expect("sockets");
    let next = Arc::new(Keeper::new(ours, left).expect("a keeper"));
    let (second, life) = pair.live(&next, true);
    assert_eq!(pair.hot_resets(), 0, "the other one has a client");
    assert_eq!(life.lost(), [""; 0]);
    // The state of the client before is in the first device.
    let is = |n: usize, field: &str| {
        let status = second[n].status.as_ref().expect("a status");
        let mut figures = status.figures().into_iter();
        figures.any(|figure| figure.field == field && figure.value == FigureValue::Flag(true))
    };
    eventually("its client", || is(1, "client"));
    assert!(is(0, "leftover") && !is(0, "client"));
    drop(client);
    eventually("its client has gone", || !is(1, "client"));
    assert_eq!(pair.hot_resets(), 1);
    assert!(!is(0, "leftover"));
}
