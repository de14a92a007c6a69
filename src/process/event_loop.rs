//! Waiting for several descriptors at once, for all threads of this crate that do so.
//!
//! Each loop has one epoll set, through the `epoll` crate. A wait for a single descriptor with a deadline (a control
//! client, the end of a process) uses `poll` instead: a set would cost three more system calls for each such wait.
//! The crate `vhost-user-backend` runs the threads of the rings, which wait in its own loop.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use epoll::{ControlOptions, Event};

pub use epoll::Events;

/// The most descriptors that one wait reports; the others are reported by the next.
const MAX_READY: usize = 32;

/// An epoll set. Descriptors are level-triggered: the next wait reports an unserved descriptor again.
pub struct EventLoop {
    set: RawFd,
    /// The interests that [`Self::wait_for`] has put into the set.
    interests: Vec<Interest>,
}

/// A descriptor that a loop waits for now.
#[derive(Clone)]
pub struct Interest {
    /// The descriptor. The loop shares it, so that no other file gets its number before it leaves the set.
    pub source: Arc<dyn AsFd + Send + Sync>,
    /// The token by which [`Ready`] reports it; unique within a loop.
    pub token: u64,
    /// The events to wait for. The kernel reports `EPOLLHUP` and `EPOLLERR` in addition, even if this is empty.
    pub events: Events,
}

impl EventLoop {
    /// An empty set, closed on exec.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            set: epoll::create(true)?,
            interests: Vec::new(),
        })
    }

    /// Waits for `fd` to be readable from now on, too. It leaves the set when its file is closed, or by
    /// [`Self::remove`].
    ///
    /// # Errors
    /// The kernel's error, such as `EEXIST` if `fd` is in the set.
    pub fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, token, Events::EPOLLIN)
    }

    /// Removes `fd` from the set.
    ///
    /// # Errors
    /// The kernel's error, such as `ENOENT` if `fd` is not in the set.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, 0, Events::empty())
    }

    /// Replaces the interests of the last call by `wanted`, with system calls for the differences only. Descriptors
    /// from [`Self::add`] stay in the set.
    ///
    /// # Errors
    /// The kernel's error; the next call tries again.
    pub fn wait_for(&mut self, wanted: &[Interest]) -> io::Result<()> {
        // Old interests leave first: `wanted` may have the same descriptor with another token.
        let gone = |old: &Interest| !wanted.iter().any(|new| new.is_same(old));
        while let Some(at) = self.interests.iter().position(gone) {
            let old = self.interests.swap_remove(at);
            self.remove(old.fd())?;
        }
        for new in wanted {
            let (fd, token, events) = (new.fd(), new.token, new.events);
            match self.interests.iter_mut().find(|old| old.is_same(new)) {
                Some(old) if old.events == events => {}
                Some(old) => {
                    let event = Event::new(events, token);
                    epoll::ctl(self.set, ControlOptions::EPOLL_CTL_MOD, fd, event)?;
                    old.events = events;
                }
                None => {
                    self.control(ControlOptions::EPOLL_CTL_ADD, fd, token, events)?;
                    self.interests.push(new.clone());
                }
            }
        }
        Ok(())
    }

    /// Waits until a descriptor is ready or the time `until` has come; without `until`, there is no deadline. If a
    /// signal interrupts the wait, no descriptor is ready.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn wait(&self, until: Option<Instant>) -> io::Result<Ready> {
        let mut events = [Event::new(Events::empty(), 0); MAX_READY];
        let count = match epoll::wait(self.set, milliseconds(until), &mut events) {
            Ok(count) => count,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => 0,
            Err(cause) => return Err(cause),
        };
        Ok(Ready { events, count })
    }

    fn control(
        &self,
        operation: ControlOptions,
        fd: RawFd,
        token: u64,
        events: Events,
    ) -> io::Result<()> {
        epoll::ctl(self.set, operation, fd, Event::new(events, token))
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        // It cannot fail: the descriptor is open.
        let _ = epoll::close(self.set);
    }
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventLoop").field(&self.set).finish()
    }
}

impl Interest {
    fn fd(&self) -> RawFd {
        self.source.as_fd().as_raw_fd()
    }

    fn is_same(&self, other: &Self) -> bool {
        self.fd() == other.fd() && self.token == other.token
    }
}

/// The descriptors that one wait has found ready.
pub struct Ready {
    events: [Event; MAX_READY],
    count: usize,
}

