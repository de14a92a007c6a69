//! The budget of a peer for waits: how long the daemon lets it keep the guest's requests waiting over time.
//!
//! A deadline for each single wait bounds a peer that hangs. It does not bound a peer that answers just in time: each
//! request of the guest then takes as long as the deadline allows, for ever. So the waits for a peer add up:
//!
//! - An idle peer has a budget of one deadline. A first wait may therefore be as long as a single wait ever may.
//! - Each wait takes its length from the budget, apart from its first twentieth of the deadline. A peer that is merely
//!   scheduled late on a busy host takes nothing.
//! - While nobody waits for the peer, the budget recovers a tenth of the time.
//! - A wait ends when the budget is used up. The caller then cuts the peer off, as if the peer had hung.
//! - A task may consist of many answers. Its wait counts in proportion to the time that the task may take, or as its
//!   longest answer, whichever is more. Only in proportion, a peer could delay one answer of each task for free; only by
//!   answers, a task of many would have twenty deadlines for free.
//!
//! With a deadline of 1 s, the waits beyond 50 ms add up to 1 s at once and to a tenth of the time after that.
//!
//! A bucket that recovers was chosen instead of a list of the waits in the last ten deadlines: the list grows with the
//! number of waits, which the guest chooses.

use std::time::{Duration, Instant};

/// The part of the deadline that each wait has for free is one in this many.
const FREE_SHARE: u32 = 20;
/// The budget recovers one in this many parts of the time in which nobody waits.
const RECOVERY: u32 = 10;

/// A peer's budget for waits.
#[derive(Clone, Debug)]
pub struct WaitBudget {
    /// The longest single wait.
    deadline: Duration,
    /// The used part, up to `deadline`.
    used: Duration,
    /// When `used` was computed.
    at: Instant,
}

/// A wait that a budget allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowedWait {
    /// When it begins.
    pub began: Instant,
    /// Its end, if the peer keeps the daemon waiting for so long.
    pub until: Instant,
    /// The longest time that it could have with an unused budget.
    pub longest: Duration,
    /// The time for each single answer of the task.
    pub answer: Duration,
}

impl AllowedWait {
    /// Its longest time.
    pub fn length(&self) -> Duration {
        self.until.saturating_duration_since(self.began)
    }

    /// The task turns out to take more answers: it may take `longest`. The wait keeps its share of that.
    pub fn grow(&mut self, longest: Duration) {
        self.until = self.began + scale(self.length(), longest, self.longest);
        self.longest = longest;
    }

    /// Whether earlier waits have shortened it.
    pub fn is_shortened(&self) -> bool {
        self.length() < self.longest
    }
}

impl WaitBudget {
    /// An unused budget of a peer that may take `deadline` for one answer. `now` is the present.
    pub fn new(deadline: Duration, now: Instant) -> Self {
        Self {
            deadline,
            used: Duration::ZERO,
            at: now,
        }
    }

    /// The wait that may begin at `now`. A task that consists of many answers may take `longest`, and then uses the
    /// budget in proportion: a wait of `longest` counts as one of the deadline.
    pub fn allow(&mut self, longest: Duration, now: Instant) -> AllowedWait {
        self.recover(now);
        let own = (self.deadline / FREE_SHARE) + self.deadline.saturating_sub(self.used);
        let answer = own.min(self.deadline);
        let length = scale(longest, answer, self.deadline);
        AllowedWait {
            began: now,
            until: now + length,
            longest,
            answer,
        }
    }

    /// Takes a wait for a single answer from the budget; see [`Self::charge_answers`].
    pub fn charge(&mut self, wait: &AllowedWait, now: Instant) {
        self.charge_answers(wait, Duration::ZERO, now);
    }

