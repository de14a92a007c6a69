//! One client: its messages are taken apart, answered, and turned into what they mean.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_EVENTFD,
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};
use vhost_device_iommu::vfio_user::message::{
    Command, DeviceInfoBody, DmaMapBody, DmaUnmapBody, IRQ_ACTION_TRIGGER, IRQ_ACTIONS,
    IRQ_DATA_BOOL, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqInfoBody, IrqSetBody, Kind, MAX_DATA,
    Malformed, RegionAccessBody, RegionInfoBody, WriteMultiBody, WriteOneBody, check_command, take,
};
use vhost_device_iommu::vfio_user::socket::{Message, Outbox, Received, Receiver, SocketError};
use vhost_device_iommu::vfio_user::version::{Capabilities, Version, VersionError};
use zerocopy::IntoBytes;

use crate::controller::Controller;
use crate::disk::Disk;
use crate::memory::{MAX_WINDOWS, Manner, Memory, Messages, Outbound};
use crate::orders::Orders;
use crate::pci::{BAR_BYTES, CONFIG_BYTES, ConfigSpace, VECTORS};

/// While this many bytes wait for a client to read them, nothing is read from it.
const MAX_WAITING: usize = 4 << 20;

/// What all clients find.
pub struct Setup {
    /// The disk.
    pub disk: Arc<Disk>,
    /// How guest memory is reached.
    pub manner: Manner,
    /// Who is to know the memory of the client that is there.
    pub orders: Arc<Orders>,
}

