//! The log of the daemon of one VM: the VM's name in every line, a level that can change at run time, and a bound
//! on the bytes written. No thread waits for the reader of standard error (`sink`).
//!
//! `limit` limits each message that a guest or a peer can trigger, at the place where it is logged. The budgets
//! here bound the sum of all messages, including those of libraries. Errors have a budget of their own, so that a
//! flood of warnings does not hide them.

pub mod journal;
pub mod limit;
mod sink;

use std::fmt;
use std::io::{self, Stderr, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use env_logger::{Builder, Env, Logger, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};
use thiserror::Error;

use self::sink::{LineWriter, Sink};
use crate::locks::{Mutex, Rank, RwLock};

/// Filters out the virtqueue library, which logs mistakes of the guest without a limit. This crate logs them, too,
/// with a limit.
const LIBRARIES: &str = "virtio_queue=off";
/// The level without `RUST_LOG`.
const DEFAULT_LEVEL: LevelFilter = LevelFilter::Info;
/// Bytes of a line in addition to its message.
const LINE_OVERHEAD: u64 = 100;

/// The budget of errors: bytes at once, and bytes in a second. 17 MB in a day.
const ERRORS: (u64, u64) = (64 << 10, 200);
/// The budget of warnings and infos: bytes at once, and bytes in a second. 17 MB in a day.
const MESSAGES: (u64, u64) = (256 << 10, 200);
/// The budget of the levels debug and trace: bytes at once, and bytes in a second. 350 MB in a day.
const DETAILS: (u64, u64) = (4 << 20, 4000);

static LOG: OnceLock<VmLog> = OnceLock::new();

/// The level of the log cannot be changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LevelError {
    /// Not a level.
    #[error("{0:?} is no level; use off, error, warn, info, debug, trace, or default")]
    Unknown(String),
    /// The process has another logger.
    #[error("the log of this process is not the daemon's; change it where it was set up")]
    NotOurs,
}

/// Installs the logger of this process, for the VM `name` and with the level of the environment (`RUST_LOG`). Only
/// the first call has an effect.
pub fn init(name: &str) {
    let log = LOG.get_or_init(|| VmLog::new(name));
    if log::set_logger(log).is_ok() {
        log::set_max_level(log.inner.read().filter());
    }
}

/// Sets the level: messages that are less severe are not written. `default` is the level of the environment.
///
/// # Errors
/// See [`LevelError`].
pub fn set_level(level: &str) -> Result<(), LevelError> {
    let log = LOG.get().ok_or(LevelError::NotOurs)?;
    log.set_level(level)?;
    log::set_max_level(log.inner.read().filter());
    Ok(())
}

/// The current level, in lower case. If modules have different levels, it is the least severe one.
pub fn level() -> String {
    log::max_level().to_string().to_lowercase()
}

/// The number of messages that the budgets suppressed.
pub fn suppressed() -> u64 {
    LOG.get()
        .map_or(0, |log| log.suppressed.load(Ordering::Relaxed))
}

/// The number of messages that standard error did not take: nobody read it, and the log waits for nobody.
pub fn lost() -> u64 {
    LOG.get().map_or(0, |log| log.sink.lost())
}

/// A line of the log that is formatted beforehand. Writing it takes no lock and no memory, as a signal handler demands.
pub struct PreparedLine(Vec<u8>);

impl PreparedLine {
    /// The line for `text`, which the module `target` logs. Empty if this process does not have the daemon's log.
    pub fn new(level: Level, target: &str, text: &str) -> Self {
        let mut line = Vec::new();
        if let Some(log) = LOG.get() {
            let args = format_args!("{text}");
            let record = Record::builder().level(level).args(args).build();
            // Memory takes every byte.
            let _ = if log.to_journal {
                journal::write(&mut line, &record)
            } else {
                writeln!(line, "[{level} {target}] {}: {text}", log.name)
            };
        }
        Self(line)
    }

    /// Writes the line to standard error, as far as that does not wait.
    pub fn write(&self) {
        if let Some(log) = LOG.get() {
            log.sink.write_prepared(&self.0);
        }
    }
}

