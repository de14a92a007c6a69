//! Resets between clients of devices that cannot be reset alone.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vhost_device_iommu::export::HotResetRegistry;
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::vfio::{AffectedDevice, BusReset, HostFunction};

use crate::bed::{Bed, RecordingDevice, eventually};
use crate::common::memory::memfd;

pub fn function(number: u8) -> HostFunction {
    HostFunction {
        domain: 0,
        bus: 0x65,
        devfn: number,
    }
}

fn affected(number: u8) -> AffectedDevice {
    AffectedDevice {
        function: function(number),
        is_unused: false,
        group: None,
    }
}

/// A function that the kernel names by its group, as for devices without iommufd.
pub fn in_group(number: u8, group: u32) -> AffectedDevice {
    AffectedDevice {
        group: Some(group),
        ..affected(number)
    }
}

/// An open file that stands for a group.
fn group_file() -> Arc<OwnedFd> {
    Arc::new(memfd(0x1000).into())
}

/// As [`served`], for a device without a reset of its own and of a group.
fn served_in_group(
    registry: &HotResetRegistry,
    number: u8,
    bus: &[AffectedDevice],
    group: &Arc<OwnedFd>,
    log: &Arc<Mutex<Vec<&'static str>>>,
) -> Bed {
    let device = RecordingDevice::new();
    {
        let mut state = device.state();
        state.group = Some(group.clone());
        state.reopened = log.clone();
    }
    serve_on(registry, device, number, bus, false)
}

/// A server of function `number`, whose bus has the functions `bus`. `resets_alone`: the device has a reset of its own.
fn served(
    registry: &HotResetRegistry,
    number: u8,
    bus: &[AffectedDevice],
    resets_alone: bool,
) -> Bed {
    serve_on(registry, RecordingDevice::new(), number, bus, resets_alone)
}

fn serve_on(
    registry: &HotResetRegistry,
    device: RecordingDevice,
    number: u8,
    bus: &[AffectedDevice],
    resets_alone: bool,
) -> Bed {
    {
        let mut state = device.state();
        state.resets_alone = resets_alone;
        state.bus = bus.to_vec();
    }
    let mut leftover = Arc::default();
    let mut bed = Bed::of(device, |offered| {
        let offered = offered.with_hot_reset(registry, function(number));
        let offered = offered.expect("registered");
        leftover = offered.leftover();
        offered
    });
    bed.leftover = leftover;
    bed
}

fn has_leftover(bed: &Bed) -> bool {
    bed.leftover.load(Ordering::Relaxed)
}

/// Connects a client and drops it. Returns once the device is released.
fn visit(bed: &Bed) {
    let client = bed.client();
    drop(client);
    released(bed);
}

fn released(bed: &Bed) {
    let status = bed.server.as_ref().expect("a server").status();
    eventually("the device is released", || !status.is_connected());
}

fn hot_resets(bed: &Bed) -> u32 {
    bed.device.state().hot_resets
}

#[test]
fn a_device_without_a_reset_of_its_own_is_reset_with_its_bus_between_clients() {
    let registry = HotResetRegistry::default();
    let bed = served(&registry, 0, &[affected(0)], false);
    for visits in 1..=3 {
        visit(&bed);
        assert_eq!(hot_resets(&bed), visits);
    }
    assert_eq!(bed.device.state().resets, 0, "the kernel would refuse");
}

#[test]
fn a_device_with_a_reset_of_its_own_is_not_reset_with_its_bus() {
    let registry = HotResetRegistry::default();
    let bed = served(&registry, 0, &[affected(0)], true);
    visit(&bed);
    let state = bed.device.state();
    assert_eq!((state.resets, state.hot_resets), (1, 0));
}

#[test]
fn a_bus_is_reset_once_its_last_client_has_gone() {
    for second_resets_alone in [false, true] {
        let registry = HotResetRegistry::default();
        let bus = [affected(0), affected(1)];
        let first = served(&registry, 0, &bus, false);
        let second = served(&registry, 1, &bus, second_resets_alone);
        let client = second.client();
        visit(&first);
        assert_eq!(hot_resets(&first), 0, "the second has a client");
        drop(client);
        released(&second);
        assert_eq!((hot_resets(&first), hot_resets(&second)), (0, 1));
        // Both are as new now: the second device causes no further reset if it has one of its own.
        visit(&second);
        let again = u32::from(!second_resets_alone);
        assert_eq!((hot_resets(&first), hot_resets(&second)), (0, 1 + again));
    }
}