/// Why a client is sent away.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The connection failed, or something came that is no message.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A message is not what it says it is.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// It speaks another protocol.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// It does not keep to the protocol.
    #[error("{0}")]
    Protocol(&'static str),
    /// A system call failed.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// Serves a client until it hangs up.
///
/// # Errors
/// Where it has to be sent away.
pub fn serve(stream: UnixStream, setup: &Setup) -> Result<(), ServeError> {
    let wire = Arc::new(Wire {
        stream,
        outbox: Mutex::default(),
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(io::Error::from)?,
    });
    let messages = Arc::new(Messages::new(Box::new(wire.clone())));
    let memory = setup.manner.memory(&messages);
    let controller = Controller::start(setup.disk.clone(), memory.clone())?;
    setup.orders.set_memory(Some(memory.clone()));
    let mut connection = Connection {
        wire,
        receiver: Receiver::default(),
        agreed: false,
        messages: messages.clone(),
        memory,
        controller,
        config: ConfigSpace::new(),
    };
    let outcome = connection.run();
    setup.orders.set_memory(None);
    // Before the controller's worker is waited for, which may wait for a reply.
    messages.end();
    outcome
}

/// The socket, for whoever has something to send.
struct Wire {
    stream: UnixStream,
    outbox: Mutex<Outbox>,
    /// Tells the thread that polls that there is something to send.
    wake: OwnedFd,
}

impl Outbound for Arc<Wire> {
    fn send(&self, message: Vec<u8>) {
        let mut outbox = self.outbox.lock();
        outbox.push(message, Vec::new());
        // What goes wrong here goes wrong for the thread that polls, too.
        if outbox.flush(&self.stream).is_err() || !outbox.is_empty() {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

struct Connection {
    wire: Arc<Wire>,
    receiver: Receiver,
    /// VERSION has been answered.
    agreed: bool,
    messages: Arc<Messages>,
    memory: Arc<dyn Memory>,
    controller: Controller,
    config: ConfigSpace,
}

/// The body of a reply, or an errno.
type Answer = Result<Vec<u8>, i32>;

impl Connection {
    fn run(&mut self) -> Result<(), ServeError> {
        loop {
            let waiting = self.wire.outbox.lock().len_bytes();
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, waiting < MAX_WAITING);
            flags.set(PollFlags::OUT, waiting > 0);
            let ready = {
                let stream = self.wire.stream.as_fd();
                let wake = self.wire.wake.as_fd();
                let mut fds = [
                    PollFd::new(&stream, flags),
                    PollFd::new(&wake, PollFlags::IN),
                ];
                match poll(&mut fds, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(cause) => return Err(io::Error::from(cause).into()),
                }
                fds.map(|fd| fd.revents())
            };
            if ready[1].contains(PollFlags::IN) {
                // It only wakes; how often does not matter.
                let _ = rustix::io::read(&self.wire.wake, &mut [0; 8]);
            }
            self.wire.outbox.lock().flush(&self.wire.stream)?;
            if ready[0].intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                match self.receiver.receive(&self.wire.stream)? {
                    Received::Message(message) => self.take(message)?,
                    Received::Nothing => {}
                    Received::End => return Ok(()),
                }
            }
        }
    }

    fn take(&mut self, message: Message) -> Result<(), ServeError> {
        let header = message.header;
        match header.kind {
            Kind::Command { .. } => {}
            Kind::Reply | Kind::Refusal(_) => {
                if !message.descriptors.is_empty() {
                    return Err(ServeError::Protocol("a reply comes with descriptors"));
                }
                return match self.messages.take_reply(&header, &message.body) {
                    true => Ok(()),
                    false => Err(ServeError::Protocol("a reply comes that nobody asked for")),
                };
            }
        }
        let command = Command::from_number(header.command);
        if let Some(command) = command {
            check_command(command, &message.body, message.descriptors.len())?;
        } else if !message.descriptors.is_empty() {
            return Err(ServeError::Protocol(
                "an unknown command comes with descriptors",
            ));
        }
        let is_first = command == Some(Command::Version);
        if is_first == self.agreed {
            return Err(ServeError::Protocol("VERSION comes first, and once"));
        }
        let answer = match command {
            Some(command) => self.obey(command, message)?,
            None => Err(libc::ENOTSUP),
        };
        if header.wants_no_reply() {
            return Ok(());
        }
        let reply = match answer {
            Ok(body) => header.reply_to(body.len()).with_body(&body),
            Err(errno) => header.refusal_of(errno).encode().to_vec(),
        };
        self.wire.send(reply);
        Ok(())
    }

    fn obey(&mut self, command: Command, message: Message) -> Result<Answer, ServeError> {
        let body = &message.body[..];
        Ok(match command {
            Command::Version => {
                let answer = self.agree(body)?;
                self.agreed = true;
                Ok(answer)
            }
            Command::DmaMap => {
                let (window, _) = take::<DmaMapBody>(command, body)?;
                let file = message.descriptors.into_iter().next();
                self.memory.map(&window, file).map(|()| Vec::new())
            }
            Command::DmaUnmap => {
                let (window, _) = take::<DmaUnmapBody>(command, body)?;
                let unmapped = self.memory.unmap(&window);
                unmapped.map(|()| window.as_bytes().to_vec())
            }
            Command::DeviceGetInfo => Ok(DeviceInfoBody {
                argsz: argsz::<DeviceInfoBody>(),
                flags: (VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET).into(),
                regions: VFIO_PCI_NUM_REGIONS.into(),
                irqs: VFIO_PCI_NUM_IRQS.into(),
            }
            .as_bytes()
            .to_vec()),
            Command::DeviceGetRegionInfo => region_info(take(command, body)?.0),
            Command::DeviceGetIrqInfo => irq_info(take(command, body)?.0),
            Command::DeviceSetIrqs => {
                let (set, data) = take(command, body)?;
                self.set_irqs(&set, data, message.descriptors)
            }
            Command::RegionRead => self.read_region(take(command, body)?.0),
            Command::RegionWrite => {
                let (access, data) = take::<RegionAccessBody>(command, body)?;
                let written = self.write_region(&access, data);
                written.map(|()| access.as_bytes().to_vec())
            }
            Command::RegionWriteMulti => self.write_several(command, body)?,
            Command::DeviceReset => {
                self.controller.reset();
                self.config = ConfigSpace::new();
                Ok(Vec::new())
            }
            Command::DeviceGetRegionIoFds
            | Command::DmaRead
            | Command::DmaWrite
            | Command::DirtyPages
            | Command::DeviceFeature
            | Command::MigDataRead
            | Command::MigDataWrite => Err(libc::ENOTSUP),
        })
    }

    fn agree(&self, body: &[u8]) -> Result<Vec<u8>, ServeError> {
        let asked = Version::decode(body)?;
        if asked.major != 0 {
            return Err(ServeError::Protocol(
                "the client speaks another major version",
            ));
        }
        let max_data = asked.capabilities.max_data_xfer_size;
        self.messages
            .set_max_data(max_data.unwrap_or(MAX_DATA.into()));
        let answer = Version {
            major: 0,
            minor: asked.minor.min(1),
            capabilities: Capabilities {
                max_msg_fds: Some(VECTORS.into()),
                max_data_xfer_size: Some(MAX_DATA.into()),
                max_dma_maps: Some(MAX_WINDOWS as u64),
                pgsizes: Some(4096),
                migration: None,
                twin_socket: None,
                write_multiple: asked.capabilities.write_multiple,
            },
        };
        Ok(answer.encode())
    }

    /// Each interrupt's descriptor is replaced, taken away, or signalled.
    fn set_irqs(&self, set: &IrqSetBody, data: &[u8], fds: Vec<OwnedFd>) -> Answer {
        let (start, count) = (set.start.get(), set.count.get());
        let flags = set.flags.get();
        if set.index.get() != VFIO_PCI_MSIX_IRQ_INDEX {
            // There are none of other kinds, which may be said to be used no longer.
            return if count == 0 {
                Ok(Vec::new())
            } else {
                Err(libc::EINVAL)
            };
        }
        let end = start.checked_add(count).ok_or(libc::EINVAL)?;
        if end > u32::from(VECTORS) || flags & IRQ_ACTIONS != IRQ_ACTION_TRIGGER {
            return Err(libc::EINVAL);
        }
        let (first, count) = (start as usize, count as usize);
        match flags & (IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD) {
            IRQ_DATA_NONE if count == 0 => {
                let none = std::iter::repeat_with(|| None).take(VECTORS.into());
                self.controller.set_interrupts(0, none);
            }
            IRQ_DATA_NONE => (first..first + count).for_each(|n| self.controller.interrupt(n)),
            IRQ_DATA_BOOL => {
                let wanted = data
                    .iter()
                    .take(count)
                    .zip(first..)
                    .filter(|(on, _)| **on != 0);
                wanted.for_each(|(_, n)| self.controller.interrupt(n));
            }
            IRQ_DATA_EVENTFD if fds.is_empty() => {
                let none = std::iter::repeat_with(|| None).take(count);
                self.controller.set_interrupts(first, none);
            }
            IRQ_DATA_EVENTFD if fds.len() == count => {
                self.controller
                    .set_interrupts(first, fds.into_iter().map(Some));
            }
            _ => return Err(libc::EINVAL),
        }
        Ok(Vec::new())
    }

    fn read_region(&self, access: RegionAccessBody) -> Answer {
        let (region, at) = (access.region.get(), access.offset.get());
        let len = within(region, at, access.count.get())?;
        let mut reply = access.as_bytes().to_vec();
        let head = reply.len();
        reply.resize(head + len, 0);
        let into = &mut reply[head..];
        match region {
            VFIO_PCI_CONFIG_REGION_INDEX => self.config.read(at, into),
            _ => self.controller.read(at, into),
        }
        Ok(reply)
    }

    fn write_region(&mut self, access: &RegionAccessBody, data: &[u8]) -> Result<(), i32> {
        let (region, at) = (access.region.get(), access.offset.get());
        let len = within(region, at, access.count.get())?;
        let data = data.get(..len).ok_or(libc::EINVAL)?;
        match region {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                self.config.write(at, data);
                self.controller.set_bus_master(self.config.is_bus_master());
            }
            _ => self.controller.write(at, data),
        }
        Ok(())
    }

    /// Answers with the number of writes done, up to the first that fails.
    fn write_several(&mut self, command: Command, body: &[u8]) -> Result<Answer, Malformed> {
        let (multi, mut entries) = take::<WriteMultiBody>(command, body)?;
        let mut done = 0;
        while done < multi.count.get() {
            let (one, rest) = take::<WriteOneBody>(command, entries)?;
            entries = rest;
            let access = RegionAccessBody {
                offset: one.offset,
                region: one.region,
                count: one.count,
            };
            if let Err(errno) = self.write_region(&access, &one.data) {
                if done == 0 {
                    return Ok(Err(errno));
                }
                break;
            }
            done += 1;
        }
        let reply = WriteMultiBody { count: done.into() };
        Ok(Ok(reply.as_bytes().to_vec()))
    }
}

/// The bytes of an access, which stays within its region.
fn within(region: u32, at: u64, count: u32) -> Result<usize, i32> {
    let end = at.checked_add(count.into()).ok_or(libc::EINVAL)?;
    if count > MAX_DATA || end > size_of_region(region) {
        return Err(libc::EINVAL);
    }
    usize::try_from(count).map_err(|_| libc::EINVAL)
}

fn size_of_region(index: u32) -> u64 {
    match index {
        VFIO_PCI_BAR0_REGION_INDEX => BAR_BYTES as u64,
        VFIO_PCI_CONFIG_REGION_INDEX => CONFIG_BYTES as u64,
        _ => 0,
    }
}

fn region_info(asked: RegionInfoBody) -> Answer {
    let index = asked.index.get();
    if index >= VFIO_PCI_NUM_REGIONS {
        return Err(libc::EINVAL);
    }
    let size = size_of_region(index);
    let flags = if size > 0 {
        VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE
    } else {
        0
    };
    let info = RegionInfoBody {
        argsz: argsz::<RegionInfoBody>(),
        flags: flags.into(),
        index: index.into(),
        cap_offset: 0.into(),
        size: size.into(),
        offset: 0.into(),
    };
    Ok(info.as_bytes().to_vec())
}

fn irq_info(asked: IrqInfoBody) -> Answer {
    let (flags, count) = match asked.index.get() {
        VFIO_PCI_MSIX_IRQ_INDEX => (VFIO_IRQ_INFO_EVENTFD, u32::from(VECTORS)),
        0..VFIO_PCI_NUM_IRQS => (0, 0),
        _ => return Err(libc::EINVAL),
    };
    let info = IrqInfoBody {
        argsz: argsz::<IrqInfoBody>(),
        flags: flags.into(),
        index: asked.index,
        count: count.into(),
    };
    Ok(info.as_bytes().to_vec())
}

fn argsz<T>() -> zerocopy::native_endian::U32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX).into()
}
