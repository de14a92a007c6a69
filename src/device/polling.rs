//! How long the worker polls an empty request ring before it sleeps.
//!
//! The stock driver waits for an answer with interrupts off, and waking the worker takes longer than serving the
//! request. A busy driver sends its next request soon, so the worker polls for it. An idle driver must find the
//! worker asleep.
//!
//! ```text
//!  served     ring empty            next request comes
//!    |------------|----- gap ----------|
//!                 |-- window --|            gap > window: the worker slept
//! ```
//!
//! The window is how long the worker polls. It follows the gaps:
//!
//! - Miss, with a gap of the longest window at most: the window becomes twice that gap.
//! - Miss, with a longer gap: the window is halved. Below 2 us the worker does not poll.
//! - Hit: the window decays slowly towards four times the gap.
//!
//! Polling pauses when processors are short, for 1 ms first, then for twice as long each time, up to 100 ms:
//!
//! - The worker was preempted while it polled: another thread needs the processor more.
//! - A second immediate miss without a hit in between. A miss is immediate when the request comes just after the
//!   window has ended. The first widens the window, which may have been slightly too short. The second means CPU
//!   contention: the driver was waiting for the worker's processor.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

/// A shorter window is not worth polling for.
const SHORTEST_WINDOW: Duration = Duration::from_micros(2);
/// Checks of the ring between two reads of the clock.
const CHECKS_PER_CLOCK_READ: u32 = 4;
/// Spin-loop hints between two checks of the ring. Without them, the checks would keep the ring's cache lines away from
/// the driver's processor. If the driver and the worker run on hyperthreads of one core, the checks would also slow the
/// driver down.
const SPINS_PER_CHECK: u32 = 2;
/// The worker was preempted if two clock reads are this far apart.
const PREEMPTED: Duration = Duration::from_micros(150);
/// A request that comes this soon after a window has expired is an immediate miss: its driver was waiting for the
/// window to end.
const IMMEDIATE: Duration = Duration::from_micros(15);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Each hit decays the excess window by 1/128. A faster decay would forget the longer gap between two bursts of
/// requests within one burst.
const DECAY: u32 = 128;
/// This many hits halve the length of the next pause.
const HITS_PER_HALVING: u32 = 100;

/// The outcome of [`Polling::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollOutcome {
    /// A request has come, after this long. The time is that of the last clock read: another read would take a tenth
    /// of the time that a request takes.
    Hit(Duration),
    /// The window has ended without a request.
    Expired,
    /// There was no window: the worker did not poll.
    Skipped,
}

/// The window, and the state that it is computed from.
#[derive(Debug)]
pub struct Polling {
    longest: Duration,
    window: Duration,
    /// When the ring became empty; `None` while it is not empty.
    empty_since: Option<Instant>,
    /// When the last window ended, if no request came in it.
    expired_at: Option<Instant>,
    /// The last miss was an immediate one, and no hit has come since.
    missed_at_once: bool,
    paused_until: Option<Instant>,
    pause: Duration,
    /// Hits since the last pause began or was shortened.
    hits: u32,
}

impl Polling {
    /// Polling with windows of up to `longest`; zero turns it off.
    pub fn new(longest: Duration) -> Self {
        Self {
            longest,
            window: Duration::ZERO,
            empty_since: None,
            expired_at: None,
            missed_at_once: false,
            paused_until: None,
            pause: FIRST_PAUSE,
            hits: 0,
        }
    }

    /// Polls a ring that has just become empty, for one window at most. `found` returns whether to stop polling; it
    /// must be cheap.
    pub fn poll(&mut self, mut found: impl FnMut() -> bool) -> PollOutcome {
        let began = Instant::now();
        self.empty_since = Some(began);
        if self.window < SHORTEST_WINDOW || self.is_paused(began) {
            return PollOutcome::Skipped;
        }
        let mut seen = began;
        loop {
            for _ in 0..CHECKS_PER_CLOCK_READ {
                if found() {
                    let gap = seen - began;
                    self.hit(gap);
                    return PollOutcome::Hit(gap);
                }
                for _ in 0..SPINS_PER_CHECK {
                    spin_loop();
                }
            }
            let now = Instant::now();
            if now - seen > PREEMPTED {
                self.back_off(now);
                return PollOutcome::Expired;
            }
            if now - began >= self.window {
                self.expired_at = Some(now);
                return PollOutcome::Expired;
            }
            seen = now;
        }
    }

    /// A request has woken the worker.
    pub fn woken(&mut self) {
        self.woken_at(Instant::now());
    }

    fn woken_at(&mut self, now: Instant) {
        let Some(since) = self.empty_since.take() else {
            return;
        };
        let at_once = self
            .expired_at
            .take()
            .is_some_and(|over| now - over < IMMEDIATE);
        if at_once && self.missed_at_once {
            self.missed_at_once = false;
            self.back_off(now);
        } else {
            self.missed_at_once |= at_once;
            self.miss(now - since);
        }
    }

    fn miss(&mut self, gap: Duration) {
        if gap <= self.longest {
            self.window = (gap * 2).clamp(self.window, self.longest);
        } else {
            self.window /= 2;
            if self.window < SHORTEST_WINDOW {
                self.window = Duration::ZERO;
            }
        }
    }

