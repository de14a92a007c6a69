//! Listens to the VMM's QMP socket for resets of the VM, and asks for the places of its devices.
//!
//! The vhost-user protocol reports only that rings stop and start. QMP tells a reset from a pause at once;
//! without it, the daemon has to wait for the next driver.
//!
//! The VMM may send anything: lines are bounded, a message that cannot be parsed ends the connection, and
//! the daemon connects again after a pause that grows. An answer has a deadline.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::lines::{Lines, refuse};
use super::pci_tree::PciTree;
use crate::locks::{Mutex, Rank};
use crate::process::connector;
use crate::process::sandbox::{self, Role};
use crate::{info_limited, warn_limited};

/// The pause before the second attempt to connect. Each further pause is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long the VMM may take to read a line.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the VMM may take to list its devices, while requests of the guest wait.
const DEADLINE: Duration = Duration::from_secs(2);
/// The shortest time between two resets that the daemon acts on.
const RESET_PAUSE: Duration = Duration::from_millis(10);

const NO_CONNECTION: &str = "the daemon has no connection to QMP";

/// Receives what the VMM reports.
pub trait VmReports: Send + 'static {
    /// The VM was reset.
    fn reset(&self);
    /// The answer to [`Asker::ask`]: the devices, or the reason why they are not known. A later call replaces it.
    fn places(&self, answer: Result<PciTree, String>);
}

/// The thread that listens to the VMM. Dropping this ends it.
pub struct Qmp {
    monitor: Arc<Monitor>,
    thread: Option<JoinHandle<()>>,
}

/// Asks for the places of the devices. Any thread may use it, whatever locks it holds.
#[derive(Clone)]
pub struct Asker(Arc<Signals>);

/// What other threads tell the thread without a lock.
struct Signals {
    /// The places are to be asked for.
    asked: AtomicBool,
    /// The same, once there is a connection.
    asked_later: AtomicBool,
    /// Wakes the thread.
    wake: OwnedFd,
}

struct Monitor {
    state: Mutex<MonitorState>,
    signals: Arc<Signals>,
}

#[derive(Default)]
struct MonitorState {
    /// A VMM is connected, and the thread must listen to it.
    wanted: bool,
    ended: bool,
    /// The connection that the thread reads.
    stream: Option<UnixStream>,
}

impl Asker {
    /// An asker before there is a thread.
    ///
    /// # Errors
    /// The system has no event descriptor left.
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Signals {
            asked: AtomicBool::new(false),
            asked_later: AtomicBool::new(false),
            wake,
        })))
    }

    /// Asks for the places. [`VmReports::places`] is called soon, whatever the VMM does. Does not wait.
    pub fn ask(&self) {
        self.0.asked.store(true, Ordering::Release);
        self.0.wake();
    }
}

impl Asker {
    /// Asks for the places once there is a connection, for a driver that does not wait for the answer. [`VmReports::places`]
    /// is called within the deadline after a VMM has connected, whatever the VMM does. Call this before the thread is
    /// started.
    pub fn ask_when_connected(&self) {
        self.0.asked_later.store(true, Ordering::Release);
    }
}

impl Signals {
    fn wake(&self) {
        // Fails only if the thread has not read the last 2^64 - 2 wakeups.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Qmp {
    /// Starts a thread that calls `reports` for what the VMM at the socket `path` reports, while
    /// a VMM is connected: see [`Self::set_vmm_present`].
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(path: PathBuf, asker: &Asker, reports: impl VmReports) -> io::Result<Self> {
        let monitor = Arc::new(Monitor {
            state: Mutex::new(Rank::Qmp, MonitorState::default()),
            signals: asker.0.clone(),
        });
        let listened = monitor.clone();
        let thread = sandbox::spawn(Role::Qmp, move || listen(&path, &listened, &reports))?;
        Ok(Self {
            monitor,
            thread: Some(thread),
        })
    }

    /// Notes that a VMM has connected or gone. While it is gone, the thread does not try to connect.
    pub fn set_vmm_present(&self, present: bool) {
        self.monitor.change(|state| state.wanted = present);
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.monitor.change(|state| state.ended = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that listens to QMP has panicked");
        }
    }
}

impl Monitor {
    /// Changes the state, and ends the connection if none is wanted.
    fn change(&self, change: impl FnOnce(&mut MonitorState)) {
        let mut state = self.state.lock();
        change(&mut state);
        if (state.ended || !state.wanted)
            && let Some(stream) = state.stream.take()
        {
            // The peer may be gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(state);
        self.signals.wake();
    }

    /// Waits until a connection is wanted. Returns `false` when the thread is to end.
    fn wait_until_wanted(&self, reports: &impl VmReports) -> io::Result<bool> {
        loop {
            {
                let state = self.state.lock();
                if state.ended || state.wanted {
                    return Ok(!state.ended);
                }
            }
            self.wait(None, None)?;
            self.refuse_question(reports);
        }
    }

    /// Waits for `pause`, or until no connection is wanted.
    fn wait_for(&self, pause: Duration, reports: &impl VmReports) -> io::Result<()> {
        let end = Instant::now() + pause;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            {
                let state = self.state.lock();
                if state.ended || !state.wanted || left.is_zero() {
                    return Ok(());
                }
            }
            self.wait(None, Some(left))?;
            self.refuse_question(reports);
        }
    }

