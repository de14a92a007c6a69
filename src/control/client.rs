//! A client whose patience with us is its own affair, and ours with it is bounded.
#![expect(unsafe_code, reason = "asks who is at the other end of a socket")]

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::geteuid;

/// How long a client may take to say what it wants.
const QUESTION: Duration = Duration::from_secs(2);
/// How long it may take to take its answer.
const ANSWER: Duration = Duration::from_secs(30);
/// How long it may take none of it.
const STALL: Duration = Duration::from_secs(5);
/// Bytes of an answer that are sent at a time.
const CHUNK: usize = 64 << 10;

/// A stream, which does not block by itself, with an end to all patience, however the client divides
/// it up.
pub(super) struct Bounded<'a> {
    stream: &'a UnixStream,
    until: Instant,
    /// It has failed, and is not tried again: a buffer may want to, when it is dropped.
    failed: bool,
}

/// What a client says, up to `most` bytes and the end of what `is_whole` calls whole; shorter where it
/// hangs up, and longer than `most` where that is too long.
///
/// # Errors
/// It takes too long.
pub(super) fn hear(
    stream: &UnixStream,
    most: u64,
    is_whole: impl Fn(&[u8]) -> bool,
) -> io::Result<Vec<u8>> {
    let bounded = Bounded::new(stream, QUESTION);
    let mut reader = BufReader::new(bounded.take(most + 1));
    let mut heard = Vec::new();
    while reader.read_until(b'\n', &mut heard)? > 0 && !is_whole(&heard) {}
    Ok(heard)
}

/// Where the answer goes.
pub(super) fn reply(stream: &UnixStream) -> BufWriter<Bounded<'_>> {
    BufWriter::with_capacity(CHUNK, Bounded::new(stream, ANSWER))
}

/// Whether a client may change things: it is the daemon's own user or root. Others may look, where the
/// socket's file lets them connect.
pub(super) fn may_change(stream: &UnixStream) -> bool {
    user_of(stream).is_ok_and(|user| user == 0 || user == geteuid().as_raw())
}

/// The user at the other end. The process there may be one that has no number here, which typed
/// credentials do not have.
fn user_of(stream: &UnixStream) -> io::Result<libc::uid_t> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: libc::uid_t::MAX,
        gid: libc::gid_t::MAX,
    };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).map_err(io::Error::other)?;
    // SAFETY: peer and len are valid for writes, and len is the size of peer.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if done == 0 {
        Ok(peer.uid)
    } else {
        Err(io::Error::last_os_error())
    }
}

impl<'a> Bounded<'a> {
    fn new(stream: &'a UnixStream, patience: Duration) -> Self {
        Self {
            stream,
            until: Instant::now() + patience,
            failed: false,
        }
    }

    /// Who says or takes a little now and then has no more time than others.
    fn check_time(&mut self) {
        self.failed |= self.until <= Instant::now();
    }

    /// Does what it can do at once, or as soon as the stream is ready for it.
    fn when_ready(
        &mut self,
        ready: PollFlags,
        mut act: impl FnMut(&UnixStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if self.failed {
            return Err(io::ErrorKind::TimedOut.into());
        }
        loop {
            match act(self.stream) {
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
                done => {
                    self.failed = done.is_err();
                    return done;
                }
            }
            let left = self.until.saturating_duration_since(Instant::now());
            let left = left.min(STALL);
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(self.stream, ready)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => {
                    self.failed = true;
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(cause) => return Err(cause.into()),
            }
        }
    }
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.check_time();
        self.when_ready(PollFlags::IN, |mut stream| stream.read(buffer))
    }
}

impl Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check_time();
        self.when_ready(PollFlags::OUT, |mut stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
