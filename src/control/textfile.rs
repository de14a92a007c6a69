//! Metrics in a file for node_exporter's textfile collector.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use log::debug;

use super::figures::Figures;
use super::prometheus;
use super::subjects::Subjects;
use crate::warn_limited;

/// Writes the file at an interval. Dropping it removes the file, so that the collector does not take the
/// last figures for those of a running daemon.
pub(super) struct TextfileWriter {
    path: PathBuf,
    /// A file in the same folder, with an ending that the collector ignores.
    draft: PathBuf,
    interval: Duration,
    due: Instant,
}

impl TextfileWriter {
    /// A writer of the file at `path`. The first write is due at once.
    pub fn new(path: PathBuf, interval: Duration) -> Self {
        Self {
            draft: path.with_extension("prom.new"),
            path,
            interval,
            due: Instant::now(),
        }
    }

    /// The time of the next write.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Writes the file if a write is due. A rename makes the change atomic: a reader sees either the old
    /// content or the new one.
    pub fn write_if_due(&mut self, now: Instant, subjects: &Subjects) {
        if now < self.due {
            return;
        }
        // Not `self.due + self.interval`: a daemon that was stopped for long must not catch up.
        self.due = now + self.interval;
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
