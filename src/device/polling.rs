//! How long the worker looks at an empty ring before it sleeps.
//!
//! The stock driver waits for an answer with interrupts off, and a wakeup takes longer than the work.
//! A driver that is busy asks again soon; one that is not must find the worker asleep.
//!
//! ```text
//!  served     ring empty            next request comes
//!    |------------|----- gap ----------|
//!                 |-- window --|            gap > window: the worker slept
//! ```
//!
//! The window follows the gaps there are:
//!
//! - A gap up to the longest window, slept through: the window becomes twice as long as that gap.
//! - A gap longer than the longest window: the window is halved, and nothing is polled below 2 us.
//! - A gap that polling met: the window shrinks slowly towards four times that gap.
//!
//! Where the processor is taken away from a worker that polls, somebody else needs it more. Where a
//! request comes as soon as the worker has given up, either the window was hardly too short, and
//! becomes longer, or its driver had to wait for the worker's processor; where the longer window is in
//! vain in the same way, it is that. Then polling pauses, for 1 ms and each time for twice as long, up
//! to 100 ms.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

/// Windows shorter than this are not worth a look.
const SHORTEST_WINDOW: Duration = Duration::from_micros(2);
/// Looks at the ring between two looks at the clock.
const CHECKS_PER_CLOCK_READ: u32 = 4;
/// Pauses between two looks at the ring: what looks all the time keeps the driver's processor from
/// its own cache lines, and from the core they may share.
const SPINS_PER_CHECK: u32 = 2;
/// Nobody was here for so long: another thread had the processor.
const PREEMPTED: Duration = Duration::from_micros(150);
/// A request that comes so soon after a window in vain has waited for its end.
const IMMEDIATE: Duration = Duration::from_micros(15);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// The part of what a window is too long by that it loses with each request: a longer gap between
/// bursts of requests must not be forgotten within one.
const DECAY: u32 = 128;
/// Windows in which requests came that make up for one in which the processor was taken away.
const HITS_PER_PARDON: u32 = 100;

/// What looking came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollOutcome {
    /// Something is there, after so long: as of the last look at the clock, for another one would take a
    /// tenth of the time a request does.
    Hit(Duration),
    /// The window is over.
    Expired,
    /// There was no window.
    Skipped,
}

/// The window, and what it is learned from.
#[derive(Debug)]
pub struct Polling {
    longest: Duration,
    window: Duration,
    /// Since when the ring has been empty, where it has.
    empty_since: Option<Instant>,
    /// When the last window was over, where nothing came in it.
    expired_at: Option<Instant>,
    /// A request came as soon as the last window in vain was over, and polling has met none since.
    missed_at_once: bool,
    paused_until: Option<Instant>,
    pause: Duration,
    /// Windows in which requests came since the last pause.
    hits: u32,
}

impl Polling {
    /// Windows up to `longest`; none at all where that is zero.
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

    /// The ring has become empty: looks at it for a window. `found` is asked whether to look no
    /// longer; it should be cheap.
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

    /// The worker was woken by a request.
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
        if self.hits >= HITS_PER_PARDON {
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
    fn a_short_gap_slept_through_is_waited_for_next_time() {
        let mut polling = polling(0);
        polling.miss(us(30));
        assert_eq!(polling.window, us(60));
        polling.miss(us(20));
        assert_eq!(polling.window, us(60), "it covers that");
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
    fn looking_ends_with_the_window_or_with_what_is_found() {
        let mut never = Polling::new(Duration::ZERO);
        never.miss(us(1));
        assert_eq!(
            never.poll(|| panic!("not to be asked")),
            PollOutcome::Skipped
        );
        let mut polling = polling(100);
        let began = Instant::now();
        loop {
            // Where the processor is taken away, it is tried again.
            match polling.poll(|| false) {
                PollOutcome::Expired if polling.paused_until.is_none() => break,
                PollOutcome::Expired => polling.paused_until = None,
                other => panic!("{other:?}"),
            }
        }
        assert!(began.elapsed() >= LONGEST);
        let mut looks = 0;
        let look = polling.poll(|| {
            looks += 1;
            looks == 5
        });
        assert!(
            matches!(look, PollOutcome::Hit(_)) && looks == 5,
            "{look:?}"
        );
        assert_eq!(polling.empty_since, None);
    }

    #[test]
    fn who_is_short_of_processors_does_not_poll() {
        let mut polling = polling(100);
        let look = polling.poll(|| {
            std::thread::sleep(us(300));
            false
        });
        assert_eq!(look, PollOutcome::Expired);
        assert_eq!(
            polling.poll(|| panic!("not to be asked")),
            PollOutcome::Skipped
        );
        assert_eq!(polling.pause, FIRST_PAUSE * 2);
        for _ in 0..20 {
            polling.back_off(Instant::now());
        }
        assert_eq!(polling.pause, LONGEST_PAUSE);
        for _ in 0..HITS_PER_PARDON {
            polling.hit(us(1));
        }
        assert_eq!(polling.pause, LONGEST_PAUSE / 2);
        polling.paused_until = Some(Instant::now());
        assert!(matches!(polling.poll(|| true), PollOutcome::Hit(_)));
    }

    /// The window is over, in vain, and a request comes `later`.
    fn missed(polling: &mut Polling, later: Duration) {
        let began = Instant::now();
        let over = began + polling.window;
        polling.empty_since = Some(began);
        polling.expired_at = Some(over);
        polling.woken_at(over + later);
    }

    #[test]
    fn a_driver_that_waits_for_the_worker_to_sleep_is_let_alone() {
        let mut polling = polling(20);
        missed(&mut polling, us(1));
        assert_eq!(polling.paused_until, None);
        assert_eq!(polling.window, us(42), "it may have been hardly too short");
        missed(&mut polling, us(1));
        assert!(polling.paused_until.is_some());
        assert_eq!(polling.window, us(42));
        polling.paused_until = None;
        missed(&mut polling, IMMEDIATE);
        missed(&mut polling, IMMEDIATE);
        assert_eq!(polling.paused_until, None);
    }

    #[test]
    fn what_polling_meets_between_two_windows_in_vain_clears_the_driver() {
        let mut polling = polling(0);
        for _ in 0..10 {
            // Just below a gap that comes again and again.
            polling.window = us(40);
            missed(&mut polling, us(1));
            assert_eq!(polling.window, us(82));
            polling.hit(us(1));
        }
        assert_eq!(polling.paused_until, None);
    }
}
