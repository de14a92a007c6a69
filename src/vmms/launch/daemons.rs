//! The daemon of a VM: its first process, and those that take over from it.
//!
//! ```text
//! first -- ends; it has left descriptors --> second -- ends --> third ...
//!   |                                          ^
//!   \-- descriptors --> DescriptorStore -------/  --kept-fd NAME=N for each
//! ```
//!
//! Nothing waits or polls between a daemon's death and the start of the next one: the guest waits for it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use libc::SIGTERM;

use super::descriptor_store::DescriptorStore;
use super::devices::OpenFiles;
use super::error::{LaunchError, system};
use super::events::{Event, Events};
use super::process::Running;
use crate::process::socket::SocketFile;

/// How long the daemon may take to end: longer than it waits for its own threads.
const PATIENCE: Duration = Duration::from_secs(8);
/// `StartLimitIntervalSec=` of the unit.
const INTERVAL: Duration = Duration::from_secs(60);

/// What all daemons of one VM have in common.
#[derive(Debug)]
pub(super) struct DaemonStart<'a> {
    pub program: &'a Path,
    pub config: &'a Path,
    /// The other options.
    pub options: Vec<String>,
    /// How long it may take until it listens.
    pub patience: Duration,
    /// The paths of its sockets.
    pub sockets: Vec<PathBuf>,
    /// How often it is started again within [`INTERVAL`]: `StartLimitBurst=` of the unit.
    pub max_restarts: u32,
}

/// The daemon that runs, and what is needed to start the next one.
///
/// The fields stand in the order in which they are dropped: the daemon ends first.
pub(super) struct Daemons<'a> {
    running: Running,
    /// The files of its sockets, to remove if it is killed.
    sockets: Vec<SocketFile>,
    store: DescriptorStore,
    /// Open as long as the VM runs, because each daemon inherits them. So devices that are unplugged from the VM go back
    /// to the host when `launch` ends.
    files: OpenFiles,
    start: DaemonStart<'a>,
    events: &'a Events,
    /// The number of the daemon: 0 for the first one.
    life: u64,
    /// `None` as soon as the daemon listens.
    beginning: Option<Beginning>,
    restarts: RestartLimit,
}

/// When daemons were started again within [`INTERVAL`], the latest last.
#[derive(Debug)]
struct RestartLimit {
    max: u32,
    restarts: VecDeque<Instant>,
}

impl RestartLimit {
    fn new(max: u32) -> Self {
        Self {
            max,
            restarts: VecDeque::new(),
        }
    }

    /// Whether one more may be started now; if so, it counts.
    fn take(&mut self, now: Instant) -> bool {
        let is_old = |then: &Instant| now.duration_since(*then) > INTERVAL;
        while self.restarts.front().is_some_and(is_old) {
            self.restarts.pop_front();
        }
        let may = u32::try_from(self.restarts.len()).is_ok_and(|count| count < self.max);
        if may {
            self.restarts.push_back(now);
        }
        may
    }
}

/// The start of a daemon that does not listen yet.
#[derive(Debug)]
struct Beginning {
    since: Instant,
    /// How the daemon before has ended.
    before: Option<ExitStatus>,
}

/// The outcome of the first daemon's start.
pub(super) enum Started {
    Ready,
    /// The daemon ended with a status other than 0.
    Ended(ExitStatus),
    /// This process got a signal with this number.
    Signalled(u8),
}

impl<'a> Daemons<'a> {
    /// Starts the first daemon, which inherits `files`.
    pub fn start(
        start: DaemonStart<'a>,
        files: OpenFiles,
        events: &'a Events,
    ) -> Result<Self, LaunchError> {
        let store = DescriptorStore::new().map_err(system("make sockets"))?;
        let running = spawn(&start, &files, &store, (events, 0))?;
        let restarts = RestartLimit::new(start.max_restarts);
        Ok(Self {
            running,
            sockets: Vec::new(),
            store,
            files,
            start,
            events,
            life: 0,
            beginning: Some(Beginning {
                since: Instant::now(),
                before: None,
            }),
            restarts,
        })
    }

    /// Waits until the first daemon listens.
    pub fn until_ready(&mut self) -> Result<Started, LaunchError> {
        while let Some(event) = self.events.next_until(self.deadline()) {
            match event {
                Event::Ready(life) => {
                    self.note_ready(life);
                    return Ok(Started::Ready);
                }
                Event::Signal(signal) => {
                    return Ok(Started::Signalled(u8::try_from(signal).unwrap_or(u8::MAX)));
                }
                Event::Child => match self.poll().map_err(system("wait for the daemon"))? {
                    None => {}
                    Some(status) if status.code().is_some_and(|code| code != 0) => {
                        return Ok(Started::Ended(status));
                    }
                    Some(status) => return Err(LaunchError::DaemonEnded(status)),
                },
            }
        }
        Err(LaunchError::NotReady(self.start.patience))
    }

