//! A limit of how often something may happen: so many times at once, and at a steady rate after that.

use std::time::{Duration, Instant};

/// The limit.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    /// The time after which one more is allowed.
    refill: Duration,
    left: u32,
    /// When `left` was last right.
    refilled: Instant,
}

impl RateLimit {
    /// Allows `burst` times at once, and one more after each `refill`.
    pub fn new(burst: u32, refill: Duration) -> Self {
        Self {
            burst,
            refill,
            left: burst,
            refilled: Instant::now(),
        }
    }

    /// Takes one of the times that are left.
    ///
    /// # Errors
    /// None is left. Returns the time until one is.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let elapsed = now.saturating_duration_since(self.refilled);
        let earned = elapsed.as_nanos() / self.refill.as_nanos().max(1);
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned >= self.burst - self.left {
            self.left = self.burst;
            self.refilled = now;
        } else {
            self.left += earned;
            self.refilled += self.refill * earned;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.refill - now.saturating_duration_since(self.refilled)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_followed_by_a_steady_rate() {
        const REFILL: Duration = Duration::from_millis(10);
        let mut limit = RateLimit::new(3, REFILL);
        let mut now = Instant::now();
        for _ in 0..3 {
            limit.take(now).expect("the burst");
        }
        let wait = limit.take(now).expect_err("used up");
        assert!(wait <= REFILL && !wait.is_zero(), "{wait:?}");
        for _ in 0..100 {
            let wait = limit.take(now).expect_err("used up");
            now += wait;
            limit.take(now).expect("one more");
        }
        now += REFILL / 2;
        assert_eq!(limit.take(now), Err(REFILL / 2));
        now += 100 * REFILL;
        for _ in 0..3 {
            limit.take(now).expect("a new burst");
        }
        limit.take(now).expect_err("no more than a burst");
    }
}
