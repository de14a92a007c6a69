//! How long a server may take to answer, and what happens when it takes longer.

use std::time::{Duration, Instant};

use crate::metrics::Counter;
use crate::process::wait_budget::AllowedWait;

/// How long a device's server may take to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// The time for an answer while a requester waits. It begins anew with each answer.
    pub answer: Duration,
    /// The longest wait for all updates of one request. It counts as `answer` if it is shorter than that.
    pub total: Duration,
    /// The time for the answer to VERSION, and for each answer while a server that has connected is told all windows.
    pub connect: Duration,
}

impl Deadlines {
    /// The default of [`Self::answer`].
    pub const DEFAULT_ANSWER: Duration = Duration::from_secs(1);
    /// The default of [`Self::total`].
    pub const DEFAULT_TOTAL: Duration = Duration::from_secs(20);
    /// The default of [`Self::connect`].
    pub const DEFAULT_CONNECT: Duration = Duration::from_secs(10);

    /// The defaults with another time for an answer.
    pub fn with_answer(answer: Duration) -> Self {
        Self {
            answer,
            total: Self::DEFAULT_TOTAL.max(answer),
            connect: Self::DEFAULT_CONNECT,
        }
    }

    /// The longest wait for the answers to so many updates.
    pub(super) fn of_updates(&self, updates: usize) -> Duration {
        let updates = u32::try_from(updates.max(1)).unwrap_or(u32::MAX);
        let sum = self.answer.saturating_mul(updates);
        sum.min(self.total.max(self.answer))
    }

    /// The time for the answer to the removal of so many windows with one message, beyond that of any answer: for each
    /// window a hundredth of it, up to the total. A server may call its device for each window.
    pub(super) fn of_removal(&self, windows: usize) -> Duration {
        let windows = u32::try_from(windows).unwrap_or(u32::MAX);
        (self.answer / 100).saturating_mul(windows).min(self.total)
    }
}

/// What a server that is cut off has exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitLimit {
    /// [`Deadlines::answer`].
    Answer,
    /// [`Deadlines::total`].
    Total,
    /// The device's budget for waits.
    Budget,
    /// [`Deadlines::connect`].
    Connect,
}

impl WaitLimit {
    /// Why the server is cut off, with the key of the configuration that raises the limit. `wait` is the wait for it.
    pub(super) fn reason(self, deadlines: &Deadlines, wait: Duration) -> String {
        let (answer, connect) = (deadlines.answer, deadlines.connect);
        match self {
            Self::Answer => {
                format!("no reply within {answer:?}; raise `deadline-ms` if it may take longer")
            }
            Self::Total => format!(
                "its replies to one request took longer than {wait:?} in all; raise `total-deadline-ms` if they may"
            ),
            Self::Budget => format!(
                "it has used up its budget of {answer:?} for late replies; the last one had {} ms left; raise \
                 `deadline-ms` if its replies may be so slow",
                wait.as_millis()
            ),
            Self::Connect => format!(
                "it has connected and left a message unanswered for {connect:?}; raise `connect-deadline-ms` if it \
                 may take longer"
            ),
        }
    }
}

/// How many times servers were cut off for each limit.
#[derive(Debug, Default)]
pub(super) struct LimitCounters {
    answer: Counter,
    total: Counter,
    budget: Counter,
    connect: Counter,
}

impl LimitCounters {
    pub(super) fn of(&self, limit: WaitLimit) -> &Counter {
        match limit {
            WaitLimit::Answer => &self.answer,
            WaitLimit::Total => &self.total,
            WaitLimit::Budget => &self.budget,
            WaitLimit::Connect => &self.connect,
        }
    }
}

/// The answers of a server while a requester waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// The last answer, or the start of the wait.
    since: Instant,
    /// The longest time between two answers.
    slowest: Duration,
    /// The time that the next answer may take beyond that of any answer.
    pub(super) more: Duration,
}

impl Progress {
    /// A wait begins.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            slowest: Duration::ZERO,
            more: Duration::ZERO,
        }
    }

    /// The server has answered.
    pub(super) fn answered(&mut self, now: Instant) {
        self.slowest = self.slowest.max(self.time_of_answer(now));
        self.since = now;
    }

    /// The longest time between two answers since the last call, including the time since the last answer.
    pub(super) fn take_slowest(&mut self, now: Instant) -> Duration {
        std::mem::take(&mut self.slowest).max(self.time_of_answer(now))
    }

    /// The time that counts of an answer that comes now.
    fn time_of_answer(&self, now: Instant) -> Duration {
        let time = now.saturating_duration_since(self.since);
        time.saturating_sub(self.more)
    }

    /// When `wait` ends unless another answer comes, and which limit ends it.
    pub(super) fn end_of(&self, wait: &AllowedWait) -> (Instant, WaitLimit) {
        let answer = self.since.max(wait.began) + wait.answer + self.more;
        let until = answer.min(wait.until);
        let limit = if wait.is_shortened() {
            WaitLimit::Budget
        } else if answer <= wait.until {
            WaitLimit::Answer
        } else {
            WaitLimit::Total
        };
        (until, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::wait_budget::WaitBudget;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_request_has_the_deadline_of_each_update_up_to_the_total() {
        let deadlines = Deadlines::with_answer(SECOND);
        let of = |updates| deadlines.of_updates(updates).as_secs();
        assert_eq!([0, 1, 2, 19, 20, 21].map(of), [1, 1, 2, 19, 20, 20]);
        assert_eq!(deadlines.of_updates(usize::MAX), Deadlines::DEFAULT_TOTAL);
        let longer = Deadlines::with_answer(SECOND * 60);
        assert_eq!(longer.of_updates(7), SECOND * 60);
    }

    #[test]
    fn each_answer_begins_the_deadline_anew_up_to_the_total() {
        let start = Instant::now();
        let mut budget = WaitBudget::new(SECOND, start);
        let wait = budget.allow(SECOND * 3, start);
        let mut progress = Progress::new(start);
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(progress.end_of(&wait), (at(1000), WaitLimit::Answer));
        progress.answered(at(900));
        assert_eq!(progress.end_of(&wait), (at(1900), WaitLimit::Answer));
        progress.answered(at(2500));
        assert_eq!(progress.end_of(&wait), (at(3000), WaitLimit::Total));
        assert_eq!(progress.take_slowest(at(2600)), Duration::from_millis(1600));
        assert_eq!(progress.take_slowest(at(2600)), Duration::from_millis(100));
        // A budget that is used up by half halves both.
        budget.charge(&wait, at(1650));
        let wait = budget.allow(SECOND * 3, at(1650));
        let (until, limit) = Progress::new(at(1650)).end_of(&wait);
        assert_eq!(
            (until - at(1650), limit),
            (SECOND / 20 * 11, WaitLimit::Budget)
        );
    }
}
