//! Guest RAM that the VMM adds and removes while readers run.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::debug;

use super::reader::Reader;
use super::waiting::ReadersWait;
use super::{Ram, Registry, RegistryState, Stuck};
use crate::address::GpaRange;
use crate::shadow::frames::send_frame;
use crate::shadow::process::has_hung_up;
use crate::shadow::wire::{Frame, kind};
use crate::warn_limited;

/// The longest time that sending to a reader takes if its socket has room.
const SEND_TIME: Duration = Duration::from_millis(1);

impl Registry {
    /// Adds guest RAM and waits until the readers have mapped it: the guest's next request may map this RAM for
    /// their DMA.
    ///
    /// A reader that does not acknowledge in time reaches the RAM once it does; later calls do not wait for it
    /// until it has caught up. The caller may hold the core's lock: the thread that serves the readers does not
    /// need that lock to receive an acknowledgement.
    pub fn add_memory(&self, ram: Ram) {
        let mut state = self.state.lock();
        let up_to_date = state.generation;
        state.generation += 1;
        let generation = state.generation;
        let done = memory_frame(generation);
        let endpoints: Vec<_> = state.readers.iter().map(|r| r.endpoint).collect();
        let mut wait = state.begin_wait(endpoints, self.limits.patience);
        let mut awaited: Vec<_> = state
            .readers
            .iter()
            .filter(|r| r.acknowledged.load(Ordering::Acquire) >= up_to_date)
            .cloned()
            .collect();
        let unreached = state.broadcast(&mut wait, |reader, deadline| {
            send_ram(&reader.stream, &ram, deadline)
                .and_then(|()| send_frame(&reader.stream, &done, &[], Some(deadline)))
        });
        state.memory.push(ram);
        for reader in unreached {
            // Half-close: the reader drains its socket, then disconnects. Not removed here, because its accesses
            // are valid until then and must be waited for. It cannot reach the new RAM, which it never maps.
            let _ = reader.stream.shutdown(std::net::Shutdown::Write);
        }
        loop {
            awaited.retain(|r| {
                !r.is_gone()
                    && r.acknowledged.load(Ordering::Acquire) < generation
                    && !has_hung_up(&r.stream)
                    && !r.process.is_gone()
            });
            let now = Instant::now();
            for reader in &awaited {
                wait.note(reader.endpoint, now);
            }
            for late in awaited.extract_if(.., |r| now >= wait.until(r.endpoint)) {
                warn_limited!(
                    "reader {} of endpoint {} did not acknowledge the new memory slot in time",
                    late.number,
                    late.endpoint
                );
            }
            let Some(next) = awaited.iter().map(|r| wait.until(r.endpoint)).min() else {
                break;
            };
            self.changed.wait_until(&mut state, next);
        }
        state.charge(&wait);
    }

    /// Removes guest RAM. On success no reader reaches it any more. Kills a reader that does not acknowledge in
    /// time.
    ///
    /// # Errors
    /// A reader does not acknowledge and cannot be killed.
    pub fn remove_memory(&self, range: GpaRange) -> Result<(), Stuck> {
        let mut state = self.state.lock();
        state.memory.retain(|ram| ram.range != range);
        state.generation += 1;
        let generation = state.generation;
        let removed = Frame::new(kind::MEMORY_REMOVED, 0, [range.first().0, 0, 0, 0]);
        let endpoints: Vec<_> = state.readers.iter().map(|r| r.endpoint).collect();
        let mut wait = state.begin_wait(endpoints, self.limits.patience);
        let unreached = state.broadcast(&mut wait, |reader, deadline| {
            send_frame(&reader.stream, &removed, &[], Some(deadline)).and_then(|()| {
                send_frame(
                    &reader.stream,
                    &memory_frame(generation),
                    &[],
                    Some(deadline),
                )
            })
        });
        let mut holding: Vec<_>;
        loop {
            let holds = |r: &&Arc<Reader>| {
                !r.is_gone() && r.acknowledged.load(Ordering::Acquire) < generation
            };
            holding = state.readers.iter().filter(holds).cloned().collect();
            holding.retain(|r| !r.has_ended());
            let now = Instant::now();
            let reached = holding
                .iter()
                .filter(|r| !unreached.iter().any(|d| Arc::ptr_eq(r, d)));
            let mut next: Option<Instant> = None;
            for reader in reached {
                wait.note(reader.endpoint, now);
                let until = wait.until(reader.endpoint);
                if until > now {
                    next = Some(next.map_or(until, |next| next.min(until)));
                }
            }
            let Some(next) = next else { break };
            self.changed.wait_until(&mut state, next);
        }
        state.charge(&wait);
        drop(state);
        // A reader that has disconnected begins no access any more. If it is inside none, it uses no memory.
        for reader in holding.extract_if(.., |r| has_hung_up(&r.stream) && !r.is_inside()) {
            self.remove(&reader);
        }
        holding
            .iter()
            .try_for_each(|reader| self.kill(reader, "does not release removed memory"))
    }
}

impl RegistryState {
    /// Calls `send` for every reader, with the deadline of its endpoint. Returns the readers to which nothing could be
    /// sent. A reader whose socket is full keeps the caller waiting like one that does not acknowledge.
    fn broadcast(
        &self,
        wait: &mut ReadersWait,
        mut send: impl FnMut(&Reader, Instant) -> io::Result<()>,
    ) -> Vec<Arc<Reader>> {
        let unreached = self.readers.iter().filter(|reader| {
            let began = Instant::now();
            let sent = send(reader, wait.until(reader.endpoint));
            let ended = Instant::now();
            // A shorter time is that of the system calls, and may follow another reader's wait.
            if ended.duration_since(began) > SEND_TIME {
                wait.note(reader.endpoint, ended);
            }
            if let Err(cause) = &sent {
                debug!("cannot send to reader {}: {cause}", reader.number);
            }
            sent.is_err()
        });
        unreached.cloned().collect()
    }
}

pub(super) fn memory_frame(generation: u64) -> Frame {
    Frame::new(kind::MEMORY_COMPLETE, 0, [generation, 0, 0, 0])
}

pub(super) fn send_ram(stream: &UnixStream, ram: &Ram, deadline: Instant) -> io::Result<()> {
    let (first, span) = (ram.range.first().0, ram.range.span());
    // A region is whole pages below 2^64, so the length fits.
    let numbers = [first, span.saturating_add(1), ram.offset, 0];
    let frame = Frame::new(kind::MEMORY_ADDED, 0, numbers);
    send_frame(stream, &frame, &[ram.file.as_fd()], Some(deadline))
}
