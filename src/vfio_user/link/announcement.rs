//! The announcement of all windows to a server, and how far it is.

use super::update::{DmaUpdate, REPLAY, UNWATCHED};
use crate::address::Iova;

/// The state of the announcement of all windows, and of the updates that no requester waits for.
#[derive(Debug)]
pub(super) struct Announcement {
    /// Its batch, if one is in progress.
    pub(super) batch: Option<u64>,
    /// The windows from this address on are not announced yet; `None` if all are. No update concerns those.
    pub(super) next: Option<Iova>,
    /// [`DmaUpdates::hold_back`](super::DmaUpdates::hold_back) has stopped it, and the next one has not begun; whether it was
    /// one of [`REPLAY`].
    pub(super) held_back: Option<bool>,
    /// It goes on after the update of this number: earlier ones remove windows that may be in its way.
    pub(super) after: u64,
    /// It continues before the next update of [`UNWATCHED`].
    pub(super) goes_next: bool,
    /// The windows of [`REPLAY`] without a reply.
    pub(super) replayed: usize,
    /// The updates of [`UNWATCHED`] without a reply, whether they are sent or not.
    pub(super) unwatched: usize,
}

impl Announcement {
    /// None has begun: no window is announced.
    pub(super) fn new() -> Self {
        Self {
            batch: None,
            next: Some(Iova(0)),
            held_back: None,
            after: 0,
            goes_next: false,
            replayed: 0,
            unwatched: 0,
        }
    }

    /// Begins one of all windows, for `batch`, after the update `after`.
    pub(super) fn begin(&mut self, batch: u64, after: u64) {
        self.batch = Some(batch);
        self.next = Some(Iova(0));
        self.held_back = None;
        self.after = after;
    }

    /// Stops it: all windows are about to be replaced. `is_replaying`: it was one of [`REPLAY`].
    pub(super) fn hold_back(&mut self, is_replaying: bool) {
        self.held_back = Some(is_replaying);
        self.batch = None;
        self.next = Some(Iova(0));
    }

    /// An update joins the backlog. If it removes a window that reaches into the addresses to announce, the guest may have
    /// mapped some of these again: the announcement must not overtake the removal.
    pub(super) fn give_way(&mut self, update: &DmaUpdate, serial: u64) {
        if let DmaUpdate::Unmap(range) = update
            && self.is_ahead(range.last())
        {
            self.after = serial;
        }
    }

    /// Whether it has not reached the window at `first`.
    pub(super) fn is_ahead(&self, first: Iova) -> bool {
        self.next.is_some_and(|from| first >= from)
    }

    /// Counts an update of `batch` that is about to be sent or to join the backlog. Returns whether a requester waits for it.
    pub(super) fn count_in(&mut self, batch: u64) -> bool {
        match batch {
            UNWATCHED => self.unwatched += 1,
            REPLAY => self.replayed += 1,
            _ => return true,
        }
        false
    }

    /// Counts an update of `batch` that is complete.
    pub(super) fn count_out(&mut self, batch: u64) {
        match batch {
            UNWATCHED => self.unwatched -= 1,
            REPLAY => self.replayed -= 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use vm_memory::VolatileSlice;

    use super::*;
    use crate::address::{Access, IovaRange};
    use crate::vfio_user::dma::{AccessDenied, DmaTarget, Window};
    use crate::vfio_user::link::{Deadlines, Link};
    use crate::vfio_user::socket::Outbox;
    use crate::vfio_user::version::Terms;

    /// A device with one window.
    struct OneWindow;

    impl DmaTarget for OneWindow {
        fn read(&self, _: IovaRange, _: &mut [u8]) -> Result<(), AccessDenied> {
            Err(AccessDenied)
        }

        fn read_in_place(
            &self,
            _: IovaRange,
            _: &mut dyn FnMut(&[VolatileSlice<'_>]),
        ) -> Result<(), AccessDenied> {
            Err(AccessDenied)
        }

        fn write(&self, _: IovaRange, _: &[u8]) -> Result<(), AccessDenied> {
            Err(AccessDenied)
        }

        fn windows_from(&self, first: Iova, limit: usize) -> Vec<Window> {
            let window = Window {
                range: IovaRange::from_len(Iova(0x1000), 0x1000).expect("a range"),
                access: Access::READ,
                file: None,
            };
            let windows = std::iter::once(window);
            windows
                .filter(|w| w.range.first() >= first)
                .take(limit)
                .collect()
        }
    }

    /// The server that the ATTACH has not held back gets the new windows from the negotiation.
    #[test]
    fn a_server_that_negotiates_during_an_attach_is_told_each_window_once() {
        let deadlines = Deadlines::with_answer(Deadlines::DEFAULT_ANSWER);
        let link = Link::new("device".into(), Arc::new(OneWindow), deadlines).expect("a link");
        let (server, _peer) = UnixStream::pair().expect("sockets");
        link.start_session(Arc::new(server.into()), Outbox::default(), &[]);
        let removal = {
            let mut updates = link.lock();
            updates.hold_back();
            updates.open(true)
        };
        let terms = Terms {
            server_descriptors: 8,
            client_descriptors: 8,
            server_data: 4096,
            windows: u64::MAX,
            twin: None,
        };
        link.activate(terms, Vec::new(), None);
        link.wait(removal.clone()).expect("nothing to wait for");
        let announcement = link.lock().announce(&removal, 1);
        let state = link.state.lock();
        let connection = state.connection.as_ref().expect("a server");
        assert_eq!(connection.windows, 1);
        drop(state);
        link.wait(announcement)
            .expect("nobody waits for a server that connects");
    }
}
