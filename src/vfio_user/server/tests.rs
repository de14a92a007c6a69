//! The server with a small device, over a socket pair and over a listener.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use zerocopy::IntoBytes;

use super::*;
use crate::process::sandbox::Role;
use crate::vfio_user::message::{
    Command, DEVICE_PCI, DEVICE_RESET, DeviceInfoBody, DmaAccessBody, DmaMapBody, DmaUnmapBody,
    HEADER_BYTES, Header, IRQ_ACTION_MASK, IRQ_ACTION_TRIGGER, IRQ_DATA_BOOL, IRQ_DATA_EVENTFD,
    IRQ_DATA_NONE, IrqInfoBody, IrqSetBody, Kind, MAX_DATA, REGION_CAP_SPARSE_MMAP,
    REGION_CAP_TYPE, REGION_CAPS, REGION_READ, REGION_WRITE, RegionAccessBody, RegionInfoBody,
    WriteMultiBody, WriteOneBody, take,
};
use crate::vfio_user::version::{Capabilities, Version};

/// Registers of the device: region 0 may be written, region 1 may not, region 2 is absent.
const REGISTERS: usize = 64;

/// A device that remembers what the server calls.
struct Registers {
    bytes: Vec<u8>,
    regions: Vec<Region>,
    calls: Vec<String>,
    /// It sends commands, and this is the client's connection.
    channel: Option<Arc<ClientChannel>>,
    /// Gets the calls when the client has gone.
    released: Sender<Vec<String>>,
}

impl Registers {
    fn new(released: Sender<Vec<String>>) -> Self {
        let capability = |id| RegionCapability {
            id,
            version: 1,
            data: vec![7; 4],
        };
        let region = |flags, size| Region {
            flags,
            size,
            capabilities: vec![
                capability(REGION_CAP_SPARSE_MMAP),
                capability(REGION_CAP_TYPE),
            ],
        };
        Self {
            bytes: vec![0; REGISTERS],
            regions: vec![
                region(REGION_READ | REGION_WRITE, REGISTERS as u64),
                region(REGION_READ, 2 << 20),
                Region::default(),
            ],
            calls: Vec::new(),
            channel: None,
            released,
        }
    }
}

impl ServedDevice for Registers {
    fn name(&self) -> &str {
        "registers"
    }

    fn negotiate(&mut self, client: &Version, answer: &mut Capabilities) {
        let fds = client.capabilities.max_msg_fds;
        self.calls.push(format!("negotiate {fds:?}"));
        answer.max_msg_fds = Some(5);
    }

    fn info(&self) -> DeviceSummary {
        DeviceSummary {
            flags: DEVICE_PCI | DEVICE_RESET,
            regions: 3,
            irqs: 2,
        }
    }

    fn region(&self, index: u32) -> Option<&Region> {
        self.regions.get(index as usize)
    }

    fn irq(&self, index: u32) -> Option<IrqKind> {
        [0, 4]
            .get(index as usize)
            .map(|&count| IrqKind { flags: 1, count })
    }

    fn set_irqs(&mut self, set: IrqSet<'_>) -> Result<(), i32> {
        let data = match set.data {
            IrqSetData::Disable => "disable".to_owned(),
            IrqSetData::All(count) => format!("all {count}"),
            IrqSetData::Chosen(chosen) => format!("chosen {chosen:?}"),
            IrqSetData::Eventfds(fds) => {
                let given: Vec<_> = fds.iter().map(Option::is_some).collect();
                format!("eventfds {given:?}")
            }
        };
        let (action, index, start) = (set.action, set.index, set.start);
        self.calls
            .push(format!("{action:?} {index} from {start}: {data}"));
        Ok(())
    }

    fn read_region(&mut self, index: u32, offset: u64, into: &mut [u8]) -> Result<usize, i32> {
        self.calls
            .push(format!("read {index} {offset:#x} {}", into.len()));
        let offset = usize::try_from(offset).expect("checked");
        if index == 0 {
            into.copy_from_slice(&self.bytes[offset..offset + into.len()]);
        }
        // Like a device that cannot read the last byte.
        Ok(if offset + into.len() == REGISTERS {
            into.len() - 1
        } else {
            into.len()
        })
    }

