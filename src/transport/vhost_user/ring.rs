//! A ring of the backend crate, with the VMM's descriptors in this module's hands.
//!
//! **Kicks.** The backend crate keeps one descriptor for each ring, puts it into the worker's epoll set when the ring
//! starts, and reads it when it is readable. If a read fails, the worker's thread ends without a message. If the VMM
//! replaces the descriptor of a running ring, the set keeps the old one, which the crate has closed. A kick through the
//! old one then makes the worker read the new one, and a kick through the new one reaches nobody.
//!
//! So the crate gets a descriptor of our own, which stays the same: an epoll set with the VMM's descriptor in it.
//!
//! **Calls.** The backend crate writes to the VMM's descriptor while it holds the ring's lock. A VMM can make that
//! `write` block. Here the device notes under its locks that the driver wants an interrupt, and the kernel signals the
//! descriptor after they are released ([`PeerEvent`]). The crate never gets the descriptor.
//!
//! A descriptor that is not an eventfd ends the connection.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::connection::Connection;
use crate::device::ring::{LockedRing, Ring};
use crate::error_limited;
use crate::locks::{Mutex, Rank};
use crate::process::peer_event::PeerEvent;

/// Guest memory as the backend crate passes it.
type RingMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A ring that a VMM has set up. Clones name the same ring.
#[derive(Clone)]
pub struct VmmRing {
    /// Addresses, indices and state. The crate's descriptor in it is a duplicate of `kicks.set` while the ring is
    /// started.
    state: VringRwLock,
    kicks: Arc<Kicks>,
    calls: Arc<Calls>,
    connection: Arc<Connection>,
}

impl VmmRing {
    /// The connection that this ring belongs to.
    pub(super) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// The VMM's kick descriptor is `kick` from now on.
    fn replace_kick(&self, kick: Option<File>) -> io::Result<()> {
        let has_kick = kick.is_some();
        self.kicks.replace(peer_event(kick)?)?;
        let state = self.state.get_ref();
        let (is_started, has_set) = (state.get_queue().ready(), state.get_kick().is_some());
        drop(state);
        // The crate adds its descriptor to the worker's set when a ring starts, and removes it when the ring stops.
        // Meanwhile it must stay the same.
        if !is_started && has_set != has_kick {
            let set = has_kick.then(|| self.kicks.set.try_clone()).transpose()?;
            self.state.set_kick(set.map(File::from));
        }
        Ok(())
    }
}

impl Ring for VmmRing {
    type Locked<'a> = LockedVmmRing<'a>;

    fn lock(&self) -> Self::Locked<'_> {
        LockedVmmRing {
            state: self.state.get_mut(),
            calls: &self.calls,
        }
    }

    fn send_interrupts(&self) -> io::Result<()> {
        self.calls.send()
    }
}

/// A [`VmmRing`] whose lock is held.
pub struct LockedVmmRing<'a> {
    state: RwLockWriteGuard<'a, VringState>,
    calls: &'a Calls,
}

impl LockedRing for LockedVmmRing<'_> {
    fn is_running(&self) -> bool {
        self.state.is_enabled() && self.state.get_queue().ready()
    }

    fn queue(&self) -> &Queue {
        self.state.get_queue()
    }

    fn queue_mut(&mut self) -> &mut Queue {
        self.state.get_queue_mut()
    }

    fn request_interrupt(&self) {
        self.calls.request();
    }
}

impl<'a> VringStateGuard<'a, RingMemory> for VmmRing {
    type G = RwLockReadGuard<'a, VringState>;
}

impl<'a> VringStateMutGuard<'a, RingMemory> for VmmRing {
    type G = RwLockWriteGuard<'a, VringState>;
}

impl VringT<RingMemory> for VmmRing {
    fn new(memory: RingMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let kicks = Kicks::new().map_err(|cause| {
            error_limited!("cannot make the descriptors of a ring: {cause}");
            QueueError::QueueNotReady
        })?;
        Ok(Self {
            state: VringRwLock::new(memory, max_queue_size)?,
            kicks: Arc::new(kicks),
            calls: Arc::new(Calls::default()),
            connection: Connection::in_the_making(),
        })
    }

