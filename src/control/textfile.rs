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

/// A file that is written anew from time to time; removed when dropped, so that nobody takes the last
/// figures for those of a daemon that runs.
pub(super) struct TextfileWriter {
    path: PathBuf,
    /// Beside it, with an ending that the collector does not read.
    draft: PathBuf,
    interval: Duration,
    due: Instant,
}

impl TextfileWriter {
    /// The file at `path`, due at once.
    pub fn new(path: PathBuf, interval: Duration) -> Self {
        Self {
            draft: path.with_extension("prom.new"),
            path,
            interval,
            due: Instant::now(),
        }
    }

    /// When it is written next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Writes it, if that is due. A reader sees all of it or the one before.
    pub fn write_if_due(&mut self, now: Instant, subjects: &Subjects) {
        if now < self.due {
            return;
        }
        // Not the sum: a daemon that was stopped for long does not catch up.
        self.due = now + self.interval;
        let text = prometheus::render(&Figures::gather(subjects));
        if let Err(cause) = self.write(&text) {
            subjects.clients.unwritten.inc();
            let path = self.path.display();
            warn_limited!(
                "the metrics cannot be written to {path}: {cause}; give the daemon a folder where it may \
                 make files"
            );
        }
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let mut file = File::create(&self.draft)?;
        // Who may enter the folder may read it, whatever the umask is for sockets.
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
