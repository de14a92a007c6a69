//! Counters: cheap to bump, read whenever somebody asks.

use std::sync::atomic::{AtomicU64, Ordering};

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

/// Request kinds that are counted apart.
pub const REQUEST_KINDS: usize = 5;
/// Statuses that are counted apart.
pub const STATUSES: usize = 9;

/// What has happened since the daemon was started.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Answered requests by kind and status, in the order of their numbers.
    pub requests: [[Counter; STATUSES]; REQUEST_KINDS],
    /// Chains that were returned unwritten.
    pub chains_refused: Counter,
    /// How often the worker was woken for requests.
    pub wakeups: Counter,
    /// Times the worker looked at the empty request ring and requests came.
    pub polls_paid: Counter,
    /// Nanoseconds until they came, in all: where a guest asks for one thing after the other, its own
    /// part of the time.
    pub polls_paid_ns: Counter,
    /// Times it did and none came, or was too short of processor time for it.
    pub polls_unpaid: Counter,
    /// Faults the guest was told of.
    pub faults_delivered: Counter,
    /// Faults for which the guest had no buffer.
    pub faults_dropped: Counter,
    /// Frontends that connected.
    pub connections: Counter,
    /// Device resets seen.
    pub resets: Counter,
}
