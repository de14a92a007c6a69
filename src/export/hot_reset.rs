//! Hot resets: a reset of a whole bus or slot, for devices that cannot be reset alone.
//!
//! A hot reset concerns all functions behind one bridge. So the exported devices of the daemon share a registry: a hot
//! reset is made once none of them that it concerns has a client, when the last one is released. If VFIO refuses it,
//! because a function on the bus belongs to nobody, the devices of groups (type1) are closed and opened again instead.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::reset_thread::{Reset, ResetThread};
use crate::locks::{Mutex, Rank};
use crate::process::keeper::Keeper;
use crate::process::unkept::UnkeptConnection;
use crate::vfio::{BusReset, GroupFile, HostFunction, HotResetScope};
use crate::warn_limited;

/// The exported devices of the daemon, for the hot resets of all of them. Clones share the registry.
#[derive(Clone)]
pub struct HotResetRegistry(Arc<Mutex<ResetRegistry>>);

#[derive(Default)]
struct ResetRegistry {
    devices: BTreeMap<HostFunction, Registered>,
    /// `None` until a device is registered whose bus can be reset, or that can be closed and opened again.
    thread: Option<ResetThread>,
}

/// A registered device, and its relation to its clients.
struct Registered {
    bus: Arc<dyn BusReset>,
    /// The number of its group, and the group; `None` for a device that is bound to an iommufd.
    group: Option<(u32, GroupFile)>,
    /// A client has the device.
    is_used: bool,
    /// A client has had the device since its last reset.
    is_stale: bool,
    /// Another process had the device open when [`RegisteredDevice::take_back`] was called last.
    is_held: bool,
    /// The device has, or may have, the state of a client that has gone.
    leftover: Arc<AtomicBool>,
    /// `None` for a device that ends with this process.
    kept: Option<KeptBusDevice>,
}

/// A device that outlives this process.
struct KeptBusDevice {
    keeper: Arc<Keeper>,
    name: String,
    /// Set while the keeper does not have the device: a client's connection would end with this process.
    unkept: Option<UnkeptConnection>,
}

impl KeptBusDevice {
    /// Has the keeper close the device.
    fn withdraw(&mut self) {
        self.keeper.drop_file(&self.name);
        self.unkept = Some(self.keeper.unkept().count());
    }

    /// Has the keeper keep the device again.
    fn keep_again(&mut self, device: &dyn BusReset) {
        let device = device.duplicate();
        let kept = device.and_then(|device| self.keeper.keep_as(&self.name, device.as_fd()));
        match kept {
            Ok(()) => self.unkept = None,
            Err(cause) => warn_limited!(
                "{} will not survive this daemon, so its device will stop if it restarts: {cause}",
                self.name
            ),
        }
    }
}

impl Registered {
    fn note_reset(&mut self) {
        self.is_stale = false;
        self.leftover.store(false, Ordering::Relaxed);
    }
}

/// A device in the registry, until this is dropped.
pub(super) struct RegisteredDevice {
    registry: HotResetRegistry,
    function: HostFunction,
    /// See [`Registered::leftover`].
    leftover: Arc<AtomicBool>,
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
    /// The device was closed and opened again. VFIO has reset its bus if no process has these functions open, and VFIO
    /// does not say whether it has.
    Reopened(Vec<HostFunction>),
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
    /// The device, or another one on its bus, was closed and cannot be opened again, or not be closed.
    NotReopened(io::Error),
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
            Self::NotReopened(cause) => {
                write!(
                    f,
                    "the devices of its bus cannot be closed and opened again: {cause}"
                )
            }
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
        Self(Arc::new(Mutex::new(
            Rank::HotResets,
            ResetRegistry::default(),
        )))
    }
}

impl HotResetRegistry {
    /// Why no other VMM may be served: a process of a former client has a device open, and could have it read and write
    /// the memory of the next guest. `None` if there is no such process. Waits for a reset in progress.
    pub fn vmm_refusal(&self) -> Option<String> {
        let registry = self.0.lock();
        let held = registry.devices.iter().filter(|(_, device)| device.is_held);
        let held: Vec<_> = held.map(|(function, _)| *function).collect();
        (!held.is_empty()).then(|| {
            format!(
                "a process of a former VMM still has the descriptor of {}; end that process, and connect again",
                Names(&held)
            )
        })
    }

