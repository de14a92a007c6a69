//! System calls: sending and receiving bytes with descriptors, polling, and advice about mappings.

#![expect(unsafe_code, reason = "system calls")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The most descriptors of one message. The kernel closes those beyond.
const MAX_FDS: usize = 4;
/// Room for their control message. Words.
const CONTROL_WORDS: usize = 8;

/// Sends as many of `bytes` as the socket has room for, with `fds`. Never waits. Returns the number of bytes sent.
///
/// # Errors
/// `WouldBlock` if the socket has no room at all. On error no descriptor has been sent.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut message = empty_message(&raw mut part);
    if !fds.is_empty() {
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let len = u32::try_from(size_of_val(numbers.as_slice())).unwrap_or(0);
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes a size from a size.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as usize;
        // SAFETY:
        // - message: has a control buffer that lives until the end of this function, and is at
        //   least as long as it says: MAX_FDS descriptors fit
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: computes a size from a size.
        let total = unsafe { libc::CMSG_LEN(len) } as usize;
        // SAFETY:
        // - header: the start of the control buffer, aligned as words are, with room for a header
        unsafe {
            header.write(libc::cmsghdr {
                cmsg_len: total,
                cmsg_level: libc::SOL_SOCKET,
                cmsg_type: libc::SCM_RIGHTS,
            });
        };
        // SAFETY: header is that of the message.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY:
        // - data: room for `numbers` was asked for above
        // - the two do not overlap: one is on the heap, one on the stack
        unsafe {
            data.copy_from_nonoverlapping(numbers.as_ptr().cast(), size_of_val(numbers.as_slice()));
        };
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY:
    // - message: describes `bytes`, which is only read, and the control buffer
    // - the descriptor is open, being borrowed
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives up to `buffer.len()` bytes and the descriptors that come with them. Returns 0 bytes at the end of the
/// stream. The descriptors are closed on exec.
///
/// # Errors
/// `WouldBlock` if `wait` is not set and no byte has arrived, or the system's error.
pub fn receive(
    stream: &UnixStream,
    buffer: &mut [u8],
    wait: bool,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut message = empty_message(&raw mut part);
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | if wait { 0 } else { libc::MSG_DONTWAIT };
    // SAFETY:
    // - message: describes `buffer` and `control`, both valid for writes for the whole call
    // - the descriptor is open, being borrowed
    let got = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, flags) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    // SAFETY: message is as the kernel has left it, and its control buffer is still there.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: header is not null, so it lies in the control buffer and was filled in.
        let found = unsafe { *header };
        if found.cmsg_level == libc::SOL_SOCKET && found.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: header is that of a control message.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(header) }.cast();
            // SAFETY: computes a size.
            let before = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = found.cmsg_len.saturating_sub(before) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: below the number of descriptors in this control message.
                let at = unsafe { data.add(index) };
                // SAFETY: the kernel has written a descriptor's number there.
                let number = unsafe { at.read_unaligned() };
                // SAFETY: the kernel has made the descriptor for this process just now.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: both are those of the message.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok((got, fds))
}

/// Keeps `bytes` of mapped memory from `start` on out of the children that this process forks.
///
/// # Errors
/// The system's error, for example if nothing is mapped there.
pub fn keep_from_children(start: *mut u8, bytes: usize) -> io::Result<()> {
    // SAFETY: the advice changes nothing in this process, whatever is mapped there.
    if unsafe { libc::madvise(start.cast(), bytes, libc::MADV_DONTFORK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn empty_message(part: *mut libc::iovec) -> libc::msghdr {
    // SAFETY: zero is a value of every field; pointers are null and lengths 0.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message
}

/// Connects to the socket at `path`. Waits up to `patience` if the listener's backlog is full.
///
/// # Errors
/// `WouldBlock` if the backlog stays full, or the system's error.
pub fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: zero is a value of every field.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    address.sun_family = libc::AF_UNIX.try_into().map_err(too_large)?;
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).map_err(too_large)?;
    // One byte stays 0: the end of the path.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed() as libc::c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has made the descriptor for this call just now.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // It bounds `connect`, too: unix(7).
    stream.set_write_timeout(Some(patience))?;
    loop {
        let at: *const libc::sockaddr_un = &raw const address;
        // SAFETY:
        // - address: valid for reads of its own length; the path ends with a zero
        // - the descriptor is open, being ours
        let done = unsafe { libc::connect(stream.as_raw_fd(), at.cast(), len) };
        if done == 0 {
            return Ok(stream);
        }
        let cause = io::Error::last_os_error();
        if cause.kind() != io::ErrorKind::Interrupted {
            return Err(cause);
        }
    }
}

/// Waits up to `patience` until the socket has room. Returns whether it has.
///
/// # Errors
/// The system's error.
pub fn wait_for_room(stream: &UnixStream, patience: Duration) -> io::Result<bool> {
    poll(stream.as_raw_fd(), libc::POLLOUT, patience)
}

/// Waits up to `patience` for one of `events`. Returns whether one occurred; a signal ends the wait early.
///
/// # Errors
/// The system's error.
pub fn poll(fd: RawFd, events: libc::c_short, patience: Duration) -> io::Result<bool> {
    let mut watched = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(patience.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(patience.subsec_nanos() as i32),
    };
    // SAFETY:
    // - watched: one structure, valid for writes for the whole call
    // - timeout: valid for reads; no signal mask is given
    let ready = unsafe { libc::ppoll(&raw mut watched, 1, &raw const timeout, std::ptr::null()) };
    match ready {
        1.. => Ok(watched.revents & events != 0),
        0 => Ok(false),
        _ => match io::Error::last_os_error() {
            cause if cause.kind() == io::ErrorKind::Interrupted => Ok(false),
            cause => Err(cause),
        },
    }
}
