//! The relay's connection to the crate, and its waits.
//!
//! The crate has no reply to some messages. So each message is followed by a question of the relay's own, GET_FEATURES. The
//! crate answers in order, so when that answer has come, the crate has accepted the message, and has sent its reply if
//! there is one. GET_FEATURES has no effect on the device. It makes the crate reply to messages that ask for it, which it
//! otherwise does only for a VMM that has asked for the features; the relay takes that flag away until the VMM has.

use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;

use super::message::{HEADER_LEN, MAX_MESSAGE, MessageBytes, receive, send};
use crate::process::event_loop::{EventLoop, Events, Interest};

const VMM: u64 = 0;
const CRATE: u64 = 1;
const STOP: u64 = 2;

/// The crate's reaction to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It has accepted the message, and has sent this reply.
    Accepted(Option<MessageBytes>),
    /// It has ended the connection, perhaps after a reply.
    Refused(Option<MessageBytes>),
}

/// The connection to the crate. Waits for the VMM and for the end of the daemon, too.
#[derive(Debug)]
pub(super) struct CrateLink {
    socket: Arc<UnixStream>,
    /// Edge-triggered: what it has reported is in the flags below, or is tried before the next wait.
    events: EventLoop,
    /// Bytes from the crate that are no whole message yet.
    received: Vec<u8>,
    is_stopped: bool,
    has_ended: bool,
}

impl CrateLink {
    /// The link over `socket`, whose other end the crate has. `vmm` is the VMM's socket; `stop` becomes readable when the
    /// daemon is to end.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub(super) fn new(socket: UnixStream, vmm: UnixStream, stop: UnixStream) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let mut events = EventLoop::new()?;
        let input = Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLET;
        let interest = |source, token, events| Interest {
            source,
            token,
            events,
        };
        events.wait_for(&[
            interest(Arc::new(vmm), VMM, input | Events::EPOLLOUT),
            interest(socket.clone(), CRATE, input),
            interest(Arc::new(stop), STOP, input),
        ])?;
        Ok(Self {
            socket,
            events,
            received: Vec::new(),
            is_stopped: false,
            has_ended: false,
        })
    }

    /// Whether the daemon is to end.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// Whether the crate has ended the connection.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Waits until something has happened since the last wait: the VMM has sent something, has read something, or has
    /// gone; the crate has; the daemon is to end.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        let ready = self.events.wait(None)?;
        self.is_stopped |= ready.contains(STOP);
        let gone = Events::EPOLLHUP | Events::EPOLLRDHUP | Events::EPOLLERR;
        self.has_ended |= ready
            .iter()
            .any(|(token, events)| token == CRATE && events.intersects(gone));
        Ok(())
    }

    /// Passes a message to the crate, and waits until the crate has accepted or refused it.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn exchange(
        &mut self,
        message: &MessageBytes,
        files: &[BorrowedFd<'_>],
    ) -> io::Result<Verdict> {
        self.pass(message, files)?;
        self.pass(&MessageBytes::new(FrontendReq::GET_FEATURES, &[]), &[])?;
        let mut reply = None;
        loop {
            while let Some(message_back) = self.next_message() {
                let is_own =
                    message.request() != Some(FrontendReq::GET_FEATURES) || reply.is_some();
                if is_own && message_back.request() == Some(FrontendReq::GET_FEATURES) {
                    return Ok(Verdict::Accepted(reply));
                }
                reply = Some(message_back);
            }
            if self.receive()? == 0 {
                return Ok(Verdict::Refused(reply));
            }
        }
    }

    /// Passes bytes that are no message that the crate accepts, and the VMM's end after them if `is_end`. Waits until the
    /// crate ends the connection.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn finish(&mut self, bytes: &MessageBytes, is_end: bool) -> io::Result<()> {
        if !bytes.0.is_empty() {
            self.pass(bytes, &[])?;
        }
        if is_end {
            // Fails if the crate has ended the connection.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        while self.receive()? > 0 {}
        Ok(())
    }

    /// Ends the connection to the crate.
    pub(super) fn close(&self) {
        // Fails if the crate has ended the connection.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// The crate reads each message before it gets another one, so there is room for it.
    fn pass(&self, message: &MessageBytes, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        match send(&self.socket, &message.0, files) {
            Ok(count) if count == message.0.len() => Ok(()),
            Ok(_) => Err(io::Error::other("the crate takes no whole message")),
            // It has ended the connection. Its last replies are still to be read.
            Err(cause) if is_gone(&cause) => Ok(()),
            Err(cause) => Err(cause),
        }
    }

    /// Waits for bytes from the crate. Returns their number, 0 if it has ended the connection.
    fn receive(&mut self) -> io::Result<usize> {
        loop {
            let mut bytes = [0; MAX_MESSAGE];
            match receive(&self.socket, &mut bytes) {
                Ok(count) => {
                    self.received.extend(bytes.get(..count).unwrap_or(&[]));
                    self.has_ended |= count == 0;
                    return Ok(count);
                }
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => self.wait()?,
                Err(cause) => return Err(cause),
            }
        }
    }

    fn next_message(&mut self) -> Option<MessageBytes> {
        if self.received.len() < HEADER_LEN {
            return None;
        }
        let mut message = MessageBytes(std::mem::take(&mut self.received));
        match message.whole_len() {
            Some(len) if len <= message.0.len() => {
                self.received = message.0.split_off(len);
                Some(message)
            }
            _ => {
                self.received = message.0;
                None
            }
        }
    }
}

/// Whether an error says that the other end is closed.
pub(super) fn is_gone(cause: &io::Error) -> bool {
    matches!(
        cause.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}
