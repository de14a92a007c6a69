//! Connections: how they begin and end.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::{RecordingRegisters, TestClient, access, version_body};
use crate::process::sandbox::Role;
use crate::vfio_user::message::{Command, HEADER_BYTES, Header};
use crate::vfio_user::server::{ClientEnd, ClientError, DeviceServer};

#[test]
fn clients_that_violate_the_protocol_are_cut_off() {
    let message = |command, body: &[u8]| Header::command(1, command, 0).with_body(body);
    let read = message(Command::RegionRead, access(0, 0, 1).as_bytes());
    let mut early = TestClient::new(false);
    early.send(&read);
    assert!(matches!(early.end().0, Err(ClientError::Protocol(_))));
    let dma_read = message(Command::DmaRead, &[0; 16]);
    let reply = Header::command(1, Command::DmaRead, 0)
        .reply_to(0)
        .with_body(&[0; 16]);
    let short = message(Command::RegionRead, &[0; 15]);
    for (bad, why) in [
        (message(Command::Version, &version_body()), "Protocol"),
        (dma_read, "ServerCommand"),
        (reply, "Protocol"),
        (short, "Malformed"),
        (b"this is not a message".to_vec(), "Socket"),
    ] {
        let mut client = TestClient::negotiated();
        client.send(&bad);
        let outcome = client.end().0;
        let found = format!("{:?}", outcome.expect_err("cut off"));
        assert!(found.starts_with(why), "{found}");
    }
}

#[test]
fn a_device_may_send_commands_and_gets_the_replies() {
    let mut client = TestClient::new(true);
    let (read, body) = client.receive();
    assert_eq!((read.id, read.command), (77, Command::DmaRead.number()));
    assert!(client.call(Command::Version, &version_body()).is_ok());
    client.send(&read.reply_to(0).with_body(&[&body[..], b"data"].concat()));
    assert!(client.call(Command::DeviceReset, &[]).is_ok());
    let unexpected = Header { id: 78, ..read };
    client.send(&unexpected.reply_to(0).with_body(&body));
    let (outcome, calls) = client.end();
    assert!(matches!(outcome, Err(ClientError::Protocol(_))));
    assert_eq!(calls, ["reply 77: 20 bytes", "reset", "reply 78: 16 bytes"]);
}

#[test]
fn a_stopped_server_returns() {
    let client = TestClient::negotiated();
    client.signal.stop().expect("signalled");
    let (outcome, _) = client.server.join().expect("the server");
    assert!(matches!(outcome, Ok(ClientEnd::Stopped)));
}

#[test]
fn clients_are_served_one_after_the_other_and_counted() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a listener");
    let (sender, released) = channel();
    let device = Box::new(RecordingRegisters::new(sender));
    let server = DeviceServer::start(Role::Export, listener, device).expect("a server");
    let status = server.status();
    let hello = Header::command(1, Command::Version, 0).with_body(&version_body());
    for garbage in [false, true] {
        let mut stream = UnixStream::connect(&path).expect("connected");
        stream.write_all(&hello).expect("sent");
        stream
            .read_exact(&mut [0; HEADER_BYTES])
            .expect("an answer");
        assert!(status.is_connected());
        if garbage {
            stream.write_all(&[0xff; HEADER_BYTES]).expect("sent");
            stream.read_to_end(&mut Vec::new()).expect("the end");
        }
        drop(stream);
        let calls = released.recv_timeout(Duration::from_secs(20));
        assert_eq!(calls.expect("released").len(), 1);
    }
    let _idle = UnixStream::connect(&path).expect("connected");
    while status.clients.get() < 3 {
        thread::sleep(Duration::from_millis(1));
    }
    drop(server);
    assert_eq!(released.recv().expect("released").len(), 0);
    assert_eq!((status.clients.get(), status.cut_offs.get()), (3, 1));
    assert!(!status.is_connected());
}
