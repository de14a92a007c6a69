//! What the keeper has, from one process to the next.

use std::os::unix::net::UnixDatagram;

use super::super::{KeptDevice, LeftSocket};
use super::*;
use crate::ids::EndpointId;
use crate::process::keeper::Keeper;
use crate::process::life::Life;

/// A keeper's end that nobody reads.
fn keeper(left: Vec<(String, OwnedFd)>) -> (UnixDatagram, Arc<Keeper>) {
    let (manager, ours) = UnixDatagram::pair().expect("sockets");
    (
        manager,
        Arc::new(Keeper::new(ours, left).expect("a keeper")),
    )
}

fn open(keeper: &Arc<Keeper>, life: &Arc<Life>) -> KeptDevice {
    KeptDevice::open(keeper, life, EndpointId(48), "device", true).expect("room")
}

/// The files of a keeper, as a next process gets them.
fn pass_on(keeper: &Keeper) -> Vec<(String, OwnedFd)> {
    let names = keeper.names().into_iter();
    names
        .map(|name| {
            let file = keeper.claim(&name).expect("kept");
            (name, file.try_clone().expect("a copy"))
        })
        .collect()
}

#[test]
fn a_socket_is_known_by_its_number_and_its_state() {
    let life = Arc::new(Life::new(true));
    let (_manager, first) = keeper(Vec::new());
    let mut device = open(&first, &life);
    assert!(device.left.is_none());
    let (socket, _peer) = UnixStream::pair().expect("sockets");
    let number = device
        .connections
        .keep(Leg::Client, socket.as_fd())
        .expect("kept");
    let left = |device: &KeptDevice, keeper: &Arc<Keeper>| {
        let (_manager, next) = self::keeper(pass_on(keeper));
        let left = open(&next, &life).left.expect("a record");
        let _ = device;
        left.client
    };
    assert!(matches!(left(&device, &first), LeftSocket::New(_)));
    device.book.now.client.peer = Peer::Connected(number + 1);
    device.book.commit();
    assert!(matches!(left(&device, &first), LeftSocket::New(_)));
    device.book.now.client.peer = Peer::Connected(number);
    device.book.commit();
    assert!(matches!(left(&device, &first), LeftSocket::Connected(_)));
    device.book.now.client.peer = Peer::Closing(number);
    device.book.commit();
    assert!(matches!(left(&device, &first), LeftSocket::Closing(_)));
    device.book.now.client.peer = Peer::Connected(number).ended();
    device.book.commit();
    assert!(matches!(left(&device, &first), LeftSocket::None));
    device.book.now.client.peer = Peer::Connected(number);
    device.book.commit();
    device.connections.release(Leg::Client);
    assert!(matches!(left(&device, &first), LeftSocket::Lost));
    assert_eq!(life.lost(), [""; 0]);
}

#[test]
fn memory_that_does_not_add_up_is_replaced_and_that_is_said() {
    let life = Arc::new(Life::new(true));
    let (_manager, first) = keeper(Vec::new());
    let device = open(&first, &life);
    let (socket, mut peer) = UnixStream::pair().expect("sockets");
    let patience = Some(std::time::Duration::from_secs(30));
    peer.set_read_timeout(patience).expect("set");
    let kept = device.connections.keep(Leg::Client, socket.as_fd());
    kept.expect("kept");
    drop((device, socket));
    let mut files = pass_on(&first);
    files.retain(|(name, _)| name != "vfio-user.48.server-out");
    let (_other, next) = keeper(files);
    assert!(open(&next, &life).left.is_none());
    assert_eq!(life.lost().len(), 1);
    let end = std::io::Read::read(&mut peer, &mut [0]);
    assert_eq!(end.expect("its connection has ended"), 0);
    let mut names = next.names();
    names.sort();
    assert_eq!(
        names,
        ["client-out", "record", "server-out", "twin-out"]
            .map(|part| format!("vfio-user.48.{part}"))
    );
}
