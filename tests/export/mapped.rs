//! Clients that map BARs through the device's own descriptor.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::fstat;
use vhost_device_iommu::config::Config;
use vhost_device_iommu::endpoints::exported::{KeptExport, bind_export};
use vhost_device_iommu::export::{ExportedDevice, HotResetRegistry};
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::process::life::Life;
use vhost_device_iommu::vfio::BusReset;
use vhost_device_iommu::vfio_user::server::{ClientFiles, ServedDevice};

use crate::access::region_info;
use crate::bed::{
    BAR, Bed, CAPS, CLIENT_TEXT, MMAP, OWN, READ, RecordingDevice, TRAPPED, WRITE, eventually,
    offset_of,
};
use crate::common::memory::memfd;
use crate::connection::{Connection, VERSION, version_body};
use crate::resets::{function, in_group};

/// A device of a group, and the log of its closings.
fn device_of_group() -> (RecordingDevice, Arc<Mutex<Vec<&'static str>>>) {
    let device = RecordingDevice::new();
    let log = Arc::default();
    {
        let mut state = device.state();
        state.bus = vec![in_group(0, 7)];
        state.group = Some(Arc::new(memfd(0x1000).into()));
        state.reopened = Arc::clone(&log);
    }
    (device, log)
}

/// A server that gives the device's descriptor to clients.
struct LendingBed {
    bed: Bed,
    registry: HotResetRegistry,
    held: Arc<AtomicBool>,
}

impl LendingBed {
    fn new(device: RecordingDevice) -> Self {
        let registry = HotResetRegistry::default();
        let mut held = Arc::default();
        let bed = Bed::of(device, |offered| {
            let offered = offered.lending(true);
            held = offered.held();
            let registered = offered.with_hot_reset(&registry, function(0));
            registered.expect("registered")
        });
        Self {
            bed,
            registry,
            held,
        }
    }

    fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// Hangs up. Returns once the device is released.
    fn leave(&self, client: Connection) {
        drop(client);
        let status = self.bed.server.as_ref().expect("a server").status();
        eventually("the device is released", || !status.is_connected());
    }
}

/// The descriptor that the client gets with the description of the BAR.
fn borrow(client: &mut Connection) -> OwnedFd {
    let mut info = region_info(client, BAR, 4096);
    info.fds.pop().expect("a descriptor")
}

#[test]
fn a_region_is_mapped_at_its_place_in_the_device() {
    let (device, _) = device_of_group();
    let LendingBed { bed, .. } = LendingBed::new(device.clone());
    let mut client = bed.client();
    let info = region_info(&mut client, BAR, 4096);
    assert_eq!(info.u32_at(4), READ | WRITE | MMAP | CAPS);
    assert_eq!(info.u64_at(24), offset_of(BAR));
    assert_eq!(
        info.u64_at(48),
        0x1000,
        "the first area that can be mapped, counted from the region's first byte"
    );
    let identity = |file: &OwnedFd| {
        let stat = fstat(file).expect("a file");
        (stat.st_dev, stat.st_ino)
    };
    let own = device.duplicate().expect("open");
    assert_eq!(identity(&info.fds[0]), identity(&own));
    for index in [TRAPPED, OWN] {
        let info = region_info(&mut client, index, 4096);
        assert_eq!(info.u32_at(4) & MMAP, 0);
        assert!(info.fds.is_empty() && info.u64_at(24) == 0);
    }
    // A file of the BAR alone gives the client less.
    let alone = bed.give_file();
    let info = region_info(&mut client, BAR, 4096);
    assert_eq!(info.u64_at(24), 0);
    assert_eq!(identity(&info.fds[0]), alone);
}

#[test]
fn a_device_is_closed_and_opened_after_a_client_that_had_its_descriptor() {
    let (device, log) = device_of_group();
    let bed = LendingBed::new(device.clone());
    let client = bed.bed.client();
    bed.leave(client);
    assert!(log.lock().unwrap().is_empty(), "it had no descriptor");
    let mut client = bed.bed.client();
    let descriptor = borrow(&mut client);
    device.changes();
    drop(descriptor);
    bed.leave(client);
    assert_eq!(*log.lock().unwrap(), ["closed", "opened"]);
    assert!(!bed.is_held());
    // The client may have switched any of them on without the daemon.
    assert_eq!(
        device.changes(),
        [0, 1, 2, 3].map(|kind| format!("kind {kind} action 0x20 from 0: all 0"))
    );
    let client = bed.bed.client();
    bed.leave(client);
    assert_eq!(
        log.lock().unwrap().len(),
        2,
        "the last one had no descriptor"
    );
}

#[test]
fn a_device_takes_no_client_while_a_former_one_has_its_descriptor() {
    let (device, _) = device_of_group();
    let bed = LendingBed::new(device.clone());
    let mut client = bed.bed.client();
    let descriptor = borrow(&mut client);
    bed.leave(client);
    assert!(bed.is_held());
    let resets = device.state().resets;
    assert_eq!(resets, 1, "it is reset all the same");
    for _ in 0..2 {
        let mut next = bed.bed.connect();
        next.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        assert!(next.is_closed(), "the device is refused");
    }
    let status = bed.bed.server.as_ref().expect("a server").status();
    eventually("both are cut off", || status.cut_offs.get() == 2);
    assert!(bed.is_held());
    drop(descriptor);
    let client = bed.bed.client();
    assert!(!bed.is_held());
    assert!(
        device.state().resets > resets,
        "the former client may have changed it since"
    );
    bed.leave(client);
    assert!(!bed.is_held());
}

