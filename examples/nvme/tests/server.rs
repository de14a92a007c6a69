//! A client over a socket pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use vhost_device_iommu::vfio_user::message::{
    Command, HEADER_BYTES, Header, IrqSetBody, Kind, RegionAccessBody, WriteMultiBody, WriteOneBody,
};
use vhost_device_iommu::vfio_user::server::ClientError;
use vhost_device_iommu::vfio_user::socket::{Outbox, OutgoingFd};
use zerocopy::IntoBytes;

use crate::disk::Disk;
use crate::memory::Manner;
use crate::server::{Setup, serve};
use crate::test_access::TestAccess;

struct Client {
    stream: UnixStream,
    server: JoinHandle<Result<(), ClientError>>,
}

impl Client {
    fn new(manner: Manner) -> Self {
        let (stream, other) = UnixStream::pair().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let setup = Setup {
            disk: Arc::new(Disk::new(file).unwrap()),
            manner,
            test_access: Arc::new(TestAccess::default()),
        };
        let server = thread::spawn(move || serve(other, &setup));
        Self { stream, server }
    }

    fn negotiated(manner: Manner) -> Self {
        let mut client = Self::new(manner);
        let (kind, body) = client.ask(Command::Version, &[0; 4]);
        assert_eq!(kind, Kind::Reply);
        assert!(body.len() > 4);
        client
    }

    fn ask(&mut self, command: Command, body: &[u8]) -> (Kind, Vec<u8>) {
        self.ask_with(command, body, Vec::new())
    }

    fn ask_with(
        &mut self,
        command: Command,
        body: &[u8],
        descriptors: Vec<OutgoingFd>,
    ) -> (Kind, Vec<u8>) {
        let message = Header::command(7, command, 0).with_body(body);
        let mut outbox = Outbox::default();
        outbox.push(message, descriptors);
        outbox.flush(&self.stream).unwrap();
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).unwrap();
        let header = Header::decode(&head).unwrap();
        assert_eq!((header.id, header.command), (7, command.number()));
        let mut body = vec![0; header.body_len];
        self.stream.read_exact(&mut body).unwrap();
        (header.kind, body)
    }

    /// Waits until the server cuts the client off.
    fn cut_off(mut self) -> ClientError {
        let closed = self.stream.read_to_end(&mut Vec::new());
        let reset = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(closed.as_ref().is_ok_and(|n| *n == 0) || closed.is_err_and(|e| reset(&e)));
        self.server.join().unwrap().expect_err("cut off")
    }

    fn end(self) -> Result<(), ClientError> {
        drop(self.stream);
        self.server.join().unwrap()
    }
}

fn access(region: u32, offset: u64, count: u32) -> RegionAccessBody {
    RegionAccessBody {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    }
}

#[test]
fn regions_are_read_and_written_within_their_bounds() {
    let mut client = Client::negotiated(Manner::Messages);
    let (kind, body) = client.ask(Command::RegionRead, access(7, 0, 256).as_bytes());
    assert_eq!(kind, Kind::Reply);
    assert_eq!(body[16..][8..12], [1, 2, 8, 1], "an NVMe controller");
    let (_, body) = client.ask(Command::RegionRead, access(0, 8, 4).as_bytes());
    assert_eq!(body[16..], [0, 4, 1, 0]);
    for bad in [
        access(7, 0, 257),
        access(0, 0x4000, 1),
        access(0, u64::MAX, 4),
        access(1, 0, 4),
        access(99, 0, 0x10000),
    ] {
        let (kind, _) = client.ask(Command::RegionRead, bad.as_bytes());
        let expected = Kind::Refusal(libc::EINVAL.unsigned_abs());
        assert_eq!(kind, expected, "{bad:?}");
    }
    let one = |region: u32, offset: u64, data: [u8; 8], count: u32| WriteOneBody {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
        data,
    };
    let multi = [
        WriteMultiBody { count: 3.into() }.as_bytes().to_vec(),
        one(7, 4, [6, 0, 0, 0, 0, 0, 0, 0], 2).as_bytes().to_vec(),
        one(7, 4, [0xff; 8], 9).as_bytes().to_vec(),
        one(7, 4, [0; 8], 2).as_bytes().to_vec(),
    ];
    let (kind, body) = client.ask(Command::RegionWriteMulti, &multi.concat());
    assert_eq!(
        (kind, body[0]),
        (Kind::Reply, 1),
        "up to the first that fails"
    );
    let (_, body) = client.ask(Command::RegionRead, access(7, 4, 2).as_bytes());
    assert_eq!(body[16..], [6, 0]);
    client.end().expect("an ordinary end");
}

