//! Metrics in a file for node_exporter's textfile collector.
//!
//! A thread of its own writes the file. It reads nothing that a client sends, and the control thread, which does, needs
//! no files. A folder that does not answer delays neither clients nor the watchdog.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use log::{debug, warn};

use super::figures::Figures;
use super::prometheus;
use super::subjects::Subjects;
use crate::process::sandbox::{self, Role};
use crate::warn_limited;

/// The thread that writes the file at an interval. Dropping it ends the thread, which removes the file: the collector
/// must not take the last figures for those of a running daemon.
pub struct MetricsFile {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsFile {
    /// Writes the figures of `subjects` to `path` at once, and then at this interval.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(path: PathBuf, interval: Duration, subjects: Subjects) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let writer = TextfileWriter {
            draft: path.with_extension("prom.new"),
            path,
        };
        let thread = sandbox::spawn(Role::MetricsFile, move || {
            writer.run(interval, &stopped, &subjects);
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that writes the metrics has panicked");
        }
    }
}

/// The files of the thread.
struct TextfileWriter {
    path: PathBuf,
    /// A file in the same folder, with an ending that the collector ignores.
    draft: PathBuf,
}

impl TextfileWriter {
    fn run(&self, interval: Duration, stopped: &Receiver<()>, subjects: &Subjects) {
        loop {
            self.publish(subjects);
            match stopped.recv_timeout(interval) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn publish(&self, subjects: &Subjects) {
        let text = prometheus::render(&Figures::gather(subjects));
        if let Err(cause) = self.write(&text) {
            subjects.clients.unwritten.inc();
            let path = self.path.display();
            warn_limited!(
                "the metrics cannot be written to {path}: {cause}; give the daemon a folder where it may \
                 create files"
            );
        }
    }

    /// Writes the file. A rename makes the change atomic: a reader sees either the old content or the new one.
    fn write(&self, text: &str) -> io::Result<()> {
        let mut file = File::create(&self.draft)?;
        // Not left to the umask, which is for the sockets: every user that may enter the folder may read the file.
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())?;
        fs::rename(&self.draft, &self.path)
    }
}

impl Drop for TextfileWriter {
    fn drop(&mut self) {
        for path in [&self.path, &self.draft] {
            if let Err(cause) = fs::remove_file(path) {
                debug!("cannot remove {}: {cause}", path.display());
            }
        }
    }
}
