//! One connection to a server: the messages to send, and the commands without a reply.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::announcement::Announcement;
use super::refused::RefusedWindows;
use super::trial::UnmapAll;
use super::update::{DmaUpdate, MAX_UNWATCHED, REPLAY};
use crate::address::IovaRange;
use crate::vfio_user::dma::Window;
use crate::vfio_user::kept::Place;
use crate::vfio_user::message::{
    Command, DMA_MAP_READ, DMA_MAP_WRITE, DMA_UNMAP_ALL, DmaMapBody, DmaUnmapBody, Header,
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
    /// The announcement of all windows.
    pub(super) announcement: Announcement,
    /// Updates that are not in the outbox yet.
    pub(super) backlog: VecDeque<Queued>,
    /// A requester waits for room in the backlog.
    pub(super) is_sender_waiting: bool,
    /// The number of the last update.
    pub(super) last_serial: u64,
    /// The number of the last update that a requester waits for.
    pub(super) watched: u64,
    /// When the server connected, or last answered an update or VERSION.
    pub(super) answered_at: Instant,
    pub(super) pending: HashMap<u16, Pending>,
    pub(super) next_id: u16,
    /// Replies to updates of an earlier process may come, so many at most.
    pub(super) ghosts: usize,
    /// Updates without a reply.
    pub(super) updates: usize,
    /// The client's commands without a reply.
    pub(super) commands: usize,
    /// The number of windows that the server has.
    pub(super) windows: u64,
    /// The server got a descriptor of memory with at least one window, or is about to.
    pub(super) shares_memory: bool,
    /// The first addresses of windows that the server has neither accepted nor refused yet.
    pub(super) unconfirmed: HashSet<u64>,
    /// The windows that the server refused and the guest has mapped.
    pub(super) refused: RefusedWindows,
    /// Whether one message removes all windows.
    pub(super) unmap_all: UnmapAll,
    /// The number of windows at which the server has refused one, if it has not taken more since.
    pub(super) limit: Option<u64>,
    /// How many windows the server has refused since `limit` was found, if it has not taken more.
    pub(super) refused_in_a_row: usize,
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
    /// Where it is in the record.
    pub(in crate::vfio_user) place: Option<Place>,
}

/// An update on its way to the server.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) update: DmaUpdate,
    pub(super) batch: u64,
    /// Updates are sent in the order of these numbers.
    pub(super) serial: u64,
}

/// A command without a reply.
#[derive(Debug)]
pub(super) enum Pending {
    Version,
    Update(Queued),
    /// A command of the client.
    Client(ClientCommand),
    /// A command that sets the client's interrupts again.
    Replay(Command),
}

impl ServerConnection {
    /// A connection before the negotiation.
    pub(super) fn new(socket: Arc<OwnedFd>, outbox: Outbox) -> Self {
        Self {
            socket,
            terms: None,
            outbox,
            announcement: Announcement::new(),
            backlog: VecDeque::new(),
            is_sender_waiting: false,
            last_serial: 0,
            watched: 0,
            answered_at: Instant::now(),
            pending: HashMap::new(),
            next_id: 0,
            ghosts: 0,
            updates: 0,
            commands: 0,
            windows: 0,
            shares_memory: false,
            unconfirmed: HashSet::new(),
            refused: RefusedWindows::default(),
            unmap_all: UnmapAll::default(),
            limit: None,
            refused_in_a_row: 0,
            is_limit_logged: false,
        }
    }

    /// Announces all windows from now on, for `batch`. It counts the announcement as one update more.
    pub(super) fn announce(&mut self, batch: u64) {
        self.announcement.begin(batch, self.last_serial);
    }

    /// Whether the server has just connected and is still being told all windows. It has lost its state, so no guest
    /// depends on it: no request waits for these windows.
    pub(super) fn is_replaying(&self) -> bool {
        let announcing = self.announcement.batch == Some(REPLAY) && !self.is_announcement_paused();
        announcing || self.announcement.replayed > 0
    }

    /// Whether a requester need not wait for an update: it removes a window that the server cannot use without the
    /// interposer, and the server is still being told all windows.
    pub(super) fn needs_no_wait(&self, update: &DmaUpdate) -> bool {
        matches!(update, DmaUpdate::Unmap(_))
            && !self.shares_memory
            && self.is_replaying()
            && self.announcement.unwatched < MAX_UNWATCHED
    }

    /// Counts an update that is about to be sent or to join the backlog.
    pub(super) fn count_in(&mut self, update: DmaUpdate, batch: u64) -> Queued {
        self.last_serial += 1;
        // Not only when it is sent: an UNMAP of a window in the backlog must know.
        self.shares_memory |= matches!(&update, DmaUpdate::Map(window) if window.file.is_some());
        if self.announcement.count_in(batch) {
            self.watched = self.last_serial;
        }
        Queued {
            update,
            batch,
            serial: self.last_serial,
        }
    }

    /// Adds an update to the backlog.
    pub(super) fn queue(&mut self, update: DmaUpdate, batch: u64) {
        let queued = self.count_in(update, batch);
        self.announcement.give_way(&queued.update, queued.serial);
        self.backlog.push_back(queued);
    }

    /// The number of windows that the server can have.
    pub(super) fn max_windows(&self) -> u64 {
        self.terms.as_ref().map_or(0, |terms| terms.windows)
    }

    /// Counts a window that the server is about to get.
    pub(super) fn note_window(&mut self, window: &Window) {
        let first = window.range.first();
        self.windows += 1;
        // An earlier refusal does not count any more.
        self.refused.remove(first);
        self.unconfirmed.insert(first.0);
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

    /// A number that no pending command has. There always is one: far fewer than 65535 are pending.
    pub(super) fn free_id(&mut self) -> u16 {
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
            Self::Update(queued) => match queued.update {
                DmaUpdate::Map(_) => Command::DmaMap,
                DmaUpdate::Unmap(_) | DmaUpdate::UnmapAll => Command::DmaUnmap,
            },
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

/// DMA_UNMAP of one window.
pub(super) fn unmap_body(range: IovaRange) -> DmaUnmapBody {
    DmaUnmapBody {
        argsz: DmaUnmapBody::BYTES.into(),
        flags: 0.into(),
        address: range.first().0.into(),
        size: range.len_bytes().unwrap_or(u64::MAX).into(),
    }
}

/// DMA_UNMAP of all windows.
pub(super) fn unmap_all_body() -> DmaUnmapBody {
    DmaUnmapBody {
        argsz: DmaUnmapBody::BYTES.into(),
        flags: DMA_UNMAP_ALL.into(),
        address: 0.into(),
        size: 0.into(),
    }
}
