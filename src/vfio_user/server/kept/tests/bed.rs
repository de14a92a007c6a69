//! A device that adds, its client, and one server after the other.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::IntoBytes;

use super::super::super::client::ServerSignal;
use super::super::super::descriptors::DescriptorKeeping;
use super::super::super::device::{
    ClientFiles, DeviceRecord, DeviceSummary, IrqKind, IrqSet, ServedDevice, ServedRegion,
};
use super::super::super::respond::ClientError;
use super::super::{ClientKeeping, KeptEnd, serve_kept};
use super::Steps;
use crate::process::event_loop::EventLoop;
use crate::process::keeper::Keeper;
use crate::process::keeper_testing::Manager;
use crate::process::life::Life;
use crate::vfio_user::message::{
    Command, DEVICE_PCI, DmaMapBody, DmaUnmapBody, HEADER_BYTES, Header, Kind, REGION_READ,
    REGION_WRITE, RegionAccessBody,
};
use crate::vfio_user::version::{Capabilities, Version};

/// Bytes of region 0, and of region 1, whose writes must not be repeated. Region 2 is long, and read-only.
const REGISTERS: u64 = 64;
const LONG: u64 = 1 << 19;
const NAME: &str = "test";
/// What is kept while there is no client.
pub(super) const IDLE: [&str; 3] = ["test-record", "test-reply-reader", "test-reply-writer"];

/// A device with one register: a write adds to it.
pub(super) struct Adder {
    keeping: DescriptorKeeping,
    sum: u64,
    windows: Vec<(u64, Option<String>)>,
    regions: [ServedRegion; 3],
    has_changed: bool,
    is_held: bool,
    /// The sum when it went on.
    sum_at_go_on: Option<u64>,
    /// Executed writes of all lives.
    pub(super) writes: Arc<AtomicUsize>,
}

impl Adder {
    fn new(keeper: Arc<Keeper>, writes: Arc<AtomicUsize>) -> Self {
        let region = |flags, size| ServedRegion {
            flags,
            size,
            capabilities: Vec::new(),
        };
        let both = REGION_READ | REGION_WRITE;
        Self {
            keeping: DescriptorKeeping::new(keeper),
            sum: 0,
            windows: Vec::new(),
            regions: [
                region(both, REGISTERS),
                region(both, REGISTERS),
                region(REGION_READ, LONG),
            ],
            has_changed: false,
            is_held: false,
            sum_at_go_on: None,
            writes,
        }
    }
}

impl ServedDevice for Adder {
    fn name(&self) -> &str {
        "adder"
    }

    fn negotiate(&mut self, _: &Version, _: &mut Capabilities) -> Result<(), String> {
        self.has_changed = true;
        Ok(())
    }

    fn info(&self) -> DeviceSummary {
        DeviceSummary {
            flags: DEVICE_PCI,
            regions: 3,
            irqs: 1,
        }
    }

    fn region(&self, index: u32) -> Option<&ServedRegion> {
        self.regions.get(index as usize)
    }

    fn irq(&self, index: u32) -> Option<IrqKind> {
        (index == 0).then(IrqKind::default)
    }

    fn set_irqs(&mut self, _: IrqSet<'_>) -> Result<(), i32> {
        Err(libc::EINVAL)
    }

    fn read_region(&mut self, index: u32, _: u64, into: &mut [u8]) -> Result<usize, i32> {
        let windows = self.windows.len() as u64;
        let value = self.sum * 1000 + windows + u64::from(index);
        for (byte, value) in into.iter_mut().zip(value.to_ne_bytes().iter().cycle()) {
            *byte = *value;
        }
        Ok(into.len())
    }

