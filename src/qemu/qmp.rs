//! Listens to the VMM's QMP socket for resets of the VM.
//!
//! The vhost-user protocol reports only that rings stop and start. QMP tells a reset from a pause at once;
//! without it, the daemon has to wait for the next driver.
//!
//! The VMM may send anything: lines are bounded, a message that cannot be parsed ends the connection, and
//! the daemon connects again after a pause that grows.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use log::warn;
use serde_json::Value;

use crate::locks::{Condvar, Mutex, Rank};
use crate::process::connector;
use crate::process::sandbox::{self, Role};
use crate::{info_limited, warn_limited};

/// The longest line, in bytes. QEMU's events and its answers to this client have a few hundred.
const MAX_LINE: usize = 1 << 16;
/// The pause before the second attempt to connect. Each further pause is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long the VMM may take to read a line.
const PATIENCE: Duration = Duration::from_secs(5);
/// The shortest time between two resets that the daemon acts on.
const RESET_PAUSE: Duration = Duration::from_millis(10);

/// The thread that listens to the VMM. Dropping this ends it.
pub struct Qmp {
    monitor: Arc<Monitor>,
    thread: Option<JoinHandle<()>>,
}

struct Monitor {
    state: Mutex<MonitorState>,
    changed: Condvar,
}

#[derive(Default)]
struct MonitorState {
    /// A VMM is connected, and the thread must listen to it.
    wanted: bool,
    ended: bool,
    /// The connection that the thread reads.
    stream: Option<UnixStream>,
}

impl Qmp {
    /// Starts a thread that calls `reset` for each reset that the VMM at the socket `path` reports, while
    /// a VMM is connected: see [`Self::set_vmm_present`].
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(path: PathBuf, reset: impl Fn() + Send + 'static) -> io::Result<Self> {
        let monitor = Arc::new(Monitor {
            state: Mutex::new(Rank::Qmp, MonitorState::default()),
            changed: Condvar::new(),
        });
        let listened = monitor.clone();
        let thread = sandbox::spawn(Role::Qmp, move || listen(&path, &listened, reset))?;
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
        self.changed.notify_one();
    }

    /// Waits until a connection is wanted. Returns `false` when the thread is to end.
    fn wait_until_wanted(&self) -> bool {
        let mut state = self.state.lock();
        while !state.wanted && !state.ended {
            self.changed.wait(&mut state);
        }
        !state.ended
    }

    /// Waits for `pause`, or until the state changes.
    fn wait_for(&self, pause: Duration) {
        let mut state = self.state.lock();
        if state.wanted && !state.ended {
            self.changed.wait_for(&mut state, pause);
        }
    }

    /// Registers `stream` as the connection that a change ends. Returns whether it is still wanted.
    fn publish(&self, stream: &UnixStream) -> io::Result<bool> {
        let clone = stream.try_clone()?;
        let mut state = self.state.lock();
        let wanted = state.wanted && !state.ended;
        state.stream = wanted.then_some(clone);
        Ok(wanted)
    }

    /// Calls `reset`, unless the VMM is gone: the unread events of one VMM are not about the next VMM's
    /// VM. Returns whether the VMM is still connected.
    fn report_reset(&self, reset: &impl Fn()) -> bool {
        let state = self.state.lock();
        let there = state.stream.is_some();
        if there {
            // The state stays locked, so that no other VMM can connect meanwhile.
            reset();
        }
        there
    }
}

fn listen(path: &Path, monitor: &Monitor, reset: impl Fn()) {
    let mut pause = FIRST_PAUSE;
    while monitor.wait_until_wanted() {
        let mut greeted = false;
        let ended = connect_to(path).and_then(|stream| {
            if monitor.publish(&stream)? {
                read_events(stream, monitor, &mut greeted, &reset)
            } else {
                Ok(())
            }
        });
        monitor.state.lock().stream = None;
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
        monitor.wait_for(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Connects without waiting: a listener with a full backlog fails the call.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::from(connector::connect(path)?);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Reads events until the connection ends.
fn read_events(
    stream: UnixStream,
    monitor: &Monitor,
    greeted: &mut bool,
    reset: &impl Fn(),
) -> io::Result<()> {
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    let mut out = stream.try_clone()?;
    let mut lines = Lines::new(stream);
    while let Some(line) = lines.next()? {
        let message: Value = serde_json::from_slice(line)?;
        if !*greeted {
            if message.get("QMP").is_none() {
                return refuse("the peer sent no QMP greeting");
            }
            *greeted = true;
            out.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
            info_limited!("the VMM reports resets of the VM over QMP");
        } else if message.get("error").is_some() {
            return refuse("the VMM refuses qmp_capabilities");
        } else if message.get("event").and_then(Value::as_str) == Some("RESET") {
            if !monitor.report_reset(reset) {
                return Ok(());
            }
            std::thread::sleep(RESET_PAUSE);
        }
    }
    refuse("the VMM has closed the connection")
}

/// Splits a stream into lines of up to [`MAX_LINE`] bytes.
struct Lines<R> {
    stream: R,
    buffer: Vec<u8>,
    /// The length of the line that was returned last, from the start of the buffer.
    taken: usize,
}

impl<R: Read> Lines<R> {
    fn new(stream: R) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            taken: 0,
        }
    }

    /// The next line, without its end; `None` at the end of the stream.
    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let mut searched = 0;
        loop {
            let rest = self.buffer.iter().skip(searched);
            if let Some(more) = rest.clone().position(|byte| *byte == b'\n') {
                let end = searched + more;
                self.taken = end + 1;
                return Ok(self.buffer.get(..end));
            }
            searched = self.buffer.len();
            if searched >= MAX_LINE {
                let why = "a line is longer than any of QMP's";
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(None),
                Ok(count) => self.buffer.extend(piece.iter().take(count)),
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut lines = Lines::new(bytes);
        let mut all = Vec::new();
        while let Some(line) = lines.next()? {
            all.push(line.to_vec());
        }
        Ok(all)
    }

    #[test]
    fn lines_are_split_and_limited_in_length() {
        let long = vec![b'x'; MAX_LINE - 1];
        let text = [&b"one\n\n"[..], &long, b"\nlast\nno line"].concat();
        let found = all(&text).expect("lines");
        assert_eq!(found, [b"one".to_vec(), Vec::new(), long, b"last".to_vec()]);
        assert!(all(&vec![b'x'; 2 * MAX_LINE]).is_err());
    }
}
