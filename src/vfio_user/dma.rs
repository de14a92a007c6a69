//! A server's own accesses to memory: each is looked up, checked and done here, or refused.

use zerocopy::IntoBytes;

use super::link::Window;
use super::message::{Command, DmaAccessBody, HEADER_BYTES, Header, MAX_DATA, Malformed, take};
use crate::address::{Iova, IovaRange};

/// An access that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessDenied;

/// Memory as a device sees it.
///
/// The interposer's thread calls this. It must not wait for whoever gives a [`Link`] orders, nor
/// for anything such a one may hold while it waits for a reply, the core above all.
pub trait DmaTarget: Send + Sync {
    /// Reads all of `range`, which is as long as `into`.
    ///
    /// # Errors
    /// Where some of it may not be read; what is in `into` then means nothing.
    fn read(&self, range: IovaRange, into: &mut [u8]) -> Result<(), AccessDenied>;

    /// Writes all of `range`, which is as long as `from`.
    ///
    /// # Errors
    /// Where some of it may not be written; nothing is written then.
    fn write(&self, range: IovaRange, from: &[u8]) -> Result<(), AccessDenied>;

    /// What a server that connects may reach; called with the [`Link`] locked.
    fn windows(&self) -> Vec<Window>;
}

/// Does what DMA_READ or DMA_WRITE asks for. Returns the whole reply.
///
/// The body is well-formed ([`super::message::check_command`]).
///
/// # Errors
/// Where it is not.
pub(super) fn serve(
    target: &dyn DmaTarget,
    header: &Header,
    command: Command,
    body: &[u8],
) -> Result<Vec<u8>, Malformed> {
    let (access, data) = take::<DmaAccessBody>(command, body)?;
    let refusal = |error| Ok(header.refusal_of(error).encode().to_vec());
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
    let done = match (range, command) {
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
    match done {
        Ok(()) => Ok(reply),
        Err(AccessDenied) => refusal(libc::EFAULT),
    }
}