    /// Registers a device without a client.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(super) fn register(
        &self,
        function: HostFunction,
        scope: Option<HotResetScope>,
        bus: Arc<dyn BusReset>,
    ) -> io::Result<RegisteredDevice> {
        let affected = scope.iter().flat_map(|scope| &scope.devices);
        let own_group = affected
            .filter(|affected| affected.function == function)
            .find_map(|affected| affected.group);
        let leftover = Arc::new(AtomicBool::new(false));
        let registered = Registered {
            group: own_group.zip(bus.group()),
            bus,
            is_used: false,
            is_stale: false,
            is_held: false,
            leftover: leftover.clone(),
            kept: None,
        };
        let has_resets = scope.is_some() || registered.bus.group().is_some();
        let mut registry = self.0.lock();
        if has_resets && registry.thread.is_none() {
            registry.thread = Some(ResetThread::start()?);
        }
        registry.devices.insert(function, registered);
        Ok(RegisteredDevice {
            registry: self.clone(),
            function,
            leftover,
            scope,
        })
    }
}

impl RegisteredDevice {
    /// The functions that a hot reset resets, without this one; `None` if there is no hot reset.
    pub(super) fn mates(&self) -> Option<Vec<HostFunction>> {
        let mates = self.scope.as_ref()?.devices.iter().map(|d| d.function);
        Some(mates.filter(|f| *f != self.function).collect())
    }

    /// Whether the device has, or may have, the state of a client that has gone.
    pub(super) fn leftover(&self) -> &Arc<AtomicBool> {
        &self.leftover
    }

    /// The keeper has the device under this name. It closes the device while it is closed for a reset of its bus.
    pub(super) fn keep_with(&self, keeper: Arc<Keeper>, name: String) {
        if let Some(own) = self.registry.0.lock().devices.get_mut(&self.function) {
            own.kept = Some(KeptBusDevice {
                keeper,
                name,
                unkept: None,
            });
        }
    }

    /// A client has the device from now on. Returns whether the device may have the state of another client. Waits for a
    /// reset in progress.
    pub(super) fn take(&self) -> bool {
        let mut registry = self.registry.0.lock();
        let Some(own) = registry.devices.get_mut(&self.function) else {
            return false;
        };
        own.is_used = true;
        std::mem::replace(&mut own.is_stale, true)
    }

    /// The client of the device has gone; `is_reset` says whether the device has been reset alone. Resets all devices
    /// that a hot reset of this one concerns, if one of them needs it and none has a client.
    pub(super) fn release(&self, is_reset: bool) -> Release {
        let mut registry = self.registry.0.lock();
        let ResetRegistry { devices, thread } = &mut *registry;
        let Some(own) = devices.get_mut(&self.function) else {
            return Release::Stale(StaleReason::NoHotReset);
        };
        own.is_used = false;
        if is_reset {
            own.note_reset();
        }
        let is_stale = own.is_stale;
        own.leftover.store(is_stale, Ordering::Relaxed);
        let (scope, thread) = match (&self.scope, thread) {
            (Some(scope), Some(thread)) => (scope, thread),
            _ if is_stale => return Release::Stale(StaleReason::NoHotReset),
            _ => return Release::Reset,
        };
        let outcome = reset_bus(scope, self.function, devices, thread);
        // The other devices of the bus have logged their own state.
        if is_stale { outcome } else { Release::Reset }
    }

    /// Closes the device, whose client has gone, and opens it again. If no other process has it open, VFIO ends all that was
    /// set up through its descriptors: interrupts, DMA buffers, events that write registers. Waits for other processes, for up to
    /// two seconds if it has not waited lately; all exported devices wait meanwhile.
    pub(super) fn take_back(&self) -> Takeback {
        let mut registry = self.registry.0.lock();
        let ResetRegistry { devices, thread } = &mut *registry;
        let own = devices.get(&self.function);
        let can_reopen = own.is_some_and(|own| own.bus.group().is_some());
        let Some(thread) = thread.as_ref().filter(|_| can_reopen) else {
            return Takeback::Impossible;
        };
        let outcome = reopen_bus(devices, &BTreeSet::from([self.function]), thread);
        if let Some(own) = devices.get_mut(&self.function) {
            own.is_held = outcome.is_err();
        }
        match outcome {
            Ok(()) => Takeback::Done,
            Err(cause) => Takeback::Failed(cause),
        }
    }
}

