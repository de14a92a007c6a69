//! The half of the link for the interposer's thread, which moves messages.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::connection::{ClientCommand, NO_REPLY_ID, Pending, Queued, ServerConnection};
use super::deadlines::WaitLimit;
use super::recorded::{ClientProgress, KeptNegotiation, ServerProgress};
use super::state::{Disconnect, Link, LinkState};
use super::update::{DmaUpdate, DmaUpdateError, REPLAY};
use crate::vfio_user::dma::{LargeRead, Replies};
use crate::vfio_user::kept::{BODY_BYTES, KeptCommand};
use crate::vfio_user::message::{Command, Header, Kind, accesses_nothing};
use crate::vfio_user::socket::{Outbox, OutgoingFd};
use crate::vfio_user::version::Terms;
use crate::warn_limited;

/// The command that a reply of the server belongs to.
#[derive(Debug)]
pub(in crate::vfio_user) enum MatchedReply {
    /// VERSION.
    Version,
    /// A command of the client.
    Client(ClientCommand),
    /// A command of the link itself, which is complete.
    Own,
    /// No command; the server has to be cut off, for this reason.
    Violation(&'static str),
}

/// The state of the link that the interposer's thread needs.
#[derive(Debug)]
pub(in crate::vfio_user) struct LinkStatus {
    /// The number of the connection, or of the last one.
    pub(in crate::vfio_user) session: u64,
    pub(in crate::vfio_user) connected: bool,
    /// Client and server have negotiated.
    pub(in crate::vfio_user) active: bool,
    /// All updates are in the outbox, and all windows that the server has room for.
    pub(in crate::vfio_user) is_up_to_date: bool,
    /// Unsent bytes.
    pub(in crate::vfio_user) bytes: usize,
    /// Those of replies to the server's commands.
    pub(in crate::vfio_user) reply_bytes: usize,
    /// Unsent descriptors.
    pub(in crate::vfio_user) descriptors: usize,
    /// The client's commands without a reply.
    pub(in crate::vfio_user) commands: usize,
    /// The last server has not hung up yet; the thread must not connect before it does.
    pub(in crate::vfio_user) closing: bool,
    /// When a server that has connected must have answered.
    pub(in crate::vfio_user) answer_until: Option<Instant>,
}

impl Link {
    pub(in crate::vfio_user) fn status(&self) -> LinkStatus {
        let state = self.state.lock();
        let connection = state.connection.as_ref();
        LinkStatus {
            session: state.session,
            connected: connection.is_some(),
            active: connection.is_some_and(|c| c.terms.is_some()),
            is_up_to_date: connection.is_none_or(|c| {
                c.backlog.is_empty()
                    && (c.announcement.batch.is_none() || c.is_announcement_paused())
            }),
            bytes: connection.map_or(0, |c| c.outbox.len_bytes()),
            reply_bytes: connection.map_or(0, |c| c.outbox.len_reply_bytes()),
            descriptors: connection.map_or(0, |c| c.outbox.len_descriptors()),
            commands: connection.map_or(0, |c| c.commands),
            closing: state.closing.is_some(),
            answer_until: connection.and_then(|c| self.answer_until(c)),
        }
    }

    fn answer_until(&self, connection: &ServerConnection) -> Option<Instant> {
        let is_new = connection.terms.is_none() || connection.is_replaying();
        is_new.then(|| connection.answered_at + self.deadlines.connect)
    }

    /// Cuts off a server that has connected and has not answered in time.
    pub(in crate::vfio_user) fn end_unanswered(&self) {
        let mut state = self.state.lock();
        let connection = state.connection.as_ref();
        let until = connection.and_then(|c| self.answer_until(c));
        if until.is_some_and(|until| until <= Instant::now()) {
            self.end_for(&mut state, WaitLimit::Connect, self.deadlines.connect);
        }
    }

    /// Starts a session with a server that is connected: sends it VERSION. Returns the number of the
    /// session.
    pub(in crate::vfio_user) fn start_session(
        &self,
        socket: Arc<OwnedFd>,
        outbox: Outbox,
        proposal: &[u8],
    ) -> u64 {
        let mut state = self.state.lock();
        state.session += 1;
        state.forget_server();
        let connection = ServerConnection::new(socket, outbox);
        let connection = state.connection.insert(connection);
        connection.send(Pending::Version, Command::Version, proposal, Vec::new());
        let session = state.session;
        self.flush_locked(&mut state);
        session
    }

