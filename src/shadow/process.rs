//! The peer of a socket: its user, and a handle to kill its process and to detect its end.

#![expect(unsafe_code, reason = "system calls")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::sys::poll;

/// `SO_PEERPIDFD` of `asm-generic/socket.h`.
const SO_PEERPIDFD: libc::c_int = 77;

/// This process's effective user.
pub fn own_user() -> u32 {
    // SAFETY: always succeeds.
    unsafe { libc::geteuid() }
}

/// The user of the peer at the time it connected.
///
/// # Errors
/// The system's error.
pub fn peer_user(stream: &UnixStream) -> io::Result<u32> {
    credentials(stream).map(|c| c.uid)
}

fn credentials(stream: &UnixStream) -> io::Result<libc::ucred> {
    let mut found = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    socket_option(stream, libc::SO_PEERCRED, &mut found)?;
    Ok(found)
}

fn socket_option<T: Copy>(
    stream: &UnixStream,
    option: libc::c_int,
    value: &mut T,
) -> io::Result<()> {
    let size = size_of::<T>();
    let mut len = libc::socklen_t::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let at: *mut T = value;
    // SAFETY:
    // - at and len: valid for writes for the whole call; the callers' types are plain numbers
    // - the descriptor is open, being borrowed
    let done = unsafe {
        let fd = stream.as_raw_fd();
        libc::getsockopt(fd, libc::SOL_SOCKET, option, at.cast(), &raw mut len)
    };
    match (done, usize::try_from(len)) {
        (0, Ok(len)) if len == size => Ok(()),
        (0, _) => Err(io::ErrorKind::InvalidData.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A handle of a socket's peer. It never stands for another process, even if the kernel reuses the PID.
#[derive(Debug)]
pub struct Process {
    handle: OwnedFd,
    /// It is this very process, which must not kill itself.
    own: bool,
}

impl Process {
    /// A handle of the peer's process, to which this process may send signals.
    ///
    /// # Errors
    /// The peer's process is gone, or this process may not send it signals.
    pub fn of_peer(stream: &UnixStream) -> io::Result<Self> {
        let pid = credentials(stream)?.pid;
        let mut number: libc::c_int = -1;
        let handle = match socket_option(stream, SO_PEERPIDFD, &mut number) {
            // SAFETY: the kernel has made the descriptor for this process just now.
            Ok(()) if number >= 0 => unsafe { OwnedFd::from_raw_fd(number) },
            // Linux before 6.5.
            Err(cause) if cause.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                let handle = pidfd_open(pid)?;
                // If the peer has not hung up by now, it was running when `pidfd_open` looked up its PID. So no
                // other process had the PID then.
                if has_hung_up(stream) {
                    return Err(io::ErrorKind::NotConnected.into());
                }
                handle
            }
            Ok(()) => return Err(io::ErrorKind::NotConnected.into()),
            Err(cause) => return Err(cause),
        };
        let process = Self {
            handle,
            own: u32::try_from(pid) == Ok(std::process::id()),
        };
        process.signal(0)?;
        Ok(process)
    }

    /// A handle that the process before has kept. `stream` is the connection of the process for which it stands.
    ///
    /// # Errors
    /// It is no pidfd, or this process may not send signals.
    pub fn adopt(handle: OwnedFd, stream: Option<&UnixStream>) -> io::Result<Self> {
        let pid = stream.map(credentials).transpose()?.map(|found| found.pid);
        let pid = pid.and_then(|pid| u32::try_from(pid).ok());
        let process = Self {
            handle,
            own: pid == Some(std::process::id()),
        };
        match process.signal(0) {
            Err(cause) if cause.raw_os_error() != Some(libc::ESRCH) => Err(cause),
            // Also of a process that has ended.
            _ => Ok(process),
        }
    }

    /// The pidfd.
    pub fn handle(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// Whether the process has ended: none of its threads accesses memory any more.
    pub fn is_gone(&self) -> bool {
        // On error it counts as running.
        self.wait_until_gone(Duration::ZERO)
    }

    /// Waits up to `patience` for the end of the process. Returns whether it has ended.
    pub fn wait_until_gone(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if poll(self.handle.as_raw_fd(), libc::POLLIN, left).unwrap_or(false) {
                return true;
            }
            // A signal may have ended the wait early.
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// Sends SIGKILL. The process may run for some time after that.
    ///
    /// # Errors
    /// The system refuses, or the process is this one.
    pub fn kill(&self) -> io::Result<()> {
        if self.own {
            return Err(io::Error::other("the daemon does not kill itself"));
        }
        self.signal(libc::SIGKILL)
    }

    fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        // SAFETY:
        // - the descriptor is open, being ours; no information is passed with the signal
        let done = unsafe {
            let fd = self.handle.as_raw_fd();
            let none = std::ptr::null_mut::<libc::siginfo_t>();
            libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0)
        };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl AsRawFd for Process {
    /// Readable once the process has ended.
    fn as_raw_fd(&self) -> RawFd {
        self.handle.as_raw_fd()
    }
}

/// Whether the peer has closed the connection, or this side has shut it down. On error it counts as closed.
pub fn has_hung_up(stream: &UnixStream) -> bool {
    poll(stream.as_raw_fd(), libc::POLLHUP, Duration::ZERO).unwrap_or(true)
}

fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has made the descriptor for this process just now.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