#[test]
fn a_bus_with_a_device_that_the_daemon_does_not_have_is_not_reset() {
    let registry = HotResetRegistry::default();
    let other = affected(1);
    let bed = served(&registry, 0, &[affected(0), other], false);
    visit(&bed);
    assert_eq!(hot_resets(&bed), 0);
    assert!(has_leftover(&bed));
    assert!(bed.device.state().reopened.lock().unwrap().is_empty());
    // A device that nobody can have open is not disturbed.
    let unused = AffectedDevice {
        is_unused: true,
        ..other
    };
    let bed = served(&registry, 0, &[affected(0), unused], false);
    visit(&bed);
    assert_eq!(hot_resets(&bed), 1);
}

#[test]
fn a_refused_hot_reset_is_tried_again_after_the_next_client() {
    let registry = HotResetRegistry::default();
    let bed = served(&registry, 0, &[affected(0)], false);
    bed.device.state().hot_reset_error = Some(libc::EBUSY);
    visit(&bed);
    assert_eq!(hot_resets(&bed), 0);
    assert!(has_leftover(&bed));
    bed.device.state().hot_reset_error = None;
    let client = bed.client();
    assert!(has_leftover(&bed), "the state of the client before");
    drop(client);
    released(&bed);
    assert_eq!(hot_resets(&bed), 1);
    assert!(!has_leftover(&bed));
}

#[test]
fn devices_of_groups_are_reset_with_all_groups_of_their_bus() {
    let registry = HotResetRegistry::default();
    // Function 2 shares a group with function 0, so no other process can open it. Group 9 is on another bus.
    let bus = [in_group(0, 7), in_group(1, 8), in_group(2, 7)];
    let (seven, eight, nine) = (group_file(), group_file(), group_file());
    let log = Arc::default();
    let elsewhere = [AffectedDevice {
        function: function(0x40),
        ..in_group(0, 9)
    }];
    let _other = served_in_group(&registry, 0x40, &elsewhere, &nine, &log);
    let first = served_in_group(&registry, 0, &bus, &seven, &log);
    let second = served_in_group(&registry, 1, &bus, &eight, &log);
    let client = second.client();
    visit(&first);
    assert_eq!(hot_resets(&first), 0, "the second has a client");
    assert!(has_leftover(&first));
    drop(client);
    released(&second);
    assert_eq!(hot_resets(&first) + hot_resets(&second), 1);
    assert!(!has_leftover(&first) && !has_leftover(&second));
    let with = [&first, &second].map(|bed| bed.device.state().reset_with.clone());
    let with: Vec<_> = with.into_iter().flatten().collect();
    assert_eq!(with, [seven.as_raw_fd(), eight.as_raw_fd()]);
    assert!(log.lock().unwrap().is_empty(), "nothing is closed for it");
}

#[test]
fn devices_of_groups_are_closed_and_opened_again_if_no_hot_reset_is_possible() {
    let registry = HotResetRegistry::default();
    // Nobody may have function 2 open, but another process could.
    let bus = [in_group(0, 7), in_group(1, 8), in_group(2, 9)];
    let (seven, eight) = (group_file(), group_file());
    let log = Arc::default();
    let first = served_in_group(&registry, 0, &bus, &seven, &log);
    let second = served_in_group(&registry, 1, &bus, &eight, &log);
    let client = second.client();
    visit(&first);
    assert!(log.lock().unwrap().is_empty(), "the second has a client");
    drop(client);
    released(&second);
    // VFIO resets the bus while both are closed.
    let closed_together = ["closed", "closed", "opened", "opened"];
    assert_eq!(*log.lock().unwrap(), closed_together);
    assert_eq!(hot_resets(&first) + hot_resets(&second), 0);
    // VFIO does not say whether it has reset the bus.
    assert!(has_leftover(&first) && has_leftover(&second));
}

