//! Sends bytes of guest memory from where they are: the kernel copies them once, into the socket.
#![expect(
    unsafe_code,
    reason = "sendmsg from memory that the guest may change: no slice may refer to it"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vm_memory::VolatileSlice;

/// The most pieces in one call; Linux takes up to 1024.
const MAX_PIECES: usize = 512;

/// Sends some of the bytes of `head` and then of `parts`, but for the first `sent` of all these. Returns the number of
/// bytes, or `None` if the socket accepts none yet. The kernel refers to no part after the call.
///
/// The guest may write to `parts` meanwhile: then any mixture of old and new bytes is sent.
///
/// # Errors
/// EFAULT: a part has no memory behind it any more, because its file has become shorter. Otherwise the peer is gone, or the
/// kernel refuses to send.
pub(super) fn send_some(
    socket: BorrowedFd<'_>,
    head: &[u8],
    parts: &[VolatileSlice<'_>],
    sent: usize,
) -> io::Result<Option<usize>> {
    let guards: Vec<_> = parts.iter().map(VolatileSlice::ptr_guard).collect();
    let head = (head.as_ptr(), head.len());
    let parts = guards.iter().map(|guard| (guard.as_ptr(), guard.len()));
    let mut skip = sent;
    let mut pieces = Vec::with_capacity(guards.len() + 1);
    for (at, len) in std::iter::once(head).chain(parts) {
        let skipped = skip.min(len);
        skip -= skipped;
        if skipped < len {
            pieces.push(libc::iovec {
                iov_base: at.wrapping_add(skipped).cast_mut().cast(),
                iov_len: len - skipped,
            });
        }
    }
    pieces.truncate(MAX_PIECES);
    // SAFETY: all zero is a valid `msghdr`: null pointers, and lengths of 0.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    loop {
        // SAFETY:
        // - `message` names no address and no control data, and `pieces` outlives the call.
        // - Each piece lies within `head`, which is borrowed, or within a part, whose guard keeps it mapped: `skipped` is
        //   less than the length that the guard gives.
        // - The kernel only reads the pieces. Memory that changes meanwhile, or is gone, is a case for the kernel, not
        //   for the compiler: no reference to the parts exists here.
        let count = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        if let Ok(count) = usize::try_from(count) {
            return Ok(Some(count));
        }
        let cause = io::Error::last_os_error();
        match Errno::from_io_error(&cause) {
            Some(Errno::INTR) => {}
            Some(Errno::AGAIN) => return Ok(None),
            Some(_) | None => return Err(cause),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    use super::*;

    /// Each number of bytes that a call before may have sent, at the borders of the pieces and within them.
    #[test]
    fn the_bytes_after_those_that_were_sent_are_sent() {
        let memory = MmapRegion::<()>::new(4096).expect("memory");
        let memory = memory.as_volatile_slice();
        memory.write_slice(b"abcdefgh", 0).expect("written");
        let part = |at, len| memory.subslice(at, len).expect("inside");
        let parts = [part(4, 3), part(0, 0), part(1, 2)];
        let all = b"headefgbc";
        for sent in 0..all.len() {
            let (here, mut there) = UnixStream::pair().expect("sockets");
            let count = send_some(here.as_fd(), b"head", &parts, sent).expect("sent");
            assert_eq!(count, Some(all.len() - sent));
            let mut received = vec![0; all.len() - sent];
            there.read_exact(&mut received).expect("bytes");
            assert_eq!(received, all[sent..]);
        }
    }

    #[test]
    fn more_parts_than_a_call_takes_need_several_calls() {
        let memory = MmapRegion::<()>::new(4096).expect("memory");
        let memory = memory.as_volatile_slice();
        let parts = [memory.subslice(0, 1).expect("inside"); MAX_PIECES + 10];
        let (here, _there) = UnixStream::pair().expect("sockets");
        let first = send_some(here.as_fd(), b"h", &parts, 0).expect("sent");
        assert_eq!(first, Some(MAX_PIECES));
        let rest = send_some(here.as_fd(), b"h", &parts, MAX_PIECES).expect("sent");
        assert_eq!(rest, Some(11));
    }

    #[test]
    fn memory_whose_file_has_become_shorter_is_an_error_and_raises_no_signal() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("a length");
        let backing = FileOffset::new(file.try_clone().expect("cloned"), 0);
        let memory = MmapRegion::<()>::from_file(backing, 4096).expect("mapped");
        file.set_len(0).expect("a length");
        let (here, _there) = UnixStream::pair().expect("sockets");
        let parts = [memory.as_volatile_slice()];
        let failed = send_some(here.as_fd(), &[], &parts, 0).expect_err("no memory");
        assert_eq!(failed.raw_os_error(), Some(libc::EFAULT));
    }
}
