//! The peek offset of a Unix stream socket: how far its reader has looked ahead of what it has taken out.
//!
//! The kernel keeps the offset with the socket, so it outlives a process that has another process keep the descriptor. A
//! read without `MSG_PEEK` lowers it by the bytes that it takes out, in the same step.
#![expect(unsafe_code, reason = "SO_PEEK_OFF, which no library offers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets the offset at which the next read with `MSG_PEEK` begins.
///
/// # Errors
/// The kernel's error.
pub fn set_peek_offset(socket: BorrowedFd<'_>, offset: u32) -> io::Result<()> {
    let offset = libc::c_int::try_from(offset).map_err(io::Error::other)?;
    // SAFETY:
    // - the value: valid for reads of the length passed, for the whole call
    // - the descriptor: open, as it is borrowed
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            LENGTH,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The offset; `None` if nobody has set one.
///
/// # Errors
/// The kernel's error.
pub fn peek_offset(socket: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let mut offset: libc::c_int = -1;
    let mut length = LENGTH;
    // SAFETY:
    // - the value: valid for writes of the length passed, for the whole call
    // - the length: valid for reads and writes
    // - the descriptor: open, as it is borrowed
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut offset).cast(),
            &raw mut length,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u32::try_from(offset).ok())
}

/// Bytes of the option's value.
#[expect(clippy::cast_possible_truncation, reason = "it is 4")]
const LENGTH: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::net::{RecvFlags, recv};

    use super::*;

    #[test]
    fn the_socket_knows_how_much_was_taken_out() {
        let (mut reader, mut writer) = UnixStream::pair().expect("sockets");
        assert_eq!(peek_offset(reader.as_fd()).expect("an offset"), None);
        set_peek_offset(reader.as_fd(), 0).expect("set");
        writer.write_all(b"first").expect("written");
        writer.write_all(b"second").expect("written");
        let mut bytes = [0; 4];
        for (wanted, offset) in [(b"firs".as_slice(), 4), (b"tsec", 8)] {
            let (seen, _) = recv(&reader, &mut bytes[..], RecvFlags::PEEK).expect("peeked");
            // A read may end at the end of what was written at once.
            let rest = &mut bytes[seen..];
            if !rest.is_empty() {
                recv(&reader, rest, RecvFlags::PEEK).expect("peeked");
            }
            assert_eq!(bytes, wanted);
            assert_eq!(
                peek_offset(reader.as_fd()).expect("an offset"),
                Some(offset)
            );
        }
        let other = reader.try_clone().expect("a copy");
        reader.read_exact(&mut bytes[..3]).expect("read");
        assert_eq!(peek_offset(other.as_fd()).expect("an offset"), Some(5));
        assert_eq!(&bytes[..3], b"fir");
    }
}
