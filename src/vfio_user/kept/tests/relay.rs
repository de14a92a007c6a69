use std::io::{ErrorKind, Read, Write};

use proptest::prelude::*;

use super::*;

/// Sends what the socket takes, and receives what has come.
struct Stream {
    unsent: Vec<u8>,
    received: Vec<u8>,
}

impl Stream {
    fn exchange(&mut self, socket: &mut UnixStream, reads: bool) {
        match socket.write(&self.unsent) {
            Ok(count) => drop(self.unsent.drain(..count)),
            Err(cause) => assert_eq!(cause.kind(), ErrorKind::WouldBlock),
        }
        let mut bytes = vec![0; 100_000];
        if reads {
            match socket.read(&mut bytes) {
                Ok(count) => self.received.extend(&bytes[..count]),
                Err(cause) => assert_eq!(cause.kind(), ErrorKind::WouldBlock),
            }
        }
    }
}

/// Forwards both streams through lives that die after `deaths` steps each; the last one lives. Returns the number of steps
/// of the last one.
fn forward(to_server: &[u8], to_client: &[u8], deaths: &[u64], reads: impl Fn(u64) -> bool) -> u64 {
    let (kept, mut peers) = connect();
    let mut life = Life::first(&kept);
    let mut deaths = deaths.iter().copied();
    let mut left = deaths.next();
    crash::die_after(left);
    let mut client = Stream {
        unsent: to_server.to_vec(),
        received: Vec::new(),
    };
    let mut server = Stream {
        unsent: to_client.to_vec(),
        received: Vec::new(),
    };
    let mut turns = 0;
    loop {
        turns += 1;
        client.exchange(&mut peers.client, reads(turns));
        server.exchange(&mut peers.server, reads(turns + 1));
        let is_complete =
            server.received.len() >= to_server.len() && client.received.len() >= to_client.len();
        match life.turn(&kept) {
            Ok(is_busy) => {
                if is_complete && !is_busy && left.is_none() {
                    break;
                }
                if is_complete && !is_busy {
                    // It has nothing left to do.
                    left = None;
                    crash::die_after(None);
                }
            }
            Err(()) => {
                crash::die_after(None);
                life = Life::next(&kept);
                left = deaths.next();
                crash::die_after(left);
            }
        }
        assert!(
            turns < 200_000,
            "stuck: {} and {} bytes unsent, {} and {} received, deaths {left:?}, {life:?}",
            client.unsent.len(),
            server.unsent.len(),
            server.received.len(),
            client.received.len()
        );
    }
    crash::die_after(None);
    assert!(server.received == to_server, "the server's messages");
    assert!(client.received == to_client, "the client's messages");
    turns
}

#[test]
fn a_death_at_each_step_loses_and_doubles_nothing() {
    let to_server = [
        message(1, 0),
        message(2, 70),
        message(3, 3000),
        message(4, 9),
    ]
    .concat();
    let to_client = [
        message(5, 500),
        message(6, 0),
        message(7, 700),
        message(8, 1),
    ]
    .concat();
    for at in 0..120 {
        forward(&to_server, &to_client, &[at], |_| true);
        // The next process dies as well, while it takes over or later.
        for next in 0..6 {
            forward(&to_server, &to_client, &[at, next, next], |_| true);
        }
    }
}

#[test]
fn a_slow_reader_and_a_death_at_each_step_tear_no_large_message() {
    // More than a socket takes, and more than a lap of the ring.
    let to_server: Vec<u8> = (0..6).flat_map(|id| message(id, 190_000)).collect();
    for at in (0..400).step_by(3) {
        forward(&to_server, &message(9, 1000), &[at, 40], |turn| {
            turn % 3 == 0
        });
    }
}

/// Each message is more than the lap after which the ring begins at its front again.
#[test]
fn a_death_while_the_ring_begins_anew_doubles_nothing() {
    let to_server: Vec<u8> = (0..4).flat_map(|id| message(id, 70_000)).collect();
    for at in 0..150 {
        forward(&to_server, &message(9, 100), &[at], |_| true);
    }
}

#[test]
fn the_ring_begins_anew_and_wraps_around() {
    let count = 400;
    let to_server: Vec<u8> = (0..count).flat_map(|id| message(id, 100_000)).collect();
    // Its length is more than twice that of the ring.
    assert!(to_server.len() as u64 > 2 * Leg::Server.ring_bytes());
    for slow in [1, 7] {
        forward(&to_server, &[], &[100, 300, 1000], |turn| turn % slow == 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any messages in both directions, through a chain of lives that die at any steps.
    #[test]
    fn any_messages_arrive_once_and_in_order(
        to_server in proptest::collection::vec(0..9000usize, 0..40),
        to_client in proptest::collection::vec(0..9000usize, 0..40),
        deaths in proptest::collection::vec(0..60u64, 0..40),
        slow in 1..5u64,
    ) {
        let stream = |lens: &[usize]| -> Vec<u8> {
            (1..).zip(lens).flat_map(|(id, len)| message(id, *len)).collect()
        };
        forward(&stream(&to_server), &stream(&to_client), &deaths, |turn| turn % slow == 0);
    }
}
