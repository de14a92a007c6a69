//! Removal of all windows, with one message if the server is known to do that ([`trial`](super::trial)).

use std::time::Duration;

use super::connection::ServerConnection;
use super::state::Link;
use super::trial::{MESSAGES, Meaning, UnmapAll, WINDOWS};
use super::update::{BatchTicket, DmaUpdate};
use crate::address::IovaRange;
use crate::info_limited;

/// Fewer windows are removed one by one: the trial takes five messages.
const FEW: u64 = 8;

impl Link {
    /// Sends the removal of all windows of the server. `windows` returns those that it was told, in ascending order.
    /// [`Link::wait`] waits for the rest, as after [`Link::send_all`], with the same guarantee.
    ///
    /// `windows` must not wait for a peer: the link is locked while some of them are taken.
    pub fn remove_all<I: Iterator<Item = IovaRange>>(
        &self,
        ticket: &mut BatchTicket,
        windows: impl Fn() -> I,
    ) {
        let Some(removed) = self.remove_at_once(ticket, &windows) else {
            return;
        };
        let others = windows().filter(|window| !removed.contains(window));
        self.send_all(ticket, others.map(DmaUpdate::Unmap));
    }

    /// Removes all windows with one message, if the server does that, and waits for the answer. Otherwise returns the windows
    /// that have been removed; the caller must remove the others.
    fn remove_at_once<I: Iterator<Item = IovaRange>>(
        &self,
        ticket: &mut BatchTicket,
        windows: impl Fn() -> I,
    ) -> Option<Vec<IovaRange>> {
        let mut state = self.state.lock();
        let connection = state.connection_of(ticket);
        let Some(connection) = connection.filter(|c| c.is_settled() && c.windows >= FEW) else {
            return Some(Vec::new());
        };
        let tried = match connection.unmap_all {
            UnmapAll::Works => Vec::new(),
            UnmapAll::Untried => connection.pick_three(windows()),
            UnmapAll::Trial { .. } | UnmapAll::Fails => return Some(Vec::new()),
        };
        let batch = ticket.batch;
        let sent = match tried[..] {
            [single, low, high] => {
                let unmaps = [single, single, low, high].map(DmaUpdate::Unmap);
                let [single, again, low, high] = unmaps;
                connection.unmap_all = UnmapAll::trial(connection.last_serial + 1);
                for update in [single, again, DmaUpdate::UnmapAll, low, high] {
                    connection.queue(update, batch);
                }
                MESSAGES
            }
            _ if matches!(connection.unmap_all, UnmapAll::Works) => {
                connection.queue(DmaUpdate::UnmapAll, batch);
                1
            }
            _ => return Some(Vec::new()),
        };
        let count = usize::try_from(connection.windows).unwrap_or(usize::MAX);
        ticket.expect_more(count, &self.deadlines);
        state.progress.more = self.deadlines.of_removal(count);
        if let Some(batch) = state.batches.get_mut(&batch) {
            batch.remaining += sent;
        }
        self.send_updates(&mut state);
        self.wait_for_replies(&mut state, ticket);
        state.progress.more = Duration::ZERO;
        // Without it, the server is gone or cut off.
        let connection = state.connection_of(ticket)?;
        if matches!(connection.unmap_all, UnmapAll::Works) && connection.windows == 0 {
            return None;
        }
        let name = &self.name;
        info_limited!(
            "{name}: the server does not remove all windows with one message; it gets a message for each"
        );
        Some(tried)
    }
}

impl ServerConnection {
    /// Whether every update has been answered.
    fn is_settled(&self) -> bool {
        self.updates == 0 && self.backlog.is_empty()
    }

    /// Three windows for a trial: the lowest two that the server has, and the highest one. None if it has fewer.
    fn pick_three(&self, windows: impl Iterator<Item = IovaRange>) -> Vec<IovaRange> {
        let mut present = windows.filter(|w| !self.refused.contains(w.first()));
        let mut picked: Vec<_> = present.by_ref().take(2).collect();
        picked.extend(present.last());
        picked
    }

    /// The server has answered the removal of windows, with an errno or with success. Returns the errno if it refuses to
    /// remove a window that it may have.
    pub(super) fn removal_answered(
        &mut self,
        update: &DmaUpdate,
        serial: u64,
        errno: Option<i32>,
    ) -> Option<i32> {
        let (removed, kept) = match (self.unmap_all.answered(serial, errno), update) {
            (Meaning::Open, _) => return None,
            (Meaning::AllGone, _) => {
                self.all_removed();
                return None;
            }
            (Meaning::Singles(kept), _) => (WINDOWS, kept),
            (Meaning::Ordinary, DmaUpdate::UnmapAll) => {
                match errno {
                    None => self.all_removed(),
                    // The windows are removed one by one now, and the server cannot refuse that.
                    Some(_) => self.unmap_all = UnmapAll::Fails,
                }
                return None;
            }
            (Meaning::Ordinary, _) => (1, errno),
        };
        // A server with memory that keeps a window is cut off. It has the window until it hangs up, so it counts.
        if kept.is_none() || !self.shares_memory {
            self.windows -= removed;
            self.refused.given_up(removed);
        }
        kept
    }

    fn all_removed(&mut self) {
        self.windows = 0;
        self.refused.clear();
    }
}
