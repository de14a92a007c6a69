//! The half of the link for the interposer's thread, which moves messages.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::connection::{NO_REPLY_ID, Pending, ServerConnection};
use super::state::{Disconnect, Link, LinkState, UNWATCHED, finish};
use super::update::{DmaUpdate, DmaUpdateError, Window};
use crate::vfio_user::message::{Command, Header, Kind};
use crate::vfio_user::socket::OutgoingFd;
use crate::vfio_user::version::Terms;
use crate::warn_limited;

/// What a reply of the server's was.
#[derive(Debug)]
pub(in crate::vfio_user) enum Settled {
    /// To VERSION.
    Version,
    /// To a command of the client's, whose header this is.
    Client(Header),
    /// To something that needs no more.
    Done,
    /// None to any command there was.
    Wrong(&'static str),
}

/// How the link is doing, for the thread that moves messages.
#[derive(Debug)]
pub(in crate::vfio_user) struct LinkStatus {
    pub(in crate::vfio_user) session: u64,
    pub(in crate::vfio_user) connected: bool,
    pub(in crate::vfio_user) up: bool,
    /// All orders are in the outbox.
    pub(in crate::vfio_user) told: bool,
    /// Bytes that wait to be sent.
    pub(in crate::vfio_user) bytes: usize,
    /// Descriptors that wait with them.
    pub(in crate::vfio_user) descriptors: usize,
    /// The client's commands without a reply.
    pub(in crate::vfio_user) commands: usize,
    /// The last server has not hung up yet, and no other is wanted before.
    pub(in crate::vfio_user) parting: bool,
}

impl Link {
    pub(in crate::vfio_user) fn status(&self) -> LinkStatus {
        let state = self.state.lock();
        let connection = state.connection.as_ref();
        LinkStatus {
            session: state.session,
            connected: connection.is_some(),
            up: connection.is_some_and(|c| c.terms.is_some()),
            told: connection.is_none_or(|c| c.backlog.is_empty()),
            bytes: connection.map_or(0, |c| c.outbox.len_bytes()),
            descriptors: connection.map_or(0, |c| c.outbox.len_descriptors()),
            commands: connection.map_or(0, |c| c.commands),
            parting: state.parting.is_some(),
        }
    }

    /// A server is connected: asks it for a version. Returns the number of the session.
    pub(in crate::vfio_user) fn begin(&self, socket: Arc<OwnedFd>, proposal: &[u8]) -> u64 {
        let mut state = self.state.lock();
        state.session += 1;
        let connection = state.connection.insert(ServerConnection::new(socket));
        connection.send(Pending::Version, Command::Version, proposal, Vec::new());
        let session = state.session;
        self.flush_locked(&mut state);
        session
    }

    /// Server and client have come to terms: the server is told what `windows` returns, and what
    /// is to be told again.
    pub(in crate::vfio_user) fn come_up(
        &self,
        terms: Terms,
        windows: impl FnOnce() -> Vec<Window>,
        again: Vec<(Command, Vec<u8>, Vec<OutgoingFd>)>,
    ) {
        let mut state = self.state.lock();
        let Some(connection) = &mut state.connection else {
            return;
        };
        connection.terms = Some(terms);
        let orders = windows()
            .into_iter()
            .map(|w| (DmaUpdate::Map(w), UNWATCHED));
        connection.backlog.extend(orders);
        for (command, body, descriptors) in again {
            connection.send(Pending::Again(command), command, &body, descriptors);
        }
        self.pump(&mut state);
    }

    /// Sends the server a command of the client's. `false` where there is no server for it.
    pub(in crate::vfio_user) fn forward(
        &self,
        header: Header,
        command: Command,
        body: &[u8],
        descriptors: Vec<OutgoingFd>,
    ) -> bool {
        let mut state = self.state.lock();
        let Some(connection) = state.connection.as_mut().filter(|c| c.terms.is_some()) else {
            return false;
        };
        if header.wants_no_reply() {
            let renumbered = Header {
                id: NO_REPLY_ID,
                ..header
            };
            connection
                .outbox
                .push(renumbered.with_body(body), descriptors);
        } else {
            connection.commands += 1;
            connection.send(Pending::Client(header), command, body, descriptors);
        }
        self.flush_locked(&mut state);
        true
    }

