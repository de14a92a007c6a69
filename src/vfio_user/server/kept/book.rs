//! Keeps what a later process needs to go on with a client: the record, the client's socket, the pipe of the replies, and
//! the descriptors that the client has passed.
//!
//! A descriptor is kept before the record names it, and released after the record does not name it any more. So a process
//! that dies in between leaves a descriptor too many, which the next one releases, and never one too few.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::super::device::DeviceRecord;
use super::progress::ClientProgress;
use crate::process::keeper::Keeper;
use crate::process::left_connection::SocketNames;
use crate::process::record::{Record, RecordFormat, refused};
use crate::process::reply_pipe::ReplyPipe;
use crate::process::unkept::UnkeptConnection;
use crate::warn_limited;

/// The version of the record, of the words beside it, and of all devices' states in it.
pub const VERSION: u64 = 1;
const FORMAT: RecordFormat = RecordFormat {
    magic: *b"iovaclnt",
    version: VERSION,
    oldest: VERSION,
    name: "viommu-client",
};
/// The bytes before the device's state, after the number of these bytes.
const LENGTH: usize = 8;
/// The most descriptors of a client: as many as a keeper has.
const MAX_NAMES: usize = crate::process::keeper::MAX_KEPT;

/// The names of the kept descriptors of a server's clients.
#[derive(Clone, Debug)]
pub(super) struct BookNames {
    pub(super) record: String,
    pub(super) reply: String,
    pub(super) sockets: SocketNames,
}

impl BookNames {
    pub(super) fn new(base: &str) -> Self {
        Self {
            record: format!("{base}-record"),
            reply: format!("{base}-reply"),
            sockets: SocketNames::new(format!("{base}-socket.")),
        }
    }
}

/// What is recorded before the device's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecordedClient {
    /// The number of the connection, which the name of the kept socket has, too.
    pub(super) connection: u64,
    /// The connection has ended.
    pub(super) is_over: bool,
    /// Bytes of the messages that the state includes.
    pub(super) executed: u64,
    /// The client has negotiated, so there is a state of the device.
    pub(super) has_device: bool,
    /// The names of the client's descriptors, as often as the state has them.
    pub(super) names: Vec<String>,
}

/// The record of one client after the other, and the descriptors that belong to it.
#[derive(Debug)]
pub(in super::super) struct ClientBook {
    keeper: Arc<Keeper>,
    names: BookNames,
    record: Record,
    pub(super) progress: ClientProgress,
    pub(super) reply: ReplyPipe,
    recorded: RecordedClient,
    /// The keeper has the record's memfd and the pipe.
    has_record: bool,
    /// The keeper has the client's socket, and the record is up to date.
    is_kept: bool,
    /// Counts a connection that is open, and is not kept.
    unkept: Option<UnkeptConnection>,
    /// The names of descriptors to release, each as often as it was kept more than the record names it.
    unused: Vec<String>,
}

impl ClientBook {
    /// An empty book.
    ///
    /// # Errors
    /// The system refuses the memfd of the record, or the pipe.
    pub(super) fn new(keeper: Arc<Keeper>, name: &str) -> io::Result<Self> {
        let names = BookNames::new(name);
        let record = Record::new(&FORMAT)?;
        Ok(Self {
            progress: ClientProgress::map(record.file())?,
            record,
            reply: ReplyPipe::new()?,
            recorded: RecordedClient {
                connection: names.sockets.last(&keeper).unwrap_or(0),
                is_over: true,
                ..RecordedClient::default()
            },
            names,
            keeper,
            has_record: false,
            is_kept: false,
            unkept: None,
            unused: Vec::new(),
        })
    }

    /// The book that an earlier process has left, and the state of the device. `None` as the book if that process has
    /// recorded nothing.
    ///
    /// # Errors
    /// The record does not add up.
    pub(super) fn left(
        keeper: Arc<Keeper>,
        names: BookNames,
        record: std::os::fd::OwnedFd,
        reply: ReplyPipe,
    ) -> io::Result<Option<(Self, Vec<u8>)>> {
        let (record, left) = Record::adopt(&FORMAT, record)?;
        let Some(left) = left else {
            return Ok(None);
        };
        let (recorded, state) = decode(&left.bytes)?;
        let book = Self {
            progress: ClientProgress::map(record.file())?,
            record,
            reply,
            recorded,
            names,
            keeper,
            has_record: true,
            is_kept: true,
            unkept: None,
            unused: Vec::new(),
        };
        Ok(Some((book, state)))
    }

    /// A client has connected through `socket`.
    pub(super) fn open(&mut self, socket: &UnixStream) {
        self.recorded = RecordedClient {
            connection: self.recorded.connection.saturating_add(1),
            ..RecordedClient::default()
        };
        self.is_kept = true;
        self.unkept = None;
        if let Err(cause) = self.keep_connection(socket) {
            self.lose(&cause);
        }
    }

