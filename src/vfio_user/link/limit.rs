//! The limit of a server's windows: how it is found, and what the log says about it.
//!
//! VERSION has a field for the limit, which libvfio-user does not set. Such a server refuses a window when it has as many
//! as it takes. The guest's driver ignores the failure of a MAP, so the log must name the cause and the cure.

use super::announcement::Announcement;
use super::connection::ServerConnection;
use super::state::Link;
use super::update::{REPLAY, WindowRefusal};
use crate::address::Iova;
use crate::warn_limited;

/// While a server that has connected is told all windows, this many refused ones are remembered. The announcement waits
/// then until the guest unmaps some: the first refused addresses are a list that must not grow with the number of
/// mappings.
pub(super) const MAX_REFUSED: usize = 65535;
/// After so many refusals in a row, the announcement takes the number of accepted windows for the server's limit. Not after
/// the first one: the server may have refused that window for a reason of its own.
const SURE_AFTER: usize = 64;

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
            c.backlog.is_empty() && (c.announcement.batch.is_none() || c.is_announcement_paused())
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
            connection.refused_in_a_row += 1;
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

    /// The window at `first` is not sent: the server has as many as it takes, or has refused very many.
    pub(super) fn no_room(&self, connection: &mut ServerConnection, first: Iova) -> WindowRefusal {
        let is_full = connection.windows >= connection.max_windows();
        let windows = connection.windows.min(connection.max_windows());
        self.refused.inc();
        if !is_full {
            let (name, refused) = (&self.name, connection.refused.len());
            warn_limited!(
                "{name}: the server has refused {refused} windows that the guest has mapped, and gets no further ones \
                 until the guest unmaps some; the device does not reach their memory"
            );
        } else if !std::mem::replace(&mut connection.is_limit_logged, true) {
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
        if self.limit.is_none() {
            self.refused_in_a_row = 0;
        }
    }

    /// The number of windows that the announcement to a server that has connected does not exceed.
    fn announced_at_most(&self) -> u64 {
        let found = self.limit.filter(|_| self.refused_in_a_row >= SURE_AFTER);
        self.max_windows().min(found.unwrap_or(u64::MAX))
    }

    /// The number of windows that may be announced now, but for those in flight. `is_replay`: nobody waits for the
    /// announcement, and refused windows stay mapped.
    pub(super) fn room(&self, is_replay: bool) -> usize {
        let most = if is_replay {
            self.announced_at_most()
        } else {
            self.max_windows()
        };
        let room = most.saturating_sub(self.windows);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        if is_replay {
            room.min(self.refusable())
        } else {
            room
        }
    }

    /// The number of windows that the server may refuse while nobody waits for its answer.
    pub(super) fn refusable(&self) -> usize {
        let Announcement {
            replayed,
            unwatched,
            ..
        } = self.announcement;
        let possible = self.refused.len() + replayed + unwatched;
        MAX_REFUSED.saturating_sub(possible)
    }

    /// Whether the announcement waits for the server to have room for more windows, or for the guest to unmap some that the
    /// server has refused. Updates do not wait meanwhile.
    pub(super) fn is_announcement_paused(&self) -> bool {
        self.announcement
            .batch
            .is_some_and(|batch| self.room(batch == REPLAY) == 0)
    }
}