struct VmLog {
    name: String,
    sink: Arc<Sink<Stderr>>,
    /// Whether standard error goes to the journal, which knows name and time. Set once, as the sandboxed daemon
    /// cannot check it later.
    to_journal: bool,
    /// Filters and formats messages.
    inner: RwLock<Logger>,
    budgets: Mutex<Budgets>,
    suppressed: AtomicU64,
}

struct Budgets {
    errors: Budget,
    messages: Budget,
    details: Budget,
    /// Messages suppressed since the last one that was written.
    suppressed: u64,
}

impl VmLog {
    fn new(name: &str) -> Self {
        let now = Instant::now();
        let to_journal = journal::stderr_is_journal();
        let sink = Arc::new(Sink::new(io::stderr()));
        let logger = builder(name, to_journal, &sink, None).build();
        Self {
            name: name.to_owned(),
            sink,
            to_journal,
            inner: RwLock::new(Rank::Logger, logger),
            budgets: Mutex::new(
                Rank::LogBudgets,
                Budgets {
                    errors: Budget::new(ERRORS, now),
                    messages: Budget::new(MESSAGES, now),
                    details: Budget::new(DETAILS, now),
                    suppressed: 0,
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
        let logger = builder(&self.name, self.to_journal, &self.sink, level).build();
        *self.inner.write() = logger;
        Ok(())
    }

    /// Takes `len` bytes from the budget of `level` at `now`. Returns the number of messages suppressed since the
    /// last one that was written, or `None` if this message must not be written.
    fn allow(&self, level: Level, len: u64, now: Instant) -> Option<u64> {
        let mut budgets = self.budgets.lock();
        let budget = match level {
            Level::Error => &mut budgets.errors,
            Level::Warn | Level::Info => &mut budgets.messages,
            Level::Debug | Level::Trace => &mut budgets.details,
        };
        if budget.take(len, now) {
            return Some(std::mem::take(&mut budgets.suppressed));
        }
        budgets.suppressed += 1;
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
            Some(suppressed) => inner.log(
                &Record::builder()
                    .level(Level::Warn)
                    .target(module_path!())
                    .args(format_args!(
                        "{suppressed} messages were suppressed: too many"
                    ))
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

/// A builder of the logger with `level`, or with the level of the environment.
fn builder(
    name: &str,
    to_journal: bool,
    sink: &Arc<Sink<Stderr>>,
    level: Option<LevelFilter>,
) -> Builder {
    let mut builder = match level {
        Some(level) => {
            let mut builder = Builder::new();
            builder.parse_filters(&format!("{level},{LIBRARIES}"));
            builder
        }
        None => {
            let usual = format!("{DEFAULT_LEVEL},{LIBRARIES}");
            Builder::from_env(Env::default().default_filter_or(usual))
        }
    };
    let head = if to_journal {
        "<4>".into()
    } else {
        format!("[WARN  {}] {name}: ", module_path!())
    };
    builder.target(Target::Pipe(Box::new(LineWriter {
        sink: sink.clone(),
        head,
    })));
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

/// A text whose control characters are escaped, so that none ends the line or moves the cursor.
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

/// A token bucket of bytes.
struct Budget {
    left: u64,
    most: u64,
    /// Bytes that are added in a second.
    rate: u64,
    refilled: Instant,
}

impl Budget {
    fn new((most, rate): (u64, u64), now: Instant) -> Self {
        Self {
            left: most,
            most,
            rate,
            refilled: now,
        }
    }

    fn take(&mut self, len: u64, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.refilled).as_secs();
        if seconds > 0 {
            let earned = self.rate.saturating_mul(seconds);
            self.left = self.left.saturating_add(earned).min(self.most);
            self.refilled += Duration::from_secs(seconds);
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
    fn budgets_bound_the_sum_of_all_messages() {
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
        let suppressed = log.suppressed.load(Ordering::Relaxed);
        assert_eq!(suppressed, 30_000 - (256 << 10) / 200 - (64 << 10) / 200);
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
    fn levels_are_set_by_name() {
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
        assert!(!enabled("virtio_queue::queue"), "the guest can trigger it");
    }
}
