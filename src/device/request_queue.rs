//! The request queue: chains to requests, requests to the core, outcomes to the used ring.

use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, DESCRIPTOR_LEN, Span};
use super::execute::{Context, Executor, WORK_PER_CLOCK_READ};
use super::request_ring::{self, RingError};
use super::resume::UsedEntry;
use super::ring::{LockedRing, Ring, signal};
use super::view::GuestView;
use crate::metrics::SINGLES_PER_SAMPLE;
use crate::warn_limited;

/// How long a pass may take chains; those left are put back for the next one. A single request
/// takes no longer than the arena is large.
const MAX_PASS: Duration = Duration::from_millis(1);
/// How long a driver that spins may wait for the first answer of a batch.
const MAX_ANSWER_DELAY: Duration = Duration::from_micros(20);
/// What a pass over the ring came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Chains were served; there may be more.
    Served,
    /// Nothing is there.
    Empty,
    /// The ring is stopped, disabled, or out of reach, or beyond use until it is started anew.
    Stopped,
}

/// The state of the queue between passes. Buffers are kept, so that a pass allocates nothing.
#[derive(Debug, Default)]
pub struct RequestQueue {
    /// The driver has made the ring unusable.
    pub broken: bool,
    /// The last used entry that is not all zero.
    pub last_used: Option<UsedEntry>,
    chains: Vec<Chain>,
    spans: Vec<Span>,
    done: Vec<(u16, u32)>,
    executor: Executor,
    /// Where the last chain had what was read: a driver that waits for each answer frees and
    /// allocates the same descriptors and the same bytes again and again.
    last_chain: ChainAddresses,
    /// Passes of a single request, to look at the time of some of them.
    singles: u64,
}

/// The places of a chain in guest memory, as good as any other address where it had none.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainAddresses {
    descriptor: u64,
    request: u64,
}

impl ChainAddresses {
    /// Has what is there fetched.
    pub fn prefetch(&self, view: &GuestView<'_>) {
        view.prefetch(self.descriptor);
        view.prefetch(self.request);
    }
}

impl RequestQueue {
    /// Serves up to a batch of requests. The driver sees their answers when all are done, or after
    /// 20 microseconds those that are.
    ///
    /// No lock of the ring is held while the core works.
    pub fn serve(&mut self, ring: &impl Ring, context: &mut Context<'_>) -> Pass {
        if self.broken {
            return Pass::Stopped;
        }
        let view = GuestView::new(context.memory);
        let taken = self.take_chains(ring, &view, context);
        if taken != Pass::Served {
            return taken;
        }
        let chains = std::mem::take(&mut self.chains);
        let weight = self.weight(chains.len());
        let started = (weight > 0).then(Instant::now);
        let mut published_at = started;
        let mut work = 0;
        let mut left = chains.len();
        let backends = context.iommu.has_backends();
        for (at, chain) in chains.iter().enumerate() {
            if work >= WORK_PER_CLOCK_READ && !self.executor.has_outcomes() {
                work = 0;
                let now = Instant::now();
                if started.is_some_and(|started| now - started > MAX_PASS) {
                    break;
                }
                if published_at.is_some_and(|published_at| now - published_at > MAX_ANSWER_DELAY) {
                    self.publish(ring, &view, 0);
                    published_at = Some(now);
                }
            }
            if backends && !self.executor.has_outcomes() {
                self.executor
                    .unmap_run(chains.get(at..).unwrap_or(&[]), context);
            }
            let used = match &chain.request {
                Some(request) => {
                    let (used, done) = self.executor.answer(&view, request, &self.spans, context);
                    work += done;
                    used
                }
                None => None,
            };
            if used.is_none() {
                context.metrics.chains_refused.inc();
            }
            self.done.push((chain.head, used.unwrap_or(0)));
            left -= 1;
        }
        self.chains = chains;
        self.chains.clear();
        self.spans.clear();
        self.publish(ring, &view, left);
        if let Some(started) = started {
            context.metrics.batches.record(started.elapsed(), weight);
        }
        Pass::Served
    }

