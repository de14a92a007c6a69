//! Inherited descriptors, which were open when this process started.
#![expect(unsafe_code, reason = "adopts descriptors by their numbers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Takes over an inherited descriptor and sets its close-on-exec flag.
///
/// The caller must adopt each number only once, and before it opens any file: a file could get the number of
/// a descriptor that was not inherited after all.
///
/// # Errors
/// The descriptor is not open.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: passes no pointer, and takes any number; a closed one gives an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: passes no pointer, and the descriptor is open, as the call above has shown.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY:
    // - the descriptor is open
    // - ownership: the operator passes each number for one purpose on the command line, and nothing
    //   else in this process uses it
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether an inherited descriptor, which nobody has adopted yet, can be read without waiting. For a listening socket: whether
/// a client waits.
pub fn is_readable(fd: RawFd) -> bool {
    let mut watched = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY:
    // - watched: one structure, valid for writes for the whole call
    // - any number may be asked about: for one that is not open, the kernel says so
    let ready = unsafe { libc::poll(&raw mut watched, 1, 0) };
    ready == 1 && watched.revents & libc::POLLIN != 0
}

/// Whether two descriptors refer to the same open file; `None` on a kernel without `CONFIG_KCMP`.
pub fn is_same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    const KCMP_FILE: libc::c_int = 0;
    let pid = libc::pid_t::try_from(std::process::id()).ok()?;
    // SAFETY: passes no pointer; both descriptors are open, as they are borrowed.
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
        // A kernel without CONFIG_KCMP gives no answer.
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
