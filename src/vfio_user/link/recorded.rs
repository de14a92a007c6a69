//! What the link records for a later process, and how it goes on with what an earlier one has recorded.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::net::Shutdown;

use super::connection::{ClientCommand, Pending, ServerConnection};
use super::state::{Disconnect, Link, LinkState};
use super::update::DmaUpdateError;
use super::{BatchTicket, DmaUpdates};
use crate::vfio_user::kept::{Book, KeptConnections, KeptTerms, Peer, Recorded, WindowsOf};
use crate::vfio_user::message::{Command, Header, Kind};
use crate::vfio_user::socket::Outbox;
use crate::vfio_user::version::Terms;

/// So many replies to an earlier process's updates may come.
const MAX_GHOSTS: usize = 4096;

/// How far the client's messages are handled, and which messages it must get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::vfio_user) struct ClientProgress {
    pub(in crate::vfio_user) handled: u64,
    pub(in crate::vfio_user) committed: u64,
    pub(in crate::vfio_user) descriptors_end: u64,
    pub(in crate::vfio_user) holds_descriptors: bool,
    pub(in crate::vfio_user) has_interrupts: bool,
}

/// How far the server's messages are handled. Each of them may concern the client.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::vfio_user) struct ServerProgress {
    pub(in crate::vfio_user) handled: u64,
    pub(in crate::vfio_user) client: Option<ClientProgress>,
}

/// The outcome of a negotiation, for the record.
#[derive(Debug)]
pub(in crate::vfio_user) struct KeptNegotiation {
    /// The numbers of the server's sockets.
    pub(in crate::vfio_user) server: u64,
    pub(in crate::vfio_user) twin: Option<u64>,
    pub(in crate::vfio_user) terms: KeptTerms,
    pub(in crate::vfio_user) progress: ServerProgress,
}

/// A server that an earlier process has left.
pub(in crate::vfio_user) struct LeftServer {
    pub(in crate::vfio_user) socket: Arc<OwnedFd>,
    pub(in crate::vfio_user) outbox: Outbox,
    pub(in crate::vfio_user) terms: Terms,
}

impl LinkState {
    /// Makes everything that was noted count, and lets the server get the messages that wait for it.
    pub(super) fn commit(&mut self) {
        let Some(book) = &mut self.book else { return };
        let mut tail = 0;
        if let Some(connection) = &mut self.connection {
            let now = &mut book.now;
            let announcement = &connection.announcement;
            now.next_id = connection.next_id;
            now.shares_memory = connection.shares_memory;
            now.is_announced = self.unrecorded_regions.is_none()
                && announcement.next.is_none()
                && announcement.batch.is_none()
                && connection.backlog.is_empty();
            now.is_settled =
                now.is_announced && connection.updates == 0 && connection.refused.len() == 0;
            if let Some(ring) = connection.outbox.ring() {
                tail = ring.tail();
                now.server.committed = tail;
                now.server.descriptors_end = ring.descriptors_end();
            }
        }
        book.commit();
        if let Some(ring) = self.connection.as_mut().and_then(|c| c.outbox.ring()) {
            ring.commit(tail);
        }
    }

    /// Commits that the server has answered all updates, if it has, and the record does not say so.
    pub(super) fn commit_if_settled(&mut self) {
        let is_settled = self.connection.as_ref().is_some_and(|c| c.updates == 0);
        let is_recorded = self.book.as_ref().is_none_or(|book| book.now.is_settled);
        if is_settled && !is_recorded {
            self.commit();
        }
    }

    /// Notes how far the client is. The caller commits.
    pub(super) fn note_client(&mut self, client: Option<&ClientProgress>) {
        if let (Some(book), Some(client)) = (&mut self.book, client) {
            let now = &mut book.now;
            now.client.handled = client.handled;
            now.client.committed = client.committed;
            now.client.descriptors_end = client.descriptors_end;
            now.client_holds_descriptors = client.holds_descriptors;
            now.client_has_interrupts = client.has_interrupts;
        }
    }

    /// Commits that the server's messages were handled, if there is a record.
    pub(super) fn note_handled(&mut self, server: &ServerProgress) -> bool {
        self.note_client(server.client.as_ref());
        let Some(book) = &mut self.book else {
            return false;
        };
        book.now.server.handled = server.handled;
        book.end_commands(self.replied.drain(..));
        self.commit();
        true
    }

    /// Notes that there is a new server, which has not negotiated yet. The caller commits.
    pub(super) fn forget_server(&mut self) {
        if let Some(book) = &mut self.book {
            book.now.server = Default::default();
            book.now.twin = Default::default();
        }
    }