    /// How many batches one of `requests` counts for; 0 where its time is not looked at.
    fn weight(&mut self, requests: usize) -> u64 {
        if requests > 1 {
            return 1;
        }
        self.singles = self.singles.wrapping_add(1);
        if self.singles.is_multiple_of(SINGLES_PER_SAMPLE) {
            SINGLES_PER_SAMPLE
        } else {
            0
        }
    }

    /// Asks the driver to notify of its next request. Returns whether one has come meanwhile, for
    /// which it may not.
    pub fn enable_notifications(&self, ring: &impl Ring, memory: &GuestMemoryMmap) -> bool {
        let mut ring = ring.lock();
        if self.broken || !ring.is_running() {
            return false;
        }
        let queue = ring.queue_mut();
        // Out of reach is tried again when memory changes.
        let more = queue.enable_notification(memory).unwrap_or(false);
        more && queue.disable_notification(memory).is_ok()
    }

    /// Asks the driver not to notify: the ring is looked at anyway. With event indices it does not
    /// until it is asked to.
    pub fn disable_notifications(&self, ring: &impl Ring, memory: &GuestMemoryMmap) {
        let mut ring = ring.lock();
        if ring.is_running() && !ring.queue().event_idx_enabled() {
            // Out of reach, it cannot be looked at either.
            let _ = ring.queue_mut().disable_notification(memory);
        }
    }

    /// Where the last chain that was taken was.
    pub fn last_chain(&self) -> ChainAddresses {
        self.last_chain
    }

    /// Takes chains off the ring.
    fn take_chains(
        &mut self,
        ring: &impl Ring,
        view: &GuestView<'_>,
        context: &Context<'_>,
    ) -> Pass {
        let mut ring = ring.lock();
        if !ring.is_running() {
            return Pass::Stopped;
        }
        let queue = ring.queue_mut();
        let (table, size) = (queue.desc_table(), queue.size());
        let count = match request_ring::available(queue, view) {
            Ok(0) => return Pass::Empty,
            Ok(count) => count,
            // The ring's memory is away; it is tried again when memory changes.
            Err(RingError::OutOfReach) => return Pass::Stopped,
            Err(RingError::TooMany) => {
                self.broken = true;
                warn_limited!(
                    "the request ring is left alone until the driver starts it anew: it promises \
                     more requests than the ring has room for"
                );
                return Pass::Stopped;
            }
        };
        if usize::from(count) > context.max_batch {
            context.metrics.batch_full.inc();
        }
        for _ in 0..usize::from(count).min(context.max_batch) {
            let Some(head) = request_ring::take(queue, view) else {
                break;
            };
            let chain = Chain::read(view, head, table, size, &mut self.spans);
            self.chains.push(chain);
        }
        let Some(last) = self.chains.last() else {
            return Pass::Stopped;
        };
        self.last_chain = ChainAddresses {
            descriptor: table.saturating_add(u64::from(last.head) * DESCRIPTOR_LEN),
            request: last.request.as_ref().map_or(0, |request| request.at),
        };
        Pass::Served
    }

    /// Returns the chains that are done, and puts the last `left` ones taken back.
    fn publish(&mut self, ring: &impl Ring, view: &GuestView<'_>, left: usize) {
        let mut ring = ring.lock();
        let queue = ring.queue_mut();
        let (size, before) = (queue.size(), queue.next_used());
        let left = u16::try_from(left).unwrap_or(0);
        queue.set_next_avail(queue.next_avail().wrapping_sub(left));
        self.done.retain(|&(head, _)| {
            if head >= size {
                warn_limited!("request {head} is not in the ring and cannot be returned");
            }
            head < size
        });
        let returned = request_ring::publish(queue, view, &self.done);
        let lost = self.done.len() - returned;
        if lost > 0 {
            warn_limited!(
                "{lost} requests cannot be returned: the used ring is not in guest memory"
            );
        }
        let returned = self.done.get(..returned).unwrap_or(&[]);
        if let Some(index) = returned.iter().rposition(|entry| *entry != (0, 0))
            && let Some(&(head, len)) = returned.get(index)
        {
            let index = u16::try_from(index).unwrap_or(0);
            let slot = before.wrapping_add(index).checked_rem(size).unwrap_or(0);
            self.last_used = Some(UsedEntry { slot, head, len });
        }
        self.done.clear();
        if request_ring::wants_notification(queue, view, before) {
            signal(&ring);
        }
    }
}
