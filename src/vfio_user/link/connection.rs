//! One connection to a server: the messages to send, and the commands without a reply.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::update::{DmaUpdate, Window};
use crate::address::IovaRange;
use crate::vfio_user::message::{
    Command, DMA_MAP_READ, DMA_MAP_WRITE, DmaMapBody, DmaUnmapBody, Header,
};
use crate::vfio_user::socket::{Outbox, OutgoingFd};
use crate::vfio_user::version::Terms;

/// The number of every command that wants no reply: some servers reply nevertheless, and the number
/// tells such a reply from others.
pub(super) const NO_REPLY_ID: u16 = u16::MAX;

#[derive(Debug)]
pub(super) struct ServerConnection {
    pub(super) socket: Arc<OwnedFd>,
    /// The negotiated terms; before the negotiation the server gets VERSION only.
    pub(super) terms: Option<Terms>,
    pub(super) outbox: Outbox,
    /// Updates that are not in the outbox yet, and their batches.
    pub(super) backlog: VecDeque<(DmaUpdate, u64)>,
    pub(super) pending: HashMap<u16, Pending>,
    next_id: u16,
    /// Updates without a reply.
    pub(super) updates: usize,
    /// The client's commands without a reply.
    pub(super) commands: usize,
    /// The number of windows that the server has.
    pub(super) windows: u64,
    /// The server got a descriptor of memory with at least one window.
    pub(super) shares_memory: bool,
    /// The first addresses of windows that the server has neither accepted nor refused yet.
    pub(super) unconfirmed: HashSet<u64>,
    /// The first addresses of windows that the server refused.
    pub(super) refused: HashSet<u64>,
}

/// A command without a reply.
#[derive(Debug)]
pub(super) enum Pending {
    Version,
    Update(DmaUpdate, u64),
    /// A command of the client, with the client's header.
    Client(Header),
    /// A command that sets the client's interrupts again.
    Replay(Command),
}

impl ServerConnection {
    /// A connection before the negotiation.
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self {
            socket,
            terms: None,
            outbox: Outbox::default(),
            backlog: VecDeque::new(),
            pending: HashMap::new(),
            next_id: 0,
            updates: 0,
            commands: 0,
            windows: 0,
            shares_memory: false,
            unconfirmed: HashSet::new(),
            refused: HashSet::new(),
        }
    }

    pub(super) fn send(
        &mut self,
        pending: Pending,
        command: Command,
        body: &[u8],
        descriptors: Vec<OutgoingFd>,
    ) {
        let id = self.free_id();
        self.pending.insert(id, pending);
        let header = Header::command(id, command, body.len());
        self.outbox.push(header.with_body(body), descriptors);
    }

    pub(super) fn send_update(
        &mut self,
        update: DmaUpdate,
        batch: u64,
        body: &[u8],
        descriptors: Vec<OutgoingFd>,
    ) {
        self.updates += 1;
        let pending = Pending::Update(update, batch);
        let command = pending.command();
        self.send(pending, command, body, descriptors);
    }

    /// A number that no pending command has. There always is one: far fewer than 65535 are pending.
    fn free_id(&mut self) -> u16 {
        loop {
            let id = self.next_id;
            self.next_id = self.next_id.wrapping_add(1);
            if id != NO_REPLY_ID && !self.pending.contains_key(&id) {
                return id;
            }
        }
    }
}

impl Pending {
    pub(super) fn command(&self) -> Command {
        match self {
            Self::Version => Command::Version,
            Self::Update(DmaUpdate::Map(_), _) => Command::DmaMap,
            Self::Update(DmaUpdate::Unmap(_), _) => Command::DmaUnmap,
            // Unknown commands are never forwarded.
            Self::Client(header) => {
                Command::from_number(header.command).unwrap_or(Command::Version)
            }
            Self::Replay(command) => *command,
        }
    }
}

pub(super) fn map_body(window: &Window) -> (DmaMapBody, Vec<OutgoingFd>) {
    let right = |has: bool, bit: u32| if has { bit } else { 0 };
    let flags = right(window.access.read, DMA_MAP_READ) | right(window.access.write, DMA_MAP_WRITE);
    let (offset, descriptors) = match &window.file {
        Some((file, offset)) => (*offset, vec![OutgoingFd::Shared(file.clone())]),
        None => (0, Vec::new()),
    };
    let body = DmaMapBody {
        argsz: DmaMapBody::BYTES.into(),
        flags: flags.into(),
        offset: offset.into(),
        address: window.range.first().0.into(),
        // No memory has 2^64 bytes.
        size: window.range.len_bytes().unwrap_or(u64::MAX).into(),
    };
    (body, descriptors)
}

pub(super) fn unmap_body(range: IovaRange) -> DmaUnmapBody {
    DmaUnmapBody {
        argsz: DmaUnmapBody::BYTES.into(),
        flags: 0.into(),
        address: range.first().0.into(),
        size: range.len_bytes().unwrap_or(u64::MAX).into(),
    }
}
