//! Guest RAM that comes and goes under the readers.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use log::debug;

use super::reader::Reader;
use super::{Ram, Registry, RegistryState, Stuck};
use crate::address::GpaRange;
use crate::shadow::frames::send_frame;
use crate::shadow::process::has_hung_up;
use crate::shadow::wire::{Frame, kind};
use crate::warn_limited;

impl Registry {
    /// Guest RAM has come. When this returns, the readers have it, so that what the guest is answered
    /// after that holds for them too.
    ///
    /// A reader that does not take it in time does not reach it until it does, and is not waited for
    /// again before it has caught up. Only what is needed for that is waited for: a thread that
    /// registers readers or hears them does not need what the caller may hold.
    pub fn add_memory(&self, ram: Ram) {
        let mut state = self.state.lock();
        let up_to_date = state.generation;
        state.generation += 1;
        let generation = state.generation;
        let done = memory_frame(generation);
        let until = Instant::now() + self.limits.patience;
        let awaited: Vec<_> = state
            .readers
            .iter()
            .filter(|r| r.taken.load(Ordering::Acquire) >= up_to_date)
            .cloned()
            .collect();
        let deaf = state.tell(|reader| {
            send_ram(&reader.stream, &ram, until)
                .and_then(|()| send_frame(&reader.stream, &done, &[], Some(until)))
        });
        state.memory.push(ram);
        for reader in deaf {
            // What it does not know of it does not reach. It goes on with what it knows until it has
            // read as far as to here, and is waited for: it is out when it has hung up itself.
            let _ = reader.stream.shutdown(std::net::Shutdown::Write);
        }
        let behind = |r: &&Arc<Reader>| {
            !r.is_gone()
                && r.taken.load(Ordering::Acquire) < generation
                && !has_hung_up(&r.stream)
                && !r.process.is_gone()
        };
        while let Some(reader) = awaited.iter().find(behind) {
            if self.changed.wait_until(&mut state, until) {
                warn_limited!(
                    "reader {} of endpoint {} does not take the memory that has come",
                    reader.number,
                    reader.endpoint
                );
                return;
            }
        }
    }

    /// Guest RAM goes. When this returns `Ok`, no reader reaches it any more.
    ///
    /// # Errors
    /// A reader does not let go and cannot be ended.
    pub fn remove_memory(&self, range: GpaRange) -> Result<(), Stuck> {
        let mut state = self.state.lock();
        state.memory.retain(|ram| ram.range != range);
        state.generation += 1;
        let generation = state.generation;
        let goes = Frame::new(kind::MEMORY_GOES, 0, [range.first().0, 0, 0, 0]);
        let until = Instant::now() + self.limits.patience;
        let deaf = state.tell(|reader| {
            send_frame(&reader.stream, &goes, &[], Some(until)).and_then(|()| {
                send_frame(&reader.stream, &memory_frame(generation), &[], Some(until))
            })
        });
        let mut holding: Vec<_>;
        loop {
            let holds =
                |r: &&Arc<Reader>| !r.is_gone() && r.taken.load(Ordering::Acquire) < generation;
            holding = state.readers.iter().filter(holds).cloned().collect();
            holding.retain(|r| !r.process.is_gone());
            if holding
                .iter()
                .all(|r| deaf.iter().any(|d| Arc::ptr_eq(r, d)))
            {
                break;
            }
            if self.changed.wait_until(&mut state, until) {
                break;
            }
        }
        drop(state);
        // Those that have hung up have let go of all memory, unless they are still at it.
        for reader in holding.extract_if(.., |r| has_hung_up(&r.stream) && !r.is_inside()) {
            self.forget(&reader);
        }
        holding
            .iter()
            .try_for_each(|reader| self.end(reader, "does not let go of memory that goes"))
    }
}

impl RegistryState {
    /// Tells every reader something; returns those that do not listen.
    fn tell(&self, mut tell: impl FnMut(&Reader) -> io::Result<()>) -> Vec<Arc<Reader>> {
        let deaf = self.readers.iter().filter(|reader| {
            let told = tell(reader);
            if let Err(cause) = &told {
                debug!("reader {} does not listen: {cause}", reader.number);
            }
            told.is_err()
        });
        deaf.cloned().collect()
    }
}

pub(super) fn memory_frame(generation: u64) -> Frame {
    Frame::new(kind::MEMORY, 0, [generation, 0, 0, 0])
}

pub(super) fn send_ram(stream: &UnixStream, ram: &Ram, until: Instant) -> io::Result<()> {
    let (first, span) = (ram.range.first().0, ram.range.span());
    // Whole pages, so that there is one more than the span.
    let numbers = [first, span.saturating_add(1), ram.offset, 0];
    let frame = Frame::new(kind::MEMORY_COMES, 0, numbers);
    send_frame(stream, &frame, &[ram.file.as_fd()], Some(until))
}
