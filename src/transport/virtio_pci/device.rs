//! The PCI device as the vfio-user server needs it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_queue::Error as QueueError;

use super::config_space::{PciSpace, SPACE_BYTES};
use super::interrupts::PciInterrupts;
use super::layout::{
    REGISTERS_BAR, REGISTERS_BYTES, Structure, TRAPPED_BAR, TRAPPED_BYTES, VECTORS,
};
use super::memory::ClientMemory;
use super::record::RecordedChanges;
use super::registers::{Consequence, Registers};
use super::ring::PciRing;
use super::trapped_bar::TrappedBar;
use super::worker::RingWorker;
use crate::device::{Device, QUEUES};
use crate::process::keeper::Keeper;
use crate::process::peer_event::PeerEvent;
use crate::vfio_user::message::{
    DEVICE_PCI, DEVICE_RESET, DmaMapBody, DmaUnmapBody, IRQ_INFO_EVENTFD, REGION_READ, REGION_WRITE,
};
use crate::vfio_user::server::{
    ClientEvent, ClientFiles, DescriptorKeeping, DeviceRecord, DeviceSummary, IrqAction, IrqKind,
    IrqSet, IrqSetData, ServedDevice, ServedRegion,
};
use crate::vfio_user::version::{Capabilities, Version};
use crate::{error_limited, warn_limited};

/// `VFIO_PCI_CONFIG_REGION_INDEX`: the configuration space, after six BARs and the ROM.
pub(super) const CONFIG_REGION: u32 = 7;
/// `VFIO_PCI_NUM_REGIONS`.
const REGIONS: u32 = 9;
/// `VFIO_PCI_MSIX_IRQ_INDEX`, after INTx and MSI.
pub(super) const MSIX_IRQS: u32 = 2;
/// `VFIO_PCI_NUM_IRQS`: also ERR and REQ.
const IRQ_KINDS: u32 = 5;
/// The maximum number of descriptors that the client may send with one message.
const MAX_FDS: u64 = 16;

/// Called with `true` when a VMM has connected, and with `false` when it has gone.
pub(super) type VmmPresence = Box<dyn Fn(bool) + Send>;

/// Restores the core from what an earlier process has left.
pub(super) type RestoreCore = Box<dyn FnOnce() + Send>;

/// The device that one client drives.
pub(super) struct VirtioPciDevice {
    pub(super) device: Arc<Device>,
    pub(super) registers: Registers,
    pub(super) space: PciSpace,
    pub(super) interrupts: Arc<PciInterrupts>,
    pub(super) memory: ClientMemory,
    pub(super) trapped: Option<Box<dyn TrappedBar>>,
    /// `None` only until [`Self::set_worker`].
    pub(super) worker: Option<RingWorker>,
    pub(super) regions: [ServedRegion; REGIONS as usize],
    pub(super) vmm_present: VmmPresence,
    pub(super) is_connected: bool,
    /// The driver has kicked the request queue, and the worker does not know yet.
    pub(super) kicked: bool,
    pub(super) keeping: DescriptorKeeping,
    /// Restores the core, when the device resumes.
    pub(super) restore: Option<RestoreCore>,
    pub(super) changes: RecordedChanges,
}

impl VirtioPciDevice {
    /// The device, to which no client is connected.
    ///
    /// # Errors
    /// See [`Registers::new`].
    pub(super) fn new(
        device: Arc<Device>,
        trapped: Option<Box<dyn TrappedBar>>,
        vmm_present: VmmPresence,
    ) -> Result<Self, QueueError> {
        let registers = Registers::new(device.clone())?;
        Ok(Self {
            interrupts: registers.interrupts().clone(),
            regions: std::array::from_fn(|index| region(index, trapped.is_some())),
            space: PciSpace::new(trapped.is_some()),
            memory: ClientMemory::default(),
            worker: None,
            is_connected: false,
            kicked: false,
            device,
            registers,
            trapped,
            vmm_present,
            keeping: DescriptorKeeping::default(),
            restore: None,
            changes: RecordedChanges::default(),
        })
    }

    /// Has `keeper` keep the client's descriptors for a later process. If an earlier process has left a client, `restore`
    /// restores the core when the device has that client's memory.
    pub(super) fn kept_with(&mut self, keeper: Arc<Keeper>, restore: Option<RestoreCore>) {
        self.keeping = DescriptorKeeping::new(keeper);
        self.restore = restore;
    }

    /// The rings that the worker must serve.
    pub(super) fn rings(&self) -> [PciRing; QUEUES] {
        self.registers.rings().clone()
    }