    /// Client and server have negotiated: sends the server the windows and the messages of `replay`.
    pub(in crate::vfio_user) fn activate(
        &self,
        terms: Terms,
        replay: Vec<(Command, Vec<u8>, Vec<OutgoingFd>)>,
        kept: Option<&KeptNegotiation>,
    ) {
        let mut state = self.state.lock();
        if let Some(kept) = kept
            && let Err(cause) = state.note_server(kept)
        {
            return self.end_locked(&mut state, Disconnect::CutOff(&cause.to_string()));
        }
        let Some(connection) = &mut state.connection else {
            return;
        };
        connection.terms = Some(Terms {
            windows: terms.windows.min(self.max_windows),
            ..terms
        });
        connection.answered_at = Instant::now();
        connection.announce(REPLAY);
        for (command, body, descriptors) in replay {
            connection.send(Pending::Replay(command), command, &body, descriptors);
        }
        self.send_updates(&mut state);
    }

    /// Sends the server a command of the client. Returns false if no server is active.
    pub(in crate::vfio_user) fn forward(
        &self,
        header: Header,
        command: Command,
        body: &[u8],
        descriptors: Vec<OutgoingFd>,
        client: Option<&ClientProgress>,
    ) -> bool {
        let accesses_nothing = accesses_nothing(command, body);
        let mut locked = self.state.lock();
        let state = &mut *locked;
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
            let id = connection.free_id();
            let place = match &mut state.book {
                Some(book) => {
                    let kept = KeptCommand {
                        id,
                        header,
                        accesses_nothing,
                        body: body.get(..BODY_BYTES).unwrap_or(body).to_vec(),
                    };
                    let Some(place) = book.add_command(&kept) else {
                        return false;
                    };
                    Some(place)
                }
                None => None,
            };
            connection.commands += 1;
            let pending = Pending::Client(ClientCommand {
                header,
                accesses_nothing,
                place,
            });
            connection.pending.insert(id, pending);
            let renumbered = Header::command(id, command, body.len());
            connection
                .outbox
                .push(renumbered.with_body(body), descriptors);
        }
        state.note_client(client);
        self.flush_locked(state);
        true
    }

    /// Sends the server the replies to some of its commands, and queues what the socket does not accept yet.
    pub(in crate::vfio_user) fn reply(&self, replies: &mut Replies, handled: &ServerProgress) {
        let mut state = self.state.lock();
        if let Some(connection) = &mut state.connection {
            let sent = replies.send(&mut connection.outbox, &*connection.socket);
            self.after_reply(&mut state, sent, handled);
        }
        replies.clear();
    }

    fn after_reply(&self, state: &mut LinkState, sent: io::Result<()>, handled: &ServerProgress) {
        if state.note_handled(handled) {
            self.flush_locked(state);
        } else {
            self.after_sending(state, sent);
        }
    }

    /// As [`Self::reply`], with the reply to `read` after the others. A refusal of `read` is left in `replies`.
    pub(in crate::vfio_user) fn reply_to_read(
        &self,
        replies: &mut Replies,
        read: &LargeRead,
        handled: &ServerProgress,
    ) {
        let mut state = self.state.lock();
        match &mut state.connection {
            Some(connection) => {
                let (outbox, socket) = (&mut connection.outbox, &*connection.socket);
                let sent = replies.send_read(read, &*self.target, outbox, socket);
                if replies.is_empty() {
                    self.after_reply(&mut state, sent, handled);
                } else {
                    // Nothing was sent: the refusal is among the replies.
                    self.after_sending(&mut state, sent);
                }
            }
            None => replies.clear(),
        }
    }

    /// Sends as much as the server accepts now.
    pub(in crate::vfio_user) fn flush(&self) {
        self.send_updates(&mut self.state.lock());
    }

