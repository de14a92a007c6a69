//! The events of the launcher: signals, children, the daemon's readiness.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use libc::c_int;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// Signals for the VM as a whole, which the launcher passes on.
const PASSED_ON: [c_int; 3] = [SIGTERM, SIGINT, SIGHUP];

/// An event of the launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// This process got a signal to pass on.
    Signal(c_int),
    /// A child may have ended.
    Child,
    /// The daemon with this number listens.
    Ready(u64),
}

/// A queue of events.
pub(super) struct Events {
    queue: Receiver<Event>,
    sender: Sender<Event>,
    signals: Handle,
}

impl Events {
    /// Turns signals into events from now on. Signals that this process ignores stay ignored, here and in
    /// children.
    ///
    /// # Errors
    /// The handlers or the thread cannot be made.
    pub fn listen() -> io::Result<Self> {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = ignored_signals(&status);
        let wanted = PASSED_ON
            .into_iter()
            .filter(|signal| ignored >> (signal - 1) & 1 == 0);
        let mut signals = Signals::new(wanted.chain([SIGCHLD]))?;
        let (sender, queue) = channel();
        let events = Self {
            queue,
            sender: sender.clone(),
            signals: signals.handle(),
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    let event = match signal {
                        SIGCHLD => Event::Child,
                        other => Event::Signal(other),
                    };
                    if sender.send(event).is_err() {
                        return;
                    }
                }
            })?;
        Ok(events)
    }

    /// Turns a byte from `pipe` into the event that the daemon `life` listens. The end of the pipe makes no event.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn watch(&self, mut pipe: PipeReader, life: u64) -> io::Result<()> {
        let sender = self.sender.clone();
        thread::Builder::new()
            .name("readiness".into())
            .spawn(move || {
                let mut byte = [0];
                if matches!(pipe.read(&mut byte), Ok(1)) {
                    // The receiver may be gone by now.
                    sender.send(Event::Ready(life)).unwrap_or_default();
                }
            })?;
        Ok(())
    }

    /// The next event, or `None` if none comes by `deadline`. Without one, waits as long as it takes.
    pub fn next_until(&self, deadline: Option<Instant>) -> Option<Event> {
        let Some(deadline) = deadline else {
            // It cannot fail, since `self` holds a sender; polling the children is harmless.
            return Some(self.queue.recv().unwrap_or(Event::Child));
        };
        let left = deadline.saturating_duration_since(Instant::now());
        self.queue.recv_timeout(left).ok()
    }

    /// Takes all waiting events. Returns whether a signal to pass on was among them.
    pub fn drain(&self) -> bool {
        let events = self.queue.try_iter();
        events
            .filter(|event| matches!(event, Event::Signal(_)))
            .count()
            > 0
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.signals.close();
    }
}

/// The signals that a process with the status `text` ignores: bit N - 1 for signal N.
fn ignored_signals(text: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_kernels_text() {
        let text = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000001\nSigCgt:\tf\n";
        assert_eq!(ignored_signals(text), 1);
        assert_eq!(ignored_signals(""), 0);
        assert_eq!(ignored_signals("SigIgn:\tx"), 0);
    }

    #[test]
    fn only_a_byte_means_ready() {
        let events = Events::listen().expect("signals");
        let soon = || Some(Instant::now() + Duration::from_secs(10));
        let (reader, writer) = io::pipe().expect("a pipe");
        events.watch(reader, 7).expect("a thread");
        drop(writer);
        let (reader, mut writer) = io::pipe().expect("a pipe");
        events.watch(reader, 7).expect("a thread");
        io::Write::write_all(&mut writer, b"\n").expect("written");
        let mut seen = Vec::new();
        while !seen.contains(&Event::Ready(7)) {
            seen.push(events.next_until(soon()).expect("an event"));
        }
        seen.retain(|event| *event != Event::Child);
        assert_eq!(seen, [Event::Ready(7)]);
        assert_eq!(events.next_until(Some(Instant::now())), None);
    }
}
