//! The server with a small device, over a socket pair and over a listener.

mod commands;
mod connection;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use zerocopy::IntoBytes;

use super::{
    ClientChannel, ClientEnd, ClientError, DeviceSummary, IrqKind, IrqSet, IrqSetData,
    RegionCapability, ServedDevice, ServedRegion, ServerSignal, serve_client,
};
use crate::process::event_loop::EventLoop;
use crate::vfio_user::message::{
    Command, DEVICE_PCI, DEVICE_RESET, DmaAccessBody, DmaMapBody, DmaUnmapBody, HEADER_BYTES,
    Header, Kind, MAX_DATA, REGION_CAP_SPARSE_MMAP, REGION_CAP_TYPE, REGION_READ, REGION_WRITE,
    RegionAccessBody,
};
use crate::vfio_user::version::{Capabilities, Version};

/// Bytes of region 0. The client may write region 0 but not region 1, and region 2 is absent.
const REGISTERS: usize = 64;

/// A device that records the calls of the server.
struct RecordingRegisters {
    bytes: Vec<u8>,
    regions: Vec<ServedRegion>,
    calls: Vec<String>,
    /// It sends commands, and this is the client's connection.
    channel: Option<Arc<ClientChannel>>,
    /// Gets the calls when the client has gone.
    released: Sender<Vec<String>>,
}

impl RecordingRegisters {
    fn new(released: Sender<Vec<String>>) -> Self {
        let capability = |id| RegionCapability {
            id,
            version: 1,
            data: vec![7; 4],
        };
        let region = |flags, size| ServedRegion {
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
                ServedRegion::default(),
            ],
            calls: Vec::new(),
            channel: None,
            released,
        }
    }
}

impl ServedDevice for RecordingRegisters {
    fn name(&self) -> &str {
        "registers"
    }

    fn negotiate(&mut self, client: &Version, answer: &mut Capabilities) -> Result<(), String> {
        let fds = client.capabilities.max_msg_fds;
        self.calls.push(format!("negotiate {fds:?}"));
        answer.max_msg_fds = Some(5);
        Ok(())
    }

    fn info(&self) -> DeviceSummary {
        DeviceSummary {
            flags: DEVICE_PCI | DEVICE_RESET,
            regions: 3,
            irqs: 2,
        }
    }

    fn region(&self, index: u32) -> Option<&ServedRegion> {
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
    server: JoinHandle<(Result<ClientEnd, ClientError>, Vec<String>)>,
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
            let mut device = RecordingRegisters::new(sender);
            device.channel = sends_commands.then(|| connection.clone());
            if sends_commands {
                let body = DmaAccessBody {
                    address: 0x1000.into(),
                    count: 4.into(),
                };
                let read = Header::command(77, Command::DmaRead, 0);
                connection.send(read.with_body(body.as_bytes()));
            }
            let mut events = EventLoop::new().expect("a set");
            let outcome = serve_client(&mut events, &connection, &mut device);
            device.release();
            (outcome, calls.recv().expect("the calls"))
        });
        Self {
            stream,
            signal,
            server,
        }
    }

    fn negotiated() -> Self {
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
    fn end(self) -> (Result<ClientEnd, ClientError>, Vec<String>) {
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