    fn keep_connection(&mut self, socket: &UnixStream) -> io::Result<()> {
        if !self.has_record {
            self.keeper
                .keep_as(&self.names.record, self.record.file())?;
            self.reply.keep(&self.keeper, &self.names.reply)?;
            self.has_record = true;
        }
        self.reply.clear()?;
        // The record says that the connection before is over, so nobody reads the words.
        self.progress.reset();
        self.write(&[])?;
        self.keeper.keep_as(&self.socket_name(), socket.as_fd())
    }

    /// What is recorded.
    pub(super) fn recorded(&self) -> &RecordedClient {
        &self.recorded
    }

    /// A message is executed: `executed` bytes are, and the device has changed to `state`, if it has changed. The caller must
    /// [release](Self::release_unused) the descriptors that the device does not use any more.
    pub(super) fn execute(&mut self, executed: u64, state: Option<DeviceRecord>) {
        match state {
            Some(state) if self.is_kept => self.record(executed, state),
            // The names of the record before are released already.
            Some(state) => self.unused.extend(state.kept),
            None => {}
        }
        self.progress.executed(executed);
    }

    fn record(&mut self, executed: u64, state: DeviceRecord) {
        let mut held = std::mem::take(&mut self.recorded.names);
        held.extend(state.kept);
        self.unused.extend(missing_names(&held, &state.names));
        self.recorded.names = state.names;
        self.recorded.executed = executed;
        self.recorded.has_device = true;
        let written = if self.recorded.names.iter().any(String::is_empty) {
            Err(io::Error::other("a descriptor of the client is not kept"))
        } else if self.recorded.names.len() > MAX_NAMES {
            let text = format!("it has more than {MAX_NAMES} descriptors");
            Err(io::Error::other(text))
        } else {
            self.write(&state.bytes)
        };
        if let Err(cause) = written {
            self.lose(&cause);
        }
    }

    /// Notes descriptors that were kept for a message that was not executed to its end.
    pub(super) fn abandon(&mut self, kept: Vec<String>) {
        self.unused.extend(kept);
    }

    /// Releases the descriptors that the record does not name any more, each as often as it was kept more.
    pub(super) fn release_unused(&mut self) {
        let names = std::mem::take(&mut self.unused);
        self.keeper.release_all(&names);
    }

    /// The connection has ended: nothing of it is kept any more.
    pub(super) fn close(&mut self) {
        self.unkept = None;
        if self.is_kept {
            self.give_up();
        }
        self.release_unused();
    }

    /// The connection goes on, and ends with this process.
    fn lose(&mut self, cause: &io::Error) {
        warn_limited!(
            "the connection of a vfio-user client cannot be kept, so it does not survive the end of this daemon: {cause}"
        );
        self.unkept = Some(self.keeper.unkept().count());
        self.give_up();
    }

    fn give_up(&mut self) {
        self.is_kept = false;
        let names = std::mem::take(&mut self.recorded.names);
        // First of all: a later process must not go on with the connection once a descriptor of it is missing.
        self.recorded = RecordedClient {
            connection: self.recorded.connection,
            is_over: true,
            ..RecordedClient::default()
        };
        if let Err(cause) = self.write(&[]) {
            warn_limited!("the record of a client's connection cannot be written: {cause}");
        }
        self.keeper.release(&self.socket_name());
        self.keeper.release_all(&names);
    }

    fn write(&mut self, state: &[u8]) -> io::Result<()> {
        self.record.write(&encode(&self.recorded, state)?)
    }

    fn socket_name(&self) -> String {
        self.names.sockets.of(self.recorded.connection)
    }
}

/// The names of `before`, as often as `now` has them less.
fn missing_names(before: &[String], now: &[String]) -> Vec<String> {
    let mut counts: BTreeMap<&String, usize> = BTreeMap::new();
    for name in now {
        *counts.entry(name).or_default() += 1;
    }
    let mut is_gone = |name: &&String| match counts.get_mut(*name) {
        Some(count) if *count > 0 => {
            *count -= 1;
            false
        }
        _ => true,
    };
    before
        .iter()
        .filter(|name| is_gone(name))
        .cloned()
        .collect()
}

fn encode(recorded: &RecordedClient, state: &[u8]) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(recorded).map_err(io::Error::other)?;
    let mut bytes = (json.len() as u64).to_ne_bytes().to_vec();
    bytes.extend(json);
    bytes.extend(state);
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> io::Result<(RecordedClient, Vec<u8>)> {
    let damaged = || refused("it cannot be decoded");
    let len = bytes.first_chunk().map(|len| u64::from_ne_bytes(*len));
    let len = len.and_then(|len| usize::try_from(len).ok());
    let rest = bytes.get(LENGTH..).ok_or_else(damaged)?;
    let (json, state) = len
        .and_then(|len| rest.split_at_checked(len))
        .ok_or_else(damaged)?;
    let recorded: RecordedClient = serde_json::from_slice(json)
        .map_err(|cause| refused(&format!("it cannot be decoded: {cause}")))?;
    if recorded.names.len() > MAX_NAMES {
        return Err(refused("it names more descriptors than anybody keeps"));
    }
    Ok((recorded, state.to_vec()))
}
