//! Answers for clients that take no refusal for an answer: cloud-hypervisor's reads as many bytes of any reply as a good
//! one would have, and waits for them for ever.
//!
//! An access of such a client that nobody serves is answered as a bus answers an access that no device claims: a read
//! gives ones, a write is dropped. Another refusal is as long as the reply would be.

use std::collections::HashMap;

use crate::vfio_user::message::{
    Command, DmaUnmapBody, Header, IrqInfoBody, MAX_DATA, RegionAccessBody, RegionInfoBody, take,
};

/// The commands of a client that wait for replies, as far as their replies have a fixed length.
#[derive(Debug, Default)]
pub(super) struct FixedReplies {
    /// By the number that the client gave the command: the body of a reply to it.
    bodies: HashMap<u16, ReplyBody>,
}

#[derive(Debug)]
enum ReplyBody {
    /// To an access: the bytes in front of the data, and the number of bytes of data.
    Access(Vec<u8>, usize),
    /// To another command.
    Other(Vec<u8>),
}

impl FixedReplies {
    /// The client has sent a command.
    pub fn record(&mut self, header: &Header, command: Command, body: &[u8]) {
        if header.wants_no_reply() {
            return;
        }
        let first = |len: u32| Some(ReplyBody::Other(body.get(..len as usize)?.to_vec()));
        let reply = match command {
            Command::RegionRead | Command::RegionWrite => access(command, body),
            Command::DmaUnmap => first(DmaUnmapBody::BYTES),
            Command::DeviceGetRegionInfo => first(RegionInfoBody::BYTES),
            Command::DeviceGetIrqInfo => first(IrqInfoBody::BYTES),
            _ => None,
        };
        match reply {
            Some(reply) => self.bodies.insert(header.id, reply),
            None => self.bodies.remove(&header.id),
        };
    }

    /// The message that refuses the command of `header` with the errno `error`.
    pub fn refusal(&mut self, header: &Header, error: i32) -> Vec<u8> {
        match self.bodies.remove(&header.id) {
            Some(ReplyBody::Access(mut body, data)) => {
                body.resize(body.len() + data, 0xff);
                header.reply_to(body.len()).with_body(&body)
            }
            Some(ReplyBody::Other(body)) => header.refusal_of(error).with_body(&body),
            None => header.refusal_of(error).encode().to_vec(),
        }
    }

    /// The command with the number `id` has a reply of the interposer's own.
    pub fn forget(&mut self, id: u16) {
        self.bodies.remove(&id);
    }

    /// The server's reply to the command with the number `id` has this body. Adds ones to it if it has fewer bytes than
    /// the client has asked for.
    pub fn complete(&mut self, id: u16, mut body: Vec<u8>) -> Vec<u8> {
        if let Some(ReplyBody::Access(head, data)) = self.bodies.remove(&id)
            && body.len() < head.len() + data
        {
            body.resize(head.len() + data, 0xff);
            body[..head.len()].copy_from_slice(&head);
        }
        body
    }
}

fn access(command: Command, body: &[u8]) -> Option<ReplyBody> {
    let (access, _) = take::<RegionAccessBody>(command, body).ok()?;
    let count = access.count.get();
    if count > MAX_DATA {
        return None;
    }
    let head = body.get(..RegionAccessBody::BYTES as usize)?.to_vec();
    let data = match command {
        Command::RegionRead => count as usize,
        _ => 0,
    };
    Some(ReplyBody::Access(head, data))
}
