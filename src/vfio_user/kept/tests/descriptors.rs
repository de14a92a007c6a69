//! Messages with descriptors, which die with the process.

use std::fs::File;

use super::*;
use crate::vfio_user::socket::OutgoingFd;

fn ring(kept: &Kept) -> SendRing {
    let (words, file) = (kept.words(), kept.rings[1].clone());
    SendRing::new(Leg::Server, words, file, kept.server.as_fd()).expect("a ring")
}

fn adopt(kept: &Kept, committed: u64) -> SendRing {
    let (words, file) = (kept.words(), kept.rings[1].clone());
    let socket = kept.server.as_fd();
    SendRing::adopt(Leg::Server, words, file, socket, committed).expect("its ring")
}

#[test]
fn descriptors_go_with_the_first_byte_of_their_message() {
    let (kept, peers) = connect();
    let mut ring = ring(&kept);
    let null = || OutgoingFd::Owned(File::open("/dev/null").expect("open").into());
    ring.push(&message(1, 10), Vec::new());
    ring.push(&message(2, 20), vec![null(), null()]);
    ring.push(&message(3, 30), Vec::new());
    ring.push(&message(4, 40), vec![null()]);
    assert_eq!(ring.len_descriptors(), 3);
    ring.flush().expect("nothing is committed");
    let mut receiver = Receiver::default();
    assert!(matches!(
        receiver.receive(&peers.server),
        Ok(Received::Nothing)
    ));
    ring.commit(ring.tail());
    ring.flush().expect("sent");
    assert_eq!((ring.len_bytes(), ring.len_descriptors()), (0, 0));
    for (id, count) in [(1, 0), (2, 2), (3, 0), (4, 1)] {
        match receiver.receive(&peers.server) {
            Ok(Received::Message(message)) => {
                assert_eq!(message.header.id, id);
                assert_eq!(message.descriptors.len(), count);
            }
            other => panic!("{other:?}"),
        }
    }
    let left = adopt(&kept, ring.tail());
    assert_eq!(left.sent(), ring.descriptors_end());
}

/// The next process sees that a message with descriptors was not sent, and that one was sent.
#[test]
fn a_death_around_a_message_with_descriptors_is_seen() {
    for (steps, is_sent) in [(0, false), (1, false), (2, true)] {
        let (kept, _peers) = connect();
        let mut ring = ring(&kept);
        let null = OutgoingFd::Owned(File::open("/dev/null").expect("open").into());
        ring.push(&message(1, 10), vec![null]);
        ring.commit(ring.tail());
        crash::die_after(Some(steps));
        assert_eq!(ring.flush().is_ok(), is_sent);
        crash::die_after(None);
        let left = adopt(&kept, ring.tail());
        assert_eq!(left.sent() >= ring.descriptors_end(), is_sent);
    }
}

/// sendfile has no flag against the signal, so the process must ignore it. Rust's runtime does.
#[test]
fn a_peer_that_is_gone_is_an_error_and_raises_no_signal() {
    let (kept, peers) = connect();
    let mut ring = ring(&kept);
    drop(peers);
    ring.push(&message(1, 10), Vec::new());
    ring.commit(ring.tail());
    let refused = ring.flush().expect_err("nobody is there");
    assert_eq!(refused.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn more_than_the_ring_holds_is_an_error() {
    let (kept, _peers) = connect();
    let mut ring = ring(&kept);
    for id in 0..16 {
        ring.push(&message(id, 1 << 20), Vec::new());
    }
    ring.commit(ring.tail());
    ring.flush().expect_err("too much");
}
