//! Clients of the control thread: requests and answers with deadlines, and the user at the other end.
#![expect(
    unsafe_code,
    reason = "reads the credentials of the process at the other end of a socket"
)]

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::geteuid;

/// The time a client has to send its request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(2);
/// The time a client has to read its answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// The time for which a client may read or send nothing.
const STALL: Duration = Duration::from_secs(5);
/// Bytes of an answer that are sent in one piece.
const CHUNK: usize = 64 << 10;

/// A nonblocking stream with a deadline for all reads and writes together.
pub(super) struct DeadlineStream<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
    /// A read or write has failed. It must not be tried again: a `BufWriter` would do so in its `drop`.
    failed: bool,
}

/// Reads lines until `is_whole` returns true for the request so far. If the client hangs up earlier, returns the
/// part that it has sent. If the request is too long, returns its first `most + 1` bytes.
///
/// # Errors
/// The client takes too long.
pub(super) fn read_request(
    stream: &UnixStream,
    most: u64,
    is_whole: impl Fn(&[u8]) -> bool,
) -> io::Result<Vec<u8>> {
    let stream = DeadlineStream::new(stream, REQUEST_DEADLINE);
    let mut reader = BufReader::new(stream.take(most + 1));
    let mut request = Vec::new();
    while reader.read_until(b'\n', &mut request)? > 0 && !is_whole(&request) {}
    Ok(request)
}

/// A buffered writer for the answer.
pub(super) fn answer_writer(stream: &UnixStream) -> BufWriter<DeadlineStream<'_>> {
    BufWriter::with_capacity(CHUNK, DeadlineStream::new(stream, ANSWER_DEADLINE))
}

/// Whether a client may change the daemon: only root and the daemon's own user may. Other users can query
/// it if the rights of the socket's file let them connect.
pub(super) fn may_change(stream: &UnixStream) -> bool {
    user_of(stream).is_ok_and(|user| user == 0 || user == geteuid().as_raw())
}

/// The user at the other end. Not rustix's typed credentials: they cannot express a process without a
/// number in this PID namespace.
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

impl<'a> DeadlineStream<'a> {
    fn new(stream: &'a UnixStream, time: Duration) -> Self {
        Self {
            stream,
            deadline: Instant::now() + time,
            failed: false,
        }
    }

    /// Fails the stream after its deadline, even if the client sends or reads a little now and then.
    fn check_deadline(&mut self) {
        self.failed |= self.deadline <= Instant::now();
    }

    /// Calls `act`, and again each time the stream becomes `ready`, until it does not block.
    fn retry_when_ready(
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
            let left = self.deadline.saturating_duration_since(Instant::now());
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

impl Read for DeadlineStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.check_deadline();
        self.retry_when_ready(PollFlags::IN, |mut stream| stream.read(buffer))
    }
}

impl Write for DeadlineStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check_deadline();
        self.retry_when_ready(PollFlags::OUT, |mut stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
