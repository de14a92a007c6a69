//! What the keeper has of one device, and its names.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use log::error;
use rustix::net::Shutdown;
use rustix::net::sockopt::socket_cookie;

use super::book::{Book, Recorded};
use super::input::KeptInput;
use super::layout::{Leg, RECORD_BYTES, WORDS_BYTES};
use super::memory::{Words, check_memfd, new_memfd};
use super::positions::Peer;
use super::ring::SendRing;
use crate::ids::EndpointId;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::process::unkept::UnkeptConnection;

/// The parts of the names. A record is forgotten first, and kept last: it relies on the rest.
const PARTS: [&str; 7] = [
    "record",
    "client",
    "server",
    "twin",
    "client-out",
    "server-out",
    "twin-out",
];

/// The memory of one device's connections, which the keeper has besides the sockets.
#[derive(Clone)]
pub(in crate::vfio_user) struct KeptConnections {
    keeper: Arc<Keeper>,
    life: Arc<Life>,
    /// The device, in the log and in the names.
    device: String,
    names: String,
    record: Arc<OwnedFd>,
    words: Arc<Words>,
    rings: [Arc<OwnedFd>; 3],
}

/// What an earlier process has left.
#[derive(Debug)]
pub(in crate::vfio_user) struct LeftConnections {
    pub recorded: Recorded,
    pub client: LeftSocket,
    pub server: LeftSocket,
    pub twin: LeftSocket,
}

/// A socket of an earlier process.
#[derive(Debug)]
pub(in crate::vfio_user) enum LeftSocket {
    /// There is none.
    None,
    /// The record knows it, and it is connected.
    Connected(Arc<OwnedFd>),
    /// It is half closed: the server may have memory until it hangs up.
    Closing(Arc<OwnedFd>),
    /// The record does not know it: nothing was received from it.
    New(Arc<OwnedFd>),
    /// The record knows it, and the keeper does not have it.
    Lost,
}

/// A device whose connections are kept.
pub struct KeptDevice {
    pub(in crate::vfio_user) connections: KeptConnections,
    pub(in crate::vfio_user) book: Book,
    pub(in crate::vfio_user) left: Option<LeftConnections>,
    /// The core will say what the device may reach: it takes the state of an earlier process over. Without that, nobody goes
    /// on with the connections of that process.
    pub(in crate::vfio_user) waits_for_target: bool,
}

struct OpenRecord {
    book: Book,
    left: Option<LeftConnections>,
}

impl KeptDevice {
    /// Takes over what an earlier process has left with the keeper, or makes new memory and has it kept. `device` is the
    /// device's name in the log. `is_successor`: the core takes the state of that process over, and
    /// [`Link::go_on`](crate::vfio_user::Link::go_on) will follow.
    ///
    /// # Errors
    /// The keeper does not take the memory, or the system refuses. Nothing is kept then.
    pub fn open(
        keeper: &Arc<Keeper>,
        life: &Arc<Life>,
        endpoint: EndpointId,
        device: &str,
        is_successor: bool,
    ) -> io::Result<Self> {
        let (connections, record) = KeptConnections::open(keeper, life, endpoint, device)?;
        Ok(Self {
            connections,
            book: record.book,
            left: record.left,
            waits_for_target: is_successor,
        })
    }

    /// The first addresses of the regions that a server of the earlier process was told.
    pub fn left_regions(&self) -> &[u64] {
        let left = self.left.as_ref().filter(|_| self.waits_for_target);
        left.map_or(&[], |left| &left.recorded.regions)
    }
}