#[test]
fn interrupts_that_do_not_exist_are_refused() {
    let mut client = Client::negotiated(Manner::Messages);
    let set = |index: u32, start: u32, count: u32, flags: u32| IrqSetBody {
        argsz: 20.into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    for (good, body) in [
        (true, set(2, 0, 0, 0x21)),
        (true, set(2, 0, 9, 0x24)),
        (true, set(2, 8, 1, 0x21)),
        (true, set(0, 0, 0, 0x21)),
        (false, set(2, 8, 2, 0x24)),
        (false, set(2, u32::MAX, 2, 0x24)),
        (false, set(2, 0, 1, 0x25)),
        (false, set(2, 0, 1, 0x0c)),
        (false, set(0, 0, 1, 0x24)),
    ] {
        let (kind, _) = client.ask(Command::DeviceSetIrqs, body.as_bytes());
        assert_eq!(kind == Kind::Reply, good, "{body:?}");
    }
    client.end().expect("an ordinary end");
}

#[test]
fn a_full_interrupt_descriptor_keeps_nobody_waiting() {
    let mut client = Client::negotiated(Manner::Messages);
    let set = |flags: u32| IrqSetBody {
        argsz: 20.into(),
        flags: flags.into(),
        index: 2.into(),
        start: 0.into(),
        count: 1.into(),
    };
    let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    for (fd, good) in [(full, true), (reader.into(), false)] {
        let fds = vec![OutgoingFd::Owned(fd)];
        let (kind, _) = client.ask_with(Command::DeviceSetIrqs, set(0x24).as_bytes(), fds);
        assert_eq!(kind == Kind::Reply, good);
    }
    for _ in 0..3 {
        let (kind, _) = client.ask(Command::DeviceSetIrqs, set(0x21).as_bytes());
        assert_eq!(kind, Kind::Reply);
    }
    client.end().expect("an ordinary end");
}

#[test]
fn clients_that_violate_the_protocol_are_cut_off() {
    let region = access(7, 0, 4);
    let early = Header::command(1, Command::RegionRead, 0).with_body(region.as_bytes());
    let mut client = Client::new(Manner::Mapped);
    client.stream.write_all(&early).unwrap();
    assert!(matches!(client.cut_off(), ClientError::Protocol(_)));
    let version = Header::command(1, Command::Version, 0).with_body(&[0; 4]);
    let reply = Header::command(1, Command::DmaRead, 0).reply_to(0);
    let short = Header::command(1, Command::RegionRead, 0).with_body(&[0; 3]);
    for bad in [
        &version,
        &reply.with_body(&[0; 16]),
        &short,
        &b"not a message at all".to_vec(),
    ] {
        let mut client = Client::negotiated(Manner::Mapped);
        client.stream.write_all(bad).unwrap();
        client.cut_off();
    }
    let mut client = Client::negotiated(Manner::Mapped);
    client.stream.write_all(&early[..20]).unwrap();
    client.end().expect_err("the stream ends within a message");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_message_is_handled_or_the_client_is_cut_off(
        messages in proptest::collection::vec(
            (0..20u16, proptest::collection::vec(any::<u8>(), 0..80), any::<bool>()),
            1..20,
        ),
    ) {
        let mut client = Client::negotiated(Manner::Mapped);
        for (command, mut body, small) in messages {
            if small {
                // Small numbers, which are more often valid.
                body.iter_mut().enumerate().for_each(|(at, byte)| {
                    *byte = if at % 4 == 0 { *byte % 16 } else { 0 };
                });
            }
            let header = Header { command, ..Header::command(3, Command::Version, 0) };
            if client.stream.write_all(&header.with_body(&body)).is_err() {
                break;
            }
        }
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        let _ = client.stream.read_to_end(&mut Vec::new());
        let _ = client.server.join().unwrap();
    }
}
