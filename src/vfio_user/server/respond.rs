//! The response to one message of a client.

use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

use super::commands::{Reply, execute};
use super::device::ServedDevice;
use crate::vfio_user::message::{
    Command, DmaUnmapBody, Header, IrqInfoBody, Kind, Malformed, RegionInfoBody, check_command,
};
use crate::vfio_user::socket::{Message, SocketError};
use crate::vfio_user::version::{Version, VersionError};

/// Why the server cuts a client off.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The connection failed, or the client sent bytes that are not a message.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A command has too few bytes, or too many descriptors.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// VERSION cannot be decoded, or names another protocol.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// The client violated the protocol.
    #[error("{0}")]
    Protocol(&'static str),
    /// The client sent a command that only servers send.
    #[error("the client sent {0:?}, a command for servers to send")]
    ServerCommand(Command),
    /// The device takes no client now.
    #[error("{0}")]
    Refused(String),
    /// A system call failed.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// What the client gets for a message.
#[derive(Debug)]
pub(super) struct Response {
    /// The reply, header and body.
    pub(super) bytes: Vec<u8>,
    /// The descriptor that goes with it.
    pub(super) descriptor: Option<OwnedFd>,
}

impl From<Vec<u8>> for Response {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            descriptor: None,
        }
    }
}

/// Executes a message. The first one of a client, before it `is_negotiated`, must be VERSION: the answer
/// limits a transfer to `max_data` bytes. Returns the response, if the client gets one.
///
/// # Errors
/// The client has to be cut off.
pub(super) fn respond(
    device: &mut dyn ServedDevice,
    is_negotiated: bool,
    max_data: u32,
    message: Message,
) -> Result<Option<Response>, ClientError> {
    let header = message.header;
    match header.kind {
        Kind::Command { .. } => {}
        Kind::Reply | Kind::Refusal(_) => {
            handle_reply(device, &message)?;
            return Ok(None);
        }
    }
    let command = Command::from_number(header.command);
    if let Some(command) = command {
        check_command(command, &message.body, message.descriptors.len())?;
    }
    if !is_negotiated {
        if command != Some(Command::Version) {
            return Err(ClientError::Protocol(
                "the client's first message is not VERSION",
            ));
        }
        let client = Version::decode(&message.body)?;
        let mut answer = client.server_answer()?;
        let negotiated = device.negotiate(&client, &mut answer.capabilities);
        negotiated.map_err(ClientError::Refused)?;
        let most = u64::from(max_data);
        let data = &mut answer.capabilities.max_data_xfer_size;
        *data = Some(data.map_or(most, |data| data.min(most)));
        return Ok(response(&header, Ok(answer.encode().into())));
    }
    let outcome = match command {
        None => Err(libc::ENOTSUP),
        Some(Command::Version) => {
            return Err(ClientError::Protocol("the client sent VERSION twice"));
        }
        Some(command @ (Command::DmaRead | Command::DmaWrite)) => {
            return Err(ClientError::ServerCommand(command));
        }
        Some(command) => {
            let usual = usual_reply(device, command, &message.body);
            let outcome = execute(device, command, message)?;
            if let (Err(errno), Some(body)) = (&outcome, usual)
                && !header.wants_no_reply()
            {
                let bytes = header.refusal_of(*errno).with_body(&body);
                return Ok(Some(bytes.into()));
            }
            outcome
        }
    };
    Ok(response(&header, outcome))
}

fn response(header: &Header, outcome: Result<Reply, i32>) -> Option<Response> {
    if header.wants_no_reply() {
        return None;
    }
    Some(match outcome {
        Ok(reply) => Response {
            bytes: header.reply_to(reply.body.len()).with_body(&reply.body),
            descriptor: reply.descriptor,
        },
        Err(errno) => header.refusal_of(errno).encode().to_vec().into(),
    })
}

/// The body that a reply to this command has if it succeeds, as far as the command tells, for a client that reads as
/// many bytes of a refusal. `None` if the client reads a header first, or the reply has no body.
fn usual_reply(device: &dyn ServedDevice, command: Command, body: &[u8]) -> Option<Vec<u8>> {
    let len = match command {
        Command::DmaUnmap => DmaUnmapBody::BYTES,
        Command::DeviceGetRegionInfo => RegionInfoBody::BYTES,
        Command::DeviceGetIrqInfo => IrqInfoBody::BYTES,
        _ => return None,
    };
    let body = body
        .get(..len as usize)
        .filter(|_| device.answers_all_accesses());
    body.map(<[u8]>::to_vec)
}

fn handle_reply(device: &mut dyn ServedDevice, message: &Message) -> Result<(), ClientError> {
    if !device.sends_commands() {
        return Err(ClientError::Protocol(
            "the client sent a reply, and the server sends no commands",
        ));
    }
    if !message.descriptors.is_empty() {
        return Err(ClientError::Protocol(
            "the client sent a reply with descriptors",
        ));
    }
    if device.handle_reply(&message.header, &message.body) {
        Ok(())
    } else {
        Err(ClientError::Protocol("the client replied to no command"))
    }
}
