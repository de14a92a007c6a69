//! The open files of devices that the VMM brings: they come from its process through the helper (`crate::adopt`), are kept
//! for the next daemon, and go with the VMM.
//!
//! The thread `vmm-devices` talks to the helper. A thread that wants the files waits for it, for a bounded time:
//!
//! 1. When the guest's driver is about to start, the thread that handles the VMM's messages waits: the VMM has made its
//!    devices by then. It holds no lock.
//! 2. When the driver attaches a device that has not come, the worker waits, up to its budget. That device was plugged in
//!    since.
//!
//! What comes is open only when the backend accepts it, which moves each device to its target in the same step. The waiting
//! thread has it do so. What comes later than its waiter likes is taken all the same: the thread `vmm-devices` then has the
//! core accept it. What comes for a VMM that has gone meanwhile is closed.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use log::info;

use super::kept;
use crate::adopt::MAX_DEVICES;
use crate::adopt::message::{FoundFiles, ask};
use crate::device::VmmWatcher;
use crate::iommu::Iommu;
use crate::locks::{Mutex, Rank};
use crate::metrics::AdoptionCounters;
use crate::process::connector;
use crate::process::inherited::is_same_file;
use crate::process::keeper::Keeper;
use crate::process::rate_limit::RateLimit;
use crate::process::sandbox::{self, Role};
use crate::process::wait_budget::WaitBudget;
use crate::topology::{HostAddress, PciAddress};
use crate::vfio::{Attach, Cdev, IommuFd, VmmCdev, VmmFiles, VmmIommufd};
use crate::{info_limited, warn_limited};

/// How long a driver's start waits for the helper. systemd starts the helper for each request.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// The same for ATTACH, as long as the budget is unused.
const ATTACH_PATIENCE: Duration = Duration::from_secs(1);
/// How long the thread waits for the core before it looks at its orders: whoever holds the core may wait for an order.
const CORE_PATIENCE: Duration = Duration::from_millis(10);
/// How long it waits for orders before it tries again.
const PAUSE: Duration = Duration::from_millis(10);
/// How long the thread waits for the helper: as long as systemd lets it live.
const HELPER_PATIENCE: Duration = Duration::from_secs(10);
/// So many requests to the helper may follow each other at once. A VM with 1024 devices needs them to start.
const BURST: u32 = 16;
/// After that, one is allowed in this time: the guest decides when it attaches a device that is not there, and each request
/// starts a process with rights.
const REFILL: Duration = Duration::from_secs(1);
/// The most orders that wait for the thread.
const WAITING: usize = 16;

/// A device of the VMM.
#[derive(Clone, Debug)]
pub(super) struct VmmDeviceFile {
    pub endpoint: PciAddress,
    pub host: HostAddress,
    pub cdev: VmmCdev,
}

/// The devices of the VMM, and the way to their files.
#[derive(Debug)]
pub struct VmmDevices {
    helper: PathBuf,
    iommufd: VmmIommufd,
    devices: Vec<VmmDeviceFile>,
    keeper: Arc<Keeper>,
    state: Mutex<FilesState>,
    orders: OnceLock<SyncSender<Order>>,
    counters: Arc<AdoptionCounters>,
}

#[derive(Debug)]
struct FilesState {
    /// The VMM's end of this connection is the process that has the files.
    vmm: Option<Arc<OwnedFd>>,
    /// The iommufd of the VMM, to compare a later one with.
    iommufd: Option<OwnedFd>,
    arrived: Arrived,
    budget: WaitBudget,
    /// Limits the requests to the helper.
    rate: RateLimit,
    /// The files of this VMM were asked for when its driver started. Its memory may come in many messages.
    has_started: bool,
}

/// Files that have come, and that nobody has accepted yet.
#[derive(Debug, Default)]
struct Arrived {
    iommufd: Option<IommuFd>,
    devices: BTreeMap<HostAddress, Cdev>,
}

/// Something for the thread to do.
#[derive(Debug)]
enum Order {
    /// Get the missing files of this VMM, and then send the answer.
    Fetch {
        vmm: Arc<OwnedFd>,
        answer: SyncSender<()>,
    },
    /// Close these files, which may take seconds: the kernel resets a device.
    Close(Vec<Cdev>, Option<OwnedFd>, Option<Arc<IommuFd>>),
}

