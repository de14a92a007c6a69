//! One connection to a server: the messages to send, and the commands without a reply.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::update::DmaUpdate;
use crate::address::{Iova, IovaRange};
use crate::vfio_user::dma::Window;
use crate::vfio_user::message::{
    Command, DMA_MAP_READ, DMA_MAP_WRITE, DmaMapBody, DmaUnmapBody, Header,
};
use crate::vfio_user::socket::{Outbox, OutgoingFd};
use crate::vfio_user::version::Terms;

/// The number of every command that wants no reply: some servers reply nevertheless, and the number
/// tells such a reply from others.
pub(super) const NO_REPLY_ID: u16 = u16::MAX;
/// A server that refuses more windows than this, all still mapped, is cut off.
pub(super) const MAX_REFUSED: usize = 65535;

#[derive(Debug)]
pub(super) struct ServerConnection {
    pub(super) socket: Arc<OwnedFd>,
    /// The negotiated terms; before the negotiation the server gets VERSION only.
    pub(super) terms: Option<Terms>,
    pub(super) outbox: Outbox,
    /// The batch of the announcement of all windows, if one is in progress.
    pub(super) announcing: Option<u64>,
    /// The windows from this address on are not announced yet, except those of updates; `None` if all are.
    pub(super) unannounced: Option<Iova>,
    /// Updates that are not in the outbox yet, and their batches. They wait for the announcement, unless the server has
    /// no room for more windows.
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
    /// The first addresses of windows that the server refused, up to [`MAX_REFUSED`] of them.
    pub(super) refused: HashSet<u64>,
    /// The number of windows at which the server has refused one, if it has not taken more since.
    pub(super) limit: Option<u64>,
    /// The log has the limit.
    pub(super) is_limit_logged: bool,
}

/// A command of the client that the server has got.
#[derive(Clone, Copy, Debug)]
pub(in crate::vfio_user) struct ClientCommand {
    /// The client's header.
    pub(in crate::vfio_user) header: Header,
    /// It accesses 0 bytes of a region, so an empty reply is a whole one.
    pub(in crate::vfio_user) accesses_nothing: bool,
}

/// A command without a reply.
#[derive(Debug)]
pub(super) enum Pending {
    Version,
    Update(DmaUpdate, u64),
    /// A command of the client.
    Client(ClientCommand),
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
            announcing: None,
            unannounced: Some(Iova(0)),
            backlog: VecDeque::new(),
            pending: HashMap::new(),
            next_id: 0,
            updates: 0,
            commands: 0,
            windows: 0,
            shares_memory: false,
            unconfirmed: HashSet::new(),
            refused: HashSet::new(),
            limit: None,
            is_limit_logged: false,
        }
    }

    /// Announces all windows from now on, for `batch`. It counts the announcement as one update more.
    pub(super) fn announce(&mut self, batch: u64) {
        self.announcing = Some(batch);
        self.unannounced = Some(Iova(0));
    }

    /// The number of windows that the server can have.
    pub(super) fn max_windows(&self) -> u64 {
        self.terms.as_ref().map_or(0, |terms| terms.windows)
    }

    /// Whether the announcement waits for the server to have room for more windows. Updates do not wait meanwhile.
    pub(super) fn is_announcement_paused(&self) -> bool {
        self.announcing.is_some() && self.windows >= self.max_windows()
    }

    /// Whether `window` is announced by an update that is not in the outbox yet.
    pub(super) fn is_in_backlog(&self, window: &Window) -> bool {
        let first = window.range.first();
        let mut updates = self.backlog.iter();
        updates.any(|(u, _)| matches!(u, DmaUpdate::Map(w) if w.range.first() == first))
    }

    /// Sends DMA_MAP for a window.
    pub(super) fn send_window(&mut self, window: Window, batch: u64) {
        self.windows += 1;
        // An earlier refusal does not count any more.
        self.refused.remove(&window.range.first().0);
        self.unconfirmed.insert(window.range.first().0);
        let (body, descriptors) = map_body(&window);
        self.shares_memory |= !descriptors.is_empty();
        self.send_update(DmaUpdate::Map(window), batch, body.as_bytes(), descriptors);
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
            Self::Client(command) => {
                Command::from_number(command.header.command).unwrap_or(Command::Version)
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
