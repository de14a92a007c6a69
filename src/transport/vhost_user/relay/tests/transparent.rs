//! What a VMM sees through the relay, which must be what it sees without one.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::FrontendReq as Req;

use super::Steps;
use super::bed::{Life, Manager, Sent, Socket, event, memfd, wait_for};
use crate::device::VmmWatcher;
use crate::device::testing::device;
use crate::process::keeper::Keeper;

const RAM: u64 = 0x10_0000;

/// Calls `test` with a socket behind which a server has a keeper, and with one without.
fn with_and_without_a_relay(test: impl Fn(&Socket)) {
    let mut manager = Manager::new();
    for keeper in [Arc::new(Keeper::none()), manager.keeper()] {
        let socket = Socket::new();
        let life = Life::start(&socket, device().0, keeper, Steps::default(), None);
        test(&socket);
        life.stop();
    }
}

/// What is kept of connections. The record and the pipe of replies stay: they are there for the next one.
fn left_of_connections(manager: &Manager) -> Vec<String> {
    let mut names = manager.names();
    names.retain(|name| name != "vmm" && !name.starts_with("vmm-reply"));
    names
}

/// The crate replies to messages that ask for it only if the VMM has asked for the features. The relay's own question must
/// not count.
#[test]
fn a_vmm_that_has_not_asked_for_features_gets_no_reply_on_demand() {
    with_and_without_a_relay(|socket| {
        let mut vmm = socket.connect();
        let demand = Sent::ring(Req::SET_VRING_NUM, 0, 16).acked();
        let reply_ack = Sent::words(Req::SET_PROTOCOL_FEATURES, &[1 << 3 | 1]);
        vmm.tell(&reply_ack).expect("served");
        vmm.send(&demand).expect("sent");
        // The first reply is that of the question, whose request is 17.
        let count = Sent::new(Req::GET_QUEUE_NUM, &[]);
        let reply = vmm.tell(&count).expect("served").expect("a reply");
        assert_eq!(reply[0], 17);

        vmm.tell(&Sent::new(Req::GET_FEATURES, &[]))
            .expect("served");
        let features = Sent::words(Req::SET_FEATURES, &[1 << 30 | 1 << 32]);
        vmm.tell(&features).expect("served");
        let reply = vmm.tell(&demand).expect("served").expect("a reply");
        assert_eq!(reply[12..], [0; 8]);
        assert!(vmm.is_idle());
    });
}

