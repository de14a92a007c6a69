//! Serves one client whose connection outlives this process.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::super::client::{RETRY, ServerSignal, VERSION_DEADLINE};
use super::super::device::ServedDevice;
use super::super::respond::{ClientError, Response, respond};
use super::keeping::ClientKeeping;
use super::left::LeftPlace;
use super::lookahead::{Lookahead, Looked, MAX_KEPT_DATA, MAX_UNTAKEN};
use super::progress::MAX_BYTES;
use crate::process::event_loop::{EventLoop, Events, Interest};
use crate::vfio_user::message::{Command, Kind};
use crate::vfio_user::socket::Message;
use crate::warn_limited;

/// The tokens of the descriptors that the server waits for.
const SIGNAL: u64 = 0;
const CLIENT: u64 = 1;

/// How the connection to a client has ended, if the server did not cut the client off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum KeptEnd {
    /// The client hung up between two messages.
    HungUp,
    /// [`ServerSignal::stop`] was called.
    Stopped,
    /// A test has ended the server, as a death of the process would.
    #[cfg(test)]
    Died,
}

/// Serves a client until it hangs up, violates the protocol, or the server is stopped. `left` is the place at which an
/// earlier process has ended; the device has resumed that process's client, if the client had negotiated.
///
/// The caller must release the device, and then close the connection with [`ClientKeeping::close`].
///
/// # Errors
/// The client has to be cut off.
pub(in super::super) fn serve_kept(
    events: &mut EventLoop,
    socket: &Arc<UnixStream>,
    signal: &Arc<ServerSignal>,
    device: &mut dyn ServedDevice,
    keeping: &mut ClientKeeping,
    left: Option<LeftPlace>,
) -> Result<KeptEnd, ClientError> {
    // For splice(2), which would wait for a client that does not read.
    socket.set_nonblocking(true)?;
    let is_negotiated = left.is_some_and(|left| left.is_negotiated);
    let version_until = (!is_negotiated).then(|| Instant::now() + VERSION_DEADLINE);
    let mut connection = KeptConnection {
        lookahead: Lookahead::new(socket)?,
        executed: left.map_or(0, |left| left.executed),
        unsent: left.map_or(0, |left| left.unsent),
        is_begun: left.is_some_and(|left| left.is_begun),
        is_held: is_negotiated,
        version_until,
        events,
        socket,
        signal,
        keeping,
    };
    let end = connection.serve(device);
    #[cfg(test)]
    if matches!(end, Ok(KeptEnd::Died)) {
        return end;
    }
    // The client would see an error instead of the end. Fails if the connection has failed.
    let _ = connection.take_executed();
    if end.is_err()
        && let Some(record) = device.take_record()
    {
        keeping.book.abandon(record.kept);
    }
    // `events` holds a reference to the socket. It fails only if the descriptor is gone.
    let _ = events.wait_for(&[]);
    end
}

/// The state of the connection.
struct KeptConnection<'a> {
    events: &'a mut EventLoop,
    socket: &'a Arc<UnixStream>,
    signal: &'a Arc<ServerSignal>,
    keeping: &'a mut ClientKeeping,
    lookahead: Lookahead,
    /// Bytes of the messages that were executed.
    executed: u64,
    /// Bytes of the last reply that are in the pipe.
    unsent: usize,
    /// An earlier process has begun to execute the next message.
    is_begun: bool,
    /// The device has resumed, and does not go on yet.
    is_held: bool,
    /// When the server cuts the client off, unless VERSION is received before.
    version_until: Option<Instant>,
}

