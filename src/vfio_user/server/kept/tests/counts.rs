//! The keeper counts a descriptor as often as the client's record names it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::super::device::DeviceRecord;
use super::super::KeptEnd;
use super::super::book::ClientBook;
use super::Steps;
use super::bed::{IDLE, Pace, Sent, live, run_client};
use crate::process::keeper_testing::Manager;

fn memfd() -> OwnedFd {
    memfd_create("file", MemfdFlags::CLOEXEC).expect("a memfd")
}

/// A client gives the same descriptor for the same place again and again.
#[test]
fn a_descriptor_that_replaces_itself_is_counted_once() {
    for step in 1.. {
        let mut manager = Manager::new();
        let writes = Arc::default();
        let (client, socket) = UnixStream::pair().expect("sockets");
        let client = std::thread::spawn(move || {
            let file = Arc::new(memfd());
            let again = || Sent::map_file(0x1000, Some(file.clone()));
            let script = [Sent::version(), again(), again(), again(), Sent::read(0, 8)];
            run_client(&client, &script, Pace::OneByOne)
        });
        let first = live(&mut manager, Some(socket), Steps::until(step), &writes);
        let first = first.expect("a client");
        let has_died = matches!(first.end, Ok(KeptEnd::Died));
        if has_died {
            // That of the record, and that of the message.
            let users = first.keeper.users("file.0");
            assert!(users <= 2, "{users} at step {step}");
            let second = live(&mut manager, None, Steps::default(), &writes);
            assert_eq!(second.expect("a client").keeper.users("file.0"), 0);
        }
        assert_eq!(client.join().expect("the client").len(), 5);
        assert_eq!(manager.names(), IDLE, "step {step}");
        if !has_died {
            assert!(step > 25, "{step} steps");
            break;
        }
    }
}

/// A connection that is kept no more releases what it has, and nothing of others.
#[test]
fn a_lost_connection_releases_each_descriptor_once() {
    let mut manager = Manager::new();
    let keeper = manager.keeper();
    let (_client, socket) = UnixStream::pair().expect("sockets");
    let mut book = ClientBook::new(keeper.clone(), "test").expect("a book");
    book.open(&socket);
    let file = memfd();
    let keep = || keeper.keep(file.as_fd()).expect("kept");
    let name = keep();
    let execute = |book: &mut ClientBook, at, names: &[&str]| {
        let record = DeviceRecord {
            bytes: Vec::new(),
            names: names.iter().map(|name| (*name).into()).collect(),
            kept: vec![keep()],
        };
        let before = keeper.users(&name);
        book.execute(at, Some(record));
        if !keeper.unkept().any() {
            // Nothing goes before the client has its reply.
            assert_eq!(keeper.users(&name), before);
        }
        book.release_unused();
        keeper.users(&name)
    };
    // Another user has it.
    assert_eq!(execute(&mut book, 1, &[&name]), 2);
    assert_eq!(execute(&mut book, 2, &[&name]), 2, "it replaces itself");
    assert!(!keeper.unkept().any());
    // The second name stands for a descriptor that is not kept.
    assert_eq!(execute(&mut book, 3, &[&name, ""]), 1);
    assert!(keeper.unkept().any());
    assert_eq!(execute(&mut book, 4, &[&name]), 1);
    assert_eq!(execute(&mut book, 5, &[]), 1);
    book.close();
    assert_eq!(keeper.users(&name), 1);
    assert!(!keeper.unkept().any());
}