    fn set_kick(&self, file: Option<File>) {
        if let Err(cause) = self.replace_kick(file) {
            let reason = format!("a ring's kick descriptor cannot be used: {cause}");
            self.connection.end(reason);
        }
    }

    /// Never fails: on an error the backend crate would end the worker's thread silently.
    fn read_kick(&self) -> io::Result<bool> {
        if let Err(cause) = self.kicks.take() {
            let reason = format!("the kicks of a ring cannot be waited for: {cause}");
            self.connection.end(reason);
        }
        Ok(self.state.get_ref().is_enabled())
    }

    fn get_ref(&self) -> RwLockReadGuard<'_, VringState> {
        self.state.get_ref()
    }

    fn get_mut(&self) -> RwLockWriteGuard<'_, VringState> {
        self.state.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.state.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.calls.request();
        self.calls.send()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.state.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.state.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.state.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.state.set_enabled(enabled);
    }

    fn set_queue_info(
        &self,
        desc_table: u64,
        avail_ring: u64,
        used_ring: u64,
    ) -> Result<(), QueueError> {
        self.state.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.state.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.state.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.state.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.state.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.state.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.state.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.state.set_queue_ready(ready);
    }

    fn set_call(&self, file: Option<File>) {
        if let Err(cause) = peer_event(file).and_then(|call| self.calls.replace(call)) {
            let reason = format!("a ring's call descriptor cannot be used: {cause}");
            self.connection.end(reason);
        }
    }

    /// Closes the descriptor: the device reports no errors of a ring.
    fn set_err(&self, file: Option<File>) {
        if let Err(cause) = peer_event(file) {
            let reason = format!("a ring's error descriptor cannot be used: {cause}");
            self.connection.end(reason);
        }
    }
}

/// Takes over a descriptor of the VMM, which must be an eventfd.
fn peer_event(file: Option<File>) -> io::Result<Option<PeerEvent>> {
    file.map(|file| PeerEvent::new(file.into())).transpose()
}

/// The interrupts of one ring.
///
/// They are numbered. A thread that requests one sends all up to its own after it has released its locks, unless
/// another thread has sent them. So an interrupt that was requested is sent at least once, and before the descriptor
/// is replaced or taken away.
struct Calls {
    call: Mutex<Option<Arc<PeerEvent>>>,
    requested: AtomicU64,
    sent: AtomicU64,
}

impl Default for Calls {
    fn default() -> Self {
        Self {
            call: Mutex::new(Rank::RingDescriptors, None),
            requested: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }
}

impl Calls {
    /// Notes that the driver wants an interrupt.
    fn request(&self) {
        self.requested.fetch_add(1, Ordering::Release);
    }

    /// Sends the interrupts that were requested.
    fn send(&self) -> io::Result<()> {
        let requested = self.requested.load(Ordering::Acquire);
        if self.sent.load(Ordering::Acquire) >= requested {
            return Ok(());
        }
        let call = self.call.lock().clone();
        let outcome = call.map_or(Ok(()), |call| call.signal());
        // After the signal: a thread that finds the number relies on it.
        self.sent.fetch_max(requested, Ordering::Release);
        outcome
    }

    /// The VMM's call descriptor is `call` from now on.
    fn replace(&self, call: Option<PeerEvent>) -> io::Result<()> {
        // The VMM takes the ring's state over after this, and sends no interrupt of its own for it.
        let outcome = self.send();
        *self.call.lock() = call.map(Arc::new);
        outcome
    }
}

/// The kicks of one ring: a set of the VMM's kick descriptor and one of our own.
///
/// The descriptors are edge-triggered, and the set alone tells whether a kick has come. Nothing reads the VMM's
/// descriptor, so no read of it can block, whatever it is, and whoever else reads it.
#[derive(Debug)]
struct Kicks {
    set: OwnedFd,
    /// Stands in for a kick when the descriptor is replaced: the driver may have kicked the old one.
    replaced: OwnedFd,
    kick: Mutex<Option<PeerEvent>>,
}

impl Kicks {
    fn new() -> io::Result<Self> {
        let kicks = Self {
            set: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            replaced: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            kick: Mutex::new(Rank::RingDescriptors, None),
        };
        kicks.add(&kicks.replaced)?;
        Ok(kicks)
    }

