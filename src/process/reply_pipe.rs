//! The reply that is being sent, in a pipe that outlives the process.
//!
//! A reply is written to the pipe, and splice(2) moves it from there into the peer's socket. A process that is killed ends
//! after the system call, so each byte is either in the pipe or was sent, and a later process knows which.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::{Errno, ioctl_fionread};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, pipe_with, splice};

use crate::process::keeper::Keeper;

/// The names under which the ends of the pipe are kept end with these.
const READER: &str = "-reader";
const WRITER: &str = "-writer";
/// Bytes of an old reply that are read at once.
const OLD: usize = 4096;

/// A reply on its way.
#[derive(Debug)]
pub struct ReplyPipe {
    reader: Arc<OwnedFd>,
    writer: Arc<OwnedFd>,
    /// Bytes that fit into the empty pipe.
    room: usize,
}

impl ReplyPipe {
    /// Makes an empty pipe.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self {
            room: fcntl_getpipe_size(&reader)?,
            reader: Arc::new(reader),
            writer: Arc::new(writer),
        })
    }

    /// The pipe that an earlier process has left under this name; `None` if the keeper does not have both ends.
    pub fn left(keeper: &Keeper, name: &str) -> Option<Self> {
        let reader = keeper.claim(&format!("{name}{READER}"))?;
        Some(Self {
            room: fcntl_getpipe_size(&reader).ok()?,
            reader,
            writer: keeper.claim(&format!("{name}{WRITER}"))?,
        })
    }

    /// The most bytes of a reply.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Has the pipe kept under a name.
    ///
    /// # Errors
    /// See [`Keeper::keep_as`].
    pub fn keep(&self, keeper: &Keeper, name: &str) -> io::Result<()> {
        keeper.keep_as(&format!("{name}{READER}"), self.reader.as_fd())?;
        keeper.keep_as(&format!("{name}{WRITER}"), self.writer.as_fd())
    }

    /// Bytes of a reply that were not sent yet.
    ///
    /// # Errors
    /// It is not a pipe.
    pub fn unsent(&self) -> io::Result<usize> {
        let unsent = ioctl_fionread(self.reader.as_fd())?;
        Ok(usize::try_from(unsent).unwrap_or(usize::MAX))
    }

    /// Takes whatever is in the pipe out of it.
    ///
    /// # Errors
    /// The system refuses.
    pub fn clear(&self) -> io::Result<()> {
        let mut old = [0; OLD];
        loop {
            match rustix::io::read(self.reader.as_fd(), &mut old) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(cause) => return Err(cause.into()),
            }
        }
    }

    /// Puts a reply into the pipe, which must be empty.
    ///
    /// # Errors
    /// The reply is longer than the pipe has room, or the system refuses.
    pub fn put(&self, reply: &[u8]) -> io::Result<()> {
        // Within PIPE_BUF bytes it is written as a whole. A longer one is written before anything is sent.
        let mut left = reply;
        while !left.is_empty() {
            match rustix::io::write(self.writer.as_fd(), left) {
                Ok(count) => left = left.get(count..).unwrap_or(&[]),
                Err(Errno::INTR) => {}
                Err(cause) => return Err(cause.into()),
            }
        }
        Ok(())
    }

    /// Sends what is in the pipe, as far as the socket has room. Returns whether the pipe is empty.
    ///
    /// # Errors
    /// The peer has gone, or the system refuses.
    pub fn send(&self, socket: &UnixStream) -> io::Result<bool> {
        let mut unsent = self.unsent()?;
        while unsent > 0 {
            match self.send_some(socket, unsent)? {
                Some(count) => unsent = unsent.saturating_sub(count),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Sends bytes of the `unsent` ones that are in the pipe. Returns their number; `None` if the socket has no room.
    ///
    /// # Errors
    /// The peer has gone, or the system refuses.
    pub fn send_some(&self, socket: &UnixStream, unsent: usize) -> io::Result<Option<usize>> {
        loop {
            let flags = SpliceFlags::NONBLOCK;
            match splice(&self.reader, None, socket, None, unsent, flags) {
                // The pipe has fewer bytes than the caller thinks.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(cause) => return Err(cause.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn each_byte_is_in_the_pipe_or_was_sent() {
        let pipe = ReplyPipe::new().expect("a pipe");
        let (ours, mut vmm) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("set");
        assert!(pipe.send(&ours).expect("nothing to send"));
        pipe.put(b"another reply").expect("put");
        pipe.clear().expect("cleared");
        pipe.put(b"a reply").expect("put instead");
        assert_eq!(pipe.unsent().expect("a pipe"), 7);
        assert!(pipe.send(&ours).expect("sent"));
        assert_eq!(pipe.unsent().expect("a pipe"), 0);
        let mut bytes = [0; 7];
        vmm.read_exact(&mut bytes).expect("received");
        assert_eq!(&bytes, b"a reply");
    }

    #[test]
    fn a_vmm_that_does_not_read_leaves_the_reply_in_the_pipe() {
        let pipe = ReplyPipe::new().expect("a pipe");
        let (ours, mut vmm) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("set");
        let reply = [7; 5000];
        let mut sent = 0;
        loop {
            pipe.put(&reply).expect("put");
            if !pipe.send(&ours).expect("there is a VMM") {
                break;
            }
            sent += reply.len();
        }
        let unsent = pipe.unsent().expect("a pipe");
        assert!(unsent > 0);
        let expected = sent + reply.len();
        let mut received = vec![0; expected - unsent];
        vmm.read_exact(&mut received).expect("received");
        assert!(pipe.send(&ours).expect("there is room"));
        let mut rest = vec![0; unsent];
        vmm.read_exact(&mut rest).expect("received");
        assert!(received.iter().chain(&rest).all(|byte| *byte == 7));
        drop(vmm);
        pipe.clear().expect("cleared");
        pipe.put(b"x").expect("put");
        assert!(pipe.send(&ours).is_err(), "the VMM has gone");
    }

    #[test]
    fn a_later_process_finds_what_is_unsent() {
        let (_manager, socket) = std::os::unix::net::UnixDatagram::pair().expect("sockets");
        let keeper = Keeper::new(socket, []).expect("a keeper");
        assert!(ReplyPipe::left(&keeper, "reply").is_none());
        let pipe = ReplyPipe::new().expect("a pipe");
        pipe.keep(&keeper, "reply").expect("kept");
        pipe.put(b"reply").expect("put");
        let left = ReplyPipe::left(&keeper, "reply").expect("both ends");
        drop(pipe);
        assert_eq!(left.unsent().expect("a pipe"), 5);
        let (ours, mut vmm) = UnixStream::pair().expect("sockets");
        assert!(left.send(&ours).expect("sent"));
        let mut bytes = [0; 5];
        vmm.read_exact(&mut bytes).expect("received");
        assert_eq!(&bytes, b"reply");
        left.put(b"next").expect("it can be used again");
    }
}
