//! The device runs in this process, and the driver reaches it over a real socket. The tests cover
//! faults on their way to the guest, and calls that only the device's owner can make.
#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::daemon::EP;
use common::guest::{Guest, Setup};
use tempfile::TempDir;
use vhost_device_iommu::address::{Access, Iova};
use vhost_device_iommu::args::{Question, RunArgs};
use vhost_device_iommu::config::Config;
use vhost_device_iommu::ctl;
use vhost_device_iommu::daemon::{Daemon, StopHandle};
use vhost_device_iommu::device::Device;
use vhost_device_iommu::faults::{Fault, FaultReason};
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::process::keeper::Keeper;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

const SOON: Duration = Duration::from_secs(30);
const NEVER: Duration = Duration::from_millis(100);
/// Nothing that goes on takes so long.
const HANG: Duration = Duration::from_secs(30);

/// A daemon on a thread of this process, so that the test can call the device directly.
struct InProcess {
    directory: TempDir,
    device: Arc<Device>,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

impl InProcess {
    fn start() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let config = Config::try_from(&RunArgs {
            socket_path: Some(directory.path().join("vhost.sock")),
            control_path: Some(directory.path().join("control.sock")),
            iommu: Some("00:05.0".into()),
            endpoint: vec!["00:06.0".into(), "00:07.0".into(), "00:08.0".into()],
            ..RunArgs::default()
        })
        .expect("a configuration");
        let mut daemon = Daemon::new(&config, Arc::new(Keeper::none())).expect("a daemon");
        let (device, stop) = (daemon.device().clone(), daemon.stop_handle());
        let thread = std::thread::spawn(move || daemon.run().expect("an orderly end"));
        Self {
            directory,
            device,
            stop,
            thread: Some(thread),
        }
    }

    fn boot(&self) -> Guest {
        let mut guest = Guest::connect_to(self.socket(), Setup::default());
        guest.driver_ok();
        guest
    }

    fn socket(&self) -> impl AsRef<Path> + use<> {
        self.directory.path().join("vhost.sock")
    }

    fn counts(&self) -> (u64, u64) {
        let metrics = self.device.metrics();
        (metrics.faults_delivered.get(), metrics.faults_dropped.get())
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok(), "the daemon panicked");
        }
    }
}

fn fault(address: u64) -> Fault {
    Fault {
        endpoint: EndpointId(EP),
        reason: FaultReason::Mapping,
        access: Access::WRITE,
        address: Iova(address),
    }
}

/// Decodes a record: reason, flags, endpoint and address. Its reserved fields must be zero.
fn decode(record: &[u8]) -> (u8, u32, u32, u64) {
    assert_eq!(record.len(), 24);
    assert_eq!(record[1..4], [0; 3]);
    assert_eq!(record[12..16], [0; 4]);
    let u32_at = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("4 bytes"));
    let address = u64::from_le_bytes(record[16..].try_into().expect("8 bytes"));
    (record[0], u32_at(4), u32_at(8), address)
}

#[test]
fn a_fault_reaches_the_driver_in_the_format_of_the_specification() {
    let daemon = InProcess::start();
    let mut guest = daemon.boot();
    // An answered request shows that the device is up.
    guest.attach(1, EP);
    for (reason, number) in [
        (FaultReason::Unknown, 0),
        (FaultReason::Domain, 1),
        (FaultReason::Mapping, 2),
    ] {
        for (access, flags) in [
            (Access::READ, 0x101),
            (Access::WRITE, 0x102),
            (Access::READ_WRITE, 0x103),
        ] {
            guest.post_event_buffer(24);
            let address = 0xffff_1234_5678_9abc;
            daemon.device.report_fault(&Fault {
                reason,
                access,
                ..fault(address)
            });
            let event = guest.take_event(SOON).expect("a fault record");
            assert_eq!(event.len, 24);
            assert_eq!(decode(&event.bytes), (number, flags, EP, address));
        }
    }
    assert_eq!(daemon.counts(), (9, 0));
}

