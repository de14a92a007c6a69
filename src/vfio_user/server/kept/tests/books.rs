//! The records of one client after the other, and clients that nobody goes on with.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::super::book::ClientBook;
use super::super::left::{LeftPlace, find};
use super::super::{ClientKeeping, KeptEnd};
use super::Steps;
use super::bed::{IDLE, Pace, Sent, live, run_client};
use crate::process::keeper::Keeper;
use crate::process::keeper_testing::Manager;
use crate::process::life::Life;

/// A client, and the server's end.
fn connect() -> (UnixStream, UnixStream) {
    let (client, socket) = UnixStream::pair().expect("sockets");
    let timeout = Some(Duration::from_secs(30));
    client.set_read_timeout(timeout).expect("set");
    (client, socket)
}

fn has_ended(mut client: &UnixStream) -> bool {
    client.read(&mut [0]).expect("the end") == 0
}

fn book(keeper: &Arc<Keeper>) -> ClientBook {
    ClientBook::new(keeper.clone(), "test").expect("a book")
}

/// What the server notes of a client counts for nothing once the next one has connected.
#[test]
fn a_client_inherits_nothing_from_the_one_before() {
    let mut manager = Manager::new();
    let mut book = book(&manager.keeper());
    let (_first, socket) = connect();
    book.open(&socket);
    book.progress.begin(0, false);
    book.reply.put(b"an old reply").expect("room");
    book.execute(40, None);
    book.close();
    let (_second, socket) = connect();
    book.open(&socket);
    let found = find(&manager.keeper(), "test").expect("sound");
    let (_, left) = found.expect("a client");
    let nothing = LeftPlace {
        is_negotiated: false,
        executed: 0,
        is_begun: false,
        unsent: 0,
    };
    assert_eq!(left.place, nothing);
}

/// The process died when the record said so, and the keeper still had the socket.
#[test]
fn a_connection_that_is_over_is_not_gone_on_with() {
    let mut manager = Manager::new();
    let keeper = manager.keeper();
    let mut book = book(&keeper);
    let (client, socket) = connect();
    book.open(&socket);
    book.close();
    keeper
        .keep_as("test-socket.1", socket.as_fd())
        .expect("kept");
    let found = find(&manager.keeper(), "test").expect("sound");
    assert!(found.is_none());
    // A copy of the socket is open: that of a keeper which is slow.
    assert!(has_ended(&client));
    drop(socket);
    assert_eq!(manager.names(), &IDLE[1..], "its record goes, too");
}

#[test]
fn a_record_of_another_connection_is_refused() {
    let mut manager = Manager::new();
    let keeper = manager.keeper();
    let (_client, socket) = connect();
    book(&keeper).open(&socket);
    let (other, socket) = connect();
    keeper
        .keep_as("test-socket.7", socket.as_fd())
        .expect("kept");
    drop(socket);
    let refused = find(&manager.keeper(), "test").expect_err("no record");
    assert!(
        refused.to_string().contains("of another connection"),
        "{refused}"
    );
    assert!(has_ended(&other));
}

#[test]
fn a_client_that_is_refused_sees_the_end_and_is_lost() {
    let mut manager = Manager::new();
    let keeper = manager.keeper();
    let (client, socket) = connect();
    book(&keeper).open(&socket);
    let life = Arc::new(Life::new(true));
    let found = ClientKeeping::find(manager.keeper(), "test", life.clone());
    let mut keeping = found.expect("a keeping");
    assert!(keeping.left.is_some() && life.lost().is_empty());
    keeping.refuse_left("its device is gone");
    // A copy of the socket is open here, too.
    assert!(has_ended(&client));
    assert!(life.lost()[0].contains("its device is gone"));
    assert_eq!(manager.names(), IDLE);
    drop(socket);
}

/// A message that has begun comes before everything else: the rings must not run in between.
#[test]
fn the_device_goes_on_when_the_message_that_has_begun_is_executed() {
    let script = || vec![Sent::version(), Sent::write(0, &[9]), Sent::read(0, 8)];
    // At some steps, the first process has begun with the write, and has not executed it.
    let has_waited = |step: &usize| {
        let mut manager = Manager::new();
        let writes: Arc<AtomicUsize> = Arc::default();
        let (client, socket) = connect();
        let client = std::thread::spawn(move || run_client(&client, &script(), Pace::OneByOne));
        let first = live(&mut manager, Some(socket), Steps::until(*step), &writes);
        assert!(matches!(first.expect("a client").end, Ok(KeptEnd::Died)));
        let is_unexecuted = writes.load(Ordering::Relaxed) == 0;
        let second = live(&mut manager, None, Steps::default(), &writes).expect("a client");
        assert_eq!(client.join().expect("the client").len(), 3);
        is_unexecuted && second.sum_at_go_on == Some(9)
    };
    assert_eq!((1..14).filter(has_waited).count(), 1);
}
