//! Logging of what a guest or a peer can trigger at will: limited in rate, the rest counted.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Messages a limiter lets through at once.
const BURST: u32 = 10;
/// How often one more message is let through.
const REFILL: Duration = Duration::from_secs(5);

/// A token bucket for one kind of message.
#[derive(Debug)]
pub struct LogLimit {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: u32,
    refilled: Option<Instant>,
    suppressed: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

impl LogLimit {
    /// A limiter that lets a burst of 10 messages through, then one every 5 seconds.
    pub const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                tokens: BURST,
                refilled: None,
                suppressed: 0,
            }),
        }
    }

    /// Whether a message may be written at `now`: `Some(n)` if so, where `n` messages were
    /// suppressed since the last one.
    pub fn allow(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let since = *state.refilled.get_or_insert(now);
        let elapsed = now.saturating_duration_since(since);
        let earned = u32::try_from(elapsed.as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        if earned > 0 {
            state.tokens = state.tokens.saturating_add(earned).min(BURST);
            state.refilled = Some(now);
        }
        if state.tokens == 0 {
            state.suppressed = state.suppressed.saturating_add(1);
            return None;
        }
        state.tokens -= 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// `log::warn!` through a limiter of this call site's own.
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => {{
        static LIMIT: $crate::log_limit::LogLimit = $crate::log_limit::LogLimit::new();
        if log::log_enabled!(log::Level::Warn) {
            match LIMIT.allow(std::time::Instant::now()) {
                Some(0) => log::warn!($($arg)+),
                Some(n) => log::warn!("{} ({n} like it were not shown)", format_args!($($arg)+)),
                None => {}
            }
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let shown = (0..1000).filter(|_| limit.allow(start).is_some()).count();
        assert_eq!(shown, 10);
        assert_eq!(limit.allow(start + Duration::from_secs(4)), None);
        assert_eq!(limit.allow(start + Duration::from_secs(5)), Some(991));
        assert_eq!(limit.allow(start + Duration::from_secs(5)), None);
        assert_eq!(limit.allow(start + Duration::from_secs(10)), Some(1));
    }
}