    /// Notes that the server has negotiated. The caller commits.
    pub(super) fn note_server(&mut self, kept: &KeptNegotiation) -> io::Result<()> {
        self.note_client(kept.progress.client.as_ref());
        if let Some(book) = &mut self.book {
            book.set_terms(&kept.terms)?;
            book.now.server.peer = Peer::Connected(kept.server);
            book.now.server.handled = kept.progress.handled;
            book.now.twin.peer = kept.twin.map_or(Peer::None, Peer::Connected);
        }
        Ok(())
    }

    /// Commits that the connection to the server has ended, or is half closed.
    pub(super) fn note_end_of_server(&mut self) {
        let is_closing = self.closing.is_some();
        let Some(book) = &mut self.book else { return };
        let now = &mut book.now;
        now.server.peer = match now.server.peer {
            Peer::Connected(cookie) if is_closing => Peer::Closing(cookie),
            peer => peer.ended(),
        };
        now.twin.peer = now.twin.peer.ended();
        book.commit();
    }

    /// Commits that the client has gone.
    pub(super) fn note_end_of_client(&mut self) {
        self.replied.clear();
        let Some(book) = &mut self.book else { return };
        book.now.client.peer = book.now.client.peer.ended();
        book.now.terms = None;
        book.now.client_holds_descriptors = false;
        book.now.client_has_interrupts = false;
        book.end_all_commands();
        book.commit();
    }
}

impl ServerConnection {
    /// Takes a reply to no command of this process. It may be one to an update of an earlier process.
    ///
    /// # Errors
    /// Why the server has to be cut off.
    pub(super) fn match_ghost(&mut self, reply: &Header) -> Result<(), &'static str> {
        let command = Command::from_number(reply.command);
        let is_update = matches!(
            command,
            Some(Command::DmaMap | Command::DmaUnmap | Command::DeviceSetIrqs)
        );
        if self.ghosts == 0 || !is_update {
            return Err("it replied to no command");
        }
        self.ghosts -= 1;
        if command == Some(Command::DmaMap) && matches!(reply.kind, Kind::Refusal(_)) {
            return Err("it refuses a window of the daemon before");
        }
        Ok(())
    }
}

impl Link {
    /// Records everything for a later process.
    pub(in crate::vfio_user) fn keep(&self, book: Book, kept: KeptConnections) {
        let mut state = self.state.lock();
        state.book = Some(book);
        state.kept = Some(kept);
    }

    /// Commits that a client has connected, with this number.
    pub(in crate::vfio_user) fn begin_client(&self, cookie: u64) {
        let mut state = self.state.lock();
        if let Some(book) = &mut state.book {
            book.now.client = Default::default();
            book.now.client.peer = Peer::Connected(cookie);
            book.now.terms = None;
            book.commit();
        }
    }

    /// Commits how far the client is.
    pub(in crate::vfio_user) fn commit_client(&self, client: &ClientProgress) {
        let mut state = self.state.lock();
        state.note_client(Some(client));
        state.commit();
        self.flush_locked(&mut state);
    }

    /// Commits how far the server's messages are handled.
    pub(in crate::vfio_user) fn commit_server(&self, handled: &ServerProgress) {
        let mut state = self.state.lock();
        if state.note_handled(handled) {
            self.flush_locked(&mut state);
        }
    }

    /// Commits how far the messages on the server's second socket are handled, and the replies up to `committed`.
    pub(in crate::vfio_user) fn commit_twin(&self, handled: u64, committed: u64) {
        let mut state = self.state.lock();
        if let Some(book) = &mut state.book {
            book.now.twin.handled = handled;
            book.now.twin.committed = committed;
        }
        state.commit();
        self.flush_locked(&mut state);
    }

    /// The server has a second socket, which must be shut down when the connection ends.
    pub(in crate::vfio_user) fn set_twin(&self, twin: Arc<OwnedFd>) {
        self.state.lock().twin = Some(twin);
    }

    /// Shuts that socket down.
    pub(in crate::vfio_user) fn shut_twin(&self) {
        self.state.lock().shut_twin();
    }

    /// Commits that the server has closed its second socket.
    pub(in crate::vfio_user) fn commit_end_of_twin(&self) {
        let mut state = self.state.lock();
        if let Some(book) = &mut state.book {
            book.now.twin.peer = book.now.twin.peer.ended();
            book.commit();
        }
    }