    /// The worker that serves [`Self::rings`].
    pub(super) fn set_worker(&mut self, worker: RingWorker) {
        self.worker = Some(worker);
    }

    pub(super) fn trapped_bar(&self) -> Option<&dyn TrappedBar> {
        self.trapped.as_deref().map(|bar| bar as &dyn TrappedBar)
    }

    fn read_bar(&mut self, index: u32, offset: u64, into: &mut [u8]) {
        into.fill(0);
        match (index, &mut self.trapped) {
            (REGISTERS_BAR, _) => {
                let generation = self.registers.generation;
                self.registers.read(offset, into);
                self.changes.any |= generation != self.registers.generation;
            }
            (TRAPPED_BAR, Some(trapped)) => {
                self.changes.any = true;
                trapped.read(offset, into, self.memory.read_only());
            }
            _ => {}
        }
    }

    fn write_bar(&mut self, index: u32, offset: u64, data: &[u8]) {
        match (index, &mut self.trapped) {
            (REGISTERS_BAR, trapped) => {
                let Consequence { kicked, started } = self.registers.write(offset, data);
                if started {
                    if let Some(trapped) = trapped {
                        trapped.driver_started();
                    }
                    self.wake_worker();
                }
                self.kicked |= kicked;
                self.changes.any |= !is_notification(offset, data.len());
            }
            (TRAPPED_BAR, Some(trapped)) => {
                self.changes.any = true;
                trapped.write(offset, data);
            }
            _ => {}
        }
    }

    fn read_space(&mut self, offset: u64, into: &mut [u8]) {
        if let Some(access) = self.space.window_access(offset, into.len()) {
            let mut data = [0; 4];
            self.changes.any = true;
            if let Some(data) = data.get_mut(..access.len) {
                self.read_bar(access.bar, access.offset, data);
                self.space.set_window_data(data);
            }
        }
        self.space.set_interrupt_status(self.interrupts.has_isr());
        self.space.read(offset, into);
    }

    fn write_space(&mut self, offset: u64, data: &[u8]) {
        self.changes.any = true;
        self.space.write(offset, data);
        self.interrupts.set_uses_msix(self.space.uses_msix());
        if self.registers.set_bus_master(self.space.is_bus_master()) {
            self.wake_worker();
        }
        if let Some(access) = self.space.window_access(offset, data.len()) {
            let data = self.space.window_data();
            self.write_bar(
                access.bar,
                access.offset,
                data.get(..access.len).unwrap_or_default(),
            );
        }
    }

    /// The driver has started the device: there may be requests already, for which it does not kick.
    pub(super) fn wake_worker(&self) {
        if let Err(cause) = self.device.wake_worker() {
            error_limited!("cannot wake the worker: {cause}");
        }
    }

    fn restart_trapped_bar(&mut self) {
        if let Some(trapped) = &mut self.trapped {
            trapped.restart();
        }
    }
}

impl ServedDevice for VirtioPciDevice {
    fn name(&self) -> &str {
        "the VMM"
    }

    fn negotiate(&mut self, _client: &Version, answer: &mut Capabilities) -> Result<(), String> {
        if let Some(reason) = self.device.vmm_refusal() {
            return Err(reason);
        }
        answer.max_msg_fds = Some(MAX_FDS);
        self.changes.any = true;
        self.is_connected = true;
        self.device.prepare();
        self.device.connect();
        // A client connects when it makes this device, after the devices before it.
        self.device.announce_vmm();
        self.restart_trapped_bar();
        (self.vmm_present)(true);
        Ok(())
    }

    fn info(&self) -> DeviceSummary {
        DeviceSummary {
            flags: DEVICE_PCI | DEVICE_RESET,
            regions: REGIONS,
            irqs: IRQ_KINDS,
        }
    }

    fn region(&self, index: u32) -> Option<&ServedRegion> {
        self.regions.get(index as usize)
    }

    fn irq(&self, index: u32) -> Option<IrqKind> {
        match index {
            MSIX_IRQS => Some(IrqKind {
                flags: IRQ_INFO_EVENTFD,
                count: VECTORS.into(),
            }),
            0..IRQ_KINDS => Some(IrqKind::default()),
            _ => None,
        }
    }

