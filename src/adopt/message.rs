//! The request of a daemon and the answer of the helper, each a few lines of text up to the end of the stream.
//!
//! ```text
//! daemon                                  helper
//!   viommu-adopt 1                          found
//!   0000:65:00.0                            iommufd
//!   0000:66:00.0                            0000:65:00.0
//!   (with the VMM's socket)                 (with a descriptor for each line below the first)
//! ```
//!
//! or `refused REASON` in one line. A device that the VMM has not bound yet is missing from the answer.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::{AdoptError, MAX_DEVICES};
use crate::topology::HostAddress;

/// The first line of a request.
const HELLO: &str = "viommu-adopt 1";
/// The first line of an answer with descriptors.
const FOUND: &str = "found";
/// The beginning of an answer without.
const REFUSED: &str = "refused ";
/// The name of the iommufd in an answer.
const IOMMUFD: &str = "iommufd";
/// The most bytes of a message. Enough for the longest reason and for the names of all devices.
const MAX_BYTES: usize = 4096;
/// The most descriptors of a message: the devices and their iommufd.
const MAX_FILES: usize = MAX_DEVICES + 1;

/// The VMM's open files that were found.
#[derive(Debug, Default)]
pub struct FoundFiles {
    /// The iommufd to which the devices are bound; present if there are devices.
    pub iommufd: Option<OwnedFd>,
    /// The devices that the VMM has bound.
    pub devices: BTreeMap<HostAddress, OwnedFd>,
}

/// Asks the helper at the other end of `helper` for `devices` of the VMM at the other end of `vmm`. Waits until `deadline`.
///
/// # Errors
/// The helper has refused, which the text says; it does not answer in time, or answers something else.
pub fn ask(
    helper: &UnixStream,
    vmm: BorrowedFd<'_>,
    devices: &[HostAddress],
    deadline: Instant,
) -> io::Result<FoundFiles> {
    let odd = || {
        io::Error::other(
            "it answers with something else than descriptors; use a daemon and a helper of one version",
        )
    };
    let mut text = format!("{HELLO}\n");
    for device in devices {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{device}");
    }
    let sent = send(helper, &text, &[vmm], deadline);
    // A helper that refuses may answer before it has read everything.
    let (text, files) = match receive(helper, deadline) {
        Ok((text, _)) if text.is_empty() => return Err(sent.err().unwrap_or_else(odd)),
        received => received?,
    };
    if let Some(reason) = text.strip_prefix(REFUSED) {
        let visible = |c: char| if c.is_control() { ' ' } else { c };
        let reason: String = reason.trim_end().chars().map(visible).collect();
        return Err(io::Error::other(reason));
    }
    let mut lines = text.lines();
    if lines.next() != Some(FOUND) {
        return Err(odd());
    }
    let mut found = FoundFiles::default();
    let mut files = files.into_iter();
    for line in lines {
        let file = files.next().ok_or_else(odd)?;
        if line == IOMMUFD && found.iommufd.is_none() {
            found.iommufd = Some(file);
            continue;
        }
        let device: HostAddress = line.parse().map_err(|_| odd())?;
        if !devices.contains(&device) || found.devices.insert(device, file).is_some() {
            return Err(odd());
        }
    }
    if files.next().is_some() || found.iommufd.is_some() == found.devices.is_empty() {
        return Err(odd());
    }
    Ok(found)
}

/// Receives a request: the wanted devices, and the VMM's socket.
pub(crate) fn receive_request(
    daemon: &UnixStream,
    deadline: Instant,
) -> Result<(Vec<HostAddress>, OwnedFd), AdoptError> {
    let (text, files) = receive(daemon, deadline).map_err(|source| AdoptError::System {
        step: "receive a request",
        source,
    })?;
    let mut lines = text.lines();
    if lines.next() != Some(HELLO) {
        return Err(AdoptError::Request("its first line is another one"));
    }
    let mut devices = Vec::new();
    for line in lines {
        let device = line.parse();
        devices.push(device.map_err(|_| AdoptError::Request("a line is no PCI address"))?);
    }
    if devices.is_empty() || devices.len() > MAX_DEVICES {
        return Err(AdoptError::Request("it names no device, or too many"));
    }
    let mut files = files.into_iter();
    match (files.next(), files.next()) {
        (Some(socket), None) => Ok((devices, socket)),
        _ => Err(AdoptError::Request(
            "it comes with other descriptors than one socket",
        )),
    }
}

/// Answers a request.
pub(crate) fn answer(
    daemon: &UnixStream,
    outcome: Result<&FoundFiles, &AdoptError>,
    deadline: Instant,
) -> io::Result<()> {
    let found = match outcome {
        Ok(found) => found,
        Err(cause) => {
            let visible = |c: char| if c.is_control() { ' ' } else { c };
            let mut reason: String = cause.to_string().chars().map(visible).collect();
            let room = MAX_BYTES - REFUSED.len() - 1;
            while reason.len() > room {
                reason.pop();
            }
            return send(daemon, &format!("{REFUSED}{reason}\n"), &[], deadline);
        }
    };
    let mut text = format!("{FOUND}\n");
    let mut files = Vec::new();
    if let Some(iommufd) = &found.iommufd {
        text.push_str(IOMMUFD);
        text.push('\n');
        files.push(iommufd.as_fd());
    }
    for (device, file) in &found.devices {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{device}");
        files.push(file.as_fd());
    }
    send(daemon, &text, &files, deadline)
}

/// Sends a message, and closes this direction of the connection.
fn send(
    socket: &UnixStream,
    text: &str,
    files: &[BorrowedFd<'_>],
    deadline: Instant,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::net::sendmsg(socket, &[IoSlice::new(rest)], &mut control, flags) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or(&[]);
                // They have gone with the first byte.
                control.clear();
            }
            Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    socket.shutdown(Shutdown::Write)
}

/// Receives a message up to the end of the stream, with its descriptors.
fn receive(socket: &UnixStream, deadline: Instant) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = Vec::new();
    let mut files = Vec::new();
    loop {
        let mut buffer = [0; 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let slices = &mut [IoSliceMut::new(&mut buffer)];
        let received = match rustix::net::recvmsg(socket, slices, &mut control, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN) => {
                wait(socket, PollFlags::IN, deadline)?;
                continue;
            }
            Err(Errno::INTR) => continue,
            Err(cause) => return Err(cause.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                files.extend(more);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || files.len() > MAX_FILES {
            return Err(io::Error::other("more descriptors came than a message has"));
        }
        if received.bytes == 0 {
            break;
        }
        bytes.extend_from_slice(buffer.get(..received.bytes).unwrap_or(&[]));
        if bytes.len() > MAX_BYTES {
            return Err(io::Error::other("the message is too long"));
        }
    }
    let text = String::from_utf8(bytes).map_err(|_| io::Error::other("the message is no text"))?;
    Ok((text, files))
}

/// Waits for one of `events` until `deadline`.
fn wait(socket: &UnixStream, events: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left == Duration::ZERO {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "it does not answer in time",
        ));
    }
    let timeout = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(socket, events)], Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(cause) => Err(cause.into()),
    }
}
