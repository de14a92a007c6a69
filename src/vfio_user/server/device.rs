//! A device as the server needs it: one method for each command of a vfio-user client.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::process::peer_event::PeerEvent;
use crate::vfio_user::message::{Command, DmaMapBody, DmaUnmapBody, Header};
use crate::vfio_user::version::{Capabilities, Version};

/// A device that a server offers to one vfio-user client at a time.
///
/// The server decodes and checks every message before it calls the device:
///
/// - An access lies within a region that [`ServedDevice::region`] returns, has a right that the
///   region grants, and has at most [`MAX_DATA`](crate::vfio_user::message::MAX_DATA) bytes.
/// - A change of interrupts concerns interrupts that [`ServedDevice::irq`] returns, and its data and
///   descriptors match their number.
///
/// The thread that serves the client calls all methods. While a method waits, the client waits for
/// its reply and the server cannot be stopped.
///
/// Every error is an errno, which the client gets in the reply.
pub trait ServedDevice {
    /// The device's name in log messages.
    fn name(&self) -> &str;

    /// VERSION: a client with the capabilities of `client` has connected. `answer` has the
    /// server's own capabilities; the device may lower their limits to its own.
    ///
    /// # Errors
    /// Why the device takes no client now, and the cure. The server cuts the client off.
    fn negotiate(&mut self, client: &Version, answer: &mut Capabilities) -> Result<(), String> {
        let _ = (client, answer);
        Ok(())
    }

    /// DEVICE_GET_INFO: the kind of the device, and how many regions and kinds of interrupts it has.
    fn info(&self) -> DeviceSummary;

    /// DEVICE_GET_REGION_INFO: region `index`. A region that the device lacks has no bytes; `None`
    /// means that the index is not below the number of regions.
    fn region(&self, index: u32) -> Option<&ServedRegion>;

    /// DEVICE_GET_REGION_INFO: the file that the client may map instead of sending accesses to
    /// region `index`, which has [`REGION_MMAP`](crate::vfio_user::message::REGION_MMAP). The server calls
    /// it also if the client has no room for the whole description, and then closes the file.
    fn region_file(&mut self, index: u32) -> Option<RegionFile> {
        let _ = index;
        None
    }

    /// DEVICE_GET_IRQ_INFO: the interrupts of kind `index`; `None` means that the index is not below
    /// the number of kinds.
    fn irq(&self, index: u32) -> Option<IrqKind>;

