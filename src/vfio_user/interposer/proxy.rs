//! The state of the interposer's thread, and how connections end.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::peers::{ClientLeg, ServerLeg};
use crate::process::event_loop::EventLoop;
use crate::vfio_user::dma::{DmaTarget, Replies};
use crate::vfio_user::link::Link;
use crate::{info_limited, warn_limited};

/// The device that an interposer serves.
#[derive(Clone, Debug)]
pub struct InterposerSettings {
    /// The device's name in log messages.
    pub name: String,
    /// The socket of the device's server.
    pub server: PathBuf,
    /// Whether clients may be of the kind that takes no refusal for an answer: each access then gets an answer.
    pub answers_all_accesses: bool,
}

/// The state of the interposer's thread.
pub(super) struct Proxy {
    pub(super) settings: InterposerSettings,
    pub(super) listener: Arc<UnixListener>,
    pub(super) events: EventLoop,
    pub(super) link: Arc<Link>,
    pub(super) target: Arc<dyn DmaTarget>,
    pub(super) client: Option<ClientLeg>,
    pub(super) server: Option<ServerLeg>,
    /// Replies to commands of the server that are sent together. Empty between two events.
    pub(super) replies: Replies,
    /// The thread accepts no client before this time.
    pub(super) accept_at: Option<Instant>,
    /// The thread does not connect to the server before this time.
    pub(super) connect_at: Instant,
}

/// Why a peer is cut off, for the log.
pub(super) type CutOffReason = String;

impl Proxy {
    /// The connection to the server has ended: refuses the client's commands without a reply.
    pub(super) fn drop_server(&mut self) {
        self.server = None;
        let unanswered = self.link.take_unanswered();
        let Some(client) = &mut self.client else {
            return;
        };
        if client.holds_descriptors {
            let why = "its server is gone, and the client has descriptors of that server";
            return self.end_client(why);
        }
        for header in unanswered {
            client.refuse(&header, libc::EIO);
        }
        self.flush_client();
    }

    /// Cuts the server off.
    pub(super) fn cut_server_off(&mut self, why: &str) {
        warn_limited!("{}: the server is cut off: {why}", self.settings.name);
        self.link.cut_off(why);
        self.drop_server();
    }

    /// Ends the connections to the client and to its server.
    pub(super) fn end_client(&mut self, why: &str) {
        info_limited!("{}: the client is gone: {why}", self.settings.name);
        self.client = None;
        self.link.set_client(false);
        self.link.end_with_client();
        self.server = None;
        drop(self.link.take_unanswered());
        self.connect_at = Instant::now();
    }

    pub(super) fn flush_client(&mut self) {
        if let Some(client) = &mut self.client
            && let Err(cause) = client.outbox.flush(&*client.socket)
        {
            self.end_client(&cause.to_string());
        }
    }
}
