//! Whole frames over a socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::sys::{receive, send, wait_for_room};
use super::wire::{FRAME_LEN, Frame};

/// Says a frame, however long the daemon takes to listen.
pub fn send_frame(stream: &UnixStream, frame: &Frame) -> io::Result<()> {
    let bytes = frame.to_wire();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match send(stream, rest, &[]) {
            Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {
                wait_for_room(stream, Duration::from_secs(1))?;
            }
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}

/// Waits for a frame and the descriptors that come with it.
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
