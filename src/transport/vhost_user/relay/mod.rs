//! A relay between the VMM's socket and the crate, which makes the VMM's connection outlive this process.
//!
//! ```text
//! VMM --- socket --- relay --- private connection --- vhost-user-backend
//!            |         |
//!            +------- keeper: the socket, the record, the VMM's descriptors
//! ```
//!
//! The crate cannot go on with a connection: it begins with nothing. So the relay owns the VMM's socket, forwards whole
//! messages, and records what a new crate must be told ([`state`], [`record`], [`book`]). After this process has died, the
//! next one finds all that ([`left`]), tells a new crate, and goes on with the same socket. The VMM notices nothing.
//!
//! **Each message counts once.** The relay takes these steps for a message:
//!
//! 1. It looks at the message, which stays in the socket, and has its descriptors kept.
//! 2. It passes the message to the crate, and waits until the crate has accepted it ([`link`]).
//! 3. It writes the record, with the message and the crate's reply.
//! 4. It takes the message out of the socket.
//! 5. It puts the reply into a pipe, marks it as being sent, moves it from the pipe into the socket ([`ReplyPipe`](crate::process::reply_pipe::ReplyPipe)), and marks
//!    it as sent.
//!
//! If the process dies before step 3, the next one finds the message in the socket and begins anew: its crate has not seen
//! the message. If it dies later, the next one goes on with step 4 or 5; the socket's peek offset says whether the message
//! is still in it, and the pipe has what is unsent of the reply.
//!
//! The relay waits for the VMM and for the crate only, and holds no lock while it waits. A VMM that sends half a message, or
//! does not read its replies, stops its own relay alone.

/// In tests, the relay may end here, as if the process had died.
macro_rules! step {
    ($relay:expr) => {
        #[cfg(test)]
        if $relay.steps.dies() {
            return Ok(RelayEnd::Died.into());
        }
    };
}

mod book;
pub(super) mod left;
mod link;
mod message;
pub(super) mod record;
mod replay;
mod state;
#[cfg(test)]
pub(super) mod tests;
mod told;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use self::book::Book;
use self::left::{LeftFiles, LeftReply, LeftVmm, Unanswered};
use self::link::{CrateLink, Verdict, is_gone};
use self::message::{Inbox, MessageBytes, Peeked, send};
use self::record::ReplyProgress;
use crate::process::connector::private_connection;
use crate::process::keeper::Keeper;
use crate::process::sandbox::{self, Role};
use crate::warn_limited;

/// How a relay has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RelayEnd {
    /// The VMM or the crate has ended the connection.
    Closed,
    /// The daemon ends, and a later one can go on with the connection.
    HandedOver,
    /// A test has ended the relay, as a death of the process would.
    #[cfg(test)]
    Died,
}

/// The means of relaying one connection after the other.
#[derive(Debug)]
pub(super) struct Relays {
    /// `None` while a relay has it.
    book: Option<Book>,
    /// Readable when the daemon is to end.
    stop: UnixStream,
    #[cfg(test)]
    pub(super) steps: tests::Steps,
}

impl Relays {
    /// Relays whose connections `keeper` keeps. `stop` becomes readable when the daemon is to end.
    ///
    /// # Errors
    /// The system refuses the memfd of the record.
    pub(super) fn new(keeper: Arc<Keeper>, stop: UnixStream) -> io::Result<Self> {
        Ok(Self {
            book: Some(Book::new(keeper)?),
            stop,
            #[cfg(test)]
            steps: tests::Steps::default(),
        })
    }

    /// Makes a relay for the VMM at the other end of `vmm`, which has just connected. The crate must accept the next
    /// connection of the returned listener.
    ///
    /// # Errors
    /// The system has no descriptor left. The connection is then closed.
    pub(super) fn begin(&mut self, vmm: UnixStream) -> io::Result<(Relay, UnixListener)> {
        let mut book = self.book.take().ok_or_else(no_book)?;
        book.open(&vmm);
        match self.connect(&vmm, false) {
            Ok((link, inbox, listener)) => Ok((self.relay(link, inbox, book), listener)),
            Err(cause) => {
                // The keeper has the socket, too.
                let _ = vmm.shutdown(Shutdown::Both);
                book.close();
                self.book = Some(book);
                Err(cause)
            }
        }
    }

    /// Lets no relay begin.
    #[cfg(test)]
    pub(super) fn lose_book(&mut self) {
        self.book = None;
    }

