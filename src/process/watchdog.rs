//! Reports to the service manager's watchdog that the daemon's threads make progress.
//!
//! 1. The watchdog thread asks each [`Pulse`]. Its event wakes the thread that owes the answer.
//! 2. That thread answers from its main loop. A thread that hangs does not get there.
//! 3. Once all threads have answered, the watchdog sends WATCHDOG=1. While one owes an answer, the watchdog sends
//!    nothing. After its deadline, the service manager kills and restarts the daemon, as the unit says.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::process::sandbox::{self, Role};
use crate::{error_limited, warn_limited};

/// Rounds of questions within the deadline of the service manager. With more than one, a single late answer
/// does not end the daemon.
const ROUNDS: u32 = 4;

/// The question to one main loop, and its answer.
#[derive(Debug)]
pub struct Pulse {
    /// The name of the thread in log messages.
    name: &'static str,
    event: EventFd,
    owed: AtomicBool,
}

impl Pulse {
    /// A pulse without an open question.
    ///
    /// # Errors
    /// The system has no event descriptor left.
    pub fn new(name: &'static str) -> io::Result<Self> {
        Ok(Self {
            name,
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            owed: AtomicBool::new(false),
        })
    }

    /// Readable while an answer is owed. The loop must wait for it in its epoll.
    pub fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Answers an open question. Without one, this costs a relaxed load.
    pub fn answer(&self) {
        if self.owed.load(Ordering::Relaxed) {
            // Fails if the event was read already.
            let _ = self.event.read();
            self.owed.store(false, Ordering::Release);
        }
    }

    fn ask(&self) {
        // The event before the flag: in the other order, an answer between the two would clear the flag before
        // the event is set, and the event would wake the loop for ever. The write fails only if the counter of
        // the event is full, and then the event is set anyway.
        let _ = self.event.write(1);
        self.owed.store(true, Ordering::Release);
    }

    fn is_owed(&self) -> bool {
        self.owed.load(Ordering::Acquire)
    }
}

/// The watchdog thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts the thread. It asks `pulses` four times within `deadline`, and calls `report_alive` when all have
    /// answered.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(
        pulses: Vec<Arc<Pulse>>,
        deadline: Duration,
        mut report_alive: impl FnMut() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = sandbox::spawn(Role::Watchdog, move || {
            loop {
                for pulse in pulses.iter().filter(|pulse| !pulse.is_owed()) {
                    pulse.ask();
                }
                match stopped.recv_timeout(deadline / ROUNDS) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                }
                let mut silent = pulses.iter().filter(|pulse| pulse.is_owed()).peekable();
                if silent.peek().is_some() {
                    let names: Vec<_> = silent.map(|pulse| pulse.name).collect();
                    error_limited!(
                        "no answer to the watchdog from: {}; WATCHDOG=1 is not sent",
                        names.join(", ")
                    );
                } else if let Err(cause) = report_alive() {
                    warn_limited!("cannot send WATCHDOG=1: {cause}");
                }
            }
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::thread::sleep;

    use super::*;

    #[test]
    fn alive_is_called_only_when_all_have_answered() {
        let pulses = [Pulse::new("one"), Pulse::new("other")].map(|p| Arc::new(p.expect("made")));
        let calls = Arc::new(AtomicU32::new(0));
        let counter = calls.clone();
        let watchdog = Watchdog::start(pulses.to_vec(), Duration::from_millis(80), move || {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        let watchdog = watchdog.expect("a thread");
        for _ in 0..40 {
            sleep(Duration::from_millis(5));
            pulses[0].answer();
        }
        assert_eq!(calls.load(Ordering::Relaxed), 0, "one is silent");
        for _ in 0..40 {
            sleep(Duration::from_millis(5));
            pulses.iter().for_each(|pulse| pulse.answer());
        }
        assert!(calls.load(Ordering::Relaxed) > 0, "both are alive");
        drop(watchdog);
        let last = calls.load(Ordering::Relaxed);
        sleep(Duration::from_millis(60));
        assert_eq!(calls.load(Ordering::Relaxed), last, "the thread has ended");
    }
}
