//! A server's own accesses to memory: each is looked up, checked and done here, or refused.

use zerocopy::IntoBytes;

use super::message::{Command, DmaAccessBody, HEADER_BYTES, Header, MAX_DATA, Malformed, take};
use super::{DmaTarget, Refused};
use crate::address::{Iova, IovaRange};

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
        Err(Refused) => refusal(libc::EFAULT),
    }
}
