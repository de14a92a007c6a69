//! The bytes that a socket has sent and its peer has not read.
#![expect(unsafe_code, reason = "TIOCOUTQ, which no library offers for sockets")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// At least the number of bytes that were sent over a Unix stream socket and that the peer has not read. It is 0 if and only
/// if the peer has read everything.
///
/// # Errors
/// The kernel's error.
pub fn unread_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut unread: libc::c_int = 0;
    // SAFETY:
    // - the value: valid for writes of an integer, for the whole call
    // - the descriptor: open, as it is borrowed
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(unread).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_a_peer_that_has_read_everything_leaves_nothing_unread() {
        let (mut here, mut there) = UnixStream::pair().expect("sockets");
        let unread = |socket: &UnixStream| unread_bytes(socket.as_fd()).expect("a socket");
        assert_eq!(unread(&here), 0);
        here.write_all(b"two").expect("written");
        here.write_all(b"parts").expect("written");
        assert!(unread(&here) >= 8);
        there.read_exact(&mut [0; 7]).expect("read");
        assert!(unread(&here) >= 1);
        there.read_exact(&mut [0; 1]).expect("read");
        assert_eq!(unread(&here), 0);
    }
}