    /// Answers a question for which there is no connection.
    fn refuse_question(&self, reports: &impl VmReports) {
        if self.signals.asked.swap(false, Ordering::AcqRel) {
            // The next connection asks.
            self.signals.asked_later.store(true, Ordering::Release);
            reports.places(Err(NO_CONNECTION.to_owned()));
        }
    }

    /// Waits for `limit`, for a wakeup, or for something to read. Returns whether there is something.
    fn wait(&self, stream: Option<&UnixStream>, limit: Option<Duration>) -> io::Result<bool> {
        let limit = limit.map(|limit| Timespec {
            // Limits are seconds.
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let mut waited = vec![PollFd::new(&self.signals.wake, PollFlags::IN)];
        waited.extend(stream.map(|stream| PollFd::new(stream, PollFlags::IN)));
        match poll(&mut waited, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
        let is_ready = |at: usize| waited.get(at).is_some_and(|it| !it.revents().is_empty());
        if is_ready(0) {
            // Fails if an earlier call has read it.
            let _ = rustix::io::read(&self.signals.wake, &mut [0u8; 8]);
        }
        Ok(is_ready(1))
    }

    /// Registers `stream` as the connection that a change ends. Returns whether it is still wanted.
    fn publish(&self, stream: &UnixStream) -> io::Result<bool> {
        let clone = stream.try_clone()?;
        let mut state = self.state.lock();
        let wanted = state.wanted && !state.ended;
        state.stream = wanted.then_some(clone);
        Ok(wanted)
    }

    /// Calls `report`, unless the VMM is gone: the unread events of one VMM are not about the next VMM's
    /// VM. Returns whether the VMM is still connected.
    fn report(&self, report: impl FnOnce()) -> bool {
        let state = self.state.lock();
        let there = state.stream.is_some();
        if there {
            // The state stays locked, so that no other VMM can connect meanwhile.
            report();
        }
        there
    }
}

fn listen(path: &Path, monitor: &Monitor, reports: &impl VmReports) {
    let mut pause = FIRST_PAUSE;
    // Whether the places were asked for and are not known.
    let mut unanswered = false;
    // Whether [`Asker::ask_when_connected`] has asked, and its deadline does not run yet.
    let mut is_owed = monitor.signals.asked_later.load(Ordering::Acquire);
    // That deadline, while there is no connection.
    let mut owed_until: Option<Instant> = None;
    let ended = loop {
        match monitor.wait_until_wanted(reports) {
            Ok(true) => {}
            Ok(false) => return,
            Err(cause) => break cause,
        }
        if std::mem::take(&mut is_owed) {
            owed_until = Some(Instant::now() + DEADLINE);
        }
        let mut greeted = false;
        let ended = connect_to(path).and_then(|stream| {
            if monitor.publish(&stream)? {
                let mut session = QmpSession {
                    monitor,
                    reports,
                    out: stream.try_clone()?,
                    greeted: false,
                    ready: false,
                    unanswered,
                    deadline: owed_until.take(),
                    question: 0,
                };
                let ended = session.run(stream);
                greeted = session.greeted;
                unanswered = session.end();
                ended
            } else {
                Ok(())
            }
        });
        monitor.state.lock().stream = None;
        monitor.refuse_question(reports);
        if greeted {
            pause = FIRST_PAUSE;
        }
        let wanted = monitor.state.lock().wanted;
        if let Err(cause) = ended
            && wanted
        {
            let path = path.display();
            warn_limited!(
                "resets of the VM are not reported: QMP at {path}: {cause}; start QEMU with \
                 -qmp unix:{path},server=on,wait=off, for the daemon alone"
            );
        }
        let left = owed_until.map(|end| end.saturating_duration_since(Instant::now()));
        if let Err(cause) = monitor.wait_for(left.unwrap_or(pause).min(pause), reports) {
            break cause;
        }
        if owed_until.take_if(|end| *end <= Instant::now()).is_some() {
            reports.places(Err(NO_CONNECTION.to_owned()));
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    };
    warn_limited!("the thread that listens to QMP cannot wait for events: {ended}");
}

/// Connects without waiting: a listener with a full backlog fails the call.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::from(connector::connect(path)?);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A message of the VMM.
#[derive(Deserialize)]
struct QmpMessage {
    #[serde(rename = "QMP")]
    greeting: Option<IgnoredAny>,
    error: Option<IgnoredAny>,
    #[serde(rename = "return")]
    returned: Option<IgnoredAny>,
    event: Option<String>,
    /// The name of the command that this answers.
    id: Option<String>,
}

/// One connection to the VMM.
struct QmpSession<'a, R> {
    monitor: &'a Monitor,
    reports: &'a R,
    out: UnixStream,
    greeted: bool,
    /// The VMM takes commands.
    ready: bool,
    /// The places were asked for and are not known.
    unanswered: bool,
    /// When the VMM must have answered, while it has not.
    deadline: Option<Instant>,
    /// The number of the last question. Answers to earlier ones are out of date.
    question: u64,
}

/// The name of the command for the places, before its number.
const PLACES: &str = "places-";

impl<R: VmReports> QmpSession<'_, R> {
    /// Handles messages and questions until the connection ends.
    fn run(&mut self, stream: UnixStream) -> io::Result<()> {
        let mut lines = Lines::new(stream);
        loop {
            let limit = self
                .deadline
                .map(|end| end.saturating_duration_since(Instant::now()));
            let readable = self.monitor.wait(Some(lines.stream()), limit)?;
            if self.monitor.signals.asked.swap(false, Ordering::AcqRel) {
                self.unanswered = true;
                self.deadline = Some(Instant::now() + DEADLINE);
                if self.ready {
                    self.ask()?;
                }
            }
            if self.deadline.is_some_and(|end| end <= Instant::now()) {
                self.deadline = None;
                let why = "the VMM has not listed its devices in time";
                self.reports.places(Err(why.to_owned()));
            }
            if !readable {
                continue;
            }
            if !lines.fill()? {
                return refuse("the VMM has closed the connection");
            }
            while let Some(line) = lines.next()? {
                if !self.message(line)? {
                    return Ok(());
                }
            }
        }
    }

    /// Handles a message. Returns whether the VMM is still there.
    fn message(&mut self, line: &[u8]) -> io::Result<bool> {
        let message: QmpMessage = serde_json::from_slice(line)?;
        if !self.greeted {
            if message.greeting.is_none() {
                return refuse("the peer sent no QMP greeting");
            }
            self.greeted = true;
            self.out
                .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
            info_limited!("the VMM reports resets of the VM over QMP");
            return Ok(true);
        }
        if let Some(number) = message.id.as_deref().and_then(|id| id.strip_prefix(PLACES)) {
            if number != self.question.to_string() {
                return Ok(true);
            }
            let answer = match message.error {
                None => PciTree::parse(line).map_err(|cause| cause.to_string()),
                Some(_) => Err("the VMM refuses query-pci".to_owned()),
            };
            self.deadline = None;
            self.unanswered = answer.is_err();
            return Ok(self.monitor.report(|| self.reports.places(answer)));
        }
        if message.error.is_some() {
            return refuse("the VMM refuses qmp_capabilities");
        }
        if message.returned.is_some() && !self.ready {
            self.ready = true;
            if self.unanswered
                || self
                    .monitor
                    .signals
                    .asked_later
                    .swap(false, Ordering::AcqRel)
            {
                self.unanswered = true;
                self.ask()?;
            }
        }
        if message.event.as_deref() == Some("RESET") {
            if !self.monitor.report(|| self.reports.reset()) {
                return Ok(false);
            }
            std::thread::sleep(RESET_PAUSE);
        }
        Ok(true)
    }

    fn ask(&mut self) -> io::Result<()> {
        self.question = self.question.wrapping_add(1);
        let id = format!("{PLACES}{}", self.question);
        let command = format!("{{\"execute\":\"query-pci\",\"id\":\"{id}\"}}\n");
        self.out.write_all(command.as_bytes())
    }

    /// The connection has ended. Returns whether the next one must ask for the places.
    fn end(self) -> bool {
        if self.deadline.is_some() {
            let why = "the connection to QMP has ended";
            self.reports.places(Err(why.to_owned()));
        }
        self.unanswered
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Answers(Sender<bool>);

    impl VmReports for Answers {
        fn reset(&self) {}

        fn places(&self, answer: Result<PciTree, String>) {
            // Fails when the test has ended.
            let _ = self.0.send(answer.is_ok());
        }
    }

    #[test]
    fn a_question_for_a_driver_that_does_not_wait_is_answered_whatever_the_vmm_does() {
        let folder = tempfile::tempdir().expect("a folder");
        let (silent, absent) = (folder.path().join("silent"), folder.path().join("absent"));
        let _listener = UnixListener::bind(&silent).expect("a socket");
        for path in [silent, absent] {
            let asker = Asker::new().expect("an event");
            asker.ask_when_connected();
            let (sender, answers) = channel();
            let qmp = Qmp::start(path, &asker, Answers(sender)).expect("a thread");
            qmp.set_vmm_present(true);
            let answer = answers.recv_timeout(Duration::from_secs(30));
            assert_eq!(answer, Ok(false), "the places are not known");
        }
    }
}
