//! Proof of life for a service manager, by the threads the daemon is there for.
//!
//! 1. The watchdog's thread asks each [`Pulse`]: its event wakes the thread that owes the answer.
//! 2. That thread answers from the loop in which it does its work. One that hangs does not get there.
//! 3. Once all have answered, the service manager is told. Where one does not answer, it is told nothing
//!    more, and does what its unit says: it kills the daemon and starts it anew.

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

/// Questions in the time after which the daemon counts as dead: a late answer is not the end yet.
const QUESTIONS: u32 = 4;

/// What one loop is asked by and answers with.
#[derive(Debug)]
pub struct Pulse {
    /// Whose it is, for people.
    name: &'static str,
    event: EventFd,
    owed: AtomicBool,
}

impl Pulse {
    /// Nobody has asked yet.
    ///
    /// # Errors
    /// Where the system has no event descriptor left.
    pub fn new(name: &'static str) -> io::Result<Self> {
        Ok(Self {
            name,
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            owed: AtomicBool::new(false),
        })
    }

    /// Readable while an answer is owed; for the loop's own epoll.
    pub fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// The loop is alive. Costs next to nothing where nobody has asked.
    pub fn answer(&self) {
        if self.owed.load(Ordering::Relaxed) {
            // Fails where it was read already.
            let _ = self.event.read();
            self.owed.store(false, Ordering::Release);
        }
    }

    fn ask(&self) {
        // In this order: an answer between the two leaves nothing behind that wakes the loop for ever. The
        // write fails where the event has been set so often that it is set anyway.
        let _ = self.event.write(1);
        self.owed.store(true, Ordering::Release);
    }

    fn is_owed(&self) -> bool {
        self.owed.load(Ordering::Acquire)
    }
}

/// The thread that asks; dropping it ends it.
#[derive(Debug)]
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// From now on asks `pulses` four times in `patience`, and calls `alive` when all have answered.
    ///
    /// # Errors
    /// Where the thread cannot be made.
    pub fn start(
        pulses: Vec<Arc<Pulse>>,
        patience: Duration,
        mut alive: impl FnMut() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = sandbox::spawn(Role::Watchdog, move || {
            loop {
                for pulse in pulses.iter().filter(|pulse| !pulse.is_owed()) {
                    pulse.ask();
                }
                match stopped.recv_timeout(patience / QUESTIONS) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                }
                let mut silent = pulses.iter().filter(|pulse| pulse.is_owed()).peekable();
                if silent.peek().is_some() {
                    let names: Vec<_> = silent.map(|pulse| pulse.name).collect();
                    error_limited!(
                        "no sign of life from: {}; the service manager is told nothing",
                        names.join(", ")
                    );
                } else if let Err(cause) = alive() {
                    warn_limited!("the service manager cannot be told of life: {cause}");
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
            // A panic of its was reported by itself.
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
    fn only_the_answers_of_all_count() {
        let pulses = [Pulse::new("one"), Pulse::new("other")].map(|p| Arc::new(p.expect("made")));
        let told = Arc::new(AtomicU32::new(0));
        let counter = told.clone();
        let watchdog = Watchdog::start(pulses.to_vec(), Duration::from_millis(80), move || {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        let watchdog = watchdog.expect("a thread");
        for _ in 0..40 {
            sleep(Duration::from_millis(5));
            pulses[0].answer();
        }
        assert_eq!(told.load(Ordering::Relaxed), 0, "one is silent");
        for _ in 0..40 {
            sleep(Duration::from_millis(5));
            pulses.iter().for_each(|pulse| pulse.answer());
        }
        assert!(told.load(Ordering::Relaxed) > 0, "both are alive");
        drop(watchdog);
        let last = told.load(Ordering::Relaxed);
        sleep(Duration::from_millis(60));
        assert_eq!(told.load(Ordering::Relaxed), last, "its end is the end");
    }
}
