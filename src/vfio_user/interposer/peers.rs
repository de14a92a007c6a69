//! The client and the server, and the thread's state for each.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::unclaimed::FixedReplies;
use crate::process::unkept::UnkeptConnection;
use crate::vfio_user::client_windows::ClientWindows;
use crate::vfio_user::irq_replay::IrqReplay;
use crate::vfio_user::link::{ClientProgress, LinkStatus};
use crate::vfio_user::message::Header;
use crate::vfio_user::socket::{Outbox, Receiver};
use crate::vfio_user::version::{Terms, Version};

/// Messages received from one peer before the thread polls the others.
pub(super) const MESSAGES_PER_TURN: usize = 16;
/// While this many bytes wait to be sent to a peer, nothing is received that adds to them.
pub(super) const MAX_UNSENT: usize = 4 << 20;
/// At most this many commands of the client wait for replies; the thread receives no more.
const MAX_COMMANDS: usize = 64;
/// While this many descriptors wait to be sent to the server, nothing is received from the client: the
/// number of open files of a process is limited.
const MAX_UNSENT_DESCRIPTORS: usize = 256;
/// How long a client may take to send VERSION: other clients wait meanwhile.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

pub(super) struct ClientLeg {
    pub(super) socket: Arc<UnixStream>,
    pub(super) receiver: Receiver,
    pub(super) outbox: Outbox,
    pub(super) stage: Stage,
    pub(super) windows: ClientWindows,
    pub(super) irqs: IrqReplay,
    /// The commands that wait for replies, if the client takes no refusal.
    pub(super) fixed: Option<FixedReplies>,
    /// The client has descriptors of the server, which are useless after that server is gone.
    pub(super) holds_descriptors: bool,
    /// How far the record says that it is; `None` if its connection ends with this process.
    pub(super) recorded: Option<ClientProgress>,
    /// Counts the connection if the keeper did not take it.
    _unkept: Option<UnkeptConnection>,
}

/// The state of the negotiation with a client.
pub(super) enum Stage {
    /// The client has to send VERSION by this time.
    Connected(Instant),
    /// The client waits for the answer to VERSION.
    Negotiating { header: Header, version: Version },
    /// The client has the answer.
    Negotiated {
        version: Version,
        answer: Box<Version>,
        terms: Terms,
    },
}

pub(super) struct ServerLeg {
    pub(super) session: u64,
    pub(super) socket: Arc<OwnedFd>,
    pub(super) receiver: Receiver,
    /// The stream position up to which its messages were handled, and the one that is recorded.
    pub(super) handled: u64,
    pub(super) recorded: u64,
    /// The number of its socket, if another process keeps that.
    pub(super) kept: Option<u64>,
    /// The second socket, for the server's commands.
    pub(super) twin: Option<Twin>,
}

pub(super) struct Twin {
    pub(super) socket: Arc<OwnedFd>,
    pub(super) receiver: Receiver,
    pub(super) outbox: Outbox,
    /// The stream position up to which its messages were handled, and the one that is recorded.
    pub(super) handled: u64,
    pub(super) recorded: u64,
}

/// Where the messages of a new connection are.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) receiver: Receiver,
    pub(super) outbox: Outbox,
    /// The number of the socket, if another process keeps that and the buffers.
    pub(super) kept: Option<u64>,
    /// Counts a connection that could not be kept.
    pub(super) unkept: Option<UnkeptConnection>,
}

impl ClientLeg {
    /// A client that has just connected.
    pub(super) fn new(socket: UnixStream, buffers: Buffers, takes_no_refusal: bool) -> Self {
        Self {
            socket: Arc::new(socket),
            receiver: buffers.receiver,
            outbox: buffers.outbox,
            stage: Stage::Connected(Instant::now() + VERSION_DEADLINE),
            windows: ClientWindows::default(),
            irqs: IrqReplay::default(),
            fixed: takes_no_refusal.then(FixedReplies::default),
            holds_descriptors: false,
            recorded: buffers.kept.map(|_| ClientProgress::default()),
            _unkept: buffers.unkept,
        }
    }

    /// How far it is, for the record. VERSION counts when it is answered: until then, the next process must negotiate.
    pub(super) fn progress(&mut self) -> Option<ClientProgress> {
        self.recorded?;
        let ring = self.outbox.ring()?;
        let handled = match self.stage {
            Stage::Negotiated { .. } => self.receiver.position(),
            Stage::Connected(_) | Stage::Negotiating { .. } => 0,
        };
        Some(ClientProgress {
            handled,
            committed: ring.tail(),
            descriptors_end: ring.descriptors_end(),
            holds_descriptors: self.holds_descriptors,
            has_interrupts: self.irqs.has_any(),
        })
    }

    /// The record says so.
    pub(super) fn set_recorded(&mut self, progress: ClientProgress) {
        self.recorded = Some(progress);
        self.receiver.set_handled(progress.handled);
        if let Some(ring) = self.outbox.ring() {
            ring.commit(progress.committed);
        }
    }

    /// Whether the thread may receive the client's next message.
    pub(super) fn may_receive(&self, status: &LinkStatus) -> bool {
        if self.outbox.len_bytes() >= MAX_UNSENT {
            return false;
        }
        match self.stage {
            Stage::Connected(_) => true,
            Stage::Negotiating { .. } => false,
            // The server must get all updates before the client's next command: the command may start
            // DMA to memory that an update concerns.
            Stage::Negotiated { .. } => {
                !status.connected
                    || (status.active
                        && status.is_up_to_date
                        && status.commands < MAX_COMMANDS
                        && status.bytes < MAX_UNSENT
                        && status.descriptors < MAX_UNSENT_DESCRIPTORS)
            }
        }
    }

    pub(super) fn answer(&mut self, header: &Header, done: Result<(), i32>, body: &[u8]) {
        match done {
            Ok(()) if header.wants_no_reply() => {}
            Ok(()) => {
                if let Some(fixed) = &mut self.fixed {
                    fixed.forget(header.id);
                }
                let reply = header.reply_to(body.len()).with_body(body);
                self.outbox.push(reply, Vec::new());
            }
            Err(error) => self.refuse(header, error),
        }
    }

    pub(super) fn refuse(&mut self, header: &Header, error: i32) {
        if !header.wants_no_reply() {
            let reply = match &mut self.fixed {
                Some(fixed) => fixed.refusal(header, error),
                None => header.refusal_of(error).encode().to_vec(),
            };
            self.outbox.push(reply, Vec::new());
        }
    }
}
