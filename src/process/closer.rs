//! Closes descriptors that another process has chosen, in a thread for which nobody waits.
//!
//! The kernel may wait in `close` for as long as the file likes: a FUSE file asks its server, and a TCP socket may linger.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use crate::process::sandbox::{self, Role};

/// The most descriptors that wait for the thread.
const WAITING: usize = 256;

/// The way to the thread, which ends with it.
#[derive(Debug)]
pub struct Closer(SyncSender<Arc<OwnedFd>>);

impl Closer {
    /// Starts the thread. Nobody joins it: it may wait for ever.
    ///
    /// # Errors
    /// The system has no thread left, or the thread cannot be confined.
    pub fn start() -> io::Result<Self> {
        let (sender, files) = sync_channel::<Arc<OwnedFd>>(WAITING);
        sandbox::spawn(Role::Closer, move || files.iter().for_each(drop))?;
        Ok(Self(sender))
    }

    /// Closes a descriptor in the thread. If too many wait for the thread, closes it here: the process that has chosen them
    /// must not make this one run out of descriptors.
    pub fn close(&self, file: Arc<OwnedFd>) {
        match self.0.try_send(file) {
            Ok(()) => {}
            Err(TrySendError::Full(file) | TrySendError::Disconnected(file)) => drop(file),
        }
    }
}
