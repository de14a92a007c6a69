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
const SHORTEST: Duration = Duration::from_micros(2);
/// Looks at the ring between two looks at the clock.
const LOOKS: u32 = 4;
/// Pauses between two looks at the ring: what looks all the time keeps the driver's processor from
/// its own cache lines, and from the core they may share.
const PAUSES: u32 = 2;
/// Nobody was here for so long: another thread had the processor.
const TAKEN_AWAY: Duration = Duration::from_micros(150);
/// A request that comes so soon after a window in vain has waited for its end.
const AT_ONCE: Duration = Duration::from_micros(15);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// The part of what a window is too long by that it loses with each request: a longer gap between
/// bursts of requests must not be forgotten within one.
const SLOWNESS: u32 = 128;
/// Windows in which requests came that make up for one in which the processor was taken away.
const FORGIVEN: u32 = 100;

/// What looking came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Something is there, after so long: as of the last look at the clock, for another one would take a
    /// tenth of the time a request does.
    Found(Duration),
    /// The window is over.
    Over,
    /// There was no window.
    None,
}

/// The window, and what it is learned from.
#[derive(Debug)]
pub struct Polling {
    longest: Duration,
    window: Duration,
    /// Since when the ring has been empty, where it has.
    empty_since: Option<Instant>,
    /// When the last window was over, where nothing came in it.
    in_vain: Option<Instant>,
    /// A request came as soon as the last window in vain was over, and polling has met none since.
    too_late: bool,
    paused_until: Option<Instant>,
    pause: Duration,
    /// Windows in which requests came since the last pause.
    paid: u32,
}

impl Polling {
    /// Windows up to `longest`; none at all where that is zero.
    pub fn new(longest: Duration) -> Self {
        Self {
            longest,
            window: Duration::ZERO,
            empty_since: None,
            in_vain: None,
            too_late: false,
            paused_until: None,
            pause: FIRST_PAUSE,
            paid: 0,
        }
    }

    /// The ring has become empty: looks at it for a window. `found` is asked whether to look no
    /// longer; it should be cheap.
    pub fn look(&mut self, mut found: impl FnMut() -> bool) -> Look {
        let began = Instant::now();
        self.empty_since = Some(began);
        if self.window < SHORTEST || self.is_paused(began) {
            return Look::None;
        }
        let mut seen = began;
        loop {
            for _ in 0..LOOKS {
                if found() {
                    let gap = seen - began;
                    self.met(gap);
                    return Look::Found(gap);
                }
                for _ in 0..PAUSES {
                    spin_loop();
                }
            }
            let now = Instant::now();
            if now - seen > TAKEN_AWAY {
                self.short_of_processors(now);
                return Look::Over;
            }
            if now - began >= self.window {
                self.in_vain = Some(now);
                return Look::Over;
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
        let at_once = self.in_vain.take().is_some_and(|over| now - over < AT_ONCE);
        if at_once && self.too_late {
            self.too_late = false;
            self.short_of_processors(now);
        } else {
            self.too_late |= at_once;
            self.slept_through(now - since);
        }
    }

    fn slept_through(&mut self, gap: Duration) {
        if gap <= self.longest {
            self.window = (gap * 2).clamp(self.window, self.longest);
        } else {
            self.window /= 2;
            if self.window < SHORTEST {
                self.window = Duration::ZERO;
            }
        }
    }

    fn met(&mut self, gap: Duration) {
        self.empty_since = None;
        self.too_late = false;
        let enough = (gap * 4).max(SHORTEST);
        if self.window > enough {
            self.window -= (self.window - enough) / SLOWNESS;
        }
        self.paid += 1;
        if self.paid >= FORGIVEN {
            self.paid = 0;
            self.pause = (self.pause / 2).max(FIRST_PAUSE);
        }
    }

    fn short_of_processors(&mut self, now: Instant) {
        self.paused_until = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.paid = 0;
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
        polling.slept_through(us(30));
        assert_eq!(polling.window, us(60));
        polling.slept_through(us(20));
        assert_eq!(polling.window, us(60), "it covers that");
        polling.slept_through(us(90));
        assert_eq!(polling.window, LONGEST);
    }

    #[test]
    fn long_gaps_end_polling() {
        let mut polling = polling(100);
        let mut windows = Vec::new();
        while polling.window > Duration::ZERO {
            polling.slept_through(us(101));
            windows.push(polling.window);
        }
        assert_eq!(windows.len(), 6, "{windows:?}");
        polling.slept_through(us(1_000_000));
        assert_eq!(polling.window, Duration::ZERO);
    }

    #[test]
    fn a_window_longer_than_the_gaps_shrinks() {
        let mut polling = polling(100);
        for _ in 0..16 {
            polling.met(us(5));
        }
        assert!(polling.window > us(90), "{polling:?}");
        for _ in 0..1000 {
            polling.met(us(5));
        }
        assert!((us(20)..us(22)).contains(&polling.window), "{polling:?}");
        polling.met(us(90));
        assert!((us(20)..us(22)).contains(&polling.window), "{polling:?}");
    }

    #[test]
    fn looking_ends_with_the_window_or_with_what_is_found() {
        let mut never = Polling::new(Duration::ZERO);
        never.slept_through(us(1));
        assert_eq!(never.look(|| panic!("not to be asked")), Look::None);
        let mut polling = polling(100);
        let began = Instant::now();
        loop {
            // Where the processor is taken away, it is tried again.
            match polling.look(|| false) {
                Look::Over if polling.paused_until.is_none() => break,
                Look::Over => polling.paused_until = None,
                other => panic!("{other:?}"),
            }
        }
        assert!(began.elapsed() >= LONGEST);
        let mut looks = 0;
        let look = polling.look(|| {
            looks += 1;
            looks == 5
        });
        assert!(matches!(look, Look::Found(_)) && looks == 5, "{look:?}");
        assert_eq!(polling.empty_since, None);
    }

    #[test]
    fn who_is_short_of_processors_does_not_poll() {
        let mut polling = polling(100);
        let look = polling.look(|| {
            std::thread::sleep(us(300));
            false
        });
        assert_eq!(look, Look::Over);
        assert_eq!(polling.look(|| panic!("not to be asked")), Look::None);
        assert_eq!(polling.pause, FIRST_PAUSE * 2);
        for _ in 0..20 {
            polling.short_of_processors(Instant::now());
        }
        assert_eq!(polling.pause, LONGEST_PAUSE);
        for _ in 0..FORGIVEN {
            polling.met(us(1));
        }
        assert_eq!(polling.pause, LONGEST_PAUSE / 2);
        polling.paused_until = Some(Instant::now());
        assert!(matches!(polling.look(|| true), Look::Found(_)));
    }

    /// The window is over, in vain, and a request comes `later`.
    fn missed(polling: &mut Polling, later: Duration) {
        let began = Instant::now();
        let over = began + polling.window;
        polling.empty_since = Some(began);
        polling.in_vain = Some(over);
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
        missed(&mut polling, AT_ONCE);
        missed(&mut polling, AT_ONCE);
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
            polling.met(us(1));
        }
        assert_eq!(polling.paused_until, None);
    }
}
