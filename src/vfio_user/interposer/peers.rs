//! The two peers, as far as they have come.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::vfio_user::client_windows::ClientWindows;
use crate::vfio_user::irq_replay::IrqReplay;
use crate::vfio_user::link::LinkStatus;
use crate::vfio_user::message::Header;
use crate::vfio_user::socket::{Outbox, Receiver};
use crate::vfio_user::version::{Terms, Version};

/// Messages taken from one peer before the others have their turn.
pub(super) const TURN: usize = 16;
/// While this many bytes wait to be sent to a peer, nothing is taken in that adds to them.
pub(super) const MAX_WAITING: usize = 4 << 20;
/// The most commands of the client's that wait for replies; the next ones wait unread.
const MAX_COMMANDS: usize = 64;
/// While this many descriptors wait to be sent to the server, nothing more is taken in: a process may
/// have only so many open.
const MAX_WAITING_DESCRIPTORS: usize = 256;
/// How long a client may take to say VERSION, while others wait.
const FIRST_WORD_PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct ClientLeg {
    pub(super) socket: Arc<UnixStream>,
    pub(super) receiver: Receiver,
    pub(super) outbox: Outbox,
    pub(super) stage: Stage,
    pub(super) windows: ClientWindows,
    pub(super) irqs: IrqReplay,
    /// It has descriptors of the server's, which lead nowhere when that is gone.
    pub(super) holds_descriptors: bool,
}

/// How far a client has come.
pub(super) enum Stage {
    /// It has said nothing yet, and is to until this.
    Fresh(Instant),
    /// It waits for the answer to its VERSION.
    Asked { header: Header, version: Version },
    /// It was answered.
    Agreed {
        version: Version,
        answer: Box<Version>,
        terms: Terms,
    },
}

pub(super) struct ServerLeg {
    pub(super) session: u64,
    pub(super) socket: Arc<OwnedFd>,
    pub(super) receiver: Receiver,
    /// The socket of the server's commands.
    pub(super) twin: Option<Twin>,
    /// When VERSION has to be answered, where it is not.
    pub(super) answer_until: Option<Instant>,
}

pub(super) struct Twin {
    pub(super) socket: Arc<OwnedFd>,
    pub(super) receiver: Receiver,
    pub(super) outbox: Outbox,
}

impl ClientLeg {
    /// A client that has said nothing yet.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket: Arc::new(socket),
            receiver: Receiver::default(),
            outbox: Outbox::default(),
            stage: Stage::Fresh(Instant::now() + FIRST_WORD_PATIENCE),
            windows: ClientWindows::default(),
            irqs: IrqReplay::default(),
            holds_descriptors: false,
        }
    }

    /// Whether its next message is taken in.
    pub(super) fn may_speak(&self, pulse: &LinkStatus) -> bool {
        if self.outbox.len_bytes() >= MAX_WAITING {
            return false;
        }
        match self.stage {
            Stage::Fresh(_) => true,
            Stage::Asked { .. } => false,
            // What the server is to know already when it gets a command has to go first.
            Stage::Agreed { .. } => {
                !pulse.connected
                    || (pulse.up
                        && pulse.told
                        && pulse.commands < MAX_COMMANDS
                        && pulse.bytes < MAX_WAITING
                        && pulse.descriptors < MAX_WAITING_DESCRIPTORS)
            }
        }
    }

    pub(super) fn answer(&mut self, header: &Header, done: Result<(), i32>, body: &[u8]) {
        match done {
            Ok(()) if header.wants_no_reply() => {}
            Ok(()) => {
                let reply = header.reply_to(body.len()).with_body(body);
                self.outbox.push(reply, Vec::new());
            }
            Err(error) => self.refuse(header, error),
        }
    }

    pub(super) fn refuse(&mut self, header: &Header, error: i32) {
        if !header.wants_no_reply() {
            let reply = header.refusal_of(error).encode().to_vec();
            self.outbox.push(reply, Vec::new());
        }
    }
}