impl Ready {
    /// Their tokens, and the events of each.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Events)> {
        let ready = self.events.iter().take(self.count);
        ready.map(|event| (event.data, Events::from_bits_retain(event.events)))
    }

    /// Whether the descriptor with this token is among them.
    pub fn contains(&self, token: u64) -> bool {
        self.iter().any(|(ready, _)| ready == token)
    }
}

/// The time that is left, rounded up: a wait that ends too early would be repeated for the rest.
fn milliseconds(until: Option<Instant>) -> i32 {
    let Some(until) = until else { return -1 };
    let left = until.saturating_duration_since(Instant::now());
    i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    fn ready(events: &EventLoop) -> Vec<(u64, Events)> {
        let ready = events.wait(Some(Instant::now())).expect("waited");
        let mut ready: Vec<_> = ready.iter().collect();
        ready.sort_by_key(|(token, _)| *token);
        ready
    }

    fn interest(source: &Arc<UnixStream>, token: u64, events: Events) -> Interest {
        Interest {
            source: source.clone(),
            token,
            events,
        }
    }

    #[test]
    fn readable_descriptors_are_reported_until_they_are_removed() {
        let events = EventLoop::new().expect("a set");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        events.add(ours.as_raw_fd(), 7).expect("added");
        assert_eq!(ready(&events), []);
        theirs.write_all(b"x").expect("sent");
        for _ in 0..2 {
            assert_eq!(ready(&events), [(7, Events::EPOLLIN)]);
        }
        events.remove(ours.as_raw_fd()).expect("removed");
        assert_eq!(ready(&events), []);
    }

    #[test]
    fn a_wait_ends_when_its_time_is_over() {
        let events = EventLoop::new().expect("a set");
        let until = Instant::now() + Duration::from_millis(20);
        let ready = events.wait(Some(until)).expect("waited");
        assert!(Instant::now() >= until);
        assert!(!ready.contains(0));
    }

    #[test]
    fn interests_can_be_changed_and_removed() {
        let mut events = EventLoop::new().expect("a set");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let ours = Arc::new(ours);
        theirs.write_all(b"x").expect("sent");
        let both = Events::EPOLLIN | Events::EPOLLOUT;
        for wanted in [Events::EPOLLIN, both, Events::EPOLLOUT] {
            let interests = [interest(&ours, 1, wanted)];
            events.wait_for(&interests).expect("waits for them");
            assert_eq!(ready(&events), [(1, wanted)]);
        }
        // A descriptor without events is reported nevertheless after its peer has hung up.
        let nothing = [interest(&ours, 1, Events::empty())];
        events.wait_for(&nothing).expect("waits for them");
        assert_eq!(ready(&events), []);
        drop(theirs);
        events.wait_for(&nothing).expect("waits for them");
        assert_eq!(ready(&events), [(1, Events::EPOLLHUP)]);
        events.wait_for(&[]).expect("waits for them");
        assert_eq!(ready(&events), []);
    }

    #[test]
    fn a_descriptor_may_come_back_under_another_token() {
        let mut events = EventLoop::new().expect("a set");
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let ours = Arc::new(ours);
        for token in [1, 2] {
            let interests = [interest(&ours, token, Events::EPOLLOUT)];
            events.wait_for(&interests).expect("waits for them");
            assert_eq!(ready(&events), [(token, Events::EPOLLOUT)]);
        }
    }

    /// The next file that is opened gets the number of a closed descriptor.
    #[test]
    fn a_reused_descriptor_number_is_waited_for() {
        let mut events = EventLoop::new().expect("a set");
        for _ in 0..3 {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair");
            let interests = [interest(&Arc::new(ours), 1, Events::EPOLLIN)];
            events.wait_for(&interests).expect("waits for them");
            assert_eq!(ready(&events), []);
            theirs.write_all(b"x").expect("sent");
            assert_eq!(ready(&events), [(1, Events::EPOLLIN)]);
        }
    }

    #[test]
    fn the_set_is_closed_with_its_loop() {
        let before = std::fs::read_dir("/proc/self/fd").expect("proc").count();
        for _ in 0..200 {
            EventLoop::new().expect("a set");
        }
        let after = std::fs::read_dir("/proc/self/fd").expect("proc").count();
        assert!(after < before + 200, "{before} {after}");
    }
}