    /// Finds the command that a reply belongs to, and completes it if it is one of the link.
    pub(in crate::vfio_user) fn match_reply(&self, reply: &Header) -> MatchedReply {
        let mut state = self.state.lock();
        let LinkState {
            connection: Some(connection),
            batches,
            progress,
            replied,
            ..
        } = &mut *state
        else {
            return MatchedReply::Own;
        };
        if reply.id == NO_REPLY_ID {
            return MatchedReply::Own;
        }
        let Some(pending) = connection.pending.remove(&reply.id) else {
            return match connection.match_ghost(reply) {
                Ok(()) => MatchedReply::Own,
                Err(why) => MatchedReply::Violation(why),
            };
        };
        if pending.command().number() != reply.command {
            // Put back, so that the end of the connection fails it and wakes its requester.
            connection.pending.insert(reply.id, pending);
            return MatchedReply::Violation("its reply names another command");
        }
        match pending {
            Pending::Version => MatchedReply::Version,
            Pending::Client(command) => {
                connection.commands -= 1;
                replied.extend(command.place);
                MatchedReply::Client(command)
            }
            Pending::Replay(command) => {
                if let Kind::Refusal(error) = reply.kind {
                    let name = &self.name;
                    warn_limited!("{name}: the server refuses {command:?}: errno {error}");
                }
                MatchedReply::Own
            }
            Pending::Update(Queued {
                update,
                batch,
                serial,
            }) => {
                connection.updates -= 1;
                connection.announcement.count_out(batch);
                connection.answered_at = Instant::now();
                // Later updates do not bring the requester's replies nearer.
                if serial <= connection.watched {
                    progress.answered(connection.answered_at);
                }
                if let DmaUpdate::Map(window) = &update {
                    connection.unconfirmed.remove(&window.range.first().0);
                }
                let errno = match reply.kind {
                    Kind::Refusal(error) => Some(i32::try_from(error).unwrap_or(libc::EIO)),
                    Kind::Command { .. } | Kind::Reply => None,
                };
                let refusal = match (&update, errno) {
                    (DmaUpdate::Map(window), Some(errno)) => {
                        connection.windows -= 1;
                        connection
                            .refused
                            .insert(window.range.first(), batch <= REPLAY);
                        Some(self.window_refused(connection, window.range.first(), errno))
                    }
                    (DmaUpdate::Map(_), None) => {
                        connection.window_accepted();
                        None
                    }
                    (DmaUpdate::Unmap(_) | DmaUpdate::UnmapAll, _) => {
                        let kept = connection.removal_answered(&update, serial, errno);
                        if let Some(errno) = kept {
                            let cause = io::Error::from_raw_os_error(errno);
                            let why = format!("it refuses to remove {update}: {cause}");
                            if connection.shares_memory {
                                if let Some(batch) = batches.get_mut(&batch) {
                                    batch.failed = Some(DmaUpdateError::CutOff(why));
                                }
                                return MatchedReply::Violation("it refuses to remove a window");
                            }
                            // Each access is a message, which the interposer refuses. So a window that the server
                            // keeps reaches no memory.
                            warn_limited!("{}: the server stays, although {why}", self.name);
                        }
                        None
                    }
                };
                let is_announced = connection.announcement.batch == Some(batch) && batch != REPLAY;
                self.finish_update(batches, batch, refusal);
                if refusal.is_some() && is_announced {
                    self.end_announcement(connection, batches, refusal);
                }
                self.send_updates(&mut state);
                // Before the requester goes on: a planned end waits for the requester alone. The next process takes the
                // reply for one to an update of this one.
                state.commit_if_settled();
                MatchedReply::Own
            }
        }
    }

    /// The server has hung up, or the interposer ends.
    pub(in crate::vfio_user) fn end(&self) {
        self.end_locked(&mut self.state.lock(), Disconnect::HungUp);
    }

    /// The client is gone: ends the connection to its server.
    pub(in crate::vfio_user) fn end_with_client(&self) {
        let mut state = self.state.lock();
        state.note_end_of_client();
        self.end_locked(&mut state, Disconnect::ClientGone);
    }

    /// The connection of the closing server.
    pub(in crate::vfio_user) fn closing(&self) -> Option<Arc<OwnedFd>> {
        self.state.lock().closing.clone()
    }

    /// The closing server has hung up.
    pub(in crate::vfio_user) fn closed(&self) {
        let mut state = self.state.lock();
        state.closing = None;
        state.note_end_of_server();
        drop(state);
        self.changed.notify_all();
    }

    /// Takes the client's commands whose server disconnected before it replied.
    pub(in crate::vfio_user) fn take_unanswered(&self) -> Vec<Header> {
        std::mem::take(&mut self.state.lock().unanswered)
    }
}
