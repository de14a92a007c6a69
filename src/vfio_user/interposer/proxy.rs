//! The state of the interposer's thread, and how connections end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::peers::{Buffers, ClientLeg, ServerLeg};
use crate::process::event_loop::EventLoop;
use crate::vfio_user::dma::{DmaTarget, Replies};
use crate::vfio_user::kept::{KeptConnections, Leg};
use crate::vfio_user::link::Link;
use crate::vfio_user::message::Header;
use crate::vfio_user::socket::Receiver;
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
    /// Where the connections are kept for a later process, if there is a keeper.
    pub(super) kept: Option<KeptConnections>,
}

/// Why a peer is cut off, for the log.
pub(super) type CutOffReason = String;

impl Proxy {
    /// The connection to the server has ended: refuses the client's commands without a reply.
    pub(super) fn drop_server(&mut self) {
        self.release_server();
        let unanswered = self.link.take_unanswered();
        self.refuse_all(&unanswered);
    }

    /// The server is gone: refuses the client's commands without a reply, or ends the client.
    pub(super) fn refuse_all(&mut self, unanswered: &[Header]) {
        let Some(client) = &mut self.client else {
            return;
        };
        if client.holds_descriptors {
            let why = "its server is gone, and the client has descriptors of that server";
            return self.end_client(why);
        }
        if client.irqs.is_incomplete() {
            let why = "its server is gone, and its interrupts were set before the daemon died";
            self.lose(&format!("the client's connection ends: {why}"));
            return self.end_client(why);
        }
        for header in unanswered {
            client.refuse(header, libc::EIO);
        }
        if let Some(progress) = client.progress() {
            self.link.commit_refusals(&progress);
            client.set_recorded(progress);
        }
        self.flush_client();
    }

    /// The connection to the server has ended. Its socket stays with the keeper if it is half closed only.
    fn release_server(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        let Some(kept) = &self.kept else { return };
        if server.kept.is_some() && self.link.closing().is_none() {
            kept.end(Leg::Server, server.socket.as_fd());
        }
        if let Some(twin) = server.twin {
            kept.end(Leg::Twin, twin.socket.as_fd());
        }
    }

    /// Has a new connection kept, if there is a keeper.
    pub(super) fn buffers(
        &self,
        leg: Leg,
        socket: BorrowedFd<'_>,
        reads_ahead: bool,
    ) -> io::Result<Buffers> {
        let Some(kept) = &self.kept else {
            return Ok(Buffers {
                receiver: if reads_ahead {
                    Receiver::reading_ahead()
                } else {
                    Receiver::default()
                },
                ..Buffers::default()
            });
        };
        let cookie = kept.keep(leg, socket)?;
        let begun = kept.begin(leg, socket);
        if begun.is_err() {
            kept.release(leg);
        }
        let (input, ring) = begun?;
        Ok(Buffers {
            receiver: Receiver::kept(input, reads_ahead),
            outbox: ring.into(),
            kept: Some(cookie),
            unkept: None,
        })
    }

    /// Makes everything count that was done for the client, and lets it get its messages.
    pub(super) fn commit_client(&mut self) {
        if let Some(client) = &mut self.client
            && let Some(progress) = client.progress()
            && client.recorded != Some(progress)
        {
            self.link.commit_client(&progress);
            client.set_recorded(progress);
        }
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
        let client = self.client.take();
        self.link.set_client(false);
        self.link.end_with_client();
        if let (Some(client), Some(kept)) = (client, &self.kept)
            && client.recorded.is_some()
        {
            kept.end(Leg::Client, client.socket.as_fd());
        }
        self.release_server();
        drop(self.link.take_unanswered());
        self.connect_at = Instant::now();
    }

    /// Says that something of an earlier process could not be taken over. Returns why the peer is cut off.
    pub(super) fn lose(&self, why: &str) -> CutOffReason {
        if let Some(kept) = &self.kept {
            kept.lose(why);
        }
        why.to_owned()
    }

    /// The device is removed: nothing of it is kept any more.
    pub(super) fn forget(&mut self) {
        if self.kept.is_none() {
            return;
        }
        if self.client.is_some() {
            self.end_client("the device is removed");
        }
        self.release_server();
        if let Some(kept) = &self.kept {
            kept.forget();
        }
    }

    pub(super) fn flush_client(&mut self) {
        if let Some(client) = &mut self.client
            && let Err(cause) = client.outbox.flush(&*client.socket)
        {
            self.end_client(&cause.to_string());
        }
    }
}
