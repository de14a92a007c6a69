//! The limit of a server's windows: how it is found, and what the log says about it.
//!
//! VERSION has a field for the limit, which libvfio-user does not set. Such a server refuses a window when it has as many
//! as it takes. The guest's driver ignores the failure of a MAP, so the log must name the cause and the cure.

use super::connection::ServerConnection;
use super::state::Link;
use super::update::WindowRefusal;
use crate::address::Iova;
use crate::warn_limited;

/// The windows that a device's server does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowLimits {
    /// The most windows that the server takes, as far as is known: as many as it had when it refused one, or as it has
    /// stated, or as the configuration allows. 0 if no server is connected.
    pub most: u64,
    /// The number of windows that a server is connected without: those that it has refused, and those that it has no room
    /// for. 0 while it is told windows.
    pub missing: u64,
    /// How many windows a server has refused, or had no room for, since the start.
    pub refused: u64,
}

impl Link {
    /// The same link, whose servers are told up to `max_windows` windows.
    #[must_use]
    pub fn with_max_windows(mut self, max_windows: u64) -> Self {
        self.max_windows = max_windows;
        self
    }

    /// The limits now. `count` returns the number of windows that the device has. It is called with the link locked, so that
    /// no change comes in between, and must not wait for a peer.
    pub fn window_limits(&self, count: impl FnOnce() -> usize) -> WindowLimits {
        let state = self.state.lock();
        let wanted = count() as u64;
        let connection = state.connection.as_ref().filter(|c| c.terms.is_some());
        let settled = connection.filter(|c| {
            c.backlog.is_empty() && (c.announcing.is_none() || c.is_announcement_paused())
        });
        WindowLimits {
            most: connection.map_or(0, |c| c.limit.unwrap_or(c.max_windows())),
            missing: settled.map_or(0, |c| wanted.saturating_sub(c.windows)),
            refused: self.refused.get(),
        }
    }

    /// The server has refused the window at `first`, which counts no more. Counts the refusal, and logs the first one at
    /// a limit of each connection.
    pub(super) fn window_refused(
        &self,
        connection: &mut ServerConnection,
        first: Iova,
        errno: i32,
    ) -> WindowRefusal {
        let windows = connection.accepted();
        let refusal = WindowRefusal {
            first,
            errno,
            windows,
        };
        self.refused.inc();
        if refusal.is_limit() {
            connection.limit = Some(windows);
            if !std::mem::replace(&mut connection.is_limit_logged, true) {
                let name = &self.name;
                warn_limited!(
                    "{name}: the server refuses a window: {refusal}, which seems to be its limit; the device does not \
                     reach further mappings. libvfio-user before 2024-05 takes 16 windows, until 2026-03 64, and later \
                     as many as the server passes to vfu_setup_device_dma (max_regions); raise this limit, or let the \
                     guest map larger pieces, or use isolation = \"messages\" without announce = \"exact\", which has no \
                     limit"
                );
            }
        }
        refusal
    }

    /// The window at `first` is not sent: the server has as many as it takes.
    pub(super) fn no_room(&self, connection: &mut ServerConnection, first: Iova) -> WindowRefusal {
        let windows = connection.max_windows();
        self.refused.inc();
        if !std::mem::replace(&mut connection.is_limit_logged, true) {
            let name = &self.name;
            warn_limited!(
                "{name}: the server takes {windows} windows, as VERSION or `max-windows` says, and has them; the device \
                 does not reach further mappings. Raise the limit, or let the guest map larger pieces, or use isolation \
                 = \"messages\" without announce = \"exact\", which has no limit"
            );
        }
        WindowRefusal {
            first,
            errno: libc::ENOSPC,
            windows,
        }
    }
}

impl ServerConnection {
    /// The number of windows that the server has accepted and not given up.
    fn accepted(&self) -> u64 {
        self.windows.saturating_sub(self.unconfirmed.len() as u64)
    }

    /// The server has accepted a window. This disproves a lower limit.
    pub(super) fn window_accepted(&mut self) {
        let accepted = self.accepted();
        self.limit = self.limit.filter(|limit| accepted <= *limit);
    }
}
