//! Keeps what a later process needs to go on with the VMM's connection: the record, the VMM's socket, and the descriptors
//! that the VMM has passed.
//!
//! A descriptor is kept before the record names it, and released after the record does not name it any more. So a process
//! that dies in between leaves a descriptor too many, which the next one releases, and never one too few.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;

use super::message::MessageBytes;
use super::record::{LastMessage, Recorded, ReplyProgress, VmmRecord};
use super::state::{MAX_REGIONS, VmmState};
use crate::process::keeper::Keeper;
use crate::process::left_connection::SocketNames;
use crate::process::reply_pipe::ReplyPipe;
use crate::process::unkept::UnkeptConnection;
use crate::warn_limited;

/// The name under which the record is kept.
pub(super) const RECORD: &str = "vmm";
/// The name under which the pipe of the replies is kept.
pub(super) const REPLY: &str = "vmm-reply";

/// The record of one connection after the other, and the descriptors that belong to it.
#[derive(Debug)]
pub(super) struct Book {
    keeper: Arc<Keeper>,
    record: VmmRecord,
    recorded: Recorded,
    reply: ReplyPipe,
    /// The keeper has the record's memfd, and the pipe of the replies.
    has_record: bool,
    /// The keeper has the VMM's socket, and the record is up to date.
    is_kept: bool,
    /// Counts a connection that is open, and is not kept.
    unkept: Option<UnkeptConnection>,
}

impl Book {
    /// An empty book.
    ///
    /// # Errors
    /// The system refuses the memfd of the record.
    pub(super) fn new(keeper: Arc<Keeper>) -> io::Result<Self> {
        let recorded = Recorded {
            connection: sockets().last(&keeper).unwrap_or(0),
            is_over: true,
            ..Recorded::default()
        };
        Ok(Self {
            record: VmmRecord::new()?,
            recorded,
            reply: ReplyPipe::new()?,
            keeper,
            has_record: false,
            is_kept: false,
            unkept: None,
        })
    }

    /// The book that an earlier process has left.
    pub(super) fn left(
        keeper: Arc<Keeper>,
        record: VmmRecord,
        recorded: Recorded,
        reply: ReplyPipe,
    ) -> Self {
        Self {
            keeper,
            reply,
            record,
            recorded,
            has_record: true,
            is_kept: true,
            unkept: None,
        }
    }

    /// A VMM has connected through `socket`.
    pub(super) fn open(&mut self, socket: &UnixStream) {
        self.recorded = Recorded {
            connection: self.recorded.connection.saturating_add(1),
            ..Recorded::default()
        };
        self.is_kept = true;
        self.unkept = None;
        if let Err(cause) = self.keep_connection(socket) {
            self.lose(&cause);
        }
    }

    fn keep_connection(&mut self, socket: &UnixStream) -> io::Result<()> {
        if !self.has_record {
            self.keeper.keep_as(RECORD, self.record.file())?;
            self.reply.keep(&self.keeper, REPLY)?;
            self.has_record = true;
        }
        // Before the record: a socket without a record is of a VMM that has said nothing yet.
        self.keeper.keep_as(&self.socket_name(), socket.as_fd())?;
        self.record.write(&self.recorded)
    }

    /// The pipe through which replies are sent.
    pub(super) fn reply(&self) -> &ReplyPipe {
        &self.reply
    }

    /// What the VMM has said so far.
    pub(super) fn state(&self) -> &VmmState {
        &self.recorded.state
    }

    /// See [`VmmState::forget_unreachable_rings`].
    pub(super) fn forget_unreachable_rings(&mut self) -> Vec<usize> {
        self.recorded.state.forget_unreachable_rings()
    }

    /// Whether a later process can go on with the connection.
    pub(super) fn is_kept(&self) -> bool {
        // Without a keeper, nothing refuses to be kept.
        self.is_kept && self.keeper.is_present()
    }