    /// When the daemon must listen; `None` if it does already.
    pub fn deadline(&self) -> Option<Instant> {
        let beginning = self.beginning.as_ref()?;
        beginning.since.checked_add(self.start.patience)
    }

    /// The daemon `life` listens.
    pub fn note_ready(&mut self, life: u64) {
        if life != self.life {
            return;
        }
        if let Some(Beginning { since, before }) = self.beginning.take() {
            self.note_sockets();
            if let Some(before) = before {
                let time = since.elapsed().as_millis();
                say(&format!(
                    "the daemon ended ({before}), started again in {time} ms"
                ));
            }
        }
    }

    /// How the daemon has ended, if it has.
    pub fn poll(&mut self) -> io::Result<Option<ExitStatus>> {
        self.running.poll()
    }

    /// Ends a daemon that does not listen in time.
    pub fn end_late_one(&mut self) -> io::Result<()> {
        say(&LaunchError::NotReady(self.start.patience).to_string());
        self.running.end().map(drop)
    }

    /// Starts the next daemon, after one that has ended with this status.
    ///
    /// # Errors
    /// The daemon has left nothing, has ended too often, or cannot be started.
    pub fn start_again(&mut self, status: ExitStatus) -> Result<(), LaunchError> {
        let now = Instant::now();
        let beginning = Beginning {
            since: now,
            before: Some(status),
        };
        if let Some(Beginning {
            before: Some(before),
            ..
        }) = self.beginning.replace(beginning)
        {
            say(&format!(
                "the daemon ended ({before}), started again, and ended before it listened"
            ));
            // It may have made its sockets anew.
            self.note_sockets();
        }
        // It has sent its last message.
        self.store.receive();
        if self.store.is_empty() {
            return Err(LaunchError::DaemonEnded(status));
        }
        if !self.restarts.take(now) {
            return Err(LaunchError::DaemonLoops {
                status,
                restarts: self.start.max_restarts,
                within: INTERVAL,
            });
        }
        self.life += 1;
        let context = (self.events, self.life);
        self.running = spawn(&self.start, &self.files, &self.store, context)?;
        Ok(())
    }

    /// Remembers the socket files that are there now.
    fn note_sockets(&mut self) {
        let paths = self.start.sockets.iter();
        let found = paths.filter_map(|path| SocketFile::of_another(path).ok());
        let before = mem::replace(&mut self.sockets, found.collect());
        // Not dropped, which would remove a file that the daemon goes on to use.
        before.into_iter().for_each(SocketFile::forget);
    }
}

/// Starts a daemon with everything that the one before has left. It tells the events with the number that it listens.
fn spawn(
    start: &DaemonStart<'_>,
    files: &OpenFiles,
    store: &DescriptorStore,
    (events, life): (&Events, u64),
) -> Result<Running, LaunchError> {
    let (reader, writer) = io::pipe().map_err(system("make a pipe"))?;
    let mut command = Command::new(start.program);
    command.arg("--config").arg(start.config);
    command.args(["--ready-fd", &writer.as_raw_fd().to_string()]);
    command.args(&start.options);
    command.args(["--keeper-fd", &store.daemons_end().to_string()]);
    let mut inherited = files.numbers();
    inherited.extend([writer.as_raw_fd(), store.daemons_end()]);
    for (name, fd) in store.numbers() {
        command.args(["--kept-fd", &format!("{name}={fd}")]);
        inherited.push(fd);
    }
    command.stdin(Stdio::null());
    // A terminal signals a whole process group, and the daemon must outlive the VMM.
    command.process_group(0);
    let running = Running::start(command, inherited, SIGTERM, PATIENCE);
    let running = running.map_err(|source| LaunchError::Start {
        program: start.program.to_owned(),
        source,
    })?;
    events
        .watch(reader, life)
        .map_err(system("start a thread"))?;
    Ok(running)
}

/// Tells the operator. Nothing is lost that the VM needs if nobody reads standard error.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "vhost-device-iommu: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_restarts_in_a_minute_are_the_most() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut limit = RestartLimit::new(5);
        for seconds in [0, 0, 0, 30, 40] {
            assert!(limit.take(at(seconds)), "{seconds}");
        }
        assert!(!limit.take(at(41)));
        assert!(!limit.take(at(60)), "a refusal does not count");
        for seconds in [61, 61, 61] {
            assert!(limit.take(at(seconds)), "{seconds}");
        }
        assert!(!limit.take(at(89)));
        assert!(limit.take(at(91)));
        assert!(!limit.take(at(91)));
    }
}
