//! What other parts of the daemon learn of the VMM's connection.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use std::sync::atomic::Ordering;

use super::Device;

/// Wants to know of the VMM's connection, because the VMM's process has something for it.
pub trait VmmWatcher: Send + Sync {
    /// A VMM has connected, and is at the other end of `socket`; or the daemon goes on with a VMM that an earlier one has
    /// served.
    fn connected(&self, socket: BorrowedFd<'_>);

    /// The guest's driver is about to start, for the first time since the VMM has connected. The VMM has made its devices,
    /// and waits for the end of this call, which must have a limit.
    fn driver_starts(&self);
}

impl Device {
    /// Tells `watcher` of the VMM's connections from now on. Only the first call has an effect.
    pub fn watch_vmm(&self, watcher: Arc<dyn VmmWatcher>) {
        // Fails if there is one.
        let _ = self.watcher.set(watcher);
    }

    /// Whether anybody wants to know the VMM's connection.
    pub fn has_watcher(&self) -> bool {
        self.watcher.get().is_some()
    }

    /// A VMM is at the other end of `socket`.
    pub fn tell_connection(&self, socket: BorrowedFd<'_>) {
        if let Some(watcher) = self.watcher.get() {
            watcher.connected(socket);
        }
    }

    /// Tells the core that the VMM has made its devices. The VMM counts as present from its first message; only the
    /// first call after a connection has an effect.
    pub fn announce_vmm(&self) {
        if !self.announced.swap(true, Ordering::Relaxed) {
            self.iommu.lock().connect();
        }
    }

    /// The driver of this VMM is about to start.
    pub(super) fn tell_driver_start(&self) {
        if let Some(watcher) = self.watcher.get() {
            watcher.driver_starts();
        }
    }
}
