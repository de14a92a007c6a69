//! Descriptors this process was started with.
#![expect(unsafe_code, reason = "adopts descriptors by their numbers")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes over an inherited descriptor, and keeps it from being inherited once more. Each may be
/// taken once, and before any file is opened that could get the number of one that was not passed
/// on.
///
/// # Errors
/// Where it is not open.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed, and any number may be asked; a closed one gives an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no pointer is passed, and the descriptor is open: it answered just now.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY:
    // - the descriptor is open
    // - ownership: the operator handed it over on the command line, each number for one purpose,
    //   and nothing else here uses it
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        let refused = adopt(RawFd::MAX).expect_err("closed");
        assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
    }
}