impl KeptConnections {
    /// Takes over what an earlier process has left with the keeper, or makes new memory and has it kept. `device` is the
    /// device's name in the log.
    ///
    /// # Errors
    /// The keeper does not take the memory, or the system refuses. Nothing is kept then.
    fn open(
        keeper: &Arc<Keeper>,
        life: &Arc<Life>,
        endpoint: EndpointId,
        device: &str,
    ) -> io::Result<(Self, OpenRecord)> {
        let names = format!("vfio-user.{}.", endpoint.0);
        match Self::take_over(keeper, life, &names, device) {
            Ok(Some((kept, record))) => return Ok((kept, record)),
            Ok(None) => {}
            Err(cause) => {
                let text = format!(
                    "{device}: the connections to the daemon before cannot be taken over, and end: {cause}"
                );
                error!("{text}");
                life.lose(text);
            }
        }
        // Whatever is left of it. The kernel closes the sockets, unless they were claimed.
        for leg in Leg::ALL {
            if let Some(socket) = keeper.claim(&format!("{names}{}", leg.name())) {
                let _ = rustix::net::shutdown(&*socket, Shutdown::Both);
            }
        }
        for part in PARTS {
            keeper.drop_file(&format!("{names}{part}"));
        }
        let made = Self::make(keeper, life, &names, device);
        if made.is_err() {
            for part in PARTS {
                keeper.drop_file(&format!("{names}{part}"));
            }
        }
        made
    }

    fn make(
        keeper: &Arc<Keeper>,
        life: &Arc<Life>,
        names: &str,
        device: &str,
    ) -> io::Result<(Self, OpenRecord)> {
        let record = new_memfd("viommu-vfio-user", RECORD_BYTES)?;
        let ring = |leg: Leg| -> io::Result<Arc<OwnedFd>> {
            let ring = new_memfd("viommu-vfio-user-out", leg.ring_bytes())?;
            keeper.keep_as(&ring_name(names, leg), ring.as_fd())?;
            Ok(Arc::new(ring))
        };
        let rings = [ring(Leg::Client)?, ring(Leg::Server)?, ring(Leg::Twin)?];
        let words = Arc::new(Words::map(record.as_fd(), WORDS_BYTES)?);
        let book = Book::new(words.clone());
        // Last: a process that finds a record relies on the rest.
        keeper.keep_as(&format!("{names}record"), record.as_fd())?;
        let kept = Self {
            keeper: keeper.clone(),
            life: life.clone(),
            device: device.to_owned(),
            names: names.to_owned(),
            record: Arc::new(record),
            words,
            rings,
        };
        Ok((kept, OpenRecord { book, left: None }))
    }

    fn take_over(
        keeper: &Arc<Keeper>,
        life: &Arc<Life>,
        names: &str,
        device: &str,
    ) -> io::Result<Option<(Self, OpenRecord)>> {
        let Some(record) = keeper.claim(&format!("{names}record")) else {
            return Ok(None);
        };
        check_memfd(record.as_fd(), RECORD_BYTES)?;
        let ring = |leg: Leg| -> io::Result<Arc<OwnedFd>> {
            let missing = || io::Error::new(io::ErrorKind::NotFound, "a send ring is missing");
            let ring = keeper.claim(&ring_name(names, leg)).ok_or_else(missing)?;
            check_memfd(ring.as_fd(), leg.ring_bytes())?;
            Ok(ring)
        };
        let rings = [ring(Leg::Client)?, ring(Leg::Server)?, ring(Leg::Twin)?];
        let words = Arc::new(Words::map(record.as_fd(), WORDS_BYTES)?);
        let (book, recorded) = Book::adopt(words.clone())?;
        let kept = Self {
            keeper: keeper.clone(),
            life: life.clone(),
            device: device.to_owned(),
            names: names.to_owned(),
            record,
            words,
            rings,
        };
        let positions = &recorded.positions;
        let left = LeftConnections {
            client: kept.find(Leg::Client, positions.client.peer),
            server: kept.find(Leg::Server, positions.server.peer),
            twin: kept.find(Leg::Twin, positions.twin.peer),
            recorded,
        };
        let left = Some(left);
        Ok(Some((kept, OpenRecord { book, left })))
    }

    /// The socket that an earlier process has left, of which the record says `peer`.
    fn find(&self, leg: Leg, peer: Peer) -> LeftSocket {
        let Some(socket) = self.keeper.claim(&self.name(leg)) else {
            return match peer {
                Peer::Connected(_) | Peer::Closing(_) => LeftSocket::Lost,
                Peer::None | Peer::Ended(_) => LeftSocket::None,
            };
        };
        let cookie = cookie_of(socket.as_fd()).ok();
        match peer {
            Peer::Connected(known) if cookie == Some(known) => LeftSocket::Connected(socket),
            Peer::Closing(known) if cookie == Some(known) => LeftSocket::Closing(socket),
            Peer::Ended(known) if cookie == Some(known) => {
                self.end(leg, socket.as_fd());
                LeftSocket::None
            }
            Peer::Connected(_) | Peer::Closing(_) | Peer::Ended(_) | Peer::None => {
                LeftSocket::New(socket)
            }
        }
    }

