//! What this process has taken over from the one before it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::locks::{Mutex, Rank};
use crate::process::unkept::UnkeptConnections;

/// The most descriptions of things that could not be taken over.
const MAX_LOST: usize = 64;

/// What became of the state of the process before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Inheritance {
    /// There was none: this is the first life.
    #[default]
    None,
    /// It has not been taken over yet. Endpoints and requests wait.
    Pending,
    /// It was taken over.
    TakenOver,
    /// It was refused, for this reason. All endpoints are blocked until the driver starts anew.
    Refused(String),
}

impl Inheritance {
    /// The name in answers to the operator.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pending => "taking-over",
            Self::TakenOver => "taken-over",
            Self::Refused(_) => "refused",
        }
    }
}

/// One life of the daemon, from the start of a process to its end.
#[derive(Debug)]
pub struct Life {
    began: Instant,
    process: u32,
    /// Whether the next process can go on where this one ends.
    kept: AtomicBool,
    /// The connections that end with this process all the same.
    unkept: Arc<UnkeptConnections>,
    state: Mutex<LifeState>,
    resumed: OnceLock<Instant>,
}

#[derive(Debug)]
struct LifeState {
    number: u64,
    inheritance: Inheritance,
    lost: Vec<String>,
}

impl Life {
    /// The first life, which begins now. `kept`: somebody keeps its state.
    pub fn new(kept: bool) -> Self {
        let state = LifeState {
            number: 1,
            inheritance: Inheritance::None,
            lost: Vec::new(),
        };
        Self {
            began: Instant::now(),
            process: std::process::id(),
            kept: AtomicBool::new(kept),
            unkept: Arc::default(),
            state: Mutex::new(Rank::Life, state),
            resumed: OnceLock::new(),
        }
    }

    /// The same, with the connections that the next process cannot go on with.
    #[must_use]
    pub fn with_connections(self, unkept: Arc<UnkeptConnections>) -> Self {
        Self { unkept, ..self }
    }

    /// Whether the next process can go on where this one ends: with its state, and with all connections that are open.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed) && !self.unkept.any()
    }

    /// The next process cannot go on after all.
    pub fn forgo(&self) {
        self.kept.store(false, Ordering::Relaxed);
    }

    /// The number of this process.
    pub fn process(&self) -> u32 {
        self.process
    }

    /// How long ago this life began.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// The number of this life; 1 is the first.
    pub fn number(&self) -> u64 {
        self.state.lock().number
    }

    /// What became of the state of the process before.
    pub fn inheritance(&self) -> Inheritance {
        self.state.lock().inheritance.clone()
    }

    /// There is a state of an earlier life to take over.
    pub fn await_take_over(&self) {
        self.state.lock().inheritance = Inheritance::Pending;
    }

    /// This life takes the state of an earlier one over, and has this number.
    pub fn take_over(&self, number: u64) {
        let mut state = self.state.lock();
        state.number = number;
        state.inheritance = Inheritance::TakenOver;
    }

    /// The state of the earlier life is refused.
    pub fn refuse(&self, reason: String) {
        self.state.lock().inheritance = Inheritance::Refused(reason);
    }

    /// Something could not be taken over.
    pub fn lose(&self, what: String) {
        let lost = &mut self.state.lock().lost;
        if lost.len() < MAX_LOST {
            lost.push(what);
        }
    }

    /// What could not be taken over.
    pub fn lost(&self) -> Vec<String> {
        self.state.lock().lost.clone()
    }

    /// The guest's requests are answered again. Only the first call counts.
    pub fn resume(&self) {
        // Fails if the guest was served before.
        let _ = self.resumed.set(Instant::now());
    }

    /// The time from the beginning of this life until the guest's requests were answered again; `None` if it took no
    /// ring over, or has not got there yet.
    pub fn resumed_after(&self) -> Option<Duration> {
        let resumed = self.resumed.get()?;
        Some(resumed.duration_since(self.began))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_of_a_later_life_counts() {
        let life = Life::new(true);
        assert_eq!((life.number(), life.inheritance()), (1, Inheritance::None));
        assert_eq!(life.resumed_after(), None);
        life.take_over(7);
        life.resume();
        let first = life.resumed_after().expect("resumed");
        life.resume();
        assert_eq!(life.resumed_after(), Some(first));
        assert_eq!(life.number(), 7);
        assert!(life.is_kept());
        life.forgo();
        assert!(!life.is_kept());
    }

    #[test]
    fn a_life_is_not_kept_while_a_connection_is_not() {
        let unkept = Arc::<UnkeptConnections>::default();
        let life = Life::new(true).with_connections(unkept.clone());
        let first = unkept.count();
        let second = unkept.count();
        drop(first);
        assert!(!life.is_kept());
        drop(second);
        assert!(life.is_kept());
        life.forgo();
        assert!(!life.is_kept());
    }

    #[test]
    fn what_is_lost_is_bounded() {
        let life = Life::new(true);
        for number in 0..1000 {
            life.lose(number.to_string());
        }
        assert_eq!(life.lost().len(), MAX_LOST);
    }
}