    /// Keeps the descriptors of a message that the crate has not got yet. Returns their names.
    pub(super) fn keep(&mut self, message: &MessageBytes, files: &[OwnedFd]) -> Vec<String> {
        let count = VmmState::keeps(message, files.len());
        let mut names = Vec::new();
        for file in files.iter().take(count) {
            let name = self.keep_file(file.as_fd());
            names.push(name);
        }
        if !self.is_kept {
            // Those before the one that could not be kept.
            self.keeper.release_all(&names);
            names.iter_mut().for_each(String::clear);
        }
        names
    }

    /// Keeps a file. Its name is empty if the connection is not kept.
    fn keep_file(&mut self, file: BorrowedFd<'_>) -> String {
        if !self.is_kept {
            return String::new();
        }
        self.keeper.keep(file).unwrap_or_else(|cause| {
            self.lose(&cause);
            String::new()
        })
    }

    /// The crate has accepted a message, and has sent `reply`. Returns the names of descriptors that are to be released
    /// once the VMM has the reply.
    pub(super) fn accept(
        &mut self,
        message: &MessageBytes,
        names: Vec<String>,
        reply: Option<&MessageBytes>,
    ) -> Vec<String> {
        let gone = self.recorded.state.apply(message, names, reply);
        self.recorded.last = Some(LastMessage {
            message: message.0.clone(),
            reply: reply.map(|reply| reply.0.clone()),
        });
        if self.is_kept {
            let written = if self.recorded.state.memory.len() > MAX_REGIONS {
                let text = format!("it has more than {MAX_REGIONS} regions of memory");
                Err(io::Error::other(text))
            } else {
                self.record.write(&self.recorded)
            };
            if let Err(cause) = written {
                self.lose(&cause);
            }
        }
        gone
    }

    /// The answer to the last message has come so far.
    pub(super) fn mark(&mut self, progress: ReplyProgress) {
        if self.is_kept
            && let Err(cause) = self.record.mark(progress)
        {
            self.lose(&cause);
        }
    }

    /// Releases descriptors.
    pub(super) fn release(&self, names: &[String]) {
        self.keeper.release_all(names);
    }

    /// Releases the descriptors that a message has replaced.
    pub(super) fn release_replaced(&self, message: &MessageBytes, names: &[String]) {
        let is_event = matches!(
            message.request(),
            Some(
                FrontendReq::SET_VRING_KICK
                    | FrontendReq::SET_VRING_CALL
                    | FrontendReq::GET_VRING_BASE
            )
        );
        if !is_event {
            return self.release(names);
        }
        for name in names.iter().filter(|name| !name.is_empty()) {
            self.keeper.retire(name);
        }
    }

    /// The connection has ended: nothing of it is kept any more.
    pub(super) fn close(&mut self) {
        self.unkept = None;
        if self.is_kept {
            self.give_up();
        }
    }

    /// The connection goes on, and ends with this process.
    fn lose(&mut self, cause: &io::Error) {
        warn_limited!(
            "the VMM's connection cannot be kept, so the VM does not survive the end of this daemon: {cause}"
        );
        self.unkept = Some(self.keeper.unkept().count());
        self.give_up();
    }

    fn give_up(&mut self) {
        self.is_kept = false;
        // First of all: a later process must not go on with the connection once a descriptor of it is missing.
        let over = Recorded {
            connection: self.recorded.connection,
            is_over: true,
            ..Recorded::default()
        };
        if let Err(cause) = self.record.write(&over) {
            warn_limited!("the record of the VMM's connection cannot be written: {cause}");
        }
        self.keeper.release(&self.socket_name());
        let names: Vec<String> = self.recorded.state.names().into_iter().cloned().collect();
        self.keeper.release_all(&names);
        self.keeper.release_idle();
        // The state goes on without names.
        self.recorded.state.forget_names();
    }

    fn socket_name(&self) -> String {
        sockets().of(self.recorded.connection)
    }
}

/// The names of the VMMs' sockets.
pub(super) fn sockets() -> SocketNames {
    SocketNames::new("vmm-socket.")
}
