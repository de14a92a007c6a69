//! How much of the daemon's work one guest or one device can have.

use super::Checker;
use super::draft::{Given, Scalar};
use super::error::ProblemKind;

/// The most requests that can be taken at a time: the longest ring.
pub const MAX_BATCH: usize = 1024;
/// The most faults of one endpoint that the guest can be told of in a second.
pub const MAX_FAULT_RATE: u32 = 10_000;

const DEFAULT_BATCH: usize = 64;
const DEFAULT_FAULT_RATE: u32 = 100;

impl Checker<'_> {
    /// Requests that are taken off the ring at a time: `1..=`[`MAX_BATCH`].
    pub(super) fn max_batch(&mut self, given: Option<&Given<Scalar>>) -> Option<usize> {
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

    /// Faults of one endpoint that the guest is told of in a second: `1..=`[`MAX_FAULT_RATE`].
    pub(super) fn fault_rate(&mut self, given: Option<&Given<Scalar>>) -> Option<u32> {
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