/// A message that the crate refuses is answered, and ends the connection. The next VMM is served.
#[test]
fn a_refused_message_ends_the_connection_after_its_reply() {
    with_and_without_a_relay(|socket| {
        let mut vmm = socket.connect();
        for sent in [
            Sent::new(Req::GET_FEATURES, &[]),
            Sent::words(Req::SET_PROTOCOL_FEATURES, &[1 << 3]),
            Sent::words(Req::SET_FEATURES, &[1 << 30 | 1 << 32]),
        ] {
            vmm.tell(&sent).expect("served");
        }
        let wrong = Sent::ring(Req::SET_VRING_NUM, 7, 16).acked();
        let reply = vmm.tell(&wrong).expect("answered").expect("a reply");
        assert_eq!(reply[12..], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert!(vmm.has_ended());
        let mut next = socket.connect();
        next.tell(&Sent::new(Req::GET_FEATURES, &[]))
            .expect("served");
    });
}

#[test]
fn nothing_is_kept_of_a_refused_message() {
    let mut manager = Manager::new();
    let socket = Socket::new();
    let keeper = manager.keeper();
    let life = Life::start(&socket, device().0, keeper, Steps::default(), None);
    let mut vmm = socket.connect();
    let wrong = Sent::words(Req::SET_VRING_KICK, &[7]).with(&[&event()]);
    vmm.tell(&wrong).expect("sent");
    assert!(vmm.has_ended());
    wait_for("the end of the connection", || {
        left_of_connections(&manager).is_empty()
    });
    life.stop();
}

/// Messages that come at once, some with descriptors, each get their own.
#[test]
fn messages_may_come_all_at_once() {
    with_and_without_a_relay(|socket| {
        let mut vmm = socket.connect();
        let ram = memfd(RAM);
        let (kick, call) = (event(), event());
        let features = Sent::words(Req::SET_FEATURES, &[1 << 30 | 1 << 32]);
        let sent = [
            Sent::new(Req::SET_OWNER, &[]),
            features,
            Sent::words(Req::SET_MEM_TABLE, &[1, 0, RAM, 0x7000_0000, 0]).with(&[&ram]),
            Sent::ring(Req::SET_VRING_NUM, 0, 16),
            Sent::words(Req::SET_VRING_CALL, &[0x100]),
            Sent::words(Req::SET_VRING_CALL, &[0]).with(&[&call]),
            Sent::words(Req::SET_VRING_KICK, &[0]).with(&[&kick]),
        ];
        for sent in &sent {
            vmm.send(sent).expect("sent");
        }
        let base = Sent::ring(Req::GET_VRING_BASE, 0, 0);
        vmm.tell(&base).expect("served").expect("a reply");
    });
}

/// A connection whose descriptors find no room is served as long as the process lives, and leaves nothing.
#[test]
fn a_connection_that_cannot_be_kept_is_served_nevertheless() {
    for room in 0..5 {
        let mut manager = Manager::new();
        let keeper = Arc::into_inner(manager.keeper()).expect("one user");
        let keeper = Arc::new(keeper.with_room(room));
        let socket = Socket::new();
        let (device, _) = device();
        let unkept = keeper.unkept().clone();
        let life = Life::start(&socket, device.clone(), keeper, Steps::default(), None);
        let mut vmm = socket.connect();
        let (ram, more) = (memfd(RAM), memfd(RAM));
        let user = 0x7000_0000;
        let features = Sent::words(Req::SET_FEATURES, &[1 << 30 | 1 << 32]);
        for sent in [
            Sent::new(Req::GET_FEATURES, &[]),
            features,
            Sent::words(
                Req::SET_MEM_TABLE,
                &[2, 0, RAM, user, 0, RAM, RAM, user + RAM, 0],
            )
            .with(&[&ram, &more]),
            Sent::words(Req::SET_VRING_CALL, &[0]).with(&[&event()]),
            Sent::words(Req::SET_VRING_KICK, &[0]).with(&[&event()]),
            Sent::new(Req::GET_FEATURES, &[]),
        ] {
            vmm.tell(&sent).expect("served");
        }
        assert!(device.has_memory());
        assert_eq!(
            left_of_connections(&manager),
            Vec::<String>::new(),
            "{room}"
        );
        assert!(unkept.any(), "{room}");
        // Its end closes the connection: no later process can go on.
        life.stop();
        assert!(vmm.has_ended());
        wait_for("the end", || !device.is_connected());
        assert!(!unkept.any(), "{room}");
    }
}

/// Only while that connection is open does the process promise nothing.
#[test]
fn the_connection_after_one_that_cannot_be_kept_is_kept() {
    let mut manager = Manager::new();
    let keeper = Arc::into_inner(manager.keeper()).expect("one user");
    // The record, the two ends of the pipe, and the socket.
    let keeper = Arc::new(keeper.with_room(4));
    let unkept = keeper.unkept().clone();
    let socket = Socket::new();
    let life = Life::start(&socket, device().0, keeper, Steps::default(), None);
    let features = Sent::new(Req::GET_FEATURES, &[]);
    let mut vmm = socket.connect();
    vmm.tell(&features).expect("served");
    assert!(!unkept.any());
    vmm.tell(&Sent::words(Req::SET_VRING_CALL, &[0]).with(&[&event()]))
        .expect("served");
    vmm.tell(&features).expect("served");
    assert!(unkept.any());
    drop(vmm);
    let mut next = socket.connect();
    next.tell(&features).expect("served");
    assert!(!unkept.any());
    life.stop();
}

/// A watcher that keeps the sockets of all VMMs.
#[derive(Default)]
struct Hoarder(Mutex<Vec<OwnedFd>>);

impl VmmWatcher for Hoarder {
    fn connected(&self, socket: BorrowedFd<'_>) {
        let copy = socket.try_clone_to_owned().expect("a copy");
        self.0.lock().expect("sockets").push(copy);
    }

    fn driver_starts(&self) {}
}

#[test]
fn a_vmm_whose_relay_cannot_begin_is_disconnected() {
    let socket = Socket::new();
    let device = device().0;
    device.watch_vmm(Arc::<Hoarder>::default());
    let life = Life::without_relays(&socket, device);
    assert!(socket.connect().has_ended());
    life.stop();
}