    /// Commits that the client's commands without replies were refused.
    pub(in crate::vfio_user) fn commit_refusals(&self, client: &ClientProgress) {
        let mut state = self.state.lock();
        state.note_client(Some(client));
        state.replied.clear();
        if let Some(book) = &mut state.book {
            book.end_all_commands();
            book.commit();
        }
    }

    /// Goes on with the server of an earlier process.
    pub(in crate::vfio_user) fn resume(&self, left: LeftServer, recorded: &Recorded) -> u64 {
        let mut state = self.state.lock();
        state.session += 1;
        let mut connection = ServerConnection::new(left.socket, left.outbox);
        connection.terms = Some(Terms {
            windows: left.terms.windows.min(self.max_windows),
            ..left.terms
        });
        connection.announcement.next = None;
        connection.next_id = recorded.positions.next_id;
        connection.shares_memory = recorded.positions.shares_memory;
        connection.windows = recorded.regions.len() as u64;
        connection.ghosts = MAX_GHOSTS;
        for (place, command) in &recorded.commands {
            let pending = Pending::Client(ClientCommand {
                header: command.header,
                accesses_nothing: command.accesses_nothing,
                place: Some(*place),
            });
            connection.pending.insert(command.id, pending);
            connection.commands += 1;
        }
        state.connection = Some(connection);
        state.session
    }

    /// Half closes the connection of a server that may have memory, which an earlier process has left. Nobody goes on with it.
    pub(in crate::vfio_user) fn close(&self, socket: Arc<OwnedFd>) {
        let mut state = self.state.lock();
        state.session += 1;
        state.closing = Some(socket.clone());
        state.note_end_of_server();
        // It fails if the server has hung up.
        let _ = rustix::net::shutdown(&*socket, Shutdown::Write);
    }

    /// Commits that the server of an earlier process is not there any more.
    pub(in crate::vfio_user) fn forget(&self) {
        self.state.lock().note_end_of_server();
    }

    /// Has the interposer's thread wait for [`Self::go_on`].
    pub(in crate::vfio_user) fn hold(&self) {
        self.is_held.store(true, Ordering::Release);
    }

    /// The endpoint has its target: the interposer's thread may serve both peers.
    pub fn go_on(&self) {
        self.is_held.store(false, Ordering::Release);
        self.wake();
    }

    pub(in crate::vfio_user) fn is_held(&self) -> bool {
        self.is_held.load(Ordering::Acquire)
    }

    /// Whether the server of an earlier process has exactly the windows that `of` says: it had them when that process died.
    pub fn has_windows(&self, of: u64) -> bool {
        let state = self.state.lock();
        let now = state.book.as_ref().map(|book| book.now);
        state.connection.is_some()
            && now.is_some_and(|now| now.is_settled && now.windows_of == WindowsOf(of))
    }

    /// The server of an earlier process has so many windows.
    pub fn adopt_windows(&self, windows: usize) {
        if let Some(connection) = &mut self.state.lock().connection {
            connection.windows = windows as u64;
        }
    }

    /// Nobody goes on with the server of an earlier process, for this reason.
    pub fn give_up(&self, why: &str) {
        let mut state = self.state.lock();
        if let Some(connection) = &mut state.connection {
            // Whatever they are, it has some.
            connection.windows = connection.windows.max(1);
            if let Some(kept) = &state.kept {
                kept.lose(&format!("the server's connection ends: {why}"));
            }
            self.end_locked(&mut state, Disconnect::CutOff(why));
        }
    }

    /// Waits until a server whose connection is half closed has hung up.
    ///
    /// # Errors
    /// It has not.
    pub fn wait_for_hang_up(&self) -> Result<(), DmaUpdateError> {
        let ticket: BatchTicket = self.lock().open(true);
        self.wait(ticket)
    }
}

impl DmaUpdates<'_> {
    /// Records where the windows come from; `None` while they are being replaced.
    pub fn note_windows_of(&mut self, of: Option<u64>) {
        let state = self.state();
        if let Some(book) = &mut state.book {
            book.now.windows_of = WindowsOf(of.unwrap_or(0));
            state.commit();
        }
    }

    /// Records the first addresses of the regions that a server is told instead of windows.
    pub fn note_regions(&mut self, regions: &[u64]) {
        let state = self.state();
        if let Some(book) = &mut state.book {
            book.remove_regions();
            let is_whole = regions.iter().all(|first| book.add_region(*first));
            let kept = state.kept.as_ref().filter(|_| !is_whole);
            state.unrecorded_regions = kept.map(KeptConnections::count_unkept);
        }
    }
}
