//! The connection that an earlier process has left.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::book::{Book, RECORD, REPLY, sockets};
use super::message::MessageBytes;
use super::record::{LastMessage, Recorded, ReplyProgress, VmmRecord};
use crate::process::keeper::Keeper;
use crate::process::left_connection::{Claims, missing};
use crate::process::peek::peek_offset;
use crate::process::reply_pipe::ReplyPipe;

/// The connection of a VMM to an earlier process, with everything that a new backend must be told.
#[derive(Debug)]
pub struct LeftVmm {
    socket: UnixStream,
    book: Book,
    files: LeftFiles,
    unanswered: Option<Unanswered>,
}

/// The VMM's descriptors by their names.
pub(super) type LeftFiles = BTreeMap<String, Arc<OwnedFd>>;

/// What the earlier process has not done for its last message, which its crate has accepted.
#[derive(Debug)]
pub(super) struct Unanswered {
    pub message: MessageBytes,
    /// Bytes of the message, the last ones, that are in the VMM's socket.
    pub in_socket: usize,
    /// The reply that the VMM does not have.
    pub reply: LeftReply,
}

/// The reply that the VMM does not have.
#[derive(Debug)]
pub(super) enum LeftReply {
    /// It has everything.
    None,
    /// Nothing of it was sent.
    Whole(MessageBytes),
    /// What was not sent of it is in the pipe.
    InThePipe,
}

impl LeftVmm {
    /// Finds the connection that an earlier process has left with the keeper, and claims all that belongs to it. `None` if
    /// there is none: no VMM was connected, or it was disconnecting.
    ///
    /// # Errors
    /// Something of it is missing or damaged. The connection is then closed, and the VM must be started anew.
    pub fn find(keeper: &Arc<Keeper>) -> Option<io::Result<Self>> {
        let connection = sockets().last(keeper)?;
        let mut claims = Claims::new(keeper);
        let socket = claims.claim(&sockets().of(connection)).ok()?;
        let found = Self::of(keeper, connection, &socket, &mut claims);
        if !matches!(found, Ok(Some(_))) {
            claims.refuse(&socket);
        }
        found
            .map_err(|cause| {
                let text = format!(
                    "the connection of the VMM to the daemon before cannot be taken over: {cause}; the connection is closed, \
                     so the VM must be started anew"
                );
                io::Error::new(cause.kind(), text)
            })
            .transpose()
    }

    /// The connection with this number.
    fn of(
        keeper: &Arc<Keeper>,
        connection: u64,
        socket: &OwnedFd,
        claims: &mut Claims<'_>,
    ) -> io::Result<Option<Self>> {
        let record = claims.claim(RECORD)?;
        let (record, found) = VmmRecord::adopt(owned(&record)?).map_err(|cause| {
            io::Error::new(cause.kind(), format!("its record is refused: {cause}"))
        })?;
        let (recorded, progress) = match found {
            Some(found) if found.0.connection == connection => found,
            Some(found) if found.0.connection > connection => {
                return Err(missing(&sockets().of(found.0.connection)));
            }
            // The process died when the VMM had just connected.
            _ => {
                let recorded = Recorded {
                    connection,
                    ..Recorded::default()
                };
                (recorded, ReplyProgress::Done)
            }
        };
        if recorded.is_over {
            return Ok(None);
        }
        let mut files = LeftFiles::new();
        for name in recorded.state.names() {
            files.insert(name.clone(), claims.claim(name)?);
        }
        let socket = UnixStream::from(owned(socket)?);
        let last = recorded.last.as_ref();
        let unanswered = last.map(|last| Unanswered::of(last, progress, &socket));
        let unanswered = unanswered.transpose()?.flatten();
        let reply = ReplyPipe::left(keeper, REPLY).ok_or_else(|| missing(REPLY))?;
        Ok(Some(Self {
            socket,
            book: Book::left(keeper.clone(), record, recorded, reply),
            files,
            unanswered,
        }))
    }

    /// Closes the connection: it is not taken over after all.
    pub fn refuse(mut self) {
        // Fails if the VMM has gone.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.book.close();
    }

    /// The VMM's connection.
    pub(in super::super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn into_parts(self) -> (UnixStream, Book, LeftFiles, Option<Unanswered>) {
        (self.socket, self.book, self.files, self.unanswered)
    }
}

impl Unanswered {
    /// What is left to do for the last message; `None` if nothing is.
    fn of(
        last: &LastMessage,
        progress: ReplyProgress,
        socket: &UnixStream,
    ) -> io::Result<Option<Self>> {
        let reply = match (progress, &last.reply) {
            (ReplyProgress::Done, _) => return Ok(None),
            (ReplyProgress::Sending, _) => LeftReply::InThePipe,
            (ReplyProgress::Accepted, Some(reply)) => LeftReply::Whole(MessageBytes(reply.clone())),
            (ReplyProgress::Accepted, None) => LeftReply::None,
        };
        // Whatever was taken out of the socket is not in the offset any more.
        let offset = peek_offset(socket.as_fd())?.unwrap_or(0);
        let in_socket = usize::try_from(offset).unwrap_or(usize::MAX);
        if in_socket > last.message.len() {
            return Err(io::Error::other(
                "its last message is longer than the record says",
            ));
        }
        Ok(Some(Self {
            message: MessageBytes(last.message.clone()),
            in_socket,
            reply,
        }))
    }
}

fn owned(file: &OwnedFd) -> io::Result<OwnedFd> {
    file.try_clone()
}