/// The device could read and write the next guest's memory.
#[test]
fn no_vmm_comes_until_the_descriptor_of_a_former_one_is_closed() {
    let (device, _) = device_of_group();
    let bed = LendingBed::new(device.clone());
    let mut client = bed.bed.client();
    let descriptor = borrow(&mut client);
    assert_eq!(bed.registry.vmm_refusal(), None, "it may be the VMM's own");
    bed.leave(client);
    let reason = bed.registry.vmm_refusal().expect("refused");
    assert!(reason.contains(&function(0).to_string()), "{reason}");
    drop(descriptor);
    // Without another client.
    eventually("it is free", || bed.registry.vmm_refusal().is_none());
    assert!(!bed.is_held());
    assert_eq!(device.state().resets, 2, "after each of its users");
}

/// The daemon cannot know whether another process has a device that it cannot open again.
#[test]
fn a_device_without_a_group_counts_as_held_by_its_former_client() {
    let bed = LendingBed::new(RecordingDevice::new());
    let client = bed.bed.client();
    bed.leave(client);
    assert!(!bed.is_held(), "it had no descriptor");
    let mut client = bed.bed.client();
    drop(borrow(&mut client));
    assert!(!bed.is_held(), "the client is still there");
    bed.leave(client);
    assert!(bed.is_held());
    let client = bed.bed.client();
    bed.leave(client);
    assert!(bed.is_held());
}

/// The next daemon may have another configuration, and its client the descriptor all the same.
#[test]
fn a_later_process_knows_that_its_client_has_the_descriptor() {
    let (hardware, log) = device_of_group();
    let kept = || {
        let (manager, ours) = UnixDatagram::pair().expect("sockets");
        let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
        (manager, keeper)
    };
    let device = |is_lending: bool, keeper: &Arc<Keeper>| {
        let device = ExportedDevice::new("device".into(), Box::new(hardware.clone()));
        let registry = HotResetRegistry::default();
        let device = device.expect("a device").lending(is_lending);
        let device = device.with_hot_reset(&registry, function(0));
        device
            .expect("registered")
            .kept_with(keeper.clone(), "vfio.device")
    };
    for (was_lending, is_lending, is_asked) in [
        (true, false, true),
        (true, false, false),
        // The last record may be older than the last answer.
        (true, true, false),
    ] {
        let (_manager, keeper) = kept();
        let mut first = device(was_lending, &keeper);
        let taken = first.negotiate(&Default::default(), &mut Default::default());
        assert_eq!(taken, Ok(()));
        first.take_record().expect("a client");
        if is_asked {
            drop(first.region_file(BAR).expect("a file"));
        }
        let record = first.take_record();
        assert_eq!(record.is_some(), is_asked, "each change makes a record");
        let taken = first.negotiate(&Default::default(), &mut Default::default());
        assert_eq!(taken, Ok(()));
        let record = record.or_else(|| first.take_record()).expect("a record");
        std::mem::forget(first);
        let mut second = device(is_lending, &keeper);
        second
            .resume(&record.bytes, &Default::default())
            .expect("resumed");
        log.lock().unwrap().clear();
        second.release();
        let is_closed = !log.lock().unwrap().is_empty();
        assert_eq!(is_closed, is_lending || is_asked);
    }
}

/// Nobody knows what the client of the daemon before had.
#[test]
fn a_device_that_was_left_is_closed_and_opened_before_the_first_client() {
    let folder = tempfile::tempdir().expect("a folder");
    for (registers, is_left, expected) in [
        ("mapped", true, &["closed", "opened"][..]),
        ("mapped", false, &[]),
        ("trapped", true, &[]),
    ] {
        let text = format!(
            "address = \"00:05.0\"\n[[endpoint]]\naddress = \"00:06.0\"\nvfio = \"0000:65:00.0\"\n\
             export = {:?}\nregisters = \"{registers}\"\n",
            folder.path().join("export")
        );
        let config = Config::from_text(Path::new("vm.toml"), &text).expect("a configuration");
        let endpoint = config.devices.exported[0].endpoint;
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let kept = KeptExport {
            keeper: Arc::new(Keeper::new(ours, []).expect("a keeper")),
            life: Arc::new(Life::new(true)),
            is_left,
            kept_as: "vfio.device".into(),
        };
        let (device, log) = device_of_group();
        let registry = HotResetRegistry::default();
        let bound = bind_export(&config, endpoint, Box::new(device), &registry, Some(kept));
        bound.expect("bound").serve().expect("served");
        assert_eq!(
            *log.lock().unwrap(),
            expected,
            "{registers}, left: {is_left}"
        );
    }
}

/// Nobody knows then whether the client of the daemon before has the descriptor.
#[test]
fn a_client_whose_record_is_refused_may_have_the_descriptor() {
    let (device, log) = device_of_group();
    let registry = HotResetRegistry::default();
    let offered = ExportedDevice::new("device".into(), Box::new(device)).expect("a device");
    let offered = offered.lending(true).with_hot_reset(&registry, function(0));
    let mut offered = offered.expect("registered");
    offered
        .resume(b"damaged", &ClientFiles::default())
        .expect_err("refused");
    offered.release();
    assert_eq!(*log.lock().unwrap(), ["closed", "opened"]);
}