/// Whether a device could be taken back from the processes to which a client may have given it.
#[derive(Debug)]
pub(super) enum Takeback {
    /// This process has closed the device, no other process had it open, and this process has opened it again.
    Done,
    /// Another process has it open, or the device could not be closed or opened.
    Failed(io::Error),
    /// A device without an open group cannot be opened again.
    Impossible,
}

/// Resets the bus of the device `own`, if one of its devices needs it and none has a client.
fn reset_bus(
    scope: &HotResetScope,
    own: HostFunction,
    devices: &mut BTreeMap<HostFunction, Registered>,
    thread: &ResetThread,
) -> Release {
    let functions = || scope.devices.iter().map(|affected| affected.function);
    let is = |function: &HostFunction, is: fn(&Registered) -> bool| {
        devices.get(function).is_some_and(is)
    };
    if !functions().any(|function| is(&function, |d| d.is_stale)) {
        return Release::Reset;
    }
    let used: Vec<_> = functions().filter(|f| is(f, |d| d.is_used)).collect();
    let mut groups: BTreeMap<u32, GroupFile> = BTreeMap::new();
    for (number, group) in devices.values().filter_map(|d| d.group.as_ref()) {
        groups.insert(*number, group.clone());
    }
    // Only this process can open a device of a group that it has open.
    let foreign = scope.devices.iter().filter(|affected| {
        let has_group = affected.group.is_some_and(|g| groups.contains_key(&g));
        !affected.is_unused && !has_group && !devices.contains_key(&affected.function)
    });
    let foreign: Vec<_> = foreign.map(|affected| affected.function).collect();
    let registered = || functions().filter_map(|function| devices.get(&function));
    let can_reopen = registered().all(|device| device.group.is_some());
    if !foreign.is_empty() && !can_reopen {
        return Release::Stale(StaleReason::Foreign(foreign));
    }
    if !used.is_empty() {
        return Release::Waits(used);
    }
    if !foreign.is_empty() {
        let concerned: BTreeSet<_> = functions().collect();
        let outcome = reopen_bus(devices, &concerned, thread);
        return match outcome {
            Ok(()) => Release::Reopened(foreign),
            Err(cause) => Release::Stale(StaleReason::NotReopened(cause)),
        };
    }
    let Some(device) = devices.get(&own) else {
        return Release::Stale(StaleReason::NoHotReset);
    };
    // The kernel takes no more groups than there are devices on the bus.
    groups.retain(|number, _| scope.devices.iter().any(|d| d.group == Some(*number)));
    let device = device.bus.clone();
    if let Err(cause) = thread.make(Reset::Hot(device, groups.into_values().collect())) {
        return Release::Stale(StaleReason::Failed(cause));
    }
    for function in functions() {
        if let Some(device) = devices.get_mut(&function) {
            device.note_reset();
        }
    }
    Release::Reset
}

/// Closes these devices of a bus and opens them again. If this process dies meanwhile, the next one opens them anew.
fn reopen_bus(
    devices: &mut BTreeMap<HostFunction, Registered>,
    bus: &BTreeSet<HostFunction>,
    thread: &ResetThread,
) -> io::Result<()> {
    let on_bus = |(function, device)| bus.contains(function).then_some(device);
    let mut closed: Vec<&mut Registered> = devices.iter_mut().filter_map(on_bus).collect();
    for device in &mut closed {
        if let Some(kept) = &mut device.kept {
            kept.withdraw();
        }
    }
    let resets = closed.iter().map(|device| device.bus.clone()).collect();
    let outcome = thread.make(Reset::Reopen(resets));
    for device in closed {
        if let Some(kept) = &mut device.kept {
            kept.keep_again(&*device.bus);
        }
    }
    outcome
}

impl Drop for RegisteredDevice {
    fn drop(&mut self) {
        self.registry.0.lock().devices.remove(&self.function);
    }
}