impl VmmDevices {
    /// The devices, with those files that the process before has left. `iommufd` is a second descriptor of its iommufd.
    pub(super) fn new(
        helper: PathBuf,
        iommufd: VmmIommufd,
        left: Option<OwnedFd>,
        devices: Vec<VmmDeviceFile>,
        keeper: Arc<Keeper>,
    ) -> Self {
        let state = FilesState {
            vmm: None,
            iommufd: left,
            arrived: Arrived::default(),
            budget: WaitBudget::new(ATTACH_PATIENCE, Instant::now()),
            rate: RateLimit::new(BURST, REFILL),
            has_started: false,
        };
        Self {
            helper,
            iommufd,
            devices,
            keeper,
            state: Mutex::new(Rank::VmmDevices, state),
            orders: OnceLock::new(),
            counters: Arc::default(),
        }
    }

    /// The counters.
    pub fn counters(&self) -> &Arc<AdoptionCounters> {
        &self.counters
    }

    /// Starts the thread. It has `core` accept what nobody has waited for.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(self: &Arc<Self>, core: Arc<Mutex<Iommu>>) -> io::Result<()> {
        self.start_with(move || {
            let Some(mut core) = core.lock_within(CORE_PATIENCE) else {
                return false;
            };
            // The backend must have taken over its devices before.
            let is_ready = !core.is_adopting();
            if is_ready {
                core.files_came();
            }
            is_ready
        })
    }

    /// As [`Self::start`], with a function that has the core accept what has come, and returns whether it could.
    pub(super) fn start_with(
        self: &Arc<Self>,
        accept: impl Fn() -> bool + Send + 'static,
    ) -> io::Result<()> {
        let (orders, ordered) = sync_channel(WAITING);
        let devices = self.clone();
        sandbox::spawn(Role::VmmDevices, move || devices.run(&ordered, &accept))?;
        // Fails if it runs already.
        let _ = self.orders.set(orders);
        Ok(())
    }

    /// The device of an endpoint.
    pub(in super::super) fn cdev(&self, endpoint: PciAddress) -> Option<VmmCdev> {
        let mut devices = self.devices.iter();
        let device = devices.find(|device| device.endpoint == endpoint)?;
        Some(device.cdev.clone())
    }

    fn missing(&self) -> Vec<HostAddress> {
        let state = self.state.lock();
        self.missing_in(&state)
    }

    fn missing_in(&self, state: &FilesState) -> Vec<HostAddress> {
        let has_come = |device: &VmmDeviceFile| state.arrived.devices.contains_key(&device.host);
        let devices = self.devices.iter();
        let missing = devices
            .filter(|device| !device.cdev.is_open() && !device.cdev.has_ended())
            .filter(|device| !has_come(device));
        missing.map(|device| device.host).collect()
    }

    /// Has the thread get what is missing, and waits until `deadline`.
    fn order_files(&self, vmm: Arc<OwnedFd>, deadline: Instant) {
        let Some(orders) = self.orders.get() else {
            return;
        };
        let (answer, answered) = sync_channel(1);
        let order = Order::Fetch { vmm, answer };
        if orders.try_send(order).is_ok() {
            let left = deadline.saturating_duration_since(Instant::now());
            self.counters.waits.inc();
            // What comes later is taken, and accepted, too.
            if answered.recv_timeout(left).is_err() {
                self.counters.late.inc();
            }
        }
    }

    /// Has the thread carry out an [`Order::Close`].
    fn close(&self, order: Order) {
        if let Some(orders) = self.orders.get() {
            // If the thread is busy, the files are closed here.
            drop(orders.try_send(order));
        }
    }

    fn run(&self, ordered: &Receiver<Order>, accept: &dyn Fn() -> bool) {
        // Files may have come that the core has not accepted.
        let mut is_pending = false;
        loop {
            let order = if is_pending {
                ordered.recv_timeout(PAUSE)
            } else {
                ordered.recv().map_err(RecvTimeoutError::from)
            };
            match order {
                Ok(Order::Fetch { vmm, answer }) => {
                    self.get(&vmm);
                    // Nobody may wait any more.
                    let _ = answer.try_send(());
                    is_pending = true;
                }
                Ok(Order::Close(devices, ours, iommufd)) => {
                    // The devices first: they keep their address spaces.
                    drop(devices);
                    drop((ours, iommufd));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // Not only if something is left: an ATTACH that fails accepts what has come for other endpoints, too.
            is_pending = is_pending && !accept();
        }
    }

    /// Gets the missing files, a part with each request, and says what is missing still.
    fn get(&self, vmm: &Arc<OwnedFd>) {
        let missing = self.missing();
        if missing.is_empty() {
            return;
        }
        let deadline = Instant::now() + HELPER_PATIENCE;
        let mut parts = missing.chunks(MAX_DEVICES);
        let taken = parts.try_for_each(|part| {
            let found = self.ask_for(vmm, part, deadline)?;
            self.take(vmm, found)
        });
        let missing = self.missing();
        if missing.is_empty() {
            return;
        }
        let missing: Vec<_> = missing.iter().map(ToString::to_string).collect();
        let names = missing.join(", ");
        match taken {
            Ok(()) => info_limited!(
                "the VMM has not bound {names} to its iommufd yet; the guest's next ATTACH of an endpoint without its device asks \
                 again"
            ),
            Err(cause) => warn_limited!(
                "{names} cannot be taken over from the VMM, so the VMM decides about their DMA, and ATTACH fails: {cause}"
            ),
        }
    }

    /// Asks the helper for up to [`MAX_DEVICES`] devices.
    fn ask_for(
        &self,
        vmm: &OwnedFd,
        devices: &[HostAddress],
        deadline: Instant,
    ) -> Result<FoundFiles, String> {
        let allowed = self.state.lock().rate.take(Instant::now());
        allowed.map_err(|wait| {
            self.counters.limited.inc();
            format!(
                "the helper was asked {BURST} times without a pause, and is asked again in {} ms; attach only devices that the VMM has",
                wait.as_millis()
            )
        })?;
        self.counters.requests.inc();
        let answer = connector::connect(&self.helper)
            .map_err(|cause| missing_helper(&self.helper, cause))
            .and_then(|helper| {
                ask(&UnixStream::from(helper), vmm.as_fd(), devices, deadline)
                    .map_err(|cause| format!("the helper at {}: {cause}", self.helper.display()))
            });
        answer.inspect_err(|_| self.counters.refused.inc())
    }

    /// Opens what has arrived. Returns the devices that are of no use any more.
    fn open_arrived(&self, state: &mut FilesState) -> Vec<Cdev> {
        let Arrived {
            iommufd,
            devices: mut arrived,
        } = std::mem::take(&mut state.arrived);
        if let Some(iommufd) = iommufd {
            self.iommufd.set(Some(iommufd));
        }
        let useless = self.devices.iter().filter_map(|device| {
            let cdev = arrived.remove(&device.host)?;
            device.cdev.open(cdev)
        });
        useless.collect()
    }

    /// Takes files that have come, unless the VMM has gone meanwhile.
    fn take(&self, vmm: &Arc<OwnedFd>, found: FoundFiles) -> Result<(), String> {
        let mut state = self.state.lock();
        if !state.vmm.as_ref().is_some_and(|now| Arc::ptr_eq(now, vmm)) {
            return Ok(());
        }
        let (Some(file), false) = (found.iommufd, found.devices.is_empty()) else {
            return Ok(());
        };
        let unusable = |cause: io::Error| {
            format!("its descriptors cannot be used: {cause}; see the kernel's log")
        };
        match &state.iommufd {
            Some(known) if is_same_file(known.as_fd(), file.as_fd()) == Some(false) => {
                return Err(
                    "the VMM has another open /dev/iommu than before; give all its devices one (for QEMU, one `-object iommufd`)"
                        .into(),
                );
            }
            Some(_) => {}
            None => {
                let iommufd = file
                    .try_clone()
                    .and_then(IommuFd::adopt)
                    .map_err(unusable)?;
                kept::keep(&self.keeper, kept::IOMMUFD, file.as_fd());
                state.arrived.iommufd = Some(iommufd);
                state.iommufd = Some(file);
            }
        }
        let missing = self.missing_in(&state);
        for (host, file) in found.devices {
            let mut devices = self.devices.iter();
            let Some(device) = devices.find(|device| device.host == host) else {
                continue;
            };
            if !missing.contains(&host) {
                continue;
            }
            let file = super::iommufd::check_kind(file).map_err(unusable)?;
            let cdev = Cdev::adopt(file);
            if !cdev.is_bound() {
                continue;
            }
            let name = kept::device_name(host);
            kept::keep(&self.keeper, &name, cdev.as_fd());
            // Its endpoint is removed, perhaps since the name was dropped.
            if device.cdev.has_ended() {
                self.keeper.drop_file(&name);
                continue;
            }
            state.arrived.devices.insert(host, cdev);
            self.counters.taken.inc();
            info!(
                "endpoint {}: {host} is taken over from the VMM",
                device.endpoint
            );
        }
        Ok(())
    }
}

/// The message that no helper answers at `path`, with the cure.
pub(super) fn missing_helper(path: &Path, cause: impl fmt::Display) -> String {
    let path = path.display();
    format!(
        "no helper answers at {path}: {cause}; start one with `systemctl start vhost-device-iommu-adopt@NAME.socket`, or as root \
         with `vhost-device-iommu adopt --config FILE --socket-path {path}`, then restart the daemon if it is a service, before the \
         VM starts"
    )
}

impl VmmWatcher for VmmDevices {
    fn connected(&self, socket: BorrowedFd<'_>) {
        match socket.try_clone_to_owned() {
            Ok(socket) => {
                let mut state = self.state.lock();
                state.vmm = Some(Arc::new(socket));
                state.has_started = false;
            }
            Err(cause) => warn_limited!("the VMM's devices cannot be taken over: {cause}"),
        }
    }

    fn driver_starts(&self) {
        let vmm = {
            let mut state = self.state.lock();
            let is_first = !std::mem::replace(&mut state.has_started, true);
            state.vmm.clone().filter(|_| is_first)
        };
        if let Some(vmm) = vmm.filter(|_| !self.missing().is_empty()) {
            self.order_files(vmm, Instant::now() + START_PATIENCE);
        }
    }
}

/// The files as a backend sees them.
#[derive(Clone, Debug)]
pub(super) struct FilesOfVmm(pub Arc<VmmDevices>);

impl VmmFiles for FilesOfVmm {
    fn is_open(&self) -> bool {
        self.0.iommufd.file().is_some()
    }

    fn fetch(&self) {
        let devices = &self.0;
        if devices.missing().is_empty() {
            return;
        }
        let (vmm, wait) = {
            let mut state = devices.state.lock();
            let Some(vmm) = state.vmm.clone() else {
                return;
            };
            (vmm, state.budget.allow(ATTACH_PATIENCE, Instant::now()))
        };
        devices.order_files(vmm, wait.until);
        devices.state.lock().budget.charge(&wait, Instant::now());
    }

    fn accept(&self) {
        let devices = &self.0;
        let useless = devices.open_arrived(&mut devices.state.lock());
        if !useless.is_empty() {
            devices.close(Order::Close(useless, None, None));
        }
    }

    fn release(&self) {
        let devices = &self.0;
        let mut state = devices.state.lock();
        // Nothing arrives after that.
        state.vmm = None;
        let useless = devices.open_arrived(&mut state);
        let ours = state.iommufd.take();
        let taken = devices.devices.iter().filter_map(|device| {
            let cdev = device.cdev.give_up()?;
            // However often it was claimed.
            devices.keeper.drop_file(&kept::device_name(device.host));
            Some(cdev)
        });
        let taken: Vec<_> = taken.chain(useless).collect();
        let iommufd = devices.iommufd.set(None);
        if ours.is_none() && taken.is_empty() {
            return;
        }
        devices.keeper.drop_file(kept::IOMMUFD);
        drop(state);
        info!("the VMM has gone: its devices are given up");
        devices.close(Order::Close(taken, ours, iommufd));
    }
}