    fn write_region(&mut self, _: u32, _: u64, data: &[u8]) -> Result<usize, i32> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.sum += data.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        self.has_changed = true;
        Ok(data.len())
    }

    fn reset(&mut self) -> Result<(), i32> {
        Err(libc::ENOTTY)
    }

    fn dma_map(&mut self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32> {
        let name = file.and_then(|file| self.keeping.keep(file.as_fd()));
        let address = window.address.get();
        // A window replaces one at the same address, as an eventfd does.
        self.windows.retain(|(at, _)| *at != address);
        self.windows.push((address, name));
        self.has_changed = true;
        Ok(())
    }

    fn dma_unmap(&mut self, window: &DmaUnmapBody) -> Result<(), i32> {
        let before = self.windows.len();
        self.windows.retain(|(at, _)| *at != window.address.get());
        self.has_changed = true;
        if self.windows.len() < before {
            Ok(())
        } else {
            Err(libc::ENOENT)
        }
    }

    fn release(&mut self) {}

    fn take_record(&mut self) -> Option<DeviceRecord> {
        std::mem::take(&mut self.has_changed).then(|| DeviceRecord {
            bytes: serde_json::to_vec(&(self.sum, &self.windows)).expect("numbers"),
            names: self
                .windows
                .iter()
                .filter_map(|(_, name)| name.clone())
                .collect(),
            kept: self.keeping.take_kept(),
        })
    }

    fn can_repeat(&self, command: Option<Command>, body: &[u8]) -> bool {
        let region = body.get(8..12);
        command != Some(Command::RegionWrite) || region != Some(&1u32.to_ne_bytes()[..])
    }

    fn resume(&mut self, record: &[u8], files: &ClientFiles) -> io::Result<()> {
        (self.sum, self.windows) = serde_json::from_slice(record)?;
        for name in self.windows.iter().filter_map(|(_, name)| name.as_ref()) {
            assert!(files.contains_key(name), "{name} was not kept");
        }
        self.is_held = true;
        Ok(())
    }

    fn go_on(&mut self) {
        assert!(std::mem::take(&mut self.is_held), "it has gone on");
        self.sum_at_go_on = Some(self.sum);
    }
}

/// One message of the client.
pub(super) struct Sent {
    pub(super) bytes: Vec<u8>,
    file: Option<Arc<OwnedFd>>,
    wants_reply: bool,
}

impl Sent {
    pub(super) fn new(command: Command, body: &[u8]) -> Self {
        Self {
            bytes: Header::command(7, command, 0).with_body(body),
            file: None,
            wants_reply: true,
        }
    }

    fn access(region: u32, count: usize) -> RegionAccessBody {
        RegionAccessBody {
            offset: 8.into(),
            region: region.into(),
            count: u32::try_from(count).expect("short").into(),
        }
    }

    pub(super) fn read(region: u32, count: usize) -> Self {
        Self::new(Command::RegionRead, Self::access(region, count).as_bytes())
    }

    pub(super) fn write(region: u32, data: &[u8]) -> Self {
        let body = [Self::access(region, data.len()).as_bytes(), data].concat();
        Self::new(Command::RegionWrite, &body)
    }

    pub(super) fn map(address: u64, has_file: bool) -> Self {
        let file = has_file.then(|| memfd_create("window", MemfdFlags::CLOEXEC).expect("a memfd"));
        Self::map_file(address, file.map(Arc::new))
    }

    pub(super) fn map_file(address: u64, file: Option<Arc<OwnedFd>>) -> Self {
        let body = DmaMapBody {
            argsz: DmaMapBody::BYTES.into(),
            flags: 3.into(),
            offset: 0.into(),
            address: address.into(),
            size: 4096.into(),
        };
        Self {
            file,
            ..Self::new(Command::DmaMap, body.as_bytes())
        }
    }

    pub(super) fn unmap(address: u64) -> Self {
        let body = DmaUnmapBody {
            argsz: DmaUnmapBody::BYTES.into(),
            flags: 0.into(),
            address: address.into(),
            size: 4096.into(),
        };
        Self::new(Command::DmaUnmap, body.as_bytes())
    }

    pub(super) fn version() -> Self {
        Self::new(Command::Version, &Version::default().encode())
    }

    /// The client wants no reply.
    pub(super) fn posted(mut self) -> Self {
        let mut header = Header::decode(self.bytes.first_chunk().expect("a header")).expect("good");
        header.kind = Kind::Command { no_reply: true };
        self.bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
        self.wants_reply = false;
        self
    }
}

