//! Rate limits for messages that a guest or a peer can trigger. Suppressed messages are counted.

use std::fmt;
use std::time::{Duration, Instant};

use log::Level;

use crate::locks::{Mutex, Rank};

/// Messages that a limiter allows at once.
const BURST: u32 = 10;
/// The time after which a limiter allows one more message.
const REFILL: Duration = Duration::from_secs(5);

/// A token bucket for one kind of message.
#[derive(Debug)]
pub struct LogLimit {
    state: Mutex<LimitState>,
}

#[derive(Debug)]
struct LimitState {
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
    /// A limiter that allows a burst of 10 messages, and then one every 5 seconds.
    pub const fn new() -> Self {
        Self {
            state: Mutex::new(
                Rank::LogLimit,
                LimitState {
                    tokens: BURST,
                    refilled: None,
                    suppressed: 0,
                },
            ),
        }
    }

    /// Asks to write a message at `now`. Returns the number of messages suppressed since the last one that was
    /// written, or `None` if this message must not be written.
    pub fn allow(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
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

/// Writes a message of `module` if `limit` allows it, with the number of messages suppressed before it.
pub fn log(limit: &LogLimit, level: Level, module: &str, message: fmt::Arguments<'_>) {
    if !log::log_enabled!(target: module, level) {
        return;
    }
    match limit.allow(Instant::now()) {
        Some(0) => log::log!(target: module, level, "{message}"),
        Some(n) => log::log!(target: module, level, "{message} ({n} like it were suppressed)"),
        None => {}
    }
}

/// Logs at a level. The call site has a limiter of its own.
#[macro_export]
macro_rules! log_limited {
    ($level:expr, $($arg:tt)+) => {{
        static LIMIT: $crate::logging::limit::LogLimit = $crate::logging::limit::LogLimit::new();
        $crate::logging::limit::log(&LIMIT, $level, module_path!(), format_args!($($arg)+));
    }};
}

/// `log::error!` with a limiter of the call site.
#[macro_export]
macro_rules! error_limited {
    ($($arg:tt)+) => { $crate::log_limited!(log::Level::Error, $($arg)+) };
}

/// `log::warn!` with a limiter of the call site.
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => { $crate::log_limited!(log::Level::Warn, $($arg)+) };
}

/// `log::info!` with a limiter of the call site.
#[macro_export]
macro_rules! info_limited {
    ($($arg:tt)+) => { $crate::log_limited!(log::Level::Info, $($arg)+) };
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
