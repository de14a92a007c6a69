//! What the interposer's thread has, and how connections end.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::peers::{ClientLeg, ServerLeg};
use crate::vfio_user::dma::DmaTarget;
use crate::vfio_user::link::Link;
use crate::{info_limited, warn_limited};

/// Whom an interposer stands between.
#[derive(Clone, Debug)]
pub struct InterposerSettings {
    /// The device's name, for messages.
    pub name: String,
    /// Where the device's server listens.
    pub server: PathBuf,
}

/// All the thread has.
pub(super) struct Proxy {
    pub(super) settings: InterposerSettings,
    pub(super) listener: UnixListener,
    pub(super) link: Arc<Link>,
    pub(super) target: Arc<dyn DmaTarget>,
    pub(super) client: Option<ClientLeg>,
    pub(super) server: Option<ServerLeg>,
    /// Not before this is a client accepted.
    pub(super) accept_at: Option<Instant>,
    /// Not before this is the server tried.
    pub(super) connect_at: Instant,
}

/// Why a connection ends: words for the log.
pub(super) type CutOffReason = String;

impl Proxy {
    /// The link has ended, whoever ended it.
    pub(super) fn server_lost(&mut self) {
        self.server = None;
        let orphans = self.link.take_orphans();
        let Some(client) = &mut self.client else {
            return;
        };
        if client.holds_descriptors {
            let why = "its server is gone, and it has descriptors of that one's";
            return self.end_client(why);
        }
        for header in orphans {
            client.refuse(&header, libc::EIO);
        }
        self.flush_client();
    }

    /// The server is to blame for something.
    pub(super) fn end_server(&mut self, why: &str) {
        warn_limited!("{}: the server is cut off: {why}", self.settings.name);
        self.link.cut_off(why);
        self.server_lost();
    }

    /// The client is gone, or is to go: so is the connection to its server.
    pub(super) fn end_client(&mut self, why: &str) {
        info_limited!("{}: the client is gone: {why}", self.settings.name);
        self.client = None;
        self.link.set_client(false);
        self.link.part();
        self.server = None;
        drop(self.link.take_orphans());
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