    /// Makes a relay for a VMM that an earlier process has left.
    ///
    /// # Errors
    /// The system has no descriptor left. The connection is then closed.
    pub(super) fn resume(&mut self, left: LeftVmm) -> io::Result<(Relay, UnixListener)> {
        let (vmm, mut book, files, unanswered) = left.into_parts();
        match self.connect(&vmm, unanswered.is_some()) {
            Ok((link, inbox, listener)) => {
                self.book = None;
                let mut relay = self.relay(link, inbox, book);
                relay.left_files = files;
                relay.unanswered = unanswered;
                Ok((relay, listener))
            }
            Err(cause) => {
                let _ = vmm.shutdown(Shutdown::Both);
                book.close();
                self.book = Some(book);
                Err(cause)
            }
        }
    }

    /// Takes the book back from a relay that has ended.
    pub(super) fn end(&mut self, relay: &RunningRelay) -> RelayEnd {
        let Ok((book, end)) = relay.0.recv() else {
            // Its thread has panicked, which ends the process.
            return RelayEnd::Closed;
        };
        self.book = Some(book);
        end
    }

    /// Takes the book back from a relay that has not begun, and closes the connection.
    pub(super) fn abandon(&mut self, relay: Relay) {
        self.book = Some(relay.close());
    }

    /// As [`Self::abandon`], and leaves the connection to a later process if there can be one.
    pub(super) fn leave(&mut self, relay: Relay) -> RelayEnd {
        if !relay.book.is_kept() {
            self.abandon(relay);
            return RelayEnd::Closed;
        }
        relay.link.close();
        self.book = Some(relay.book);
        RelayEnd::HandedOver
    }

    fn relay(&self, link: CrateLink, inbox: Inbox, book: Book) -> Relay {
        Relay {
            link,
            inbox,
            book,
            unanswered: None,
            left_files: LeftFiles::new(),
            #[cfg(test)]
            steps: self.steps.clone(),
        }
    }

    /// Connects to the crate. `is_looked_at`: the first message of the VMM must still be consumed.
    fn connect(
        &self,
        vmm: &UnixStream,
        is_looked_at: bool,
    ) -> io::Result<(CrateLink, Inbox, UnixListener)> {
        // For splice(2), which would wait for a VMM that does not read.
        vmm.set_nonblocking(true)?;
        let (listener, socket) = private_connection()?;
        let link = CrateLink::new(socket, vmm.try_clone()?, self.stop.try_clone()?)?;
        let vmm = vmm.try_clone()?;
        let inbox = if is_looked_at {
            Inbox::looked_at(vmm)
        } else {
            Inbox::new(vmm)?
        };
        Ok((link, inbox, listener))
    }
}

fn no_book() -> io::Error {
    io::Error::other("the relay of the VMM before has not ended")
}

/// A relay whose thread does not run yet.
#[derive(Debug)]
pub(super) struct Relay {
    link: CrateLink,
    inbox: Inbox,
    book: Book,
    /// What an earlier process has left to do.
    unanswered: Option<Unanswered>,
    /// The VMM's descriptors, for a new crate.
    left_files: LeftFiles,
    #[cfg(test)]
    steps: tests::Steps,
}

/// A relay whose thread runs.
#[derive(Debug)]
pub(super) struct RunningRelay(Receiver<(Book, RelayEnd)>);

impl Relay {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(super) fn start(self) -> Result<RunningRelay, Box<(Self, io::Error)>> {
        let (sender, ended) = sync_channel(1);
        // Not moved into the thread: if there is none, the connection is still to be closed.
        let (pass, passed) = sync_channel::<Self>(1);
        let started = sandbox::spawn(Role::Relay, move || {
            if let Ok(relay) = passed.recv() {
                // Fails if nobody waits any more.
                let _ = sender.send(relay.run());
            }
        });
        match started {
            Ok(_) => {
                // The thread waits for it.
                let _ = pass.send(self);
                Ok(RunningRelay(ended))
            }
            Err(cause) => Err(Box::new((self, cause))),
        }
    }

