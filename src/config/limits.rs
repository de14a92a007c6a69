//! Keys that limit memory, domains, and the share of the worker that one guest or device can take.

use std::time::Duration;

use super::bounds::{
    MAX_ARENA, MAX_BATCH, MAX_DOMAINS, MAX_FAULT_RATE, MAX_MEMORY, MAX_POLL_US, MAX_PRIORITY,
    MIN_ARENA,
};
use super::checker::Checker;
use super::draft::{Located, Scalar};
use super::error::ProblemKind;

const DEFAULT_POLL: Duration = Duration::from_micros(100);
pub(super) const SMALLEST_PAGE: u64 = 4096;
/// The arena of a VM of unknown size; every other VM gets a share of its memory on top.
const BASE_ARENA: u64 = 64 << 20;
const DEFAULT_BATCH: usize = 64;
const DEFAULT_FAULT_RATE: u32 = 100;

impl Checker<'_> {
    pub(super) fn domains(&mut self, given: Option<&Located<Scalar>>) -> Option<u32> {
        let Some(given) = given else {
            return Some(MAX_DOMAINS);
        };
        let count = self.integer(given, "domains", "a number, such as 1024")?;
        let domains = u32::try_from(count)
            .ok()
            .filter(|domains| (1..=MAX_DOMAINS).contains(domains));
        if domains.is_none() {
            self.refuse(&given.origin, "domains", ProblemKind::Domains(count));
        }
        domains
    }

    /// `Some(None)` if no size is given.
    pub(super) fn memory(&mut self, given: Option<&Located<Scalar>>) -> Option<Option<u64>> {
        let Some(given) = given else {
            return Some(None);
        };
        let bytes = self.size(given, "memory")?;
        let whole = bytes % (1 << 20) == 0;
        if bytes == 0 || bytes > MAX_MEMORY || !whole {
            self.refuse(&given.origin, "memory", ProblemKind::Memory(bytes));
            return None;
        }
        Some(Some(bytes))
    }

    pub(super) fn arena_limit(
        &mut self,
        given: Option<&Located<Scalar>>,
        memory: Option<u64>,
    ) -> Option<u64> {
        let Some(given) = given else {
            let share = memory.unwrap_or(0) / 256;
            return Some(whole_pages(share.saturating_add(BASE_ARENA).min(MAX_ARENA)));
        };
        let bytes = self.size(given, "arena-limit")?;
        let kind = if bytes < MIN_ARENA {
            ProblemKind::ArenaTooSmall(bytes)
        } else if bytes > MAX_ARENA {
            ProblemKind::ArenaTooLarge(bytes)
        } else {
            return Some(whole_pages(bytes));
        };
        self.refuse(&given.origin, "arena-limit", kind);
        None
    }

    pub(super) fn longest_poll(&mut self, given: Option<&Located<Scalar>>) -> Option<Duration> {
        let Some(given) = given else {
            return Some(DEFAULT_POLL);
        };
        let micros = self.integer(
            given,
            "poll-max-us",
            "a number of microseconds, such as 100",
        )?;
        let fits = u64::try_from(micros).ok().filter(|&us| us <= MAX_POLL_US);
        if fits.is_none() {
            self.refuse(&given.origin, "poll-max-us", ProblemKind::Poll(micros));
        }
        fits.map(Duration::from_micros)
    }

    pub(super) fn realtime_priority(
        &mut self,
        given: Option<&Located<Scalar>>,
    ) -> Option<Option<u8>> {
        let Some(given) = given else {
            return Some(None);
        };
        let number = self.integer(given, "realtime-priority", "a priority, such as 1")?;
        let priority = u8::try_from(number)
            .ok()
            .filter(|priority| (1..=MAX_PRIORITY).contains(priority));
        if priority.is_none() {
            self.refuse(
                &given.origin,
                "realtime-priority",
                ProblemKind::Priority(number),
            );
        }
        priority.map(Some)
    }

    /// The most requests that the worker takes off the ring at a time: `1..=`[`MAX_BATCH`].
    pub(super) fn max_batch(&mut self, given: Option<&Located<Scalar>>) -> Option<usize> {
        let Some(given) = given else {
            return Some(DEFAULT_BATCH);
        };
        let number = self.integer(given, "batch", "a number of requests, such as 64")?;
        let batch = usize::try_from(number)
            .ok()
            .filter(|batch| (1..=MAX_BATCH).contains(batch));
        if batch.is_none() {
            self.refuse(&given.origin, "batch", ProblemKind::Batch(number));
        }
        batch
    }

    /// The most faults of one endpoint that are reported in a second: `1..=`[`MAX_FAULT_RATE`].
    pub(super) fn fault_rate(&mut self, given: Option<&Located<Scalar>>) -> Option<u32> {
        let Some(given) = given else {
            return Some(DEFAULT_FAULT_RATE);
        };
        let number = self.integer(given, "fault-rate", "faults in a second, such as 100")?;
        let rate = u32::try_from(number)
            .ok()
            .filter(|rate| (1..=MAX_FAULT_RATE).contains(rate));
        if rate.is_none() {
            self.refuse(&given.origin, "fault-rate", ProblemKind::FaultRate(number));
        }
        rate
    }
}

pub(super) fn whole_pages(bytes: u64) -> u64 {
    bytes & !(SMALLEST_PAGE - 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;

    #[test]
    fn limits_are_within_their_bounds() {
        let parse = |text: &str| {
            let text = format!("address = '00:05.0'\n{text}");
            let config = Config::from_text(Path::new("vm.toml"), &text);
            config
                .map(|c| (c.max_batch, c.fault_rate))
                .map_err(|e| e.to_string())
        };
        assert_eq!(parse(""), Ok((64, 100)));
        assert_eq!(
            parse("batch = 1024\nfault-rate = 10000"),
            Ok((1024, 10_000))
        );
        assert_eq!(parse("batch = 1\nfault-rate = 1"), Ok((1, 1)));
        for (text, cure) in [
            ("batch = 0", "1 to 1024"),
            ("batch = 1025", "1 to 1024"),
            ("batch = 'all'", "such as 64"),
            ("fault-rate = 0", "1 to 10000"),
            ("fault-rate = 10001", "1 to 10000"),
            ("fault-rate = true", "such as 100"),
        ] {
            let message = parse(text).expect_err(text);
            assert!(message.contains(cure), "{text}: {message}");
        }
    }
}
