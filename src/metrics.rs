//! Counters: cheap to bump, read whenever somebody asks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows.
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

    /// The number so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets of a [`Histogram`]: up to 1 µs, 2 µs, 4 µs and so on to 32.768 ms, and what is longer.
pub const BUCKETS: usize = 17;

/// How long things took, in buckets that double.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Histogram {
    /// Counts something that took `time`, `weight` times.
    pub fn record(&self, time: Duration, weight: u64) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // A bucket's bound belongs to it.
        let rounded_up = ns.div_ceil(1000).max(1).next_power_of_two();
        let index = (rounded_up.trailing_zeros() as usize).min(BUCKETS - 1);
        if let Some(bucket) = self.buckets.get(index) {
            bucket.add(weight);
        }
        self.sum_ns.add(ns.saturating_mul(weight));
    }

    /// The upper bound of each bucket in nanoseconds, which belongs to it, and what it counts; the
    /// last one has no bound.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        self.buckets.iter().enumerate().map(|(index, counter)| {
            let bound = (index + 1 < BUCKETS).then_some(1000 << index);
            (bound, counter.get())
        })
    }

    /// Nanoseconds in all.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns.get()
    }
}

/// Request kinds that are counted apart.
pub const REQUEST_KINDS: usize = 5;
/// Statuses that are counted apart.
pub const STATUSES: usize = 9;
/// Reasons of faults that are counted apart.
pub const FAULT_REASONS: usize = 3;

/// Reading the clock is a good part of a single request's time.
pub const SINGLES_PER_LOOK: u64 = 16;

/// What has happened since the daemon was started.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Answered requests by kind and status, in the order of their numbers.
    pub requests: [[Counter; STATUSES]; REQUEST_KINDS],
    /// Chains that were returned unwritten.
    pub chains_refused: Counter,
    /// How long batches of requests took, from taking them off the ring to returning the last one. Of
    /// batches of a single request one in [`SINGLES_PER_LOOK`] is looked at, and counts for them all.
    pub batches: Histogram,
    /// Requests that a backend failed, by kind, in the order of their numbers.
    pub backend_failures: [Counter; REQUEST_KINDS],
    /// Requests refused because the page-table arena is full.
    pub arena_full: Counter,
    /// Requests refused because their domain's ID is above the last one.
    pub domain_beyond: Counter,
    /// Passes that took as many requests as one may, with more in the ring.
    pub batch_full: Counter,
    /// How often the worker was woken for requests.
    pub wakeups: Counter,
    /// Times the worker looked at the empty request ring and requests came.
    pub polls_paid: Counter,
    /// Nanoseconds until they came, in all: where a guest asks for one thing after the other, its own
    /// part of the time. Each is rounded down to the last look at the clock, by a microsecond at most.
    pub polls_paid_ns: Counter,
    /// Times it did and none came, or was too short of processor time for it.
    pub polls_unpaid: Counter,
    /// Faults the guest was to be told of, by reason, in the order of their numbers.
    pub faults: [Counter; FAULT_REASONS],
    /// Faults of emulated devices that came faster than they are passed on, which count as dropped too.
    pub faults_suppressed: Counter,
    /// Faults the guest was told of.
    pub faults_delivered: Counter,
    /// Faults the guest was not told of: it had no buffer, or there were too many.
    pub faults_dropped: Counter,
    /// Frontends that connected.
    pub connections: Counter,
    /// Device resets seen.
    pub resets: Counter,
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