    /// Takes a wait from the budget that lasted until `now`, or until its end if that was earlier. The longest time
    /// between two answers was `slowest`. If an earlier part of the same wait was charged already, takes the rest.
    pub fn charge_answers(&mut self, wait: &AllowedWait, slowest: Duration, now: Instant) {
        self.recover(wait.began);
        let ended = now.min(wait.until);
        let waited = ended.saturating_duration_since(wait.began.max(self.at));
        let counted = scale(waited, self.deadline, wait.longest).max(slowest.min(waited));
        let counted = counted.saturating_sub(self.deadline / FREE_SHARE);
        self.used = self.used.saturating_add(counted).min(self.deadline);
        // No recovery for the time of the wait: a task of many answers would recover as fast as it is used.
        self.at = self.at.max(ended);
    }

    fn recover(&mut self, now: Instant) {
        let idle = now.saturating_duration_since(self.at);
        self.used = self.used.saturating_sub(idle / RECOVERY);
        self.at = self.at.max(now);
    }
}

/// `time * part / whole`; `time` if `whole` is zero.
fn scale(time: Duration, part: Duration, whole: Duration) -> Duration {
    if part == whole || whole.is_zero() {
        return time;
    }
    let nanos = time.as_nanos().saturating_mul(part.as_nanos()) / whole.as_nanos();
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(1);

    /// One step of a peer: a pause, and then a wait that the peer lets last for this share of what it may.
    type Step = (u64, u64, u32);

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let pause = prop_oneof![0..2_000_000u64, 0..3_000_000_000u64, 0..60_000_000_000u64];
        let permille = prop_oneof![0..=1000u64, Just(1000u64), 850..950u64];
        proptest::collection::vec((pause, permille, 1..20u32), 1..60)
    }

    /// The used budget as the rules say, computed anew from all waits so far, in tenths of nanoseconds.
    fn naive_used(waits: &[(u128, u128)]) -> u128 {
        let whole = DEADLINE.as_nanos() * 10;
        waits.iter().fold(0u128, |used, (pause, counted)| {
            (used.saturating_sub(*pause) + counted * 10).min(whole)
        })
    }

    proptest! {
        #[test]
        fn the_budget_is_that_of_the_naive_model(steps in steps()) {
            let mut now = Instant::now();
            let mut budget = WaitBudget::new(DEADLINE, now);
            let mut waits = Vec::new();
            let free = DEADLINE.as_nanos() / u128::from(FREE_SHARE);
            for (pause, permille, rounds) in steps {
                now += Duration::from_nanos(pause);
                let longest = DEADLINE * rounds;
                let wait = budget.allow(longest, now);
                // The model before this wait: the pause counts, the wait does not yet.
                waits.push((u128::from(pause), 0));
                let left = DEADLINE.as_nanos() * 10 - naive_used(&waits);
                let allowed = (free * 10 + left).min(DEADLINE.as_nanos() * 10) * u128::from(rounds) / 10;
                // One nanosecond of rounding for each step.
                let slack = (waits.len() as u128 + 1) * u128::from(rounds);
                prop_assert!(wait.length().as_nanos().abs_diff(allowed) <= slack, "{wait:?}, not {allowed}");
                let waited = wait.length().as_nanos() * u128::from(permille) / 1000;
                now += Duration::from_nanos(u64::try_from(waited).expect("small"));
                budget.charge(&wait, now);
                waits.pop();
                waits.push((u128::from(pause), (waited / u128::from(rounds)).saturating_sub(free)));
            }
        }

        /// The guarantee: over any stretch, the waits beyond the free part add up to one deadline and a tenth of the
        /// pauses.
        #[test]
        fn no_stretch_has_more_waits_than_a_deadline_and_a_tenth_of_its_pauses(steps in steps()) {
            let mut now = Instant::now();
            let mut budget = WaitBudget::new(DEADLINE, now);
            let mut spent = Vec::new();
            for (pause, permille, _) in steps {
                now += Duration::from_nanos(pause);
                let wait = budget.allow(DEADLINE, now);
                let waited = wait.length() * u32::try_from(permille).expect("small") / 1000;
                now += waited;
                budget.charge(&wait, now);
                spent.push((pause, waited.saturating_sub(DEADLINE / FREE_SHARE)));
                let (mut pauses, mut counted) = (0, Duration::ZERO);
                for (pause, waited) in spent.iter().rev() {
                    counted += *waited;
                    let most = DEADLINE + Duration::from_nanos(pauses / 10 + spent.len() as u64);
                    prop_assert!(counted <= most, "{counted:?}, not {most:?}");
                    pauses += pause;
                }
            }
        }
    }

    #[test]
    fn one_full_wait_is_allowed_and_the_next_is_short() {
        let start = Instant::now();
        let mut budget = WaitBudget::new(DEADLINE, start);
        let first = budget.allow(DEADLINE, start);
        assert_eq!((first.length(), first.is_shortened()), (DEADLINE, false));
        budget.charge(&first, start + Duration::from_millis(900));
        let second = budget.allow(DEADLINE, start + Duration::from_millis(900));
        assert_eq!(second.length(), Duration::from_millis(200));
        assert!(second.is_shortened());
        let later = start + Duration::from_secs(10);
        assert_eq!(budget.allow(DEADLINE, later).length(), DEADLINE);
    }

    #[test]
    fn a_wait_in_two_parts_counts_once_and_may_grow() {
        let start = Instant::now();
        let mut budget = WaitBudget::new(DEADLINE, start);
        let mut wait = budget.allow(DEADLINE, start);
        wait.grow(DEADLINE * 4);
        assert_eq!(wait.length(), DEADLINE * 4);
        budget.charge(&wait, start + DEADLINE * 2);
        budget.charge(&wait, start + DEADLINE * 3);
        // Three quarters of what it may take, without the free part of each charge.
        let later = budget.allow(DEADLINE, start + DEADLINE * 3);
        assert_eq!(later.length(), Duration::from_millis(400));
        let mut later = later;
        later.grow(DEADLINE * 2);
        assert_eq!(later.length(), Duration::from_millis(800));
        assert!(later.is_shortened());
    }

    /// A task of twenty answers: only its first one is slow.
    #[test]
    fn one_slow_answer_of_many_counts_in_full() {
        let start = Instant::now();
        let mut budget = WaitBudget::new(DEADLINE, start);
        let wait = budget.allow(DEADLINE * 20, start);
        assert_eq!((wait.length(), wait.answer), (DEADLINE * 20, DEADLINE));
        let slowest = Duration::from_millis(900);
        budget.charge_answers(&wait, slowest, start + Duration::from_millis(910));
        let next = budget.allow(DEADLINE * 20, start + Duration::from_millis(910));
        assert_eq!(next.answer, Duration::from_millis(200));
        assert_eq!(next.length(), DEADLINE * 4);
        // Many quick answers count in proportion.
        let mut budget = WaitBudget::new(DEADLINE, start);
        let wait = budget.allow(DEADLINE * 20, start);
        let ended = start + DEADLINE * 10;
        budget.charge_answers(&wait, Duration::from_millis(5), ended);
        let next = budget.allow(DEADLINE, ended);
        assert_eq!(next.length(), Duration::from_millis(600));
    }

    #[test]
    fn short_waits_take_nothing() {
        let mut now = Instant::now();
        let mut budget = WaitBudget::new(DEADLINE, now);
        for _ in 0..1000 {
            let wait = budget.allow(DEADLINE, now);
            assert_eq!(wait.length(), DEADLINE);
            now += DEADLINE / FREE_SHARE;
            budget.charge(&wait, now);
        }
    }

    #[test]
    fn a_peer_that_uses_its_budget_up_keeps_the_free_part() {
        let start = Instant::now();
        let mut budget = WaitBudget::new(DEADLINE, start);
        let wait = budget.allow(DEADLINE, start);
        budget.charge(&wait, start + Duration::from_secs(100));
        let mut now = wait.until;
        for _ in 0..5 {
            let wait = budget.allow(DEADLINE, now);
            assert!(wait.length() <= DEADLINE / FREE_SHARE * 2);
            now = wait.until;
            budget.charge(&wait, now);
        }
    }
}