impl KeptConnection<'_> {
    fn serve(&mut self, device: &mut dyn ServedDevice) -> Result<KeptEnd, ClientError> {
        while !self.signal.is_stopped() {
            if !self.is_begun && std::mem::take(&mut self.is_held) {
                device.go_on();
            }
            if !self.send_reply()? {
                self.wait(Events::EPOLLOUT);
                continue;
            }
            match self.lookahead.next(self.socket)? {
                Looked::Message(message, len) => {
                    if let Some(end) = self.execute(device, message, len)? {
                        return Ok(end);
                    }
                }
                Looked::End => return Ok(KeptEnd::HungUp),
                Looked::Nothing if self.is_begun => {
                    return Err(ClientError::Protocol(
                        "the message that the daemon before has begun is not in the socket",
                    ));
                }
                Looked::Nothing => self.wait(Events::EPOLLIN),
            }
            if self.version_until.is_some_and(|at| at <= Instant::now()) {
                return Err(ClientError::Protocol("the client sent no VERSION in time"));
            }
        }
        Ok(KeptEnd::Stopped)
    }

    /// Waits until the client has sent bytes, or has room for some, or until there is something to stop for.
    fn wait(&mut self, wanted: Events) {
        let waited = self.wait_for(wanted);
        if let Err(cause) = waited {
            warn_limited!("cannot wait for messages of a client: {cause}");
            std::thread::sleep(RETRY);
        }
    }

    fn wait_for(&mut self, wanted: Events) -> io::Result<()> {
        self.events.wait_for(&[
            Interest {
                source: self.signal.clone(),
                token: SIGNAL,
                events: Events::EPOLLIN,
            },
            Interest {
                source: self.socket.clone(),
                token: CLIENT,
                // Edges: a part of a message stays in the socket.
                events: wanted | Events::EPOLLRDHUP | Events::EPOLLET,
            },
        ])?;
        let ready = self.events.wait(self.version_until)?;
        if ready.contains(SIGNAL) && !self.signal.is_stopped() {
            self.signal.clear();
        }
        Ok(())
    }

    /// Executes a message of `len` bytes, and answers it. Returns the end of the connection, if it has ended.
    fn execute(
        &mut self,
        device: &mut dyn ServedDevice,
        message: Message,
        len: usize,
    ) -> Result<Option<KeptEnd>, ClientError> {
        let at = self.executed;
        let executed = at.checked_add(len as u64);
        let Some(executed) = executed.filter(|executed| *executed <= MAX_BYTES) else {
            return Err(ClientError::Protocol(
                "the client has sent more bytes than can be counted",
            ));
        };
        let command = Command::from_number(message.header.command);
        let is_command = matches!(message.header.kind, Kind::Command { .. });
        let can_repeat = device.can_repeat(command, &message.body);
        let progress = &self.keeping.book.progress;
        step!(self.keeping);
        progress.begin(at, can_repeat);
        step!(self.keeping);
        let response = respond(device, self.version_until.is_none(), MAX_KEPT_DATA, message)?;
        step!(self.keeping);
        if is_command {
            self.version_until = None;
        }
        match response {
            Some(Response { bytes, descriptor })
                if descriptor.is_some() || bytes.len() > self.keeping.book.reply.room() =>
            {
                progress.mark_once(at);
                if let Some(end) = self.send_directly(&bytes, descriptor)? {
                    return Ok(Some(end));
                }
            }
            Some(Response { bytes, .. }) => {
                self.keeping.book.reply.put(&bytes)?;
                self.unsent = bytes.len();
            }
            None => {}
        }
        step!(self.keeping);
        let record = device.take_record();
        self.keeping.book.execute(executed, record);
        self.executed = executed;
        step!(self.keeping);
        self.lookahead.finish(len);
        if self.lookahead.untaken() > MAX_UNTAKEN {
            if let Some(end) = self.take_executed()? {
                return Ok(Some(end));
            }
            step!(self.keeping);
        }
        self.send_reply()?;
        step!(self.keeping);
        self.keeping.book.release_unused();
        self.is_begun = false;
        device.replied();
        Ok(None)
    }

    /// Takes the executed messages out of the socket.
    fn take_executed(&mut self) -> io::Result<Option<KeptEnd>> {
        let looked = self.executed + self.lookahead.len() as u64;
        self.keeping.book.progress.take(self.executed, looked);
        step!(self.keeping);
        self.lookahead.take(self.socket)?;
        step!(self.keeping);
        self.keeping.book.progress.taken(self.executed);
        Ok(None)
    }

    /// Sends what is unsent of the reply, as far as the client has room. Returns whether all of it is sent.
    fn send_reply(&mut self) -> io::Result<bool> {
        while self.unsent > 0 {
            let reply = &self.keeping.book.reply;
            match reply.send_some(self.socket, self.unsent)? {
                Some(count) => self.unsent = self.unsent.saturating_sub(count),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Sends a reply with a descriptor, or one that the pipe has no room for. If the process dies meanwhile, nobody knows
    /// how much the client has. Returns the end of the connection, if it has ended.
    fn send_directly(
        &mut self,
        bytes: &[u8],
        mut descriptor: Option<OwnedFd>,
    ) -> Result<Option<KeptEnd>, ClientError> {
        let mut left = bytes;
        while !left.is_empty() {
            match send(self.socket, left, descriptor.as_ref())? {
                Some(count) => {
                    left = left.get(count..).unwrap_or_default();
                    // It goes with the first byte.
                    descriptor = None;
                }
                None => self.wait(Events::EPOLLOUT),
            }
            if self.signal.is_stopped() {
                return Ok(Some(KeptEnd::Stopped));
            }
        }
        Ok(None)
    }
}

/// Sends bytes as far as the socket has room. Returns their number; `None` if it has none.
fn send(
    socket: &UnixStream,
    bytes: &[u8],
    descriptor: Option<&OwnedFd>,
) -> io::Result<Option<usize>> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = descriptor.iter().map(|file| file.as_fd()).collect();
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
}
