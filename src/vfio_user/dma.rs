//! Accesses to memory that a device's server asks for: each is checked and performed here, or
//! refused.

use std::fs::File;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::message::{Command, DmaAccessBody, HEADER_BYTES, Header, MAX_DATA, Malformed, take};
use crate::address::{Access, Iova, IovaRange};

/// Memory that a device may reach.
#[derive(Clone, Debug)]
pub struct Window {
    /// The device's addresses.
    pub range: IovaRange,
    /// The rights of the device there, at least one.
    pub access: Access,
    /// The file that the server can map, and the offset of the window in it. Without a file the server
    /// has to send DMA_READ and DMA_WRITE.
    pub file: Option<(Arc<File>, u64)>,
}

/// The device has no right to an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessDenied;

/// Memory as a device sees it.
///
/// The interposer's thread calls this trait. An implementation must not wait for a thread that uses a
/// [`Link`](super::Link), or for a lock that such a thread holds while it waits for a reply, above all
/// the lock of the core.
pub trait DmaTarget: Send + Sync {
    /// Reads all of `range`, which is as long as `into`.
    ///
    /// # Errors
    /// The device may not read all of the range. The content of `into` is then unspecified.
    fn read(&self, range: IovaRange, into: &mut [u8]) -> Result<(), AccessDenied>;

    /// Writes all of `range`, which is as long as `from`.
    ///
    /// # Errors
    /// The device may not write all of the range. Nothing is then written.
    fn write(&self, range: IovaRange, from: &[u8]) -> Result<(), AccessDenied>;

    /// The first `limit` windows, in ascending order, of those whose first address is not below `first`. The caller holds
    /// the lock of the [`Link`](super::Link).
    fn windows_from(&self, first: Iova, limit: usize) -> Vec<Window>;
}

/// Executes a DMA_READ or DMA_WRITE. Returns the whole reply.
///
/// # Errors
/// The body is malformed, although [`check_command`](super::message::check_command) accepted it.
pub(super) fn serve(
    target: &dyn DmaTarget,
    header: &Header,
    command: Command,
    body: &[u8],
) -> Result<Vec<u8>, Malformed> {
    let (access, data) = take::<DmaAccessBody>(command, body)?;
    let refusal = |errno| Ok(header.refusal_of(errno).encode().to_vec());
    let count = access.count.get();
    let (Ok(len), true) = (usize::try_from(count), count <= MAX_DATA.into()) else {
        return refusal(libc::E2BIG);
    };
    let range = IovaRange::from_len(Iova(access.address.get()), count);
    if range.is_none() && count > 0 {
        return refusal(libc::EINVAL);
    }
    let head = access.as_bytes();
    let mut reply = header.reply_to(head.len()).with_body(head);
    let outcome = match (range, command) {
        (None, _) => Ok(()),
        (Some(range), Command::DmaWrite) => {
            let data = data.get(..len).unwrap_or(data);
            target.write(range, data)
        }
        (Some(range), _) => {
            let body_len = head.len() + len;
            reply[..HEADER_BYTES].copy_from_slice(&header.reply_to(body_len).encode());
            let at = reply.len();
            reply.resize(at + len, 0);
            target.read(range, &mut reply[at..])
        }
    };
    match outcome {
        Ok(()) => Ok(reply),
        Err(AccessDenied) => refusal(libc::EFAULT),
    }
}
