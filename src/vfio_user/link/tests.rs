//! What the link records for a later process.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::{Deadlines, DmaUpdate, LeftServer, Link, MatchedReply};
use crate::address::{Access, Iova, IovaRange};
use crate::process::keeper::Keeper;
use crate::process::keeper_testing::Manager;
use crate::process::life::Life;
use crate::vfio_user::dma::{AccessDenied, DmaTarget, Window};
use crate::vfio_user::kept::{KeptDevice, LeftConnections, LeftSocket, Leg};
use crate::vfio_user::message::{HEADER_BYTES, Header};
use crate::vfio_user::socket::Outbox;
use crate::vfio_user::testing::{ENDPOINT, Left};

struct NoMemory;

impl DmaTarget for NoMemory {
    fn read(&self, _: IovaRange, _: &mut [u8]) -> Result<(), AccessDenied> {
        Err(AccessDenied)
    }

    fn read_in_place(
        &self,
        _: IovaRange,
        _: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> Result<(), AccessDenied> {
        Err(AccessDenied)
    }

    fn write(&self, _: IovaRange, _: &[u8]) -> Result<(), AccessDenied> {
        Err(AccessDenied)
    }

    fn windows_from(&self, _: Iova, _: usize) -> Vec<Window> {
        Vec::new()
    }
}

/// A guest with addresses of more than 49 bits can use more regions than the record has room for.
#[test]
fn a_life_is_not_kept_while_the_regions_are_not() {
    let (_manager, ours) = UnixDatagram::pair().expect("sockets");
    let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
    let life = Life::new(true).with_connections(keeper.unkept().clone());
    let life = Arc::new(life);
    let kept = KeptDevice::open(&keeper, &life, ENDPOINT, "device", false).expect("room");
    let deadlines = Deadlines::with_answer(Duration::from_secs(1));
    let link = Link::new("device".into(), Arc::new(NoMemory), deadlines).expect("a link");
    link.keep(kept.book, kept.connections);
    let note = |count: u64| {
        let regions: Vec<_> = (0..count).map(|region| region << 43).collect();
        let mut updates = link.lock();
        updates.note_regions(&regions);
        // Commits.
        updates.note_windows_of(None);
    };
    for count in [1, 30, 64, 1] {
        note(0);
        note(count);
        assert!(life.is_kept(), "{count}");
    }
    note(0);
    note(65);
    assert!(!life.is_kept());
    drop(link);
    assert!(life.is_kept(), "the device is gone");
}

/// A planned end waits for the requester of an update, and for nothing else. So the record must say that the server has
/// answered before the requester goes on.
#[test]
fn the_record_is_settled_once_an_update_is_answered() {
    let mut manager = Manager::new();
    let left = Left {
        windows_of: 5,
        ..Left::default()
    };
    let peers = left.keep_with(&manager.keeper());
    let life = Arc::new(Life::new(true));
    let device = KeptDevice::open(&manager.keeper(), &life, ENDPOINT, "device", true);
    let device = device.expect("room");
    let LeftConnections {
        recorded, server, ..
    } = device.left.expect("a record");
    let LeftSocket::Connected(socket) = server else {
        panic!("{server:?}");
    };
    let resumed = device
        .connections
        .resume(Leg::Server, &recorded, socket.as_fd());
    let deadlines = Deadlines::with_answer(Duration::from_secs(30));
    let link = Link::new("device".into(), Arc::new(NoMemory), deadlines).expect("a link");
    link.keep(device.book, device.connections);
    let left = LeftServer {
        socket,
        outbox: Outbox::from(resumed.expect("its messages").1),
        terms: recorded.terms.clone().expect("terms").terms,
    };
    link.resume(left, &recorded);
    assert!(link.has_windows(5), "nothing waits for an answer");
    let window = DmaUpdate::Map(Window {
        range: IovaRange::new(Iova(0), Iova(0xfff)).expect("a range"),
        access: Access::READ_WRITE,
        file: None,
    });
    let ticket = link.lock().send(vec![window], false);
    assert!(!link.has_windows(5), "an update waits");
    let mut sent = [0; HEADER_BYTES];
    (&peers.server).read_exact(&mut sent).expect("an update");
    let update = Header::decode(&sent).expect("a header");
    assert!(matches!(
        link.match_reply(&update.reply_to(0)),
        MatchedReply::Own
    ));
    assert!(link.has_windows(5));
    link.wait(ticket).expect("answered");
}
