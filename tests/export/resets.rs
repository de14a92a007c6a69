//! Resets between clients of devices that cannot be reset alone.

use vhost_device_iommu::export::HotResetRegistry;
use vhost_device_iommu::vfio::{AffectedDevice, HostFunction};

use crate::bed::{Bed, RecordingDevice, eventually};

fn function(number: u8) -> HostFunction {
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
    }
}

/// A server of function `number`, whose bus has the functions `bus`. `resets_alone`: the device has a reset of its own.
fn served(
    registry: &HotResetRegistry,
    number: u8,
    bus: &[AffectedDevice],
    resets_alone: bool,
) -> Bed {
    let device = RecordingDevice::new();
    {
        let mut state = device.state();
        state.resets_alone = resets_alone;
        state.bus = bus.to_vec();
    }
    Bed::of(device, |offered| {
        offered.with_hot_reset(registry, function(number))
    })
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
    bed.device.state().hot_reset_error = None;
    visit(&bed);
    assert_eq!(hot_resets(&bed), 1);
}