    /// Sends the server the reply to a command of its own.
    pub(in crate::vfio_user) fn reply(&self, bytes: Vec<u8>) {
        let mut state = self.state.lock();
        if let Some(connection) = &mut state.connection {
            connection.outbox.push(bytes, Vec::new());
            self.flush_locked(&mut state);
        }
    }

    /// Sends what the server takes now.
    pub(in crate::vfio_user) fn flush(&self) {
        self.pump(&mut self.state.lock());
    }

    /// Finds what a reply is to.
    pub(in crate::vfio_user) fn settle(&self, reply: &Header) -> Settled {
        let mut state = self.state.lock();
        let LinkState {
            connection: Some(connection),
            batches,
            ..
        } = &mut *state
        else {
            return Settled::Done;
        };
        if reply.id == NO_REPLY_ID {
            return Settled::Done;
        }
        let Some(pending) = connection.pending.remove(&reply.id) else {
            return Settled::Wrong("a reply to no command");
        };
        if pending.command().number() != reply.command {
            // Put back, so that whoever waits hears of the end.
            connection.pending.insert(reply.id, pending);
            return Settled::Wrong("a reply to another command");
        }
        match pending {
            Pending::Version => Settled::Version,
            Pending::Client(header) => {
                connection.commands -= 1;
                Settled::Client(header)
            }
            Pending::Again(command) => {
                if let Kind::Refusal(error) = reply.kind {
                    let name = &self.name;
                    warn_limited!("{name}: the server refuses {command:?}: errno {error}");
                }
                Settled::Done
            }
            Pending::DmaUpdate(order, batch) => {
                connection.orders -= 1;
                if let DmaUpdate::Map(window) = &order {
                    connection.asked.remove(&window.range.first().0);
                }
                let error = match (reply.kind, &order) {
                    (Kind::Refusal(_), DmaUpdate::Unmap(range)) => {
                        let why = format!("it refuses to give {range} up");
                        if let Some(batch) = batches.get_mut(&batch) {
                            batch.failed = Some(DmaUpdateError::CutOff(why));
                        }
                        return Settled::Wrong("it refuses to give a window up");
                    }
                    (Kind::Refusal(error), DmaUpdate::Map(window)) => {
                        connection.windows -= 1;
                        connection.refused.insert(window.range.first().0);
                        Some(i32::try_from(error).unwrap_or(libc::EIO))
                    }
                    (_, DmaUpdate::Map(_)) => None,
                    (_, DmaUpdate::Unmap(_)) => {
                        connection.windows -= 1;
                        None
                    }
                };
                finish(&self.name, batches, batch, error);
                self.pump(&mut state);
                self.changed.notify_all();
                Settled::Done
            }
        }
    }

    /// The server has hung up, or nobody is left to talk to it.
    pub(in crate::vfio_user) fn end(&self) {
        self.end_locked(&mut self.state.lock(), Disconnect::HungUp);
    }

    /// The client is gone.
    pub(in crate::vfio_user) fn part(&self) {
        self.end_locked(&mut self.state.lock(), Disconnect::ClientGone);
    }

    /// The server that is parting.
    pub(in crate::vfio_user) fn parting(&self) -> Option<Arc<OwnedFd>> {
        self.state.lock().parting.clone()
    }

    /// It has hung up.
    pub(in crate::vfio_user) fn parted(&self) {
        self.state.lock().parting = None;
        self.changed.notify_all();
    }

    /// The client's commands that no server answers any more.
    pub(in crate::vfio_user) fn take_orphans(&self) -> Vec<Header> {
        std::mem::take(&mut self.state.lock().orphans)
    }
}