    /// DEVICE_SET_IRQS: signals, masks, unmasks, enables or disables interrupts.
    ///
    /// # Errors
    /// An errno. The interrupts that the change concerns may then be disabled.
    fn set_irqs(&mut self, set: IrqSet<'_>) -> Result<(), i32>;

    /// REGION_READ: reads region `index` from `offset` on. Returns how many bytes of `into` were
    /// read; the reply has no more than these.
    ///
    /// # Errors
    /// An errno.
    fn read_region(&mut self, index: u32, offset: u64, into: &mut [u8]) -> Result<usize, i32>;

    /// REGION_WRITE and each entry of REGION_WRITE_MULTI: writes region `index` from `offset` on.
    /// Returns how many bytes of `data` were written.
    ///
    /// # Errors
    /// An errno.
    fn write_region(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<usize, i32>;

    /// Whether clients that take no error for an answer can use the device. An access that the server would refuse is
    /// then answered as a bus answers an access that no device claims: a read gives ones, a write is dropped. And a
    /// refusal is as long as the reply would be, because such clients read that many bytes.
    fn answers_all_accesses(&self) -> bool {
        false
    }

    /// The reply to the last command has been sent, or waits for the client to receive. For what a command sets off and
    /// its reply need not wait for.
    fn replied(&mut self) {}

    /// DEVICE_RESET: resets the device.
    ///
    /// # Errors
    /// An errno; `ENOTTY` if the device has no reset.
    fn reset(&mut self) -> Result<(), i32>;

    /// DMA_MAP: the client lets the device reach the guest memory of `window`. `file` is the memory,
    /// if the client passed a descriptor.
    ///
    /// # Errors
    /// An errno; the device must then not reach the window.
    fn dma_map(&mut self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32>;

    /// DMA_UNMAP: the client takes `window` back. On success, no access of the device uses the
    /// window after this method returns.
    ///
    /// # Errors
    /// An errno.
    fn dma_unmap(&mut self, window: &DmaUnmapBody) -> Result<(), i32>;

    /// Whether the device sends commands of its own (DMA_READ, DMA_WRITE), through
    /// [`ClientChannel::send`](super::client::ClientChannel::send). The server cuts off a client that replies
    /// to a device that sends none.
    fn sends_commands(&self) -> bool {
        false
    }

    /// The client replied to a command of the device. Returns whether the device had sent it; if
    /// not, the server cuts the client off.
    fn handle_reply(&mut self, header: &Header, body: &[u8]) -> bool {
        let _ = (header, body);
        false
    }

    /// The client is gone, and no method was called for another client yet. The device must forget
    /// the client's interrupts and windows and must stop its DMA.
    fn release(&mut self);

    /// Whether the server must call [`Self::retry_release`] from time to time while no client is connected.
    fn is_waiting(&self) -> bool {
        false
    }

    /// Finishes what [`Self::release`] could not.
    fn retry_release(&mut self) {}

    /// What a later process must know of the client to [resume](Self::resume) it, if that has changed since the last call.
    /// The server calls it after each message of a client whose connection is kept. The device has had the descriptors
    /// that the record names kept.
    fn take_record(&mut self) -> Option<DeviceRecord> {
        None
    }

    /// Whether the device bears that this message is executed, the process dies, and the next process executes it again
    /// on the state that was recorded before. If not, the next process cuts the client off.
    fn can_repeat(&self, command: Option<Command>, body: &[u8]) -> bool {
        let _ = (command, body);
        true
    }

    /// Goes on with a client of an earlier process, instead of [`Self::negotiate`]. `record` has the bytes that the device
    /// of that process has recorded last, and `files` the descriptors. The device must do nothing on its own until
    /// [`Self::go_on`]: the server may have a message to execute again before.
    ///
    /// # Errors
    /// The client has to be cut off. [`Self::release`] follows.
    fn resume(&mut self, record: &[u8], files: &ClientFiles) -> io::Result<()> {
        let _ = (record, files);
        Err(io::Error::other("the device keeps no state"))
    }

    /// The device has the state in which the earlier process has died, and goes on.
    fn go_on(&mut self) {}
}

/// A client's descriptors by their names at the keeper.
pub type ClientFiles = BTreeMap<String, Arc<OwnedFd>>;

/// What a later process must know of a client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRecord {
    /// The device's own encoding.
    pub bytes: Vec<u8>,
    /// The names of kept descriptors, each as often as the device has it kept. An empty name stands for one that is not
    /// kept: no later process can then go on with the client.
    pub names: Vec<String>,
    /// The names of the descriptors that the device has had kept since its last record, each as often as it was kept, also of
    /// those that it does not use. The server releases those that `names` lacks.
    pub kept: Vec<String>,
}

/// The reply to DEVICE_GET_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSummary {
    /// `DEVICE_*` bits of [`message`](crate::vfio_user::message).
    pub flags: u32,
    /// The number of regions; a PCI device has at least 9.
    pub regions: u32,
    /// The number of kinds of interrupts; a PCI device has at least 5.
    pub irqs: u32,
}

/// A region of a device: a BAR, the configuration space, ..
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServedRegion {
    /// [`REGION_READ`](crate::vfio_user::message::REGION_READ),
    /// [`REGION_WRITE`](crate::vfio_user::message::REGION_WRITE) and
    /// [`REGION_MMAP`](crate::vfio_user::message::REGION_MMAP); the server ignores all
    /// other bits and sets them itself.
    pub flags: u32,
    /// Bytes; 0 if the device lacks the region.
    pub size: u64,
    /// The server passes on the region's type, and the capabilities that concern mapping if there is
    /// a file to map. It omits all others, because it does not implement them.
    pub capabilities: Vec<RegionCapability>,
}

/// The file that a client may map to reach a region.
#[derive(Debug)]
pub struct RegionFile {
    /// The file.
    pub file: OwnedFd,
    /// The region's first byte in the file. The client adds the offsets of areas within the region to it.
    pub offset: u64,
}

/// A capability of a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionCapability {
    /// Its number.
    pub id: u16,
    /// The version of its layout.
    pub version: u16,
    /// The bytes after the header.
    pub data: Vec<u8>,
}

/// The interrupts of one kind, for example MSI-X.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqKind {
    /// `IRQ_INFO_*` bits of [`message`](crate::vfio_user::message).
    pub flags: u32,
    /// The number of interrupts; 0 if the device has none of this kind.
    pub count: u32,
}

/// A DEVICE_SET_IRQS.
#[derive(Debug)]
pub struct IrqSet<'a> {
    /// The kind of the interrupts.
    pub index: u32,
    /// The action, or the action that the descriptors trigger later.
    pub action: IrqAction,
    /// The first interrupt.
    pub start: u32,
    /// The interrupts that the action applies to, from `start` on, and their data.
    pub data: IrqSetData<'a>,
}

/// The action of a DEVICE_SET_IRQS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Masks them.
    Mask,
    /// Unmasks them.
    Unmask,
    /// Signals them, or enables and disables them.
    Trigger,
}

/// The data of a DEVICE_SET_IRQS.
#[derive(Debug)]
pub enum IrqSetData<'a> {
    /// Disables all interrupts of the kind. The action is [`IrqAction::Trigger`].
    Disable,
    /// Performs the action for all of this many interrupts, at least 1.
    All(u32),
    /// Performs the action for the interrupts whose byte is not 0; at least one byte.
    Chosen(&'a [u8]),
    /// For each interrupt, the eventfd through which the action happens, or `None` to remove its eventfd; at
    /// least one entry.
    Eventfds(Vec<Option<PeerEvent>>),
}