    fn name(&self, leg: Leg) -> String {
        format!("{}{}", self.names, leg.name())
    }

    /// Has a socket kept that has just connected. Returns its number.
    ///
    /// # Errors
    /// The keeper does not take it.
    pub(in crate::vfio_user) fn keep(&self, leg: Leg, socket: BorrowedFd<'_>) -> io::Result<u64> {
        let cookie = cookie_of(socket)?;
        self.keeper.keep_as(&self.name(leg), socket)?;
        Ok(cookie)
    }

    /// The memory for the messages of a new connection.
    ///
    /// # Errors
    /// The system refuses.
    pub(in crate::vfio_user) fn begin(
        &self,
        leg: Leg,
        socket: BorrowedFd<'_>,
    ) -> io::Result<(KeptInput, SendRing)> {
        let ring = self.rings[leg.index()].clone();
        let ring = SendRing::new(leg, self.words.clone(), ring, socket)?;
        let input = KeptInput::new(leg, self.words.clone(), self.record.as_fd(), socket)?;
        Ok((input, ring))
    }

    /// The memory for the messages of a connection that an earlier process has left.
    ///
    /// # Errors
    /// It does not add up, or the system refuses.
    pub(in crate::vfio_user) fn resume(
        &self,
        leg: Leg,
        recorded: &Recorded,
        socket: BorrowedFd<'_>,
    ) -> io::Result<(KeptInput, SendRing)> {
        let positions = &recorded.positions;
        let progress = match leg {
            Leg::Client => &positions.client,
            Leg::Server => &positions.server,
            Leg::Twin => &positions.twin,
        };
        let words = self.words.clone();
        let record = self.record.as_fd();
        let input = KeptInput::adopt(leg, words.clone(), record, socket, progress.handled)?;
        let ring = self.rings[leg.index()].clone();
        let ring = SendRing::adopt(leg, words, ring, socket, progress.committed)?;
        if ring.sent() < progress.descriptors_end {
            return Err(io::Error::other(
                "the daemon died while it sent a message with descriptors",
            ));
        }
        Ok((input, ring))
    }

    /// Ends a connection and has the keeper close it. The record must say that it has ended: the socket stays open until all
    /// descriptors are closed.
    pub(in crate::vfio_user) fn end(&self, leg: Leg, socket: BorrowedFd<'_>) {
        // Fails if the peer has gone.
        let _ = rustix::net::shutdown(socket, Shutdown::Both);
        self.release(leg);
    }

    /// Has the keeper close a socket.
    pub(in crate::vfio_user) fn release(&self, leg: Leg) {
        self.keeper.drop_file(&self.name(leg));
    }

    /// Has the keeper close everything: the device is removed.
    pub(in crate::vfio_user) fn forget(&self) {
        for part in PARTS {
            self.keeper.drop_file(&format!("{}{part}", self.names));
        }
    }

    /// A connection, or what a peer was told, cannot be kept. It counts until the returned value is dropped.
    pub(in crate::vfio_user) fn count_unkept(&self) -> UnkeptConnection {
        self.keeper.unkept().count()
    }

    /// Says that something of the earlier process could not be taken over.
    pub(in crate::vfio_user) fn lose(&self, what: &str) {
        let text = format!("{}: {what}", self.device);
        error!("{text}");
        self.life.lose(text);
    }
}

fn ring_name(names: &str, leg: Leg) -> String {
    format!("{names}{}-out", leg.name())
}

fn cookie_of(socket: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(socket_cookie(socket)? & ((1 << 62) - 1))
}

impl std::fmt::Debug for KeptConnections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut kept = f.debug_struct("KeptConnections");
        kept.field("names", &self.names).finish_non_exhaustive()
    }
}
