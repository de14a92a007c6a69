//! Whole frames over a socket.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::sys::{receive, send, wait_for_room};
use super::wire::{FRAME_LEN, Frame};

/// Sends a frame with `fds`. Waits for room in the socket, until `deadline` if there is one.
///
/// # Errors
/// `TimedOut` if the deadline passes, or the system's error. Part of the frame may have been sent.
pub fn send_frame(
    stream: &UnixStream,
    frame: &Frame,
    fds: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> io::Result<()> {
    let bytes = frame.to_wire();
    let (mut rest, mut fds) = (bytes.as_slice(), fds);
    while !rest.is_empty() {
        match send(stream, rest, fds) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                fds = &[];
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {
                let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
                let has_room = match left {
                    Some(Duration::ZERO) => false,
                    Some(left) => wait_for_room(stream, left)?,
                    None => wait_for_room(stream, Duration::from_secs(1)).map(|_| true)?,
                };
                if !has_room {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}

/// Waits for a frame and the descriptors that come with it.
///
/// # Errors
/// `UnexpectedEof` if the stream ends, or the system's error.
pub fn receive_frame(stream: &UnixStream) -> io::Result<(Frame, Vec<OwnedFd>)> {
    let mut bytes = [0; FRAME_LEN];
    let mut filled = 0;
    let mut fds = Vec::new();
    while filled < FRAME_LEN {
        match receive(stream, bytes.get_mut(filled..).unwrap_or_default(), true) {
            Ok((0, _)) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Ok((got, came)) => {
                filled += got;
                fds.extend(came);
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok((Frame::from_wire(&bytes), fds))
}
