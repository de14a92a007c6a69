//! Hot resets: a reset of a whole bus or slot, for devices that cannot be reset alone.
//!
//! A hot reset concerns all functions behind one bridge. So the exported devices of the daemon share a registry: a hot
//! reset is made once none of them that it concerns has a client, by the one that is released last.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use crate::locks::{Mutex, Rank};
use crate::vfio::{DeviceAccess, HostFunction, HotResetScope};

/// The exported devices of the daemon, for the hot resets of all of them. Clones share the registry.
#[derive(Clone, Debug)]
pub struct HotResetRegistry(Arc<Mutex<BTreeMap<HostFunction, ClientState>>>);

/// The relation of a registered device to its clients.
#[derive(Clone, Copy, Debug, Default)]
struct ClientState {
    /// A client has the device.
    is_used: bool,
    /// A client has had the device since its last reset.
    is_stale: bool,
}

/// A device in the registry, until this is dropped.
#[derive(Debug)]
pub(super) struct RegisteredDevice {
    registry: HotResetRegistry,
    function: HostFunction,
    /// `None` if a hot reset of the device is impossible.
    scope: Option<HotResetScope>,
}

/// What became of a device whose client has gone.
#[derive(Debug)]
pub(super) enum Release {
    /// The device has been reset, alone or with its bus.
    Reset,
    /// The devices of clients that are still there prevent a hot reset.
    Waits(Vec<HostFunction>),
    /// The device keeps the state of its last client.
    Stale(StaleReason),
}

/// Why a device keeps the state of its last client.
#[derive(Debug)]
pub(super) enum StaleReason {
    /// Its bus cannot be reset, or the daemon may not ask for it.
    NoHotReset,
    /// A hot reset would reset devices that are not exported by this daemon.
    Foreign(Vec<HostFunction>),
    /// The kernel has refused the hot reset.
    Failed(io::Error),
}

impl fmt::Display for StaleReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHotReset => f.write_str("it has no reset of its own, and no hot reset"),
            Self::Foreign(others) => write!(
                f,
                "it has no reset of its own, and a hot reset would also reset {}, which this daemon \
                 does not export",
                Names(others)
            ),
            Self::Failed(cause) => write!(f, "the kernel refuses to reset it: {cause}"),
        }
    }
}

/// Functions, as a message names them.
pub(super) struct Names<'a>(pub &'a [HostFunction]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, function) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{function}")?;
        }
        Ok(())
    }
}

impl Default for HotResetRegistry {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Rank::HotResets, BTreeMap::new())))
    }
}

impl HotResetRegistry {
    /// Registers a device without a client.
    pub(super) fn register(
        &self,
        function: HostFunction,
        scope: Option<HotResetScope>,
    ) -> RegisteredDevice {
        self.0.lock().insert(function, ClientState::default());
        RegisteredDevice {
            registry: self.clone(),
            function,
            scope,
        }
    }
}

impl RegisteredDevice {
    /// The functions that a hot reset resets, without this one; `None` if there is no hot reset.
    pub(super) fn mates(&self) -> Option<Vec<HostFunction>> {
        let mates = self.scope.as_ref()?.devices.iter().map(|d| d.function);
        Some(mates.filter(|f| *f != self.function).collect())
    }

    /// A client has the device from now on. Returns whether the device has the state of another client. Waits for a hot
    /// reset in progress.
    pub(super) fn take(&self) -> bool {
        let mut devices = self.registry.0.lock();
        let state = devices.entry(self.function).or_default();
        state.is_used = true;
        let was_stale = state.is_stale;
        state.is_stale = true;
        was_stale
    }

    /// The client of the device has gone; `is_reset` says whether the device has been reset alone. Resets all devices
    /// that a hot reset of this one concerns, if one of them needs it and none has a client.
    pub(super) fn release(&self, device: &dyn DeviceAccess, is_reset: bool) -> Release {
        let mut devices = self.registry.0.lock();
        let own = devices.entry(self.function).or_default();
        own.is_used = false;
        own.is_stale &= !is_reset;
        let is_stale = own.is_stale;
        let scope = match &self.scope {
            Some(scope) => scope,
            None if is_stale => return Release::Stale(StaleReason::NoHotReset),
            None => return Release::Reset,
        };
        let state_of = |function| devices.get(&function).copied();
        let concerned = || scope.devices.iter().map(|d| (d, state_of(d.function)));
        if !concerned().any(|(_, state)| state.is_some_and(|state| state.is_stale)) {
            return Release::Reset;
        }
        let foreign = concerned().filter(|(d, state)| state.is_none() && !d.is_unused);
        let foreign: Vec<_> = foreign.map(|(d, _)| d.function).collect();
        let used = concerned().filter(|(_, state)| state.is_some_and(|state| state.is_used));
        let used: Vec<_> = used.map(|(d, _)| d.function).collect();
        let outcome = if !foreign.is_empty() {
            Release::Stale(StaleReason::Foreign(foreign))
        } else if !used.is_empty() {
            Release::Waits(used)
        } else {
            match device.hot_reset() {
                Ok(()) => {
                    for affected in &scope.devices {
                        if let Some(state) = devices.get_mut(&affected.function) {
                            state.is_stale = false;
                        }
                    }
                    Release::Reset
                }
                Err(cause) => Release::Stale(StaleReason::Failed(cause)),
            }
        };
        // The other devices of the bus have logged their own state.
        if is_stale { outcome } else { Release::Reset }
    }
}

impl Drop for RegisteredDevice {
    fn drop(&mut self) {
        self.registry.0.lock().remove(&self.function);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The behaviour with clients is tested in `tests/export/resets.rs`, through the server.

    #[test]
    fn a_removed_device_is_foreign_again() {
        let registry = HotResetRegistry::default();
        let function = HostFunction {
            domain: 0,
            bus: 0x65,
            devfn: 0,
        };
        let registered = registry.register(function, None);
        assert!(!registered.take());
        assert!(registered.take(), "another client has had it");
        drop(registered);
        assert!(registry.0.lock().is_empty());
    }
}
