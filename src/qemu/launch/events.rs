//! What the launcher waits for.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use libc::c_int;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// Signals that are meant for the VM as a whole.
const PASSED_ON: [c_int; 3] = [SIGTERM, SIGINT, SIGHUP];

/// Something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// This process got a signal that is to be passed on.
    Signal(c_int),
    /// A child may have ended.
    Child,
    /// The daemon serves.
    Ready,
}

/// A queue of events.
pub(super) struct Events {
    queue: Receiver<Event>,
    sender: Sender<Event>,
    signals: Handle,
}

impl Events {
    /// From now on signals are events. Those that this process was told to ignore stay ignored,
    /// here and in children.
    ///
    /// # Errors
    /// Where the handlers or the thread cannot be made.
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

    /// Makes a byte from `pipe` an event; its end alone is none.
    ///
    /// # Errors
    /// Where the thread cannot be made.
    pub fn watch(&self, mut pipe: PipeReader) -> io::Result<()> {
        let sender = self.sender.clone();
        thread::Builder::new()
            .name("readiness".into())
            .spawn(move || {
                let mut byte = [0];
                if matches!(pipe.read(&mut byte), Ok(1)) {
                    // The receiver may have left meanwhile.
                    sender.send(Event::Ready).unwrap_or_default();
                }
            })?;
        Ok(())
    }

    /// The next event, or `None` where there is none up to `deadline`.
    pub fn next_until(&self, deadline: Instant) -> Option<Event> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.queue.recv_timeout(left).ok()
    }

    /// The next event, however long it takes.
    pub fn next(&self) -> Event {
        // It does not fail, since this has a sender; looking at the children is never wrong.
        self.queue.recv().unwrap_or(Event::Child)
    }

    /// Takes all events that are waiting; whether a signal to be passed on was among them.
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

/// The signals that the process whose status is `text` ignores: bit N - 1 for signal N.
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
        let soon = || Instant::now() + Duration::from_secs(10);
        let (reader, writer) = io::pipe().expect("a pipe");
        events.watch(reader).expect("a thread");
        drop(writer);
        let (reader, mut writer) = io::pipe().expect("a pipe");
        events.watch(reader).expect("a thread");
        io::Write::write_all(&mut writer, b"\n").expect("written");
        let mut seen = Vec::new();
        while !seen.contains(&Event::Ready) {
            seen.push(events.next_until(soon()).expect("an event"));
        }
        seen.retain(|event| *event != Event::Child);
        assert_eq!(seen, [Event::Ready]);
        assert_eq!(events.next_until(Instant::now()), None);
    }
}
