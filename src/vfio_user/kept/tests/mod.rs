//! Relays that die at each of their steps, and go on: each message must arrive once, whole and in order.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the tests' numbers are small, or cut on purpose"
)]

mod damage;
mod descriptors;
mod relay;
mod sockets;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::crash;
use super::layout::{Leg, RECORD_BYTES, WORDS_BYTES};
use super::memory::{Words, new_memfd};
use super::{Book, KeptInput, Peer, Recorded, SendRing};
use crate::vfio_user::message::{Command, Header};
use crate::vfio_user::socket::{Outbox, Received, Receiver};

/// What the keeper has.
struct Kept {
    record: Arc<OwnedFd>,
    rings: [Arc<OwnedFd>; 3],
    client: UnixStream,
    server: UnixStream,
}

/// The test's ends.
struct Peers {
    client: UnixStream,
    server: UnixStream,
}

fn connect() -> (Kept, Peers) {
    let (client, their_client) = UnixStream::pair().expect("sockets");
    let (server, their_server) = UnixStream::pair().expect("sockets");
    let ring = |leg: Leg| Arc::new(new_memfd("ring", leg.ring_bytes()).expect("a memfd"));
    let kept = Kept {
        record: Arc::new(new_memfd("record", RECORD_BYTES).expect("a memfd")),
        rings: Leg::ALL.map(ring),
        client,
        server,
    };
    for socket in [&their_client, &their_server] {
        socket.set_nonblocking(true).expect("set");
    }
    let peers = Peers {
        client: their_client,
        server: their_server,
    };
    (kept, peers)
}

/// A process between the two, which forwards everything in both directions.
#[derive(Debug)]
struct Life {
    book: Book,
    client: (Receiver, Outbox),
    server: (Receiver, Outbox),
}

impl Life {
    fn first(kept: &Kept) -> Self {
        let words = kept.words();
        let mut book = Book::new(words.clone());
        let leg = |leg: Leg, socket: &UnixStream| {
            let socket = socket.as_fd();
            let ring = kept.rings[leg.index()].clone();
            let ring = SendRing::new(leg, words.clone(), ring, socket).expect("a ring");
            let record = kept.record.as_fd();
            let mut input = KeptInput::new(leg, words.clone(), record, socket).expect("a buffer");
            input.rebase_every(777);
            (
                Receiver::kept(input, leg == Leg::Server),
                Outbox::from(ring),
            )
        };
        let (client, server) = (
            leg(Leg::Client, &kept.client),
            leg(Leg::Server, &kept.server),
        );
        book.now.client.peer = Peer::Connected(1);
        book.now.server.peer = Peer::Connected(2);
        book.commit();
        Self {
            book,
            client,
            server,
        }
    }

    fn next(kept: &Kept) -> Self {
        let words = kept.words();
        let (book, recorded) = Book::adopt(words.clone()).expect("a record");
        let leg = |leg: Leg, socket: &UnixStream| {
            let socket = socket.as_fd();
            let progress = match leg {
                Leg::Client => recorded.positions.client,
                Leg::Server | Leg::Twin => recorded.positions.server,
            };
            let ring = kept.rings[leg.index()].clone();
            let ring = SendRing::adopt(leg, words.clone(), ring, socket, progress.committed);
            let record = kept.record.as_fd();
            let input = KeptInput::adopt(leg, words.clone(), record, socket, progress.handled);
            let mut input = input.expect("its bytes");
            input.rebase_every(777);
            let receiver = Receiver::kept(input, leg == Leg::Server);
            (receiver, Outbox::from(ring.expect("its ring")))
        };
        let (client, server) = (
            leg(Leg::Client, &kept.client),
            leg(Leg::Server, &kept.server),
        );
        Self {
            book,
            client,
            server,
        }
    }

    /// Forwards what there is. Returns whether there was anything, or an error if the process has died.
    fn turn(&mut self, kept: &Kept) -> Result<bool, ()> {
        let mut is_busy = false;
        for from in [Leg::Client, Leg::Server] {
            let ((receiver, _), (_, outbox), socket) = match from {
                Leg::Client => (&mut self.client, &mut self.server, &kept.client),
                Leg::Server | Leg::Twin => (&mut self.server, &mut self.client, &kept.server),
            };
            if outbox.len_bytes() > 4 << 20 {
                continue;
            }
            // A read is a step: it takes bytes out of the socket.
            if !receiver.has_message() && !crash::step() {
                return Err(());
            }
            if let Received::Message(message) = receiver.receive(socket).map_err(drop)? {
                outbox.push(message.header.with_body(&message.body), Vec::new());
                let tail = outbox.ring().map_or(0, |ring| ring.tail());
                let now = &mut self.book.now;
                let (from, to) = match from {
                    Leg::Client => (&mut now.client, &mut now.server),
                    Leg::Server | Leg::Twin => (&mut now.server, &mut now.client),
                };
                from.handled = receiver.position();
                to.committed = tail;
                self.book.commit();
                receiver.set_handled(receiver.position());
                if let Some(ring) = outbox.ring() {
                    ring.commit(tail);
                }
                is_busy = true;
            }
        }
        for (leg, socket) in [
            (&mut self.client, &kept.client),
            (&mut self.server, &kept.server),
        ] {
            leg.1.flush(socket).map_err(drop)?;
            is_busy |= !leg.1.is_empty();
        }
        if crash::is_dead() {
            Err(())
        } else {
            Ok(is_busy)
        }
    }
}

impl Kept {
    fn words(&self) -> Arc<Words> {
        Arc::new(Words::map(self.record.as_fd(), WORDS_BYTES).expect("mapped"))
    }
}

/// A message of this length. Its bytes differ from those of all others.
fn message(id: u16, len: usize) -> Vec<u8> {
    let body: Vec<u8> = (0..len)
        .map(|at| (at as u8) ^ (id as u8).wrapping_mul(31))
        .collect();
    Header::command(id, Command::RegionWrite, 0).with_body(&body)
}

fn recorded(kept: &Kept) -> std::io::Result<Recorded> {
    Book::adopt(kept.words()).map(|(_, recorded)| recorded)
}
