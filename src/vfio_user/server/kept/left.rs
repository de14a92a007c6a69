//! What an earlier process has left of a client, and how far that process had come.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::super::device::ClientFiles;
use super::book::{BookNames, ClientBook};
use super::lookahead::{MAX_UNTAKEN, take};
use super::progress::{LeftProgress, MAX_BYTES};
use crate::process::keeper::Keeper;
use crate::process::left_connection::{Claims, missing};
use crate::process::peek::{peek_offset, set_peek_offset};
use crate::process::record::refused;
use crate::process::reply_pipe::ReplyPipe;
use crate::vfio_user::message::MAX_MESSAGE;

/// A message that so many processes have died of is not executed again.
const MAX_ATTEMPTS: u64 = 2;

/// The connection of a client to an earlier process.
#[derive(Debug)]
pub struct LeftClient {
    pub(in super::super) socket: UnixStream,
    /// The state of the device; `None` if the client has not negotiated.
    pub(in super::super) device: Option<Vec<u8>>,
    pub(in super::super) files: ClientFiles,
    pub(in super::super) place: LeftPlace,
}

/// How far an earlier process had come with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct LeftPlace {
    /// The client has negotiated.
    pub(super) is_negotiated: bool,
    /// Bytes of the messages that are executed.
    pub(super) executed: u64,
    /// The first message in the socket has begun, and must be executed before anything else.
    pub(super) is_begun: bool,
    /// Bytes of the reply that the client does not have.
    pub(super) unsent: usize,
}

/// Finds the client that an earlier process has left, and claims all that belongs to it. `None` if there is none.
///
/// # Errors
/// Something of it is missing or damaged. The connection is then closed.
pub(super) fn find(
    keeper: &Arc<Keeper>,
    name: &str,
) -> io::Result<Option<(ClientBook, LeftClient)>> {
    let names = BookNames::new(name);
    let Some(connection) = names.sockets.last(keeper) else {
        return Ok(None);
    };
    let mut claims = Claims::new(keeper);
    let socket = claims.claim(&names.sockets.of(connection))?;
    let socket = UnixStream::from(socket.try_clone()?);
    let found = of(keeper, names, connection, &socket, &mut claims);
    if !matches!(found, Ok(Some(_))) {
        claims.refuse(&socket);
    }
    found.map_err(|cause| {
        let text = format!(
            "the connection of a vfio-user client to the daemon before cannot be taken over: {cause}; the connection is \
             closed, so the VM must be started anew"
        );
        io::Error::new(cause.kind(), text)
    })
}

fn of(
    keeper: &Arc<Keeper>,
    names: BookNames,
    connection: u64,
    socket: &UnixStream,
    claims: &mut Claims<'_>,
) -> io::Result<Option<(ClientBook, LeftClient)>> {
    let record = claims.claim(&names.record)?.try_clone()?;
    let reply = names.reply.clone();
    let reply = ReplyPipe::left(keeper, &reply).ok_or_else(|| missing(&reply))?;
    let found = ClientBook::left(keeper.clone(), names, record, reply)
        .map_err(|cause| io::Error::new(cause.kind(), format!("its record is refused: {cause}")))?;
    let Some((book, state)) = found else {
        return Ok(None);
    };
    let recorded = book.recorded();
    if recorded.is_over {
        return Ok(None);
    }
    if recorded.connection != connection {
        return Err(refused("its record is of another connection"));
    }
    let mut files = ClientFiles::new();
    for name in &recorded.names {
        files.insert(name.clone(), claims.claim(name)?);
    }
    let device = recorded.has_device.then_some(state);
    let left = LeftClient {
        socket: socket.try_clone()?,
        device,
        files,
        place: settle(&book, socket)?,
    };
    Ok(Some((book, left)))
}

/// Takes the rest of the last message out of the socket if it is executed. Returns what is left to do.
fn settle(book: &ClientBook, socket: &UnixStream) -> io::Result<LeftPlace> {
    let progress = &book.progress;
    let found = progress.load();
    let executed = found.executed.max(book.recorded().executed);
    let LeftProgress {
        begun,
        once,
        looked,
        taken,
        taking,
        attempts,
        ..
    } = found;
    let begun_at = begun.checked_sub(1);
    let is_sound = found.is_plausible()
        && executed <= MAX_BYTES
        && taken <= taking
        && taking <= executed
        && begun_at.is_none_or(|at| at <= executed);
    if !is_sound {
        return Err(refused("its words do not add up"));
    }
    let is_begun = begun_at == Some(executed);
    if is_begun && once == begun {
        return Err(io::Error::other(
            "the daemon before has ended while it executed a message that must not be executed twice, or sent a \
             descriptor",
        ));
    }
    if is_begun && attempts >= MAX_ATTEMPTS {
        return Err(io::Error::other(format!(
            "{attempts} daemons have ended while they executed the client's next message"
        )));
    }
    // While bytes are taken out, nobody looks at more: the offset falls by what is out.
    let out = if taken < taking {
        let offset = u64::from(peek_offset(socket.as_fd())?.unwrap_or(0));
        looked
            .checked_sub(offset)
            .filter(|out| (taken..=taking).contains(out))
            .ok_or_else(|| refused("its socket has another peek offset"))?
    } else {
        taken
    };
    let left = usize::try_from(executed - out)
        .ok()
        .filter(|left| *left <= MAX_UNTAKEN + MAX_MESSAGE as usize);
    let left = left.ok_or_else(|| refused("its words do not add up"))?;
    progress.executed(executed);
    // If this process dies, too: as above, with what is looked at now.
    let offset = u32::try_from(left).map_err(io::Error::other)?;
    if taken == taking {
        set_peek_offset(socket.as_fd(), offset)?;
        progress.take(executed, executed);
    }
    take(socket, left)?;
    progress.taken(executed);
    set_peek_offset(socket.as_fd(), 0)?;
    if is_begun {
        // Of a reply that counts for nothing.
        book.reply.clear()?;
    }
    Ok(LeftPlace {
        is_negotiated: book.recorded().has_device,
        executed,
        is_begun,
        unsent: book.reply.unsent()?,
    })
}