/// The process that keeps a device for the next daemon closes it in its own time.
#[test]
fn a_device_is_closed_and_opened_until_no_other_process_has_it_open() {
    // A value of the hardware may look like a device that is still open. It costs one round more.
    for (held, hardware_line, rounds) in [(0, 11, 1), (1, 11, 2), (3, 11, 4), (0, 0x5a, 2)] {
        let registry = HotResetRegistry::default();
        let bus = [in_group(0, 7), in_group(2, 9)];
        let log = Arc::default();
        let bed = served_in_group(&registry, 0, &bus, &group_file(), &log);
        bed.device.state().held = held;
        bed.device.state().hardware_line = hardware_line;
        visit(&bed);
        let expected = ["closed", "opened"].repeat(rounds);
        assert_eq!(*log.lock().unwrap(), expected, "{held} {hardware_line:#x}");
    }
}

#[test]
fn a_device_that_another_process_keeps_open_is_not_waited_for_without_end() {
    let registry = HotResetRegistry::default();
    let bus = [in_group(0, 7), in_group(2, 9)];
    let log = Arc::default();
    let bed = served_in_group(&registry, 0, &bus, &group_file(), &log);
    bed.device.state().held = u32::MAX;
    let mut rounds = Vec::new();
    for _ in 0..3 {
        visit(&bed);
        rounds.push(std::mem::take(&mut *log.lock().unwrap()).len() / 2);
        assert!(has_leftover(&bed));
    }
    // With pauses of 1 ms, 2 ms and so on: 11 in two seconds, and 9 in half a second.
    assert!((2..=11).contains(&rounds[0]), "{rounds:?}");
    assert!(rounds[2] <= 9, "the budget is used up: {rounds:?}");
    // The next client gets it all the same, and the one after that a device that was closed.
    bed.device.state().held = 0;
    visit(&bed);
    assert_eq!(log.lock().unwrap().len(), 2);
}

/// A message that nobody has read keeps the descriptor in it open.
#[test]
fn the_keeper_closes_a_device_that_is_closed_for_a_reset_and_gets_it_again() {
    const NAME: &str = "vfio.0000-65-00.0";
    let (manager, ours) = UnixDatagram::pair().expect("sockets");
    manager.set_nonblocking(true).expect("a socket");
    let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
    let registry = HotResetRegistry::default();
    let device = RecordingDevice::new();
    let log: Arc<Mutex<Vec<&'static str>>> = Arc::default();
    {
        let mut state = device.state();
        state.resets_alone = false;
        state.bus = vec![in_group(0, 7), in_group(2, 9)];
        state.group = Some(group_file());
        state.reopened = log.clone();
    }
    let open = device.duplicate().expect("a descriptor");
    keeper.keep_as(NAME, open.as_fd()).expect("kept");
    drop(open);
    let bed = Bed::of(device, |offered| {
        let offered = offered.with_hot_reset(&registry, function(0));
        offered.expect("registered").kept_with(keeper.clone(), NAME)
    });
    let received = move || {
        let mut bytes = [0; 128];
        let len = manager.recv(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes[..len]).into_owned())
    };
    let (remove, store) = (
        format!("FDSTOREREMOVE=1\nFDNAME=viommu.{NAME}"),
        format!("FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.{NAME}"),
    );
    // It reads them when the device is closed for the third time.
    let mut times = 0;
    let messages: Arc<Mutex<Vec<String>>> = Arc::default();
    let (read, sink) = (Arc::new(received), messages.clone());
    let reader = read.clone();
    bed.device.state().closing = Some(Box::new(move || {
        times += 1;
        if times == 3 {
            let mut messages = sink.lock().unwrap();
            messages.extend(std::iter::from_fn(|| reader()));
        }
    }));
    visit(&bed);
    assert_eq!(log.lock().unwrap().len(), 6, "three times");
    let messages = messages.lock().unwrap().clone();
    assert_eq!(messages, [store.clone(), remove]);
    // The next daemon gets the device that is open now.
    assert_eq!((read(), read()), (Some(store), None));
    assert_eq!(keeper.names(), [NAME]);
    assert!(!keeper.unkept().any());
}