    fn set_irqs(&mut self, set: IrqSet<'_>) -> Result<(), i32> {
        if set.index != MSIX_IRQS {
            // There is nothing to disable.
            return match set.data {
                IrqSetData::Disable => Ok(()),
                IrqSetData::All(_) | IrqSetData::Chosen(_) | IrqSetData::Eventfds(_) => {
                    Err(libc::EINVAL)
                }
            };
        }
        self.changes.any = true;
        let first = set.start as usize;
        let action = set.action;
        let act = |vector| match action {
            IrqAction::Mask => self.interrupts.mask(vector, true),
            IrqAction::Unmask => self.interrupts.mask(vector, false),
            IrqAction::Trigger => self.interrupts.trigger(vector),
        };
        match set.data {
            IrqSetData::Disable => self.interrupts.disable(),
            IrqSetData::All(count) => (first..first + count as usize).for_each(act),
            IrqSetData::Chosen(chosen) => {
                let wanted = chosen.iter().zip(first..).filter(|(on, _)| **on != 0);
                wanted.for_each(|(_, vector)| act(vector));
            }
            IrqSetData::Eventfds(events) if action == IrqAction::Trigger => {
                let keeping = &self.keeping;
                let keep =
                    |event: Option<PeerEvent>| event.map(|event| ClientEvent::new(event, keeping));
                let events = events.into_iter().map(keep).collect();
                self.interrupts.set_events(first, events);
            }
            // An eventfd that masks or unmasks serves interrupts with a level, of which there are none.
            IrqSetData::Eventfds(_) => return Err(libc::EINVAL),
        }
        Ok(())
    }

    fn read_region(&mut self, index: u32, offset: u64, into: &mut [u8]) -> Result<usize, i32> {
        match index {
            CONFIG_REGION => self.read_space(offset, into),
            _ => self.read_bar(index, offset, into),
        }
        Ok(into.len())
    }

    fn write_region(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<usize, i32> {
        match index {
            CONFIG_REGION => self.write_space(offset, data),
            _ => self.write_bar(index, offset, data),
        }
        Ok(data.len())
    }

    fn answers_all_accesses(&self) -> bool {
        true
    }

    /// Wakes the worker after the reply: a processor of the guest waits for it.
    fn replied(&mut self) {
        if std::mem::take(&mut self.kicked)
            && let Some(worker) = &self.worker
        {
            worker.kick();
        }
    }

    fn reset(&mut self) -> Result<(), i32> {
        self.changes.any = true;
        self.registers.reset_with_vm();
        self.space = PciSpace::new(self.trapped.is_some());
        self.interrupts.set_uses_msix(false);
        self.restart_trapped_bar();
        Ok(())
    }

    fn dma_map(&mut self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32> {
        self.changes.any = true;
        let keeping = &self.keeping;
        let done = self.memory.map(&self.device, window, file, keeping);
        if let Err(errno) = done {
            self.device.metrics().windows_refused.inc();
            let cause = io::Error::from_raw_os_error(errno);
            let (address, size) = (window.address.get(), window.size.get());
            warn_limited!("DMA_MAP of {size:#x} bytes at {address:#x} is refused: {cause}");
        }
        done
    }

    fn dma_unmap(&mut self, window: &DmaUnmapBody) -> Result<(), i32> {
        self.changes.any = true;
        self.memory.unmap(&self.device, window)
    }

    fn take_record(&mut self) -> Option<DeviceRecord> {
        self.record_changes()
    }

    fn resume(&mut self, record: &[u8], files: &ClientFiles) -> io::Result<()> {
        self.resume_client(record, files)
    }

    fn go_on(&mut self) {
        if self.registers.go_on() {
            self.wake_worker();
        }
        self.interrupts.send();
    }

    fn release(&mut self) {
        if !std::mem::take(&mut self.is_connected) {
            return;
        }
        (self.vmm_present)(false);
        self.registers.stop_rings();
        self.device.stop();
        // The worker need not have left its loop: it finds neither memory nor a running ring.
        self.device.disconnect();
        self.registers.release();
        self.memory = ClientMemory::default();
        self.space = PciSpace::new(self.trapped.is_some());
        self.restart_trapped_bar();
    }
}

/// Whether an access is to the notification structure alone, and so changes no register.
fn is_notification(offset: u64, len: usize) -> bool {
    Structure::parts(offset, len).all(|(structure, ..)| structure == Structure::Notify)
}

fn region(index: usize, has_trapped_bar: bool) -> ServedRegion {
    let size = match u32::try_from(index) {
        Ok(REGISTERS_BAR) => REGISTERS_BYTES,
        Ok(TRAPPED_BAR) if has_trapped_bar => TRAPPED_BYTES,
        Ok(CONFIG_REGION) => SPACE_BYTES as u64,
        Ok(_) | Err(_) => return ServedRegion::default(),
    };
    ServedRegion {
        flags: REGION_READ | REGION_WRITE,
        size,
        capabilities: Vec::new(),
    }
}
