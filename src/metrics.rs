//! Counters. Incrementing one is a relaxed atomic addition; reading them needs no lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows. It wraps at 2^64.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds `more`.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The current number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of the devices that come from the VMM, see `endpoints::passthrough`.
#[derive(Debug, Default)]
pub struct AdoptionCounters {
    /// Devices that were taken over.
    pub taken: Counter,
    /// Requests to the helper.
    pub requests: Counter,
    /// Those of them that the helper has refused, or not answered.
    pub refused: Counter,
    /// Requests that were not made, because too many came before.
    pub limited: Counter,
    /// Times the VMM or the guest waited for the helper.
    pub waits: Counter,
    /// Those of them that ended without an answer.
    pub late: Counter,
}

/// Buckets of a [`Histogram`]: up to 1 µs, 2 µs, 4 µs and so on to 32.768 ms, and one for longer times.
pub const BUCKETS: usize = 17;

/// A distribution of durations. The bound of each bucket is twice that of the one before.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Histogram {
    /// Counts `weight` events in the bucket of `time`, and adds `time` to the sum `weight` times.
    pub fn record(&self, time: Duration, weight: u64) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // A duration that equals a bucket's upper bound counts in this bucket.
        let rounded_up = ns.div_ceil(1000).max(1).next_power_of_two();
        let index = (rounded_up.trailing_zeros() as usize).min(BUCKETS - 1);
        if let Some(bucket) = self.buckets.get(index) {
            bucket.add(weight);
        }
        self.sum_ns.add(ns.saturating_mul(weight));
    }

    /// Upper bound and count of each bucket. The bound is in nanoseconds and is part of the bucket. The last
    /// bucket has no bound.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        self.buckets.iter().enumerate().map(|(index, counter)| {
            let bound = (index + 1 < BUCKETS).then_some(1000 << index);
            (bound, counter.get())
        })
    }

    /// The sum of all durations in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns.get()
    }
}

/// The number of request kinds, each with counters of its own.
pub const REQUEST_KINDS: usize = 5;
/// The number of statuses, each with a counter of its own.
pub const STATUSES: usize = 9;
/// The number of fault reasons, each with a counter of its own.
pub const FAULT_REASONS: usize = 3;

/// One in this many batches of a single request is timed. Reading the clock takes a good part of the time that
/// such a batch takes.
pub const SINGLES_PER_SAMPLE: u64 = 16;

/// All counters since the daemon started.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Answered requests: by the index of the request's kind, then by the index of the status.
    pub requests: [[Counter; STATUSES]; REQUEST_KINDS],
    /// Descriptor chains that the device returned without writing to them.
    pub chains_refused: Counter,
    /// Durations of batches of requests. A batch lasts from when the worker takes it off the ring until it
    /// has returned the last request. Only one in [`SINGLES_PER_SAMPLE`] batches of a single request is timed,
    /// and this one counts [`SINGLES_PER_SAMPLE`] times.
    pub batches: Histogram,
    /// Requests that failed in a backend, by the index of the request's kind.
    pub backend_failures: [Counter; REQUEST_KINDS],
    /// Requests refused because the page-table arena was full.
    pub arena_full: Counter,
    /// Requests refused because their domain ID is above the highest allowed.
    pub domain_beyond: Counter,
    /// Passes over the ring that took as many requests as a batch may have, and left more in the ring.
    pub batch_full: Counter,
    /// Times a notification of the driver woke the worker.
    pub wakeups: Counter,
    /// Times the worker polled the empty request ring and requests came.
    pub polls_paid: Counter,
    /// The total duration of these polls in nanoseconds. If the guest sends one request after the other, this
    /// is the guest's share of the time. Each poll is rounded down to the last reading of the clock, by at
    /// most a microsecond.
    pub polls_paid_ns: Counter,
    /// Times the worker polled and no request came, or it had too little processor time to poll.
    pub polls_unpaid: Counter,
    /// Reported faults, delivered or not, by the index of the reason.
    pub faults: [Counter; FAULT_REASONS],
    /// Faults of emulated devices dropped by the rate limit or a full queue. They are in
    /// `faults_dropped`, too.
    pub faults_suppressed: Counter,
    /// Faults delivered: the driver got a record.
    pub faults_delivered: Counter,
    /// Faults not delivered: the driver had posted no buffer, or there were too many faults.
    pub faults_dropped: Counter,
    /// Frontends that connected.
    pub connections: Counter,
    /// Device resets.
    pub resets: Counter,
    /// Times the driver made the virtio-pci device need a reset.
    pub needs_reset: Counter,
    /// Windows of guest memory that were refused: DMA_MAP of a vfio-user client.
    pub windows_refused: Counter,
    /// Windows that the device may read and write, and that no device reaches: they have no file that can be mapped.
    pub windows_without_memory: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::default();
        for (ns, weight) in [(0, 1), (1000, 1), (1001, 1), (2000, 16), (32_768_000, 1)] {
            histogram.record(Duration::from_nanos(ns), weight);
        }
        histogram.record(Duration::from_nanos(32_768_001), 1);
        histogram.record(Duration::MAX, 1);
        let buckets: Vec<_> = histogram.buckets().collect();
        assert_eq!(buckets.len(), BUCKETS);
        assert_eq!(buckets[0], (Some(1000), 2));
        assert_eq!(buckets[1], (Some(2000), 17));
        assert_eq!(buckets[15], (Some(32_768_000), 1));
        assert_eq!(buckets[16], (None, 2));
        let others: u64 = buckets[2..15].iter().map(|bucket| bucket.1).sum();
        assert_eq!(others, 0);
    }
}
