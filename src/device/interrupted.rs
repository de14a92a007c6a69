//! Finishing the batch that was in progress when an earlier process died: each of its requests gets exactly one answer.
//!
//! The journal has the bytes of the requests, so a driver cannot change a request in between. The chains are read again,
//! for the memory of the answers.

use virtio_queue::QueueT;

use super::chain::{Chain, ChainRequest, ReadBytes};
use super::execute::Context;
use super::request_queue::{Pass, RequestQueue};
use super::request_ring;
use super::ring::{LockedRing, Ring};
use super::view::GuestView;
use crate::iommu::InterruptedBatch;
use crate::protocol::reply::Status;
use crate::protocol::request::RequestKind;
use crate::store::{JournalEntry, Phase, UNWRITTEN};
use crate::warn_limited;

impl RequestQueue {
    /// Finishes a batch. The core must be restored, and the ring must have its addresses and run; it gets its indices from
    /// the journal. Must be called before the ring is served.
    ///
    /// The ring is broken if the driver's used index says that it has fewer answers than the journal knows of or more than
    /// are done, or if a chain does not have the request that the journal has: another driver has begun, or the journal is
    /// damaged. The batch is then neither executed nor answered.
    pub(crate) fn finish_interrupted(
        &mut self,
        ring: &impl Ring,
        context: &mut Context<'_>,
        interrupted: InterruptedBatch,
    ) -> Pass {
        let InterruptedBatch {
            batch,
            entries,
            published,
        } = interrupted;
        let Some(batch) = batch else {
            return Pass::Empty;
        };
        let view = GuestView::new(context.memory);
        let (table, size, seen) = {
            let mut ring = ring.lock();
            let queue = ring.queue_mut();
            queue.set_next_avail(batch.next_avail.wrapping_add(batch.count));
            let seen = request_ring::used_index(queue, &view);
            (queue.desc_table(), queue.size(), seen)
        };
        // A head outside of the descriptor table is not returned.
        let used_after = |count: u16| {
            let entries = entries.iter().take(count.into());
            let returned = entries.filter(|entry| entry.state.head < size).count();
            let returned = u16::try_from(returned).unwrap_or(0);
            batch.next_used.wrapping_add(returned)
        };
        let is_done = |entry: &&JournalEntry| entry.state.phase == Phase::Done;
        let done = entries.iter().take_while(is_done).count();
        let done = u16::try_from(done).unwrap_or(0);
        // The first, so that a head outside of the table breaks the ring here, too.
        let answered = (published..=done).find(|&count| seen == Some(used_after(count)));
        let first = answered.unwrap_or(published);
        ring.lock().queue_mut().set_next_used(used_after(first));
        let left = entries.get(first.into()..).unwrap_or(&[]);
        let read = |entry: &JournalEntry| {
            Chain::read(&view, entry.state.head, table, size, &mut self.spans)
        };
        let chains: Vec<Chain> = left.iter().map(read).collect();
        let is_same = |(entry, chain): (&JournalEntry, &Chain)| {
            chain.journal_words() == (entry.state.head, entry.state.len, entry.words)
        };
        if answered.is_none() || !left.iter().zip(&chains).all(is_same) {
            warn_limited!(
                "the request ring was changed while no daemon served it (used index {seen:?}, expected {} to {}, or \
                 other requests); the ring is not served until a driver starts it anew",
                used_after(published),
                used_after(done)
            );
            self.spans.clear();
            self.broken = true;
            let mut ring = ring.lock();
            ring.report_broken();
            let queue = ring.queue();
            let (next_avail, next_used) = (queue.next_avail(), queue.next_used());
            context.iommu.journal().end_batch(next_avail, next_used);
            return Pass::Stopped;
        }
        for (index, (entry, chain)) in (usize::from(first)..).zip(left.iter().zip(chains)) {
            let used = self.finish(&view, index, entry, chain.request, context);
            self.done.push((entry.state.head, used.unwrap_or(0)));
        }
        self.spans.clear();
        let (next_avail, next_used) = self.publish(ring, &view, 0);
        context.iommu.journal().end_batch(next_avail, next_used);
        if self.last_used.is_none() {
            self.last_used = request_ring::last_used(ring.lock().queue(), &view);
        }
        // The earlier process may have died before it sent the interrupt for its last answers.
        ring.lock().request_interrupt();
        Pass::Served
    }

    /// Answers one request. Executes it first, unless the earlier process has done so. Returns the used length, or `None`
    /// if nothing was written.
    fn finish(
        &mut self,
        view: &GuestView<'_>,
        index: usize,
        entry: &JournalEntry,
        chain: Option<ChainRequest>,
        context: &mut Context<'_>,
    ) -> Option<u32> {
        let bytes = entry.bytes();
        let is_probe = bytes
            .as_deref()
            .is_some_and(|bytes| RequestKind::of(bytes) == Some(RequestKind::Probe));
        let is_done = entry.state.phase == Phase::Done;
        if is_done {
            context.iommu.journal().start(index);
        } else {
            context.iommu.journal().begin_again(index);
        }
        let status = Status::ALL
            .into_iter()
            .find(|status| *status as u8 == entry.state.status);
        let chain = chain.map(|chain| ChainRequest {
            bytes: bytes.as_deref().map(ReadBytes::from_slice),
            ..chain
        });
        match (chain, status) {
            // The journal has no properties. A PROBE changes nothing.
            (Some(chain), Some(status)) if is_done && !(is_probe && status == Status::Ok) => {
                let spans = std::mem::take(&mut self.spans);
                let used = self.executor.reply_again(view, &chain, &spans, status);
                self.spans = spans;
                used
            }
            _ if is_done && entry.state.status == UNWRITTEN => None,
            (Some(chain), _) => {
                let spans = std::mem::take(&mut self.spans);
                let (used, _) = self.executor.answer(view, &chain, &spans, context);
                self.spans = spans;
                used
            }
            // The chain is malformed. Nothing has happened.
            (None, _) => {
                context.iommu.journal().done(UNWRITTEN);
                None
            }
        }
    }
}