#[test]
fn a_fault_is_delivered_through_a_full_call_descriptor_that_blocks() {
    let daemon = InProcess::start();
    let mut guest = Guest::connect_to(daemon.socket(), Setup::default());
    guest.events.call = EventFd::new(EFD_CLOEXEC).expect("an eventfd");
    guest
        .events
        .call
        .write(u64::MAX - 1)
        .expect("the counter is full");
    guest.driver_ok();
    guest.attach(1, EP);
    for address in 0..3 {
        guest.post_event_buffer(24);
        let (done, delivery) = std::sync::mpsc::channel();
        let device = daemon.device.clone();
        // In a thread of its own, because a hang would otherwise hang the test.
        std::thread::spawn(move || {
            device.report_fault(&fault(address));
            done.send(())
        });
        delivery.recv_timeout(HANG).expect("delivered");
        let event = guest.take_event(SOON).expect("a fault record");
        assert_eq!(decode(&event.bytes).3, address);
    }
    assert_eq!(daemon.counts(), (3, 0));
}

#[test]
fn faults_without_a_buffer_are_dropped_and_counted() {
    let daemon = InProcess::start();
    daemon.device.report_fault(&fault(1));
    assert_eq!(daemon.counts(), (0, 1), "no VMM is connected");
    let mut guest = daemon.boot();
    guest.attach(1, EP);
    for address in 0..1000 {
        daemon.device.report_fault(&fault(address));
    }
    assert_eq!(daemon.counts(), (0, 1001));
    guest.post_event_buffer(24);
    guest.post_event_buffer(24);
    for address in 2000..2003 {
        daemon.device.report_fault(&fault(address));
    }
    assert_eq!(daemon.counts(), (2, 1002));
    for address in 2000..2002 {
        let event = guest.take_event(SOON).expect("a fault record");
        assert_eq!(decode(&event.bytes).3, address);
    }
    assert!(guest.take_event(NEVER).is_none());
}

#[test]
fn a_buffer_too_small_comes_back_empty_and_the_next_one_is_used() {
    let daemon = InProcess::start();
    let mut guest = daemon.boot();
    guest.attach(1, EP);
    for len in [23, 1, 64] {
        guest.post_event_buffer(len);
    }
    daemon.device.report_fault(&fault(0x5000));
    for _ in 0..2 {
        let small = guest.take_event(SOON).expect("a small buffer");
        assert!(small.is_untouched());
    }
    let event = guest.take_event(SOON).expect("a fault record");
    assert_eq!(event.len, 24);
    assert_eq!(decode(&event.bytes[..24]).3, 0x5000);
    assert_eq!(daemon.counts(), (1, 0));
}

#[test]
fn a_stopped_event_ring_takes_no_faults_and_goes_on_afterwards() {
    let daemon = InProcess::start();
    let mut guest = daemon.boot();
    guest.attach(1, EP);
    guest.post_event_buffer(24);
    guest.post_event_buffer(24);
    daemon.device.report_fault(&fault(0x1000));
    guest.stop_rings();
    daemon.device.report_fault(&fault(0x2000));
    assert_eq!(daemon.counts(), (1, 1));
    guest.driver_ok();
    guest.attach(1, EP);
    daemon.device.report_fault(&fault(0x3000));
    let event = guest.take_event(SOON).expect("the first");
    assert_eq!(decode(&event.bytes).3, 0x1000);
    let event = guest.take_event(SOON).expect("the second");
    assert_eq!(decode(&event.bytes).3, 0x3000);
}

#[test]
fn a_device_reset_drops_every_domain() {
    let daemon = InProcess::start();
    let mut guest = daemon.boot();
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map_page(1, 0x1000, 0x1000), 0);
    let domains = || {
        let socket = daemon.directory.path().join("control.sock");
        let status = ctl::ask(&socket, &Question::Status).expect("an answer");
        status["domains"].as_array().expect("domains").len()
    };
    assert_eq!(domains(), 1);
    daemon.device.reset();
    assert_eq!(domains(), 0);
}
