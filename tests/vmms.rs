//! VMMs other than QEMU: their order of vhost-user messages, as their sources have it, and the resets that follow.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use common::daemon::{Daemon, EP, EP2};
use common::guest::{Guest, HIGH_RAM, Setup};
use common::memory::{Memory, Region};
use common::wire::{self, CONFIG_BYPASS, F_PROTOCOL, OK};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

const QUEUES: usize = 2;

fn set_mem_table(guest: &mut Guest) {
    let regions = guest.memory.regions.iter();
    let infos: Vec<VhostUserMemoryRegionInfo> = regions.map(Region::info).collect();
    guest.frontend.set_mem_table(&infos).expect("SET_MEM_TABLE");
}

fn memory() -> Memory {
    Memory {
        regions: Guest::regions(),
    }
}

/// An eventfd of a ring.
#[derive(Clone, Copy)]
enum RingEvent {
    Call,
    Kick,
}

/// Sets a ring up and enables it, with its eventfds in this order.
fn start_ring(guest: &mut Guest, index: usize, base: u16, events: [RingEvent; 2]) {
    let queue = match index {
        0 => &guest.requests,
        _ => &guest.events,
    };
    let front = &mut guest.frontend;
    front.set_vring_num(index, queue.size).expect("num");
    front.set_vring_addr(index, &queue.config()).expect("addr");
    front.set_vring_base(index, base).expect("base");
    for event in events {
        let set = match event {
            RingEvent::Call => front.set_vring_call(index, &queue.call),
            RingEvent::Kick => front.set_vring_kick(index, &queue.kick),
        };
        set.expect("an eventfd");
    }
    front.set_vring_enable(index, true).expect("enable");
}

/// Disables a ring and returns the index at which it stopped.
fn stop_ring(guest: &mut Guest, index: usize) -> u16 {
    let front = &mut guest.frontend;
    front.set_vring_enable(index, false).expect("disable");
    front.get_vring_base(index).expect("a base") as u16
}

/// The driver attaches the endpoint to a new domain, and maps a page there.
fn attach_and_map(daemon: &Daemon, guest: &mut Guest, domain: u32) {
    assert_eq!(guest.attach(domain, EP), OK);
    assert_eq!(guest.map_page(domain, 0x1000, HIGH_RAM), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(HIGH_RAM));
}

/// crosvm, `devices/src/virtio/vhost_user_frontend/mod.rs`. It never asks for acknowledgements.
mod crosvm {
    use super::*;

    /// `VhostUserFrontend::new`.
    pub fn connect(daemon: &Daemon) -> Guest {
        let mut frontend: Frontend = daemon.frontend();
        frontend.set_owner().expect("SET_OWNER");
        let offered = frontend.get_features().expect("GET_FEATURES");
        let protocol = frontend.get_protocol_features().expect("offered");
        let wanted = Protocol::CONFIG
            | Protocol::MQ
            | Protocol::BACKEND_REQ
            | Protocol::DEVICE_STATE
            | Protocol::REPLY_ACK;
        frontend
            .set_protocol_features(protocol & wanted)
            .expect("SET_PROTOCOL_FEATURES");
        assert!(!protocol.contains(Protocol::BACKEND_REQ), "no channel back");
        assert_eq!(frontend.get_queue_num().expect("a number"), QUEUES as u64);
        Guest::behind(frontend, offered, protocol, memory(), Setup::default())
    }

    /// `read_config`: of any width, with the flag for writes.
    pub fn read_config(guest: &mut Guest, offset: u32, len: usize) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let empty = vec![0; len];
        let answer = guest.frontend.get_config(offset, len as u32, flags, &empty);
        answer.expect("GET_CONFIG").1
    }

    /// `activate`. The features are sent only when they have changed.
    pub fn activate(guest: &mut Guest, features_changed: bool) {
        if features_changed {
            let features = guest.features | F_PROTOCOL;
            guest.frontend.set_features(features).expect("SET_FEATURES");
        }
        set_mem_table(guest);
        for index in 0..QUEUES {
            let base = guest.bases[index];
            start_ring(guest, index, base, [RingEvent::Call, RingEvent::Kick]);
        }
    }

    /// `deactivate_vring` for both rings, which begins `reset` and `virtio_sleep`.
    pub fn deactivate(guest: &mut Guest) {
        for index in 0..QUEUES {
            guest.bases[index] = stop_ring(guest, index);
        }
    }
}