    fn write_region(&mut self, _: u32, offset: u64, data: &[u8]) -> Result<usize, i32> {
        if data == [0xff] {
            return Err(libc::EIO);
        }
        let offset = usize::try_from(offset).expect("checked");
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
        Ok(data.len())
    }

    fn reset(&mut self) -> Result<(), i32> {
        self.calls.push("reset".into());
        Ok(())
    }

    fn dma_map(&mut self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32> {
        let address = window.address.get();
        self.calls
            .push(format!("map {address:#x}, file {}", file.is_some()));
        if address == 0 {
            Err(libc::ENOSPC)
        } else {
            Ok(())
        }
    }

    fn dma_unmap(&mut self, window: &DmaUnmapBody) -> Result<(), i32> {
        let address = window.address.get();
        self.calls.push(format!("unmap {address:#x}"));
        Ok(())
    }

    fn sends_commands(&self) -> bool {
        self.channel.is_some()
    }

    fn handle_reply(&mut self, header: &Header, body: &[u8]) -> bool {
        self.calls
            .push(format!("reply {}: {} bytes", header.id, body.len()));
        header.id == 77
    }

    fn release(&mut self) {
        let calls = std::mem::take(&mut self.calls);
        self.released.send(calls).expect("the test waits");
    }
}

/// A client of a server that runs in a thread.
struct TestClient {
    stream: UnixStream,
    signal: Arc<ServerSignal>,
    server: JoinHandle<(Result<ClientEnd, ServeError>, Vec<String>)>,
}

impl TestClient {
    fn new(sends_commands: bool) -> Self {
        let (stream, other) = UnixStream::pair().expect("sockets");
        let timeout = Some(Duration::from_secs(20));
        stream.set_read_timeout(timeout).expect("a timeout");
        let signal = Arc::new(ServerSignal::new().expect("a signal"));
        let connection = Arc::new(ClientChannel::new(other, signal.clone()));
        let server = thread::spawn(move || {
            let (sender, calls) = channel();
            let mut device = Registers::new(sender);
            device.channel = sends_commands.then(|| connection.clone());
            if sends_commands {
                let body = DmaAccessBody {
                    address: 0x1000.into(),
                    count: 4.into(),
                };
                let read = Header::command(77, Command::DmaRead, 0);
                connection.send(read.with_body(body.as_bytes()));
            }
            let outcome = serve_client(&connection, &mut device);
            device.release();
            (outcome, calls.recv().expect("the calls"))
        });
        Self {
            stream,
            signal,
            server,
        }
    }

    fn agreed() -> Self {
        let mut client = Self::new(false);
        let answer = client.call(Command::Version, &version_body());
        let answer = Version::decode(&answer.expect("an answer")).expect("a version");
        assert_eq!(answer.capabilities.max_msg_fds, Some(5));
        assert_eq!(
            answer.capabilities.max_data_xfer_size,
            Some(MAX_DATA.into())
        );
        client
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).expect("a header");
        let header = Header::decode(&head).expect("a header");
        let mut body = vec![0; header.body_len];
        self.stream.read_exact(&mut body).expect("a body");
        (header, body)
    }

    fn send(&mut self, message: &[u8]) {
        self.stream.write_all(message).expect("sent");
    }

    fn call(&mut self, command: Command, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(&Header::command(9, command, 0).with_body(body));
        let (header, body) = self.receive();
        assert_eq!((header.id, header.command), (9, command.number()));
        match header.kind {
            Kind::Reply => Ok(body),
            Kind::Refusal(errno) => Err(errno.cast_signed()),
            Kind::Command { .. } => panic!("{header:?}"),
        }
    }

    /// Hangs up. Returns the outcome and the calls, without that of VERSION.
    fn end(self) -> (Result<ClientEnd, ServeError>, Vec<String>) {
        drop(self.stream);
        let (outcome, calls) = self.server.join().expect("the server");
        let calls = calls.into_iter().filter(|c| !c.starts_with("negotiate"));
        (outcome, calls.collect())
    }
}

fn version_body() -> Vec<u8> {
    Version::default().encode()
}

fn access(region: u32, offset: u64, count: u32) -> RegionAccessBody {
    RegionAccessBody {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    }
}