    /// The VMM's socket.
    pub(super) fn vmm(&self) -> BorrowedFd<'_> {
        self.inbox.socket().as_fd()
    }

    /// Relays until the connection ends.
    fn run(mut self) -> (Book, RelayEnd) {
        let end = match self.relay() {
            Ok(end) => end,
            Err(cause) => {
                warn_limited!("the VMM's connection cannot be relayed: {cause}");
                RelayEnd::Closed
            }
        };
        if end == RelayEnd::Closed {
            return (self.close(), end);
        }
        self.link.close();
        (self.book, end)
    }

    /// Ends the connection.
    fn close(mut self) -> Book {
        self.link.close();
        // The keeper has the socket, too: to close it would not end the connection. Fails if the VMM has gone.
        let _ = self.inbox.socket().shutdown(Shutdown::Both);
        self.book.close();
        self.book
    }

    fn relay(&mut self) -> io::Result<RelayEnd> {
        if let Some(unanswered) = self.unanswered.take()
            && let Some(end) = self.answer_left(&unanswered)?
        {
            return Ok(end);
        }
        loop {
            if self.link.has_ended() {
                return Ok(RelayEnd::Closed);
            }
            if self.link.is_stopped() {
                return Ok(self.stopped());
            }
            let end = match self.inbox.peek()? {
                Peeked::Whole => self.forward()?,
                Peeked::Partial => {
                    self.link.wait()?;
                    None
                }
                Peeked::Invalid => Some(self.finish(false)?),
                Peeked::Ended => Some(self.finish(true)?),
            };
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    /// The daemon is to end.
    fn stopped(&self) -> RelayEnd {
        if self.book.is_kept() {
            RelayEnd::HandedOver
        } else {
            RelayEnd::Closed
        }
    }

    /// Forwards the message that the inbox has. Returns the end of the connection, if it has ended.
    fn forward(&mut self) -> io::Result<Option<RelayEnd>> {
        step!(self);
        let message = self.inbox.message().clone();
        let names = self.book.keep(&message, self.inbox.files());
        step!(self);
        // Without its descriptors kept, the message is passed on nevertheless: the VMM is served as long as this process
        // lives.
        let files: Vec<BorrowedFd<'_>> = self.inbox.files().iter().map(AsFd::as_fd).collect();
        let verdict = if self.book.state().has_asked {
            self.link.exchange(&message, &files)?
        } else {
            let plain = message.without_need_reply();
            self.link.exchange(&plain, &files)?
        };
        let reply = match verdict {
            Verdict::Accepted(reply) => reply,
            Verdict::Refused(reply) => {
                self.book.release(&names);
                self.inbox.consume(message.0.len())?;
                if let Some(reply) = reply {
                    // The connection ends in any case.
                    let _ = send(self.inbox.socket(), &reply.0, &[]);
                }
                return Ok(Some(RelayEnd::Closed));
            }
        };
        step!(self);
        let gone = self.book.accept(&message, names, reply.as_ref());
        step!(self);
        self.inbox.consume(message.0.len())?;
        step!(self);
        if let Some(reply) = reply
            && let Some(end) = self.answer(&reply)?
        {
            return Ok(Some(end));
        }
        self.book.mark(ReplyProgress::Done);
        step!(self);
        self.book.release_replaced(&message, &gone);
        Ok(None)
    }

    /// Sends a reply to the VMM. Returns the end of the connection, if it has ended.
    fn answer(&mut self, reply: &MessageBytes) -> io::Result<Option<RelayEnd>> {
        self.book.reply().clear()?;
        self.book.reply().put(&reply.0)?;
        step!(self);
        self.book.mark(ReplyProgress::Sending);
        step!(self);
        self.send_reply()
    }

    /// Sends what is unsent of the reply in the pipe.
    fn send_reply(&mut self) -> io::Result<Option<RelayEnd>> {
        loop {
            match self.book.reply().send(self.inbox.socket()) {
                Ok(true) => break,
                Ok(false) => {
                    self.link.wait()?;
                    if self.link.has_ended() {
                        return Ok(Some(RelayEnd::Closed));
                    }
                    if self.link.is_stopped() {
                        return Ok(Some(self.stopped()));
                    }
                }
                Err(cause) if is_gone(&cause) => return Ok(Some(RelayEnd::Closed)),
                Err(cause) => return Err(cause),
            }
        }
        step!(self);
        Ok(None)
    }

    /// Ends what an earlier process has left to do for its last message.
    fn answer_left(&mut self, left: &Unanswered) -> io::Result<Option<RelayEnd>> {
        step!(self);
        if left.in_socket > 0 && !self.inbox.consume_expected(&left.message, left.in_socket)? {
            return Err(io::Error::other(
                "its last message is not the one that the daemon before has recorded; start the VM anew",
            ));
        }
        step!(self);
        let end = match &left.reply {
            LeftReply::None => None,
            LeftReply::Whole(reply) => self.answer(reply)?,
            LeftReply::InThePipe => self.send_reply()?,
        };
        if end.is_some() {
            return Ok(end);
        }
        self.book.mark(ReplyProgress::Done);
        step!(self);
        Ok(None)
    }

    /// The rest of what the VMM has sent is no message. Passes it to the crate, which ends the connection and says why.
    fn finish(&mut self, is_end: bool) -> io::Result<RelayEnd> {
        self.link.finish(self.inbox.message(), is_end)?;
        Ok(RelayEnd::Closed)
    }
}