#[test]
fn crosvm_activates_resets_sleeps_and_wakes() {
    let daemon = Daemon::start();
    let mut guest = crosvm::connect(&daemon);
    let whole = crosvm::read_config(&mut guest, 0, wire::CONFIG_LEN as usize);
    for (offset, width) in [(0, 8), (8, 4), (12, 2), (CONFIG_BYPASS, 1)] {
        let at = offset as usize;
        let part = crosvm::read_config(&mut guest, offset, width);
        assert_eq!(part, whole[at..at + width], "{width} bytes at {offset}");
    }

    crosvm::activate(&mut guest, true);
    attach_and_map(&daemon, &mut guest, 1);

    // A pause: the rings go on where they were, and so do the domains.
    crosvm::deactivate(&mut guest);
    crosvm::activate(&mut guest, false);
    assert_eq!(guest.map_page(1, 0x2000, HIGH_RAM), OK);
    assert_eq!(daemon.gpa_of(EP, 0x1000), Some(HIGH_RAM));

    // A reset: the rings begin at 0, for a driver with the same features.
    crosvm::deactivate(&mut guest);
    guest.clear_rings();
    crosvm::activate(&mut guest, false);
    assert_eq!(guest.attach(5, EP2), OK);
    assert_eq!(daemon.domains(), [5], "the last driver's domain is left");
}

/// OpenVMM, `vm/devices/virtio/vhost_user_frontend/src/lib.rs`. It asks for acknowledgements.
mod openvmm {
    use super::*;

    /// `VhostUserFrontend::from_socket`.
    pub fn connect(daemon: &Daemon) -> Guest {
        let mut frontend: Frontend = daemon.frontend();
        let offered = frontend.get_features().expect("GET_FEATURES");
        let protocol = frontend.get_protocol_features().expect("offered");
        assert!(protocol.contains(Protocol::RESET_DEVICE));
        let wanted = Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIG | Protocol::RESET_DEVICE;
        frontend
            .set_protocol_features(protocol & wanted)
            .expect("SET_PROTOCOL_FEATURES");
        frontend.set_owner().expect("SET_OWNER");
        assert_eq!(frontend.get_queue_num().expect("a number"), QUEUES as u64);
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        Guest::behind(frontend, offered, protocol, memory(), Setup::default())
    }

    /// `start_queue` for both rings.
    pub fn start(guest: &mut Guest) {
        let features = guest.features | F_PROTOCOL;
        guest.frontend.set_features(features).expect("SET_FEATURES");
        for index in 0..QUEUES {
            start_ring(guest, index, 0, [RingEvent::Kick, RingEvent::Call]);
        }
    }

    /// `reset`.
    pub fn reset(guest: &mut Guest) {
        for index in 0..QUEUES {
            stop_ring(guest, index);
        }
        guest.frontend.reset_device().expect("RESET_DEVICE");
    }
}

#[test]
fn openvmm_resets_the_device_and_ends_all_domains_at_once() {
    let daemon = Daemon::start();
    let mut guest = openvmm::connect(&daemon);
    // The memory table is sent once and outlives resets.
    set_mem_table(&mut guest);
    openvmm::start(&mut guest);
    for domain in 1..4 {
        attach_and_map(&daemon, &mut guest, domain);
        openvmm::reset(&mut guest);
        assert_eq!(daemon.domains(), [0; 0], "before any new driver");
        assert_eq!(daemon.gpa_of(EP, 0x1000), Some(0x1000), "bypass again");
        guest.clear_rings();
        openvmm::start(&mut guest);
    }
    assert_eq!(guest.attach(1, EP), OK);
}

#[test]
fn a_reset_of_running_rings_stops_them() {
    let daemon = Daemon::start();
    let mut guest = openvmm::connect(&daemon);
    set_mem_table(&mut guest);
    openvmm::start(&mut guest);
    assert_eq!(guest.attach(1, EP), OK);
    guest.frontend.reset_device().expect("RESET_DEVICE");
    guest.frontend.reset_device().expect("RESET_DEVICE again");
    assert_eq!(daemon.domains(), [0; 0]);
    // The request of a driver that does not know of the reset is not served.
    let attach = wire::attach(2, EP, 0);
    let layout = common::guest::Layout::plain(attach.len(), wire::TAIL);
    guest.submit(&attach, &layout);
    guest.requests.kick_always();
    assert_eq!(daemon.domains(), [0; 0]);
    for index in 0..QUEUES {
        guest.frontend.get_vring_base(index).expect("a base");
    }
    guest.clear_rings();
    openvmm::start(&mut guest);
    assert_eq!(guest.attach(3, EP2), OK);
    assert_eq!(daemon.domains(), [3]);
}
