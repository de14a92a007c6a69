//! Tests of the thread that takes a VMM's files over, with a helper in the place of the real one.
//!
//! Other character devices stand for those of the host: `/dev/zero` for the iommufd, `/dev/null` for a device of VFIO. Neither
//! knows VFIO's calls, and only EINVAL says that a device is not bound.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::super::kept;
use super::super::vmm_devices::{FilesOfVmm, VmmDeviceFile, VmmDevices};
use crate::adopt::MAX_DEVICES;
use crate::adopt::message::{FoundFiles, answer, receive_request};
use crate::device::VmmWatcher;
use crate::locks::{Mutex, Rank};
use crate::process::keeper::Keeper;
use crate::topology::{HostAddress, PciAddress};
use crate::vfio::{IommuFd, VmmCdev, VmmFiles, VmmIommufd};

/// Longer than any step takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);

fn open(path: &str) -> OwnedFd {
    let file = File::options().read(true).write(true).open(path);
    file.expect("a device of this machine").into()
}

/// The host's name of the device of a number.
fn host(number: u8) -> HostAddress {
    let text = format!("0000:65:{:02x}.{}", number / 8, number % 8);
    text.parse().expect("an address")
}

/// A request to the helper, which waits for an answer.
struct Request {
    devices: Vec<HostAddress>,
    daemon: UnixStream,
}

/// A VM with devices, its VMM's connection, and its helper.
struct Bed {
    _folder: tempfile::TempDir,
    iommufd: OwnedFd,
    cdevs: Vec<VmmCdev>,
    devices: Arc<VmmDevices>,
    files: FilesOfVmm,
    requests: Receiver<Request>,
    keeper: Arc<Keeper>,
    _sockets: (UnixStream, UnixDatagram),
}

impl Bed {
    fn new(count: u8) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("adopt.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        let (sent, requests) = channel();
        std::thread::spawn(move || receive_requests(&listener, &sent));
        let iommufd = open("/dev/zero");
        let copy = || iommufd.try_clone().expect("a descriptor");
        let known = VmmIommufd::default();
        known.set(Some(IommuFd::from(copy())));
        let file = |number: u8| VmmDeviceFile {
            endpoint: PciAddress::from_endpoint_id(crate::ids::EndpointId(u32::from(number))),
            host: host(number),
            cdev: VmmCdev::default(),
        };
        let files: Vec<_> = (0..count).map(file).collect();
        let cdevs = files.iter().map(|file| file.cdev.clone()).collect();
        let (manager, ours) = UnixDatagram::pair().expect("sockets");
        let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
        let devices = VmmDevices::new(path, known, Some(copy()), files, keeper.clone());
        let devices = Arc::new(devices);
        let (vmm, socket) = UnixStream::pair().expect("sockets");
        devices.connected(socket.as_fd());
        Self {
            _folder: folder,
            iommufd,
            cdevs,
            files: FilesOfVmm(devices.clone()),
            devices,
            requests,
            keeper,
            _sockets: (vmm, manager),
        }
    }

    /// Starts the thread. The result has a message for each time that it has the core accept what has come.
    fn start(&self, core: Arc<Mutex<()>>) -> Receiver<()> {
        let (sent, accepted) = channel();
        let files = self.files.clone();
        let accept = move || {
            let Some(_core) = core.lock_within(Duration::from_millis(1)) else {
                return false;
            };
            files.accept();
            // The test may have ended.
            let _ = sent.send(());
            true
        };
        self.devices.start_with(accept).expect("a thread");
        accepted
    }

    fn request(&self) -> Request {
        self.requests
            .recv_timeout(LONG)
            .expect("the helper is asked")
    }

    /// Gives the devices of these numbers.
    fn give(&self, request: &Request, numbers: &[u8]) {
        let is_empty = numbers.is_empty();
        let iommufd = self.iommufd.try_clone().expect("a descriptor");
        let devices = numbers
            .iter()
            .map(|number| (host(*number), open("/dev/null")));
        let found = FoundFiles {
            iommufd: (!is_empty).then_some(iommufd),
            devices: devices.collect::<BTreeMap<_, _>>(),
        };
        answer(&request.daemon, Ok(&found), Instant::now() + LONG).expect("answered");
    }

    fn are_open(&self) -> Vec<bool> {
        self.cdevs.iter().map(VmmCdev::is_open).collect()
    }
}

/// The helper's thread, until the end of the bed.
fn receive_requests(listener: &UnixListener, sent: &Sender<Request>) {
    for daemon in listener.incoming() {
        let daemon = daemon.expect("a connection");
        let received = receive_request(&daemon, Instant::now() + LONG);
        let (devices, _) = received.expect("a request");
        if sent.send(Request { devices, daemon }).is_err() {
            return;
        }
    }
}

fn core() -> Arc<Mutex<()>> {
    Arc::new(Mutex::new(Rank::Core, ()))
}

