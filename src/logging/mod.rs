//! The log of one VM's daemon: the VM's name in every line, a level that can be changed while it runs,
//! and an end to how much anybody can make it write.
//!
//! What a guest or a peer can trigger at will is limited where it is logged (`limit`), one kind of
//! message at a time. The budgets here bound what all kinds come to, those of libraries too. Errors have
//! one of their own, so that a flood of warnings does not hide them.

pub mod journal;
pub mod limit;

use std::fmt;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use env_logger::{Builder, Env, Logger};
use log::{Level, LevelFilter, Log, Metadata, Record};
use thiserror::Error;

use crate::locks::{Mutex, Rank, RwLock};

/// What the virtqueue library says of a guest's mistakes is said once more, and limited, by ours.
const LIBRARIES: &str = "virtio_queue=off";
/// What is shown where nobody has said otherwise.
const USUAL: LevelFilter = LevelFilter::Info;
/// Bytes of a line beside its message.
const LINE_OVERHEAD: u64 = 100;

/// Bytes at once and in a second: 17 MB in a day.
const ERRORS: (u64, u64) = (64 << 10, 200);
/// Bytes at once and in a second: 17 MB in a day.
const MESSAGES: (u64, u64) = (256 << 10, 200);
/// Bytes at once and in a second, for who has asked for them: 350 MB in a day.
const DETAILS: (u64, u64) = (4 << 20, 4000);

static LOG: OnceLock<VmLog> = OnceLock::new();

/// Why the level of the log stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LevelError {
    /// Not a level.
    #[error("{0:?} is no level; use off, error, warn, info, debug, trace, or default")]
    Unknown(String),
    /// This process logs through something else.
    #[error("the log of this process is not the daemon's; change it where it was set up")]
    NotOurs,
}

/// Makes all messages of this process those of the VM `name`, with the level that the environment
/// (`RUST_LOG`) asks for. Only the first call does anything.
pub fn init(name: &str) {
    let log = LOG.get_or_init(|| VmLog::new(name));
    if log::set_logger(log).is_ok() {
        log::set_max_level(log.inner.read().filter());
    }
}

/// Shows messages from now on that are at `level` or more severe; `default` is what the environment
/// asked for.
///
/// # Errors
/// See [`LevelError`].
pub fn set_level(level: &str) -> Result<(), LevelError> {
    let log = LOG.get().ok_or(LevelError::NotOurs)?;
    log.set_level(level)?;
    log::set_max_level(log.inner.read().filter());
    Ok(())
}

/// The level now: the one of the least severe messages that some part of the program may write.
pub fn level() -> String {
    log::max_level().to_string().to_lowercase()
}

/// Messages that were not written because there were too many.
pub fn suppressed() -> u64 {
    LOG.get()
        .map_or(0, |log| log.suppressed.load(Ordering::Relaxed))
}

struct VmLog {
    name: String,
    /// The journal knows the name and the time. Found out once: later nothing is looked at.
    to_journal: bool,
    /// What is shown, and how.
    inner: RwLock<Logger>,
    budgets: Mutex<Budgets>,
    suppressed: AtomicU64,
}

struct Budgets {
    errors: Budget,
    messages: Budget,
    details: Budget,
    /// Messages not written since the last one that was.
    missing: u64,
}

impl VmLog {
    fn new(name: &str) -> Self {
        let now = Instant::now();
        let to_journal = journal::is_listening();
        Self {
            name: name.to_owned(),
            to_journal,
            inner: RwLock::new(Rank::Logger, builder(name, to_journal, None).build()),
            budgets: Mutex::new(
                Rank::LogBudgets,
                Budgets {
                    errors: Budget::new(ERRORS, now),
                    messages: Budget::new(MESSAGES, now),
                    details: Budget::new(DETAILS, now),
                    missing: 0,
                },
            ),
            suppressed: AtomicU64::new(0),
        }
    }

    fn set_level(&self, level: &str) -> Result<(), LevelError> {
        let level = if level == "default" {
            None
        } else {
            let parsed = level.parse::<LevelFilter>();
            Some(parsed.map_err(|_| LevelError::Unknown(level.to_owned()))?)
        };
        *self.inner.write() = builder(&self.name, self.to_journal, level).build();
        Ok(())
    }

    /// Whether a message of `len` bytes may be written at `now`: `Some(n)` if so, where `n` messages
    /// were not since the last one.
    fn allow(&self, level: Level, len: u64, now: Instant) -> Option<u64> {
        let mut budgets = self.budgets.lock();
        let budget = match level {
            Level::Error => &mut budgets.errors,
            Level::Warn | Level::Info => &mut budgets.messages,
            Level::Debug | Level::Trace => &mut budgets.details,
        };
        if budget.take(len, now) {
            return Some(std::mem::take(&mut budgets.missing));
        }
        budgets.missing += 1;
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        None
    }
}

