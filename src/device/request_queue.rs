//! The request queue: takes chains off the ring in batches, passes their requests to the executor, and returns the
//! chains.

use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, DESCRIPTOR_LEN, Span};
use super::execute::{Context, Executor, WORK_PER_CLOCK_READ};
use super::request_ring::{self, RingError};
use super::resume::UsedEntry;
use super::ring::{LockedRing, Ring};
use super::view::GuestView;
use crate::metrics::SINGLES_PER_SAMPLE;
use crate::store::{MAX_BATCH, RingBatch, UNWRITTEN};
use crate::warn_limited;

/// A pass executes no further request after this time; the next pass takes the rest. One request can exceed it: the
/// size of the arena bounds how long it takes.
const MAX_PASS: Duration = Duration::from_millis(1);
/// The longest time for which a finished answer waits for the rest of its batch: the driver may be spinning.
const MAX_ANSWER_DELAY: Duration = Duration::from_micros(20);

/// The outcome of a pass over the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Chains were served; there may be more.
    Served,
    /// The ring has no request.
    Empty,
    /// The ring is stopped or disabled, is not in guest memory, or is unusable until a driver starts it anew.
    Stopped,
}

/// The state of the queue between passes. It keeps its buffers, so that a pass allocates no memory.
#[derive(Debug, Default)]
pub struct RequestQueue {
    /// The driver has made the ring unusable.
    pub broken: bool,
    /// The last used entry that is not all zero.
    pub last_used: Option<UsedEntry>,
    chains: Vec<Chain>,
    pub(super) spans: Vec<Span>,
    pub(super) done: Vec<(u16, u32)>,
    pub(super) executor: Executor,
    /// The ring's next available and next used index before the batch.
    batch_at: (u16, u16),
    /// The addresses of the last chain. A driver that waits for each answer frees and allocates the same descriptors
    /// and buffers again and again, so the next chain probably has the same addresses.
    last_chain: ChainAddresses,
    /// Number of passes of a single request. The time of one in [`SINGLES_PER_SAMPLE`] is measured.
    singles: u64,
}

/// Guest-physical addresses of a chain's parts; 0 for a part that it does not have.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainAddresses {
    descriptor: u64,
    request: u64,
}

impl ChainAddresses {
    /// Tells the processor to fetch the memory at these addresses.
    pub fn prefetch(&self, view: &GuestView<'_>) {
        view.prefetch(self.descriptor);
        view.prefetch(self.request);
    }
}

impl RequestQueue {
    /// Serves one batch of requests. The driver sees the answers when all are done; if that takes longer than
    /// 20 microseconds, it sees the finished ones earlier.
    ///
    /// The ring is not locked while the core works. The caller must send the ring's interrupts.
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
        self.journal_batch(&chains, context);
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
                    let count = self.done.len();
                    self.publish(ring, &view, 0);
                    let count = u16::try_from(count).unwrap_or(0);
                    context.iommu.journal().published(count);
                    published_at = Some(now);
                }
            }
            context.iommu.journal().start(at);
            if backends && !self.executor.has_outcomes() {
                self.executor.run_ahead(chains.iter().skip(at), context);
            }
            let used = match &chain.request {
                Some(request) => {
                    let (used, done) = self.executor.answer(&view, request, &self.spans, context);
                    work += done;
                    used
                }
                None => {
                    context.iommu.journal().done(UNWRITTEN);
                    None
                }
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
        let (next_avail, next_used) = self.publish(ring, &view, left);
        context.iommu.journal().end_batch(next_avail, next_used);
        if let Some(started) = started {
            context.metrics.batches.record(started.elapsed(), weight);
        }
        Pass::Served
    }

    /// The weight with which the metrics count the duration of a batch of `requests` requests; 0 if the duration is not
    /// measured.
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

    /// Asks the driver for a kick with its next request. Returns whether a request has come in the
    /// meantime, for which the driver may not kick.
    pub fn enable_notifications(&self, ring: &impl Ring, memory: &GuestMemoryMmap) -> bool {
        let mut ring = ring.lock();
        if self.broken || !ring.is_running() {
            return false;
        }
        let queue = ring.queue_mut();
        // If the ring is not in guest memory, the worker serves it again when memory changes.
        let more = queue.enable_notification(memory).unwrap_or(false);
        more && queue.disable_notification(memory).is_ok()
    }

    /// Asks the driver not to kick: the worker serves the ring without kicks. With event indices this is the default
    /// until [`Self::enable_notifications`].
    pub fn disable_notifications(&self, ring: &impl Ring, memory: &GuestMemoryMmap) {
        let mut ring = ring.lock();
        if ring.is_running() && !ring.queue().event_idx_enabled() {
            // Fails if the ring is not in guest memory; then it cannot be served either.
            let _ = ring.queue_mut().disable_notification(memory);
        }
    }

    /// The addresses of the last chain that a pass has taken.
    pub fn last_chain(&self) -> ChainAddresses {
        self.last_chain
    }

    /// Takes one batch of chains off the ring.
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
        self.batch_at = (queue.next_avail(), queue.next_used());
        let count = match request_ring::available(queue, view) {
            Ok(0) => return Pass::Empty,
            Ok(count) => count,
            // The worker serves the ring again when memory changes.
            Err(RingError::OutOfReach) => return Pass::Stopped,
            Err(RingError::TooMany) => {
                self.broken = true;
                ring.report_broken();
                warn_limited!(
                    "the driver claims more requests than the request ring has entries; the ring is \
                     not served until a driver starts it anew"
                );
                return Pass::Stopped;
            }
        };
        if usize::from(count) > context.max_batch {
            context.metrics.batch_full.inc();
        }
        for _ in 0..usize::from(count).min(context.max_batch).min(MAX_BATCH) {
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

    /// Writes the batch into the journal: from now on each of its requests gets one answer, whatever happens to this
    /// process.
    #[inline]
    fn journal_batch(&self, chains: &[Chain], context: &mut Context<'_>) {
        let journal = context.iommu.journal();
        if !journal.is_kept() {
            return;
        }
        let batch = RingBatch {
            next_avail: self.batch_at.0,
            next_used: self.batch_at.1,
            count: u16::try_from(chains.len()).unwrap_or(0),
        };
        journal.begin_batch(batch, chains.iter().map(Chain::journal_words));
    }

    /// Returns the finished chains to the driver. Puts the last `left` of the taken chains back onto the ring. Returns
    /// the ring's indices.
    pub(super) fn publish(
        &mut self,
        ring: &impl Ring,
        view: &GuestView<'_>,
        left: usize,
    ) -> (u16, u16) {
        let mut ring = ring.lock();
        let queue = ring.queue_mut();
        let (size, before) = (queue.size(), queue.next_used());
        let left = u16::try_from(left).unwrap_or(0);
        queue.set_next_avail(queue.next_avail().wrapping_sub(left));
        let mut is_broken = false;
        self.done.retain(|&(head, _)| {
            if head >= size {
                warn_limited!("request {head} cannot be returned: the ring has no such descriptor");
            }
            is_broken |= head >= size;
            head < size
        });
        let returned = request_ring::publish(queue, view, &self.done);
        let lost = self.done.len() - returned;
        if lost > 0 {
            warn_limited!(
                "{lost} requests cannot be returned: the used ring is not in guest memory"
            );
            is_broken = true;
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
            ring.request_interrupt();
        }
        if is_broken {
            // The driver waits for requests that it never gets back.
            ring.report_broken();
        }
        (ring.queue().next_avail(), ring.queue().next_used())
    }
}
