//! Descriptors this process was started with.
#![expect(unsafe_code, reason = "adopts descriptors by their numbers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

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

/// Whether two descriptors are of the same open file; `None` where the kernel does not say
/// (`CONFIG_KCMP`).
pub fn is_same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    const KCMP_FILE: libc::c_int = 0;
    let pid = libc::pid_t::try_from(std::process::id()).ok()?;
    // SAFETY: no pointer is passed; both descriptors are open: they are borrowed.
    let order = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid,
            pid,
            KCMP_FILE,
            libc::c_long::from(a.as_raw_fd()),
            libc::c_long::from(b.as_raw_fd()),
        )
    };
    (order >= 0).then_some(order == 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn copies_of_a_descriptor_are_the_same_file() {
        let (one, other) = io::pipe().expect("a pipe");
        let copy = one.try_clone().expect("a descriptor");
        // Where the kernel says it at all.
        if let Some(same) = is_same_file(one.as_fd(), copy.as_fd()) {
            assert!(same);
            assert_eq!(is_same_file(one.as_fd(), other.as_fd()), Some(false));
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        let refused = adopt(RawFd::MAX).expect_err("closed");
        assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
    }
}