#[test]
fn what_comes_too_late_for_its_waiter_is_accepted_all_the_same() {
    let bed = Bed::new(2);
    let core = core();
    let accepted = bed.start(core.clone());
    // As a worker's ATTACH, which holds the core. It gives up.
    let held = core.lock();
    bed.files.fetch();
    let request = bed.request();
    assert_eq!(request.devices, [host(0), host(1)]);
    bed.files.accept();
    assert_eq!(bed.are_open(), [false, false]);
    bed.give(&request, &[0]);
    // Another one. The thread must not wait for the core meanwhile.
    std::thread::scope(|scope| {
        scope.spawn(|| bed.files.fetch());
        let request = bed.request();
        assert_eq!(request.devices, [host(1)], "the other one has come");
        assert_eq!(bed.are_open(), [false, false], "and nobody has accepted it");
        bed.give(&request, &[]);
    });
    drop(held);
    accepted.recv_timeout(LONG).expect("accepted");
    assert_eq!(bed.are_open(), [true, false]);
}

#[test]
fn what_comes_in_time_is_accepted_by_its_waiter() {
    let bed = Bed::new(1);
    let core = core();
    bed.start(core.clone());
    let _held = core.lock();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            // The longest wait of a driver's start is not used.
            bed.devices.driver_starts();
            bed.files.accept();
        });
        bed.give(&bed.request(), &[0]);
        waiter.join().expect("no panic");
    });
    assert_eq!(bed.are_open(), [true]);
}

#[test]
fn a_device_whose_endpoint_is_removed_does_not_come_again() {
    let bed = Bed::new(3);
    let accepted = bed.start(core());
    bed.cdevs[0].end();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| bed.devices.driver_starts());
        let request = bed.request();
        assert_eq!(request.devices, [host(1), host(2)]);
        // The next one is removed while the helper looks for it.
        bed.cdevs[1].end();
        bed.give(&request, &[1, 2]);
        waiter.join().expect("no panic");
    });
    accepted.recv_timeout(LONG).expect("accepted");
    assert_eq!(bed.are_open(), [false, false, true]);
    assert_eq!(bed.keeper.names(), [kept::device_name(host(2))]);
    // Nothing is missing, so nobody is asked. The next VMM's devices come without those of removed endpoints.
    bed.files.fetch();
    bed.files.release();
    let (_vmm, socket) = UnixStream::pair().expect("sockets");
    bed.devices.connected(socket.as_fd());
    std::thread::scope(|scope| {
        scope.spawn(|| bed.devices.driver_starts());
        let request = bed.request();
        assert_eq!(request.devices, [host(2)]);
        bed.give(&request, &[]);
    });
    assert!(bed.keeper.names().is_empty(), "{:?}", bed.keeper.names());
}

/// More devices than a request can name.
#[test]
fn many_devices_come_with_several_requests() {
    const COUNT: u8 = 150;
    let bed = Bed::new(COUNT);
    let accepted = bed.start(core());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| bed.devices.driver_starts());
        let mut rest: Vec<u8> = (0..COUNT).collect();
        while !rest.is_empty() {
            let request = bed.request();
            let part: Vec<_> = rest.drain(..rest.len().min(MAX_DEVICES)).collect();
            let named: Vec<_> = part.iter().map(|number| host(*number)).collect();
            assert_eq!(request.devices, named);
            bed.give(&request, &part);
        }
        waiter.join().expect("no panic");
    });
    accepted.recv_timeout(LONG).expect("accepted");
    assert!(bed.are_open().iter().all(|is_open| *is_open));
}

/// The guest attaches a device that is not there, over and over.
#[test]
fn a_guest_cannot_start_helpers_as_fast_as_it_likes() {
    let mut bed = Bed::new(1);
    bed.start(core());
    let requests = std::mem::replace(&mut bed.requests, channel().1);
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    // Until the end of the test's process.
    std::thread::spawn(move || {
        for request in requests {
            count.fetch_add(1, Ordering::Relaxed);
            let none = FoundFiles::default();
            answer(&request.daemon, Ok(&none), Instant::now() + LONG).expect("answered");
        }
    });
    let began = Instant::now();
    let counters = bed.devices.counters().clone();
    let mut rounds = 0;
    while counters.limited.get() < 3 {
        bed.files.fetch();
        rounds += 1;
        assert!(rounds < 10_000, "no limit");
    }
    // A burst, and one in a second.
    let most = 16 + began.elapsed().as_secs() + 1;
    assert!(counters.requests.get() <= most, "{counters:?}");
    assert!((1..=rounds).contains(&counters.waits.get()), "{counters:?}");
    assert_eq!(counters.taken.get() + counters.refused.get(), 0);
    assert_eq!(asked.load(Ordering::Relaxed), counters.requests.get());
}