/// How a client sends its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// It waits for each reply.
    OneByOne,
    /// It sends all messages before it reads a reply.
    AllAtOnce,
    /// It sends each byte with a call of its own.
    Bytewise,
}

/// Sends a script, and returns the replies up to the end of the connection.
pub(super) fn run_client(stream: &UnixStream, script: &[Sent], pace: Pace) -> Vec<Vec<u8>> {
    let timeout = Some(Duration::from_secs(30));
    stream.set_read_timeout(timeout).expect("set");
    let mut replies = Vec::new();
    let mut owed = 0;
    for sent in script {
        let step = if pace == Pace::Bytewise {
            1
        } else {
            sent.bytes.len()
        };
        let mut file = sent.file.as_deref();
        for piece in sent.bytes.chunks(step) {
            send(stream, piece, file.take());
        }
        owed += usize::from(sent.wants_reply);
        if pace != Pace::AllAtOnce {
            replies.extend((0..std::mem::take(&mut owed)).map_while(|_| receive(stream)));
        }
    }
    replies.extend((0..owed).map_while(|_| receive(stream)));
    replies
}

fn send(stream: &UnixStream, bytes: &[u8], file: Option<&OwnedFd>) {
    let files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
    send_files(stream, bytes, &files);
}

/// Sends bytes with descriptors.
pub(super) fn send_files(stream: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(files)));
    }
    // Fails if the server has cut the client off.
    let _ = sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
}

pub(super) fn receive(mut stream: &UnixStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES];
    stream.read_exact(&mut bytes).ok()?;
    let header = Header::decode(bytes.first_chunk()?).expect("a header");
    bytes.resize(HEADER_BYTES + header.body_len, 0);
    stream.read_exact(&mut bytes[HEADER_BYTES..]).ok()?;
    Some(bytes)
}

/// How a life has ended, and what the device was then.
pub(super) struct Ended {
    pub(super) end: Result<KeptEnd, ClientError>,
    pub(super) sum: u64,
    /// The sum when the device of an earlier life went on.
    pub(super) sum_at_go_on: Option<u64>,
    pub(super) lost: Vec<String>,
    pub(super) keeper: Arc<Keeper>,
}

/// A life of the server: with `socket` of a new client, or with the client that the life before has left. `None` if it has
/// left none.
pub(super) fn live(
    manager: &mut Manager,
    socket: Option<UnixStream>,
    steps: Steps,
    writes: &Arc<AtomicUsize>,
) -> Option<Ended> {
    let keeper = manager.keeper();
    let life = Arc::new(Life::new(true));
    let found = ClientKeeping::find(keeper.clone(), NAME, life.clone());
    let mut keeping = found.expect("a keeping");
    let lost = life.lost();
    keeping.steps = steps;
    let mut device = Adder::new(keeper.clone(), writes.clone());
    let left = keeping.left.take();
    keeper.release_unclaimed();
    let (socket, place) = match (left, socket) {
        (Some(left), _) => {
            if let Some(record) = &left.device {
                device.resume(record, &left.files).expect("resumed");
            }
            (left.socket, Some(left.place))
        }
        (None, Some(socket)) => {
            keeping.open(&socket);
            (socket, None)
        }
        (None, None) => {
            let end = Ok(KeptEnd::Stopped);
            let ended = Ended {
                end,
                sum: 0,
                sum_at_go_on: None,
                lost,
                keeper,
            };
            return (!ended.lost.is_empty()).then_some(ended);
        }
    };
    let socket = Arc::new(socket);
    let signal = Arc::new(ServerSignal::new().expect("a signal"));
    let mut events = EventLoop::new().expect("a set");
    let end = serve_kept(
        &mut events,
        &socket,
        &signal,
        &mut device,
        &mut keeping,
        place,
    );
    if !matches!(end, Ok(KeptEnd::Died)) {
        device.release();
        keeping.close(&socket);
    }
    Some(Ended {
        end,
        sum: device.sum,
        sum_at_go_on: device.sum_at_go_on,
        lost,
        keeper,
    })
}