    fn hit(&mut self, gap: Duration) {
        self.empty_since = None;
        self.missed_at_once = false;
        let enough = (gap * 4).max(SHORTEST_WINDOW);
        if self.window > enough {
            self.window -= (self.window - enough) / DECAY;
        }
        self.hits += 1;
        if self.hits >= HITS_PER_HALVING {
            self.hits = 0;
            self.pause = (self.pause / 2).max(FIRST_PAUSE);
        }
    }

    fn back_off(&mut self, now: Instant) {
        self.paused_until = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.hits = 0;
    }

    fn is_paused(&mut self, now: Instant) -> bool {
        let paused = self.paused_until.is_some_and(|until| now < until);
        if !paused {
            self.paused_until = None;
        }
        paused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(100);

    fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    fn polling(window: u64) -> Polling {
        Polling {
            window: us(window),
            ..Polling::new(LONGEST)
        }
    }

    #[test]
    fn a_short_gap_that_was_missed_widens_the_window() {
        let mut polling = polling(0);
        polling.miss(us(30));
        assert_eq!(polling.window, us(60));
        polling.miss(us(20));
        assert_eq!(polling.window, us(60), "long enough for that gap");
        polling.miss(us(90));
        assert_eq!(polling.window, LONGEST);
    }

    #[test]
    fn long_gaps_end_polling() {
        let mut polling = polling(100);
        let mut windows = Vec::new();
        while polling.window > Duration::ZERO {
            polling.miss(us(101));
            windows.push(polling.window);
        }
        assert_eq!(windows.len(), 6, "{windows:?}");
        polling.miss(us(1_000_000));
        assert_eq!(polling.window, Duration::ZERO);
    }

    #[test]
    fn a_window_longer_than_the_gaps_shrinks() {
        let mut polling = polling(100);
        for _ in 0..16 {
            polling.hit(us(5));
        }
        assert!(polling.window > us(90), "{polling:?}");
        for _ in 0..1000 {
            polling.hit(us(5));
        }
        assert!((us(20)..us(22)).contains(&polling.window), "{polling:?}");
        polling.hit(us(90));
        assert!((us(20)..us(22)).contains(&polling.window), "{polling:?}");
    }

    #[test]
    fn polling_ends_with_the_window_or_with_a_hit() {
        let mut never = Polling::new(Duration::ZERO);
        never.miss(us(1));
        assert_eq!(
            never.poll(|| panic!("no window, no check")),
            PollOutcome::Skipped
        );
        let mut polling = polling(100);
        let began = Instant::now();
        loop {
            // Tried again if this thread was preempted.
            match polling.poll(|| false) {
                PollOutcome::Expired if polling.paused_until.is_none() => break,
                PollOutcome::Expired => polling.paused_until = None,
                other => panic!("{other:?}"),
            }
        }
        assert!(began.elapsed() >= LONGEST);
        loop {
            let mut checks = 0;
            let outcome = polling.poll(|| {
                checks += 1;
                checks == 5
            });
            match outcome {
                PollOutcome::Hit(_) => {
                    assert_eq!(checks, 5);
                    break;
                }
                // Preempted.
                PollOutcome::Expired => polling.paused_until = None,
                PollOutcome::Skipped => panic!("a window was left"),
            }
        }
        assert_eq!(polling.empty_since, None);
    }

    #[test]
    fn a_preempted_worker_pauses_polling() {
        let mut polling = polling(100);
        let outcome = polling.poll(|| {
            std::thread::sleep(us(300));
            false
        });
        assert_eq!(outcome, PollOutcome::Expired);
        assert_eq!(
            polling.poll(|| panic!("no window, no check")),
            PollOutcome::Skipped
        );
        assert_eq!(polling.pause, FIRST_PAUSE * 2);
        for _ in 0..20 {
            polling.back_off(Instant::now());
        }
        assert_eq!(polling.pause, LONGEST_PAUSE);
        for _ in 0..HITS_PER_HALVING {
            polling.hit(us(1));
        }
        assert_eq!(polling.pause, LONGEST_PAUSE / 2);
        polling.paused_until = Some(Instant::now());
        assert!(matches!(polling.poll(|| true), PollOutcome::Hit(_)));
    }

    /// The window ends without a request, and one comes `later`.
    fn expire_and_wake(polling: &mut Polling, later: Duration) {
        let began = Instant::now();
        let over = began + polling.window;
        polling.empty_since = Some(began);
        polling.expired_at = Some(over);
        polling.woken_at(over + later);
    }

    #[test]
    fn a_second_immediate_miss_pauses_polling() {
        let mut polling = polling(20);
        expire_and_wake(&mut polling, us(1));
        assert_eq!(polling.paused_until, None);
        assert_eq!(
            polling.window,
            us(42),
            "it may have been slightly too short"
        );
        expire_and_wake(&mut polling, us(1));
        assert!(polling.paused_until.is_some());
        assert_eq!(polling.window, us(42));
        polling.paused_until = None;
        expire_and_wake(&mut polling, IMMEDIATE);
        expire_and_wake(&mut polling, IMMEDIATE);
        assert_eq!(polling.paused_until, None);
    }

    #[test]
    fn a_hit_between_two_immediate_misses_prevents_the_pause() {
        let mut polling = polling(0);
        for _ in 0..10 {
            // Slightly below a gap that comes again and again.
            polling.window = us(40);
            expire_and_wake(&mut polling, us(1));
            assert_eq!(polling.window, us(82));
            polling.hit(us(1));
        }
        assert_eq!(polling.paused_until, None);
    }
}
