//! Tells a new crate what the VMM has told the one before.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Relay;
use super::link::Verdict;
use super::message::MessageBytes;
use super::state::{VmmRingState, VmmState};
use super::told::Told;
use crate::device::take_over::StoppedRing;
use crate::device::{Device, EVENT_QUEUE, MAX_QUEUE_SIZE, QUEUES, REQUEST_QUEUE};
use crate::warn_limited;

/// Entries of a ring whose size the VMM has not set: the crate's default.
const DEFAULT_SIZE: u16 = 1024;
const _: () = assert!(DEFAULT_SIZE as usize == MAX_QUEUE_SIZE);

impl Relay {
    /// Tells the crate what it must know before the core is restored: the negotiation, and guest memory. When this returns,
    /// the device has the memory.
    ///
    /// # Errors
    /// The crate refuses a message, or the daemon is to end.
    pub(in super::super) fn tell_before_restore(&mut self) -> io::Result<()> {
        let told = self.book.state().before_restore();
        self.tell(&told)
    }

    /// Takes the driver over, and tells the crate about the rings. The core must be restored.
    ///
    /// # Errors
    /// The crate refuses a message, a started ring is not in guest memory any more, or the daemon is to end.
    pub(in super::super) fn tell_after_restore(&mut self, device: &Device) -> io::Result<()> {
        device.take_over(stopped_ring(self.book.state()));
        for index in self.book.forget_unreachable_rings() {
            warn_limited!(
                "ring {index} is stopped, and is where the guest has no memory any more: it runs again once the VMM has \
                 said where it is"
            );
        }
        let state = self.book.state();
        let told = state.after_restore(bases(state, device));
        self.tell(&told.map_err(io::Error::other)?)?;
        if self.book.state().rings[usize::from(REQUEST_QUEUE)].is_running() {
            device.wait_for_interrupted();
        }
        self.left_files.clear();
        Ok(())
    }

    /// Whether the daemon is to end.
    pub(in super::super) fn is_stopped(&self) -> bool {
        self.link.is_stopped()
    }

    fn tell(&mut self, told: &[Told]) -> io::Result<()> {
        for message in told {
            let spare = if message.files.iter().any(String::is_empty) {
                Some(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
            } else {
                None
            };
            let file = |name: &String| {
                if name.is_empty() {
                    return spare.as_ref().map(AsFd::as_fd);
                }
                self.left_files.get(name).map(|file| file.as_fd())
            };
            let files: Option<Vec<BorrowedFd<'_>>> = message.files.iter().map(file).collect();
            let files = files.ok_or_else(|| io::Error::other("a descriptor is missing"))?;
            let bytes = MessageBytes::new(message.request, &message.body);
            match self.link.exchange(&bytes, &files)? {
                Verdict::Accepted(_) => {}
                Verdict::Refused(_) => {
                    let text = format!("the new backend refuses {:?}", message.request);
                    return Err(io::Error::other(text));
                }
            }
            if self.link.is_stopped() {
                return Err(io::Error::other("the daemon ends"));
            }
        }
        Ok(())
    }
}

/// The indices at which the rings go on.
fn bases(state: &VmmState, device: &Device) -> [u16; QUEUES] {
    let memory = device.memory();
    let mut bases = [0; QUEUES];
    for (queue, (base, ring)) in (0..).zip(bases.iter_mut().zip(&state.rings)) {
        *base = ring.base;
        if !ring.is_started {
            continue;
        }
        let now = match queue {
            // Whatever the earlier process has taken after this index is answered by this one.
            // Without its journal, those that are in the used ring are.
            REQUEST_QUEUE => device
                .interrupted_base()
                .or_else(|| used_index(ring, memory.as_deref()?)),
            // Each buffer of the event queue is used as it is taken.
            EVENT_QUEUE => memory
                .as_deref()
                .and_then(|memory| used_index(ring, memory)),
            _ => None,
        };
        *base = now.unwrap_or(ring.base);
    }
    bases
}

/// The index up to which the device has returned buffers.
fn used_index(ring: &VmmRingState, memory: &GuestMemoryMmap) -> Option<u16> {
    const INDEX: u64 = 2;
    let at = ring.place?.used.checked_add(INDEX)?;
    let index: u16 = memory.read_obj(GuestAddress(at)).ok()?;
    Some(u16::from_le(index))
}

/// The request ring, if the VMM has stopped it.
fn stopped_ring(state: &VmmState) -> Option<StoppedRing> {
    let [ring, ..] = &state.rings;
    let place = ring.place.filter(|_| ring.was_stopped)?;
    Some(StoppedRing {
        next_avail: ring.base,
        size: ring.size.unwrap_or(DEFAULT_SIZE),
        descriptors: place.descriptors,
        available: place.available,
        used: place.used,
    })
}