fn set_irqs(flags: u32, index: u32, start: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let set = IrqSetBody {
        argsz: IrqSetBody::BYTES.into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    [set.as_bytes(), data].concat()
}

#[test]
fn the_device_is_described_to_the_client() {
    let mut client = TestClient::agreed();
    let body = client.call(Command::DeviceGetInfo, &[0; 16]).expect("info");
    let (info, _) = take::<DeviceInfoBody>(Command::DeviceGetInfo, &body).expect("whole");
    assert_eq!((info.argsz.get(), info.flags.get()), (16, 3));
    assert_eq!((info.regions.get(), info.irqs.get()), (3, 2));
    let mut region = |index: u32, argsz: u32| {
        let request = RegionInfoBody {
            argsz: argsz.into(),
            flags: 0.into(),
            index: index.into(),
            cap_offset: 0.into(),
            size: 0.into(),
            offset: 0.into(),
        };
        client.call(Command::DeviceGetRegionInfo, request.as_bytes())
    };
    let decode = |body: &[u8]| {
        let (info, chain) =
            take::<RegionInfoBody>(Command::DeviceGetRegionInfo, body).expect("whole");
        (
            info.argsz.get(),
            info.flags.get(),
            info.cap_offset.get(),
            info.size.get(),
            chain.len(),
        )
    };
    let flags = REGION_READ | REGION_WRITE | REGION_CAPS;
    let short = region(0, 32).expect("region 0");
    assert_eq!(
        decode(&short),
        (48, flags, 32, 64, 0),
        "no room for the capability"
    );
    let whole = region(0, 48).expect("region 0");
    assert_eq!(decode(&whole), (48, flags, 32, 64, 16));
    assert_eq!(
        whole[32..34],
        REGION_CAP_TYPE.to_ne_bytes(),
        "without a file, its type alone"
    );
    assert_eq!(decode(&region(2, 48).expect("absent")), (32, 0, 0, 0, 0));
    assert_eq!(region(3, 48), Err(libc::EINVAL));
    let mut irq = |index: u32| {
        let request = IrqInfoBody {
            argsz: IrqInfoBody::BYTES.into(),
            flags: 0.into(),
            index: index.into(),
            count: 0.into(),
        };
        let body = client.call(Command::DeviceGetIrqInfo, request.as_bytes())?;
        let (info, _) = take::<IrqInfoBody>(Command::DeviceGetIrqInfo, &body).expect("whole");
        Ok((info.flags.get(), info.count.get()))
    };
    assert_eq!(
        (irq(0), irq(1), irq(2)),
        (Ok((1, 0)), Ok((1, 4)), Err(libc::EINVAL))
    );
    assert!(matches!(client.end(), (Ok(ClientEnd::HungUp), calls) if calls.is_empty()));
}

#[test]
fn the_device_gets_only_accesses_within_its_regions() {
    let mut client = TestClient::agreed();
    let write = [access(0, 4, 2).as_bytes(), b"ab"].concat();
    let reply = client.call(Command::RegionWrite, &write).expect("written");
    assert_eq!(reply, access(0, 4, 2).as_bytes());
    let reply = client.call(Command::RegionRead, access(0, 4, 2).as_bytes());
    assert_eq!(reply, Ok([access(0, 4, 2).as_bytes(), b"ab"].concat()));
    let short = client.call(Command::RegionRead, access(0, 60, 4).as_bytes());
    assert_eq!(short, Ok([access(0, 60, 3).as_bytes(), &[0; 3]].concat()));
    for (region, offset, count, errno) in [
        (0, 64, 1, libc::EINVAL),
        (0, 63, 2, libc::EINVAL),
        (0, u64::MAX, 1, libc::EINVAL),
        (2, 0, 0, libc::EINVAL),
        (3, 0, 1, libc::EINVAL),
        (1, 0, MAX_DATA + 1, libc::E2BIG),
    ] {
        let reply = client.call(
            Command::RegionRead,
            access(region, offset, count).as_bytes(),
        );
        assert_eq!(reply, Err(errno), "{region} {offset:#x} {count}");
    }
    let read_only = [access(1, 0, 1).as_bytes(), &[0]].concat();
    assert_eq!(
        client.call(Command::RegionWrite, &read_only),
        Err(libc::EPERM)
    );
    let entry = |offset: u64, count: u32, byte: u8| WriteOneBody {
        offset: offset.into(),
        region: 0.into(),
        count: count.into(),
        data: [byte; 8],
    };
    for (entries, expected) in [
        (
            [entry(0, 1, 1), entry(1, 1, 0xff), entry(2, 1, 2)],
            Ok(1u64),
        ),
        (
            [entry(0, 9, 1), entry(1, 1, 1), entry(2, 1, 1)],
            Err(libc::EINVAL),
        ),
    ] {
        let count = WriteMultiBody { count: 3.into() };
        let entries = entries.map(|e| e.as_bytes().to_vec()).concat();
        let reply = client.call(
            Command::RegionWriteMulti,
            &[count.as_bytes(), &entries].concat(),
        );
        assert_eq!(reply, expected.map(|n| n.to_ne_bytes().to_vec()));
    }
    let (_, calls) = client.end();
    assert_eq!(calls, ["read 0 0x4 2", "read 0 0x3c 4"]);
}

#[test]
fn the_device_gets_only_interrupts_that_it_has() {
    let mut client = TestClient::agreed();
    let trigger = IRQ_ACTION_TRIGGER;
    for (flags, start, count, data) in [
        (IRQ_DATA_NONE | trigger, 0, 0, &[][..]),
        (IRQ_DATA_NONE | IRQ_ACTION_MASK, 1, 3, &[]),
        (IRQ_DATA_BOOL | trigger, 2, 2, &[0, 1]),
        (IRQ_DATA_EVENTFD | trigger, 0, 2, &[]),
    ] {
        let body = set_irqs(flags, 1, start, count, data);
        assert_eq!(
            client.call(Command::DeviceSetIrqs, &body),
            Ok(Vec::new()),
            "{flags:#x}"
        );
    }
    for (flags, index, start, count) in [
        (IRQ_DATA_NONE | trigger, 2, 0, 1),
        (IRQ_DATA_NONE | trigger, 0, 0, 1),
        (IRQ_DATA_NONE | trigger, 1, 1, 4),
        (IRQ_DATA_NONE | trigger, 1, u32::MAX, 2),
        (IRQ_DATA_NONE | IRQ_ACTION_MASK, 1, 0, 0),
        (IRQ_DATA_NONE | IRQ_ACTION_MASK | trigger, 1, 0, 1),
        (IRQ_DATA_NONE, 1, 0, 1),
        (trigger, 1, 0, 1),
        (IRQ_DATA_NONE | IRQ_DATA_EVENTFD | trigger, 1, 0, 1),
        (IRQ_DATA_NONE | trigger | 1 << 6, 1, 0, 1),
    ] {
        let body = set_irqs(flags, index, start, count, &[]);
        let reply = client.call(Command::DeviceSetIrqs, &body);
        assert_eq!(
            reply,
            Err(libc::EINVAL),
            "{flags:#x} {index} {start} {count}"
        );
    }
    let (_, calls) = client.end();
    let expected = [
        "Trigger 1 from 0: disable",
        "Mask 1 from 1: all 3",
        "Trigger 1 from 2: chosen [0, 1]",
        "Trigger 1 from 0: eventfds [false, false]",
    ];
    assert_eq!(calls, expected);
}

#[test]
fn the_device_decides_on_windows_and_resets() {
    let mut client = TestClient::agreed();
    let map = |address: u64| DmaMapBody {
        argsz: DmaMapBody::BYTES.into(),
        flags: 3.into(),
        offset: 0.into(),
        address: address.into(),
        size: 0x1000.into(),
    };
    assert_eq!(
        client.call(Command::DmaMap, map(0x1000).as_bytes()),
        Ok(Vec::new())
    );
    assert_eq!(
        client.call(Command::DmaMap, map(0).as_bytes()),
        Err(libc::ENOSPC)
    );
    let unmap = DmaUnmapBody {
        argsz: DmaUnmapBody::BYTES.into(),
        flags: 0.into(),
        address: 0x1000.into(),
        size: 0x1000.into(),
    };
    let reply = client.call(Command::DmaUnmap, unmap.as_bytes());
    assert_eq!(reply, Ok(unmap.as_bytes().to_vec()));
    assert_eq!(client.call(Command::DeviceReset, &[]), Ok(Vec::new()));
    assert_eq!(
        client.call(Command::DeviceFeature, &[0; 8]),
        Err(libc::ENOTSUP)
    );
    let no_reply = Header {
        kind: Kind::Command { no_reply: true },
        ..Header::command(1, Command::DeviceReset, 0)
    };
    client.send(&no_reply.encode());
    assert_eq!(
        client.call(Command::DeviceReset, &[]),
        Ok(Vec::new()),
        "the next reply"
    );
    let (_, calls) = client.end();
    let maps = [
        "map 0x1000, file false",
        "map 0x0, file false",
        "unmap 0x1000",
    ];
    assert_eq!(calls[..3], maps);
    assert_eq!(calls[3..], ["reset"; 3]);
}

#[test]
fn clients_that_violate_the_protocol_are_cut_off() {
    let message = |command, body: &[u8]| Header::command(1, command, 0).with_body(body);
    let read = message(Command::RegionRead, access(0, 0, 1).as_bytes());
    let mut early = TestClient::new(false);
    early.send(&read);
    assert!(matches!(early.end().0, Err(ServeError::Protocol(_))));
    let dma_read = message(Command::DmaRead, &[0; 16]);
    let reply = Header::command(1, Command::DmaRead, 0)
        .reply_to(0)
        .with_body(&[0; 16]);
    let short = message(Command::RegionRead, &[0; 15]);
    for (bad, why) in [
        (message(Command::Version, &version_body()), "Protocol"),
        (dma_read, "ServerCommand"),
        (reply, "Protocol"),
        (short, "Malformed"),
        (b"this is not a message".to_vec(), "Socket"),
    ] {
        let mut client = TestClient::agreed();
        client.send(&bad);
        let outcome = client.end().0;
        let found = format!("{:?}", outcome.expect_err("cut off"));
        assert!(found.starts_with(why), "{found}");
    }
}

#[test]
fn a_device_may_send_commands_and_gets_the_replies() {
    let mut client = TestClient::new(true);
    let (read, body) = client.receive();
    assert_eq!((read.id, read.command), (77, Command::DmaRead.number()));
    assert!(client.call(Command::Version, &version_body()).is_ok());
    client.send(&read.reply_to(0).with_body(&[&body[..], b"data"].concat()));
    assert!(client.call(Command::DeviceReset, &[]).is_ok());
    let unexpected = Header { id: 78, ..read };
    client.send(&unexpected.reply_to(0).with_body(&body));
    let (outcome, calls) = client.end();
    assert!(matches!(outcome, Err(ServeError::Protocol(_))));
    assert_eq!(calls, ["reply 77: 20 bytes", "reset", "reply 78: 16 bytes"]);
}

#[test]
fn a_stopped_server_returns() {
    let client = TestClient::agreed();
    client.signal.stop().expect("signalled");
    let (outcome, _) = client.server.join().expect("the server");
    assert!(matches!(outcome, Ok(ClientEnd::Stopped)));
}

#[test]
fn clients_are_served_one_after_the_other_and_counted() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a listener");
    let (sender, released) = channel();
    let device = Box::new(Registers::new(sender));
    let server = DeviceServer::start(Role::Export, listener, device).expect("a server");
    let status = server.status();
    let hello = Header::command(1, Command::Version, 0).with_body(&version_body());
    for garbage in [false, true] {
        let mut stream = UnixStream::connect(&path).expect("connected");
        stream.write_all(&hello).expect("sent");
        stream
            .read_exact(&mut [0; HEADER_BYTES])
            .expect("an answer");
        assert!(status.is_connected());
        if garbage {
            stream.write_all(&[0xff; HEADER_BYTES]).expect("sent");
            stream.read_to_end(&mut Vec::new()).expect("the end");
        }
        drop(stream);
        let calls = released.recv_timeout(Duration::from_secs(20));
        assert_eq!(calls.expect("released").len(), 1);
    }
    let _idle = UnixStream::connect(&path).expect("connected");
    while status.clients.get() < 3 {
        thread::sleep(Duration::from_millis(1));
    }
    drop(server);
    assert_eq!(released.recv().expect("released").len(), 0);
    assert_eq!((status.clients.get(), status.cut_offs.get()), (3, 1));
    assert!(!status.is_connected());
}