    /// Waits for `kick` instead of the present descriptor.
    fn replace(&self, kick: Option<PeerEvent>) -> io::Result<()> {
        let mut present = self.kick.lock();
        if let Some(old) = &*present {
            // Closing it would not remove it: the VMM has the same file open.
            epoll::delete(&self.set, old)?;
            *present = None;
        }
        if let Some(new) = kick {
            self.add(&new)?;
            *present = Some(new);
            match rustix::io::write(&self.replaced, &1u64.to_ne_bytes()) {
                // A counter that is full has been signalled, too.
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(cause) => return Err(cause.into()),
            }
        }
        Ok(())
    }

    /// Takes the kicks that have come.
    fn take(&self) -> io::Result<()> {
        let mut events = [MaybeUninit::uninit(); 2];
        match epoll::wait(&self.set, &mut events, Some(&Timespec::default())) {
            // After a signal the worker's set still reports the kicks.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(cause) => Err(cause.into()),
        }
    }

    fn add(&self, source: impl AsFd) -> io::Result<()> {
        let events = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.set,
            source,
            epoll::EventData::new_u64(0),
            events,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::poll;

    use super::*;

    /// A descriptor for [`Calls`], and the VMM's.
    fn call() -> (PeerEvent, OwnedFd) {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let copy = event.try_clone().expect("a duplicate");
        (PeerEvent::new(copy).expect("an eventfd"), event)
    }

    fn count(event: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(event, &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(cause) => {
                assert_eq!(cause, Errno::AGAIN);
                0
            }
        }
    }

    #[test]
    fn an_interrupt_is_sent_once_it_was_requested() {
        let calls = Calls::default();
        calls.request();
        calls.send().expect("no descriptor, no interrupt");
        let (event, vmm) = call();
        calls.replace(Some(event)).expect("replaced");
        calls.send().expect("none requested");
        assert_eq!(count(&vmm), 0);
        calls.request();
        calls.request();
        assert_eq!(count(&vmm), 0);
        calls.send().expect("sent");
        calls.send().expect("sent already");
        assert_eq!(count(&vmm), 1, "one for both");
    }

    #[test]
    fn an_interrupt_is_sent_before_its_descriptor_goes() {
        let calls = Calls::default();
        let (event, vmm) = call();
        calls.replace(Some(event)).expect("replaced");
        calls.request();
        calls.replace(None).expect("replaced");
        assert_eq!(count(&vmm), 1);
        calls.send().expect("sent already");
    }

    #[test]
    fn kicks_are_taken_and_not_read() {
        let kicks = Kicks::new().expect("a set");
        let is_ready = || {
            let mut set = [poll_fd(&kicks.set)];
            poll(&mut set, Some(&Timespec::default())).expect("polled") == 1
        };
        assert!(!is_ready());
        let (event, vmm) = call();
        kicks.replace(Some(event)).expect("replaced");
        assert!(is_ready(), "the driver may have kicked before");
        kicks.take().expect("taken");
        for _ in 0..2 {
            assert!(!is_ready());
            rustix::io::write(&vmm, &1u64.to_ne_bytes()).expect("kicked");
            assert!(is_ready());
            kicks.take().expect("taken");
        }
        assert_eq!(count(&vmm), 2);
        kicks.replace(None).expect("replaced");
        rustix::io::write(&vmm, &1u64.to_ne_bytes()).expect("kicked");
        assert!(!is_ready());
    }

    fn poll_fd(fd: &OwnedFd) -> rustix::event::PollFd<'_> {
        rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)
    }
}
