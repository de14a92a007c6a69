//! One connection to a server: what is on its way there, and what replies it owes.

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

/// The number all commands without a reply have, so that a server that answers one all the same is
/// understood.
pub(super) const NO_REPLY_ID: u16 = u16::MAX;

#[derive(Debug)]
pub(super) struct ServerConnection {
    pub(super) socket: Arc<OwnedFd>,
    /// What was agreed on; before that the server knows nothing.
    pub(super) terms: Option<Terms>,
    pub(super) outbox: Outbox,
    /// Updates that are not in the outbox yet, and their batches.
    pub(super) backlog: VecDeque<(DmaUpdate, u64)>,
    pub(super) pending: HashMap<u16, Pending>,
    next_id: u16,
    pub(super) orders: usize,
    pub(super) commands: usize,
    /// Windows the server has.
    pub(super) windows: u64,
    /// It was given descriptors of memory with some of them.
    pub(super) shares: bool,
    /// First addresses of windows it was asked to have, and has not answered for.
    pub(super) asked: HashSet<u64>,
    /// First addresses of windows it was asked to have and has not.
    pub(super) refused: HashSet<u64>,
}

/// A command the server owes a reply to.
#[derive(Debug)]
pub(super) enum Pending {
    Version,
    DmaUpdate(DmaUpdate, u64),
    /// The client's, with the client's header.
    Client(Header),
    /// The client's of long ago, told again.
    Again(Command),
}

impl ServerConnection {
    /// Nothing is agreed on, nothing is on its way.
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self {
            socket,
            terms: None,
            outbox: Outbox::default(),
            backlog: VecDeque::new(),
            pending: HashMap::new(),
            next_id: 0,
            orders: 0,
            commands: 0,
            windows: 0,
            shares: false,
            asked: HashSet::new(),
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

    pub(super) fn order(
        &mut self,
        order: DmaUpdate,
        batch: u64,
        body: &[u8],
        descriptors: Vec<OutgoingFd>,
    ) {
        self.orders += 1;
        let pending = Pending::DmaUpdate(order, batch);
        let command = pending.command();
        self.send(pending, command, body, descriptors);
    }

    /// A number no command has. There are always some: far fewer commands wait at once.
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
            Self::DmaUpdate(DmaUpdate::Map(_), _) => Command::DmaMap,
            Self::DmaUpdate(DmaUpdate::Unmap(_), _) => Command::DmaUnmap,
            // Only what is known is ever forwarded.
            Self::Client(header) => {
                Command::from_number(header.command).unwrap_or(Command::Version)
            }
            Self::Again(command) => *command,
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
        argsz: 32.into(),
        flags: flags.into(),
        offset: offset.into(),
        address: window.range.first().0.into(),
        // Memory is never all 2^64 bytes.
        size: window.range.len_bytes().unwrap_or(u64::MAX).into(),
    };
    (body, descriptors)
}

pub(super) fn unmap_body(range: IovaRange) -> DmaUnmapBody {
    DmaUnmapBody {
        argsz: 24.into(),
        flags: 0.into(),
        address: range.first().0.into(),
        size: range.len_bytes().unwrap_or(u64::MAX).into(),
    }
}
