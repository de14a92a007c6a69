//! What a client can make the server hold.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::super::respond::ClientError;
use super::super::KeptEnd;
use super::super::lookahead::{Lookahead, Looked, MAX_KEPT_DATA};
use super::Steps;
use super::bed::{Ended, IDLE, Pace, Sent, live, receive, run_client, send_files};
use crate::process::keeper_testing::Manager;
use crate::vfio_user::message::{Command, HEADER_BYTES, Header};
use crate::vfio_user::socket::SocketError;
use crate::vfio_user::version::Version;

/// Serves a client that sends and receives as `act` says.
fn serve<T: Send + 'static>(act: impl FnOnce(&UnixStream) -> T + Send + 'static) -> (Ended, T) {
    let mut manager = Manager::new();
    let (client, socket) = UnixStream::pair().expect("sockets");
    let timeout = Some(Duration::from_secs(30));
    client.set_read_timeout(timeout).expect("set");
    client.set_write_timeout(timeout).expect("set");
    let client = std::thread::spawn(move || act(&client));
    let ended = live(
        &mut manager,
        Some(socket),
        Steps::default(),
        &Arc::default(),
    );
    let got = client.join().expect("the client");
    assert_eq!(manager.names(), IDLE);
    (ended.expect("a client"), got)
}

/// A client sends a message byte by byte, and many descriptors with each.
#[test]
fn descriptors_of_one_message_are_bounded() {
    let (ended, reply) = serve(|client| {
        run_client(client, &[Sent::version()], Pace::OneByOne);
        let file = memfd_create("file", MemfdFlags::CLOEXEC).expect("a memfd");
        let message = Header::command(7, Command::RegionWrite, 0).with_body(&[0; 4000]);
        // Two pieces have more than a message may have.
        send_files(client, &message[..HEADER_BYTES], &[]);
        for byte in message[HEADER_BYTES..].chunks(1).take(2) {
            send_files(client, byte, &[file.as_fd(); 200]);
        }
        receive(client)
    });
    assert!(reply.is_none());
    assert!(
        matches!(
            ended.end,
            Err(ClientError::Socket(SocketError::LostDescriptors))
        ),
        "{:?}",
        ended.end
    );
}

/// Linux returns descriptors of bytes behind a read that is full.
#[test]
fn descriptors_belong_to_their_message_where_a_read_ends_before_it() {
    let (client, socket) = UnixStream::pair().expect("sockets");
    let file = memfd_create("file", MemfdFlags::CLOEXEC).expect("a memfd");
    // As much as the first read has room for: a header, and what is read ahead.
    let first = HEADER_BYTES + (4 << 10);
    let plain = Header::command(1, Command::RegionWrite, 0).with_body(&vec![0; 1000]);
    let rest = vec![0; first - plain.len() - HEADER_BYTES];
    let last = Header::command(2, Command::RegionWrite, 0).with_body(&rest);
    assert_eq!(plain.len() + last.len(), first);
    let map = Header::command(3, Command::DmaMap, 0).with_body(&[0; 32]);
    send_files(&client, &plain, &[]);
    send_files(&client, &last, &[]);
    send_files(&client, &map, &[file.as_fd()]);
    let mut lookahead = Lookahead::new(&socket).expect("peek offsets");
    for (id, count) in [(1, 0), (2, 0), (3, 1)] {
        match lookahead.next(&socket).expect("sound") {
            Looked::Message(message, len) => {
                assert_eq!(message.header.id, id);
                assert_eq!(message.descriptors.len(), count, "message {id}");
                lookahead.finish(len);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A message stays in the socket until it was executed, so it must fit there.
#[test]
fn messages_fit_into_the_socket() {
    let data = MAX_KEPT_DATA as usize;
    let (ended, replies) = serve(move |client| {
        let script = [
            Sent::version(),
            Sent::write(0, &vec![1; data]),
            Sent::read(0, 8),
        ];
        run_client(client, &script, Pace::OneByOne)
    });
    assert!(matches!(ended.end, Ok(KeptEnd::HungUp)), "{:?}", ended.end);
    assert_eq!(replies.len(), 3);
    let version = Version::decode(&replies[0][HEADER_BYTES..]).expect("an answer");
    let most = version.capabilities.max_data_xfer_size;
    assert_eq!(most, Some(MAX_KEPT_DATA.into()));

    let (ended, reply) = serve(move |client| {
        run_client(client, &[Sent::version()], Pace::OneByOne);
        let long = Sent::write(0, &vec![1; data + 5000]);
        // The header alone says so.
        send_files(client, &long.bytes[..HEADER_BYTES], &[]);
        receive(client)
    });
    assert!(reply.is_none());
    assert!(
        matches!(ended.end, Err(ClientError::Protocol(_))),
        "{:?}",
        ended.end
    );
}
