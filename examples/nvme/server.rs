//! The controller as the library's vfio-user server needs it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
};
use vhost_device_iommu::process::event_loop::EventLoop;
use vhost_device_iommu::vfio_user::message::{
    DEVICE_PCI, DEVICE_RESET, DmaMapBody, DmaUnmapBody, Header, IRQ_INFO_EVENTFD, MAX_DATA,
    REGION_READ, REGION_WRITE,
};
use vhost_device_iommu::vfio_user::server::{
    ClientChannel, ClientError, DeviceSummary, IrqAction, IrqKind, IrqSet, IrqSetData,
    ServedDevice, ServedRegion, ServerSignal, serve_client,
};
use vhost_device_iommu::vfio_user::version::{Capabilities, Version};

use crate::controller::Controller;
use crate::disk::Disk;
use crate::memory::{MAX_WINDOWS, Manner, Memory, Messages, Outbound};
use crate::pci::{BAR_BYTES, CONFIG_BYTES, ConfigSpace, VECTORS};
use crate::test_access::TestAccess;

/// The state that all clients share, one after the other.
pub struct Setup {
    /// The disk.
    pub disk: Arc<Disk>,
    /// How the controller reaches guest memory.
    pub manner: Manner,
    /// Gets the guest memory of the connected client.
    pub test_access: Arc<TestAccess>,
}

/// Serves a client until it hangs up.
///
/// # Errors
/// The client is cut off, or the controller's worker cannot be started.
pub fn serve(stream: UnixStream, setup: &Setup) -> Result<(), ClientError> {
    let mut events = EventLoop::new()?;
    let channel = ClientChannel::new(stream, Arc::new(ServerSignal::new()?));
    let channel = Arc::new(channel);
    let messages = Arc::new(Messages::new(Box::new(channel.clone())));
    let memory = setup.manner.memory(&messages);
    let controller = Controller::start(setup.disk.clone(), memory.clone())?;
    setup.test_access.set_memory(Some(memory.clone()));
    let mut device = NvmeDevice {
        messages: messages.clone(),
        memory,
        controller,
        config: ConfigSpace::new(),
        regions: std::array::from_fn(region),
    };
    let outcome = serve_client(&mut events, &channel, &mut device);
    setup.test_access.set_memory(None);
    device.release();
    outcome.map(drop)
}

impl Outbound for Arc<ClientChannel> {
    fn send(&self, message: Vec<u8>) {
        ClientChannel::send(self, message);
    }
}

/// The controller as a PCI device that one client drives.
struct NvmeDevice {
    messages: Arc<Messages>,
    memory: Arc<dyn Memory>,
    controller: Controller,
    config: ConfigSpace,
    regions: [ServedRegion; VFIO_PCI_NUM_REGIONS as usize],
}

impl ServedDevice for NvmeDevice {
    fn name(&self) -> &str {
        "nvme"
    }

    fn negotiate(&mut self, client: &Version, answer: &mut Capabilities) -> Result<(), String> {
        let max_data = client.capabilities.max_data_xfer_size;
        self.messages
            .set_max_data(max_data.unwrap_or(MAX_DATA.into()));
        answer.max_msg_fds = Some(VECTORS.into());
        answer.max_dma_maps = Some(MAX_WINDOWS as u64);
        Ok(())
    }

    fn info(&self) -> DeviceSummary {
        DeviceSummary {
            flags: DEVICE_PCI | DEVICE_RESET,
            regions: VFIO_PCI_NUM_REGIONS,
            irqs: VFIO_PCI_NUM_IRQS,
        }
    }

    fn region(&self, index: u32) -> Option<&ServedRegion> {
        self.regions.get(index as usize)
    }

    fn irq(&self, index: u32) -> Option<IrqKind> {
        match index {
            VFIO_PCI_MSIX_IRQ_INDEX => Some(IrqKind {
                flags: IRQ_INFO_EVENTFD,
                count: VECTORS.into(),
            }),
            0..VFIO_PCI_NUM_IRQS => Some(IrqKind::default()),
            _ => None,
        }
    }

    fn set_irqs(&mut self, set: IrqSet<'_>) -> Result<(), i32> {
        if set.action != IrqAction::Trigger {
            return Err(libc::EINVAL);
        }
        let first = set.start as usize;
        match set.data {
            // The device has only MSI-X interrupts: there is nothing to disable.
            IrqSetData::Disable if set.index != VFIO_PCI_MSIX_IRQ_INDEX => {}
            IrqSetData::Disable => {
                let none = std::iter::repeat_with(|| None).take(VECTORS.into());
                self.controller.set_interrupts(0, none);
            }
            IrqSetData::All(count) => {
                (first..first + count as usize).for_each(|n| self.controller.interrupt(n));
            }
            IrqSetData::Chosen(chosen) => {
                let wanted = chosen.iter().zip(first..).filter(|(on, _)| **on != 0);
                wanted.for_each(|(_, n)| self.controller.interrupt(n));
            }
            IrqSetData::Eventfds(events) => {
                self.controller.set_interrupts(first, events.into_iter());
            }
        }
        Ok(())
    }

    fn read_region(&mut self, index: u32, offset: u64, into: &mut [u8]) -> Result<usize, i32> {
        match index {
            VFIO_PCI_CONFIG_REGION_INDEX => self.config.read(offset, into),
            _ => self.controller.read(offset, into),
        }
        Ok(into.len())
    }

    fn write_region(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<usize, i32> {
        match index {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                self.config.write(offset, data);
                self.controller.set_bus_master(self.config.is_bus_master());
            }
            _ => self.controller.write(offset, data),
        }
        Ok(data.len())
    }

    fn reset(&mut self) -> Result<(), i32> {
        self.controller.reset();
        self.config = ConfigSpace::new();
        Ok(())
    }

    fn dma_map(&mut self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32> {
        self.memory.map(window, file)
    }

    fn dma_unmap(&mut self, window: &DmaUnmapBody) -> Result<(), i32> {
        self.memory.unmap(window)
    }

    fn sends_commands(&self) -> bool {
        true
    }

    fn handle_reply(&mut self, header: &Header, body: &[u8]) -> bool {
        self.messages.handle_reply(header, body)
    }

    /// Fails the accesses that wait for a reply. The controller's worker may wait for one, and
    /// dropping the controller waits for the worker.
    fn release(&mut self) {
        self.messages.close();
    }
}

fn region(index: usize) -> ServedRegion {
    let size = match u32::try_from(index) {
        Ok(VFIO_PCI_BAR0_REGION_INDEX) => BAR_BYTES,
        Ok(VFIO_PCI_CONFIG_REGION_INDEX) => CONFIG_BYTES,
        Ok(_) | Err(_) => return ServedRegion::default(),
    };
    ServedRegion {
        flags: REGION_READ | REGION_WRITE,
        size: size as u64,
        capabilities: Vec::new(),
    }
}