impl Log for VmLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.inner.read().enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let inner = self.inner.read();
        if !inner.matches(record) {
            return;
        }
        let len = record.args().to_string().len() as u64 + LINE_OVERHEAD;
        match self.allow(record.level(), len, Instant::now()) {
            Some(0) => {}
            Some(missing) => inner.log(
                &Record::builder()
                    .level(Level::Warn)
                    .target(module_path!())
                    .args(format_args!("{missing} messages were not shown: too many"))
                    .build(),
            ),
            None => return,
        }
        inner.log(record);
    }

    fn flush(&self) {
        self.inner.read().flush();
    }
}

/// What shows messages at `level`, or at the environment's.
fn builder(name: &str, to_journal: bool, level: Option<LevelFilter>) -> Builder {
    let mut builder = match level {
        Some(level) => {
            let mut builder = Builder::new();
            builder.parse_filters(&format!("{level},{LIBRARIES}"));
            builder
        }
        None => {
            let usual = format!("{USUAL},{LIBRARIES}");
            Builder::from_env(Env::default().default_filter_or(usual))
        }
    };
    if to_journal {
        builder.format(journal::write);
        return builder;
    }
    let name = name.to_owned();
    builder.format(move |out, record| {
        let (time, level, target) = (out.timestamp(), record.level(), record.target());
        let message = record.args().to_string();
        writeln!(
            out,
            "[{time} {level:<5} {target}] {name}: {}",
            OneLine(&message)
        )
    });
    builder
}

/// A text in which nothing ends the line or moves the cursor.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.contains(char::is_control) {
            return f.write_str(self.0);
        }
        for c in self.0.chars() {
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

/// Bytes that may be written.
struct Budget {
    left: u64,
    most: u64,
    /// Bytes that are earned in a second.
    rate: u64,
    since: Instant,
}

impl Budget {
    fn new((most, rate): (u64, u64), now: Instant) -> Self {
        Self {
            left: most,
            most,
            rate,
            since: now,
        }
    }

    fn take(&mut self, len: u64, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.since).as_secs();
        if seconds > 0 {
            let earned = self.rate.saturating_mul(seconds);
            self.left = self.left.saturating_add(earned).min(self.most);
            self.since += Duration::from_secs(seconds);
        }
        let left = self.left.checked_sub(len);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_messages_together_have_an_end() {
        let log = VmLog::new("vm1");
        let now = Instant::now();
        let flood = |level, now| {
            (0..10_000)
                .filter(|_| log.allow(level, 200, now).is_some())
                .count()
        };
        assert_eq!(flood(Level::Warn, now), (256 << 10) / 200);
        assert_eq!(flood(Level::Info, now), 0, "these share a budget");
        assert_eq!(flood(Level::Error, now), (64 << 10) / 200);
        assert_eq!(flood(Level::Debug, now), 10_000);
        let day = Duration::from_secs(24 * 3600);
        let missing = log.suppressed.load(Ordering::Relaxed);
        assert_eq!(missing, 30_000 - (256 << 10) / 200 - (64 << 10) / 200);
        // A second at a time, for an hour.
        let mut shown = 0;
        for second in 1..=3600 {
            let now = now + Duration::from_secs(second);
            shown += (0..10)
                .filter(|_| log.allow(Level::Warn, 200, now).is_some())
                .count();
        }
        assert_eq!(shown, 3600);
        assert!(flood(Level::Error, now + day) > 0);
    }

    #[test]
    fn a_message_stays_one_line() {
        assert_eq!(OneLine("plain \u{e4}").to_string(), "plain \u{e4}");
        let sly = OneLine("a\nERROR \u{1b}[2J\r").to_string();
        assert_eq!(sly, "a\\nERROR \\u{1b}[2J\\r");
    }

    #[test]
    fn levels_are_words() {
        let log = VmLog::new("vm1");
        for level in ["off", "error", "WARN", "info", "debug", "trace", "default"] {
            assert_eq!(log.set_level(level), Ok(()), "{level}");
        }
        for wrong in ["", "loud", "info,virtio_queue=info", "3"] {
            let error = log.set_level(wrong).expect_err(wrong);
            assert!(error.to_string().contains("use off"), "{error}");
        }
        log.set_level("debug").expect("a level");
        let enabled = |target| {
            let metadata = Metadata::builder()
                .level(Level::Error)
                .target(target)
                .build();
            log.enabled(&metadata)
        };
        assert!(enabled("vhost_device_iommu::device"));
        assert!(!enabled("virtio_queue::queue"), "the guest's to trigger");
    }
}
