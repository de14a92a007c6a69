//! A vfio-user client with guest memory, and the driver of the device behind it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::common::daemon::Daemon;
use crate::common::memory::{Memory, Region, memfd};
use crate::common::ring::{Desc, NEXT, Queue, WRITE};
use crate::common::wire::{self, TAIL};
use crate::connection::{
    Connection, DMA_MAP, DMA_UNMAP, Msg, REGION_READ, REGION_WRITE, SET_IRQS, VERSION, dma_map,
    dma_unmap, irqs, region, version_body,
};

/// Three endpoints, in bypass mode at boot.
pub const CONFIG: &str = "address = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\n\
                          [[endpoint]]\naddress = '00:07.0'\n[[endpoint]]\naddress = '00:08.0'\n";
/// The region of the PCI configuration space.
pub const SPACE: u32 = 7;
/// The kind of MSI-X interrupts.
pub const MSIX: u32 = 2;
/// DMA_MAP: the device may read and write.
pub const RW: u32 = 3;
/// SET_IRQS: eventfds, signalled by the device.
pub const EVENTS: u32 = 4 | 0x20;
pub const RAM: u64 = 4 << 20;
/// Where the rings and the buffers of requests are.
const RINGS: [u64; 2] = [0x1_0000, 0x8_0000];
const BUFFERS: u64 = 0x10_0000;
/// Where the notification address of the request queue is in BAR 0. [`Vm::kick`] computes it as a driver does.
pub const NOTIFY_REQUESTS: u64 = 0x3000;
/// Where the buffer of a fault is, and its length.
const EVENT_BUFFER: u64 = 0x30_0000;
const EVENT_BYTES: usize = 24;
pub const POISON: u8 = 0xa5;

/// A structure that a capability names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Structure {
    pub bar: u32,
    pub offset: u64,
    pub len: u64,
}

/// A client that has negotiated.
pub struct Client {
    pub connection: Connection,
}

impl Client {
    pub fn connect(daemon: &Daemon) -> Self {
        let mut connection = Connection::new(daemon.stream());
        let text = r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576}}"#;
        let answer = connection.call(VERSION, &version_body(text), &[]);
        assert_eq!(answer.errno(), 0);
        Self { connection }
    }

    pub fn read(&mut self, index: u32, at: u64, len: u32) -> u64 {
        let bytes = self.read_bytes(index, at, len);
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(&bytes);
        u64::from_le_bytes(word)
    }

    /// Fails the test if the reply is a refusal or has another length.
    pub fn read_bytes(&mut self, index: u32, at: u64, len: u32) -> Vec<u8> {
        let reply = self
            .connection
            .call(REGION_READ, &region(at, index, len, &[]), &[]);
        assert_eq!(reply.errno(), 0, "{index} {at:#x} {len}");
        assert_eq!(reply.body.len(), 16 + len as usize);
        reply.body[16..].to_vec()
    }

    pub fn write(&mut self, index: u32, at: u64, data: &[u8]) {
        let body = region(at, index, data.len() as u32, data);
        let reply = self.connection.call(REGION_WRITE, &body, &[]);
        assert_eq!(reply.errno(), 0, "{index} {at:#x} {data:x?}");
        assert_eq!(reply.body.len(), 16);
    }

    pub fn map(&mut self, body: &[u8], fds: &[BorrowedFd<'_>]) -> i32 {
        self.connection.call(DMA_MAP, body, fds).errno()
    }

    pub fn unmap(&mut self, address: u64, size: u64) -> Msg {
        self.connection
            .call(DMA_UNMAP, &dma_unmap(address, size), &[])
    }

    pub fn set_irqs(&mut self, body: &[u8], fds: &[BorrowedFd<'_>]) -> i32 {
        self.connection.call(SET_IRQS, body, fds).errno()
    }

    /// The virtio structures, by `cfg_type`, and the multiplier of the notification structure.
    pub fn structures(&mut self) -> (Vec<(u8, Structure)>, u64) {
        let (mut found, mut multiplier) = (Vec::new(), 0);
        let mut at = self.read(SPACE, 0x34, 1);
        while at != 0 {
            let head = self.read_bytes(SPACE, at, 16);
            if head[0] == 9 {
                let word =
                    |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
                let structure = Structure {
                    bar: head[4].into(),
                    offset: word(8).into(),
                    len: word(12).into(),
                };
                found.push((head[3], structure));
                if head[3] == 2 {
                    multiplier = self.read(SPACE, at + 16, 4);
                }
            }
            at = head[1].into();
        }
        (found, multiplier)
    }
}

/// A VM: a client, its memory, and the driver.
pub struct Vm {
    pub client: Client,
    pub memory: Memory,
    pub requests: Queue,
    pub events: Queue,
    pub vectors: Vec<OwnedFd>,
    common: Structure,
    notify: Structure,
    pub config: Structure,
    multiplier: u64,
    pub kicks: u64,
}

impl Vm {
    /// A VM with RAM whose driver has not touched the device.
    pub fn new(daemon: &Daemon) -> Self {
        let mut client = Client::connect(daemon);
        let file = memfd(RAM);
        assert_eq!(client.map(&dma_map(RW, 0, 0, RAM), &[file.as_fd()]), 0);
        let memory = Memory {
            regions: vec![Region::of_file(0, RAM, file.into(), 0)],
        };
        let (structures, multiplier) = client.structures();
        let of = |kind: u8| {
            let found = structures.iter().find(|(k, _)| *k == kind);
            found.expect("the structure").1
        };
        let mut vectors = Vec::new();
        for vector in 0..3 {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("made");
            let body = irqs(EVENTS, MSIX, vector, 1);
            assert_eq!(client.set_irqs(&body, &[event.as_fd()]), 0);
            vectors.push(event);
        }
        Self {
            common: of(1),
            notify: of(2),
            config: of(4),
            client,
            memory,
            requests: Queue::new(0, 64, RINGS[0], true),
            events: Queue::new(1, 64, RINGS[1], true),
            vectors,
            multiplier,
            kicks: 0,
        }
    }

    /// A VM whose driver has started the device.
    pub fn started(daemon: &Daemon) -> Self {
        let mut vm = Self::new(daemon);
        vm.start(64);
        vm
    }

    pub fn read(&mut self, at: u64, len: u32) -> u64 {
        let Structure { bar, offset, .. } = self.common;
        self.client.read(bar, offset + at, len)
    }

    pub fn write(&mut self, at: u64, data: &[u8]) {
        let Structure { bar, offset, .. } = self.common;
        self.client.write(bar, offset + at, data);
    }

    pub fn status(&mut self) -> u64 {
        self.read(20, 1)
    }

    /// Resets the device, as a driver does first.
    pub fn reset(&mut self) {
        self.write(20, &[0]);
        assert_eq!(self.status(), 0);
    }

    /// The number of interrupts through each vector since the last call.
    pub fn take_interrupts(&self) -> [u64; 3] {
        std::array::from_fn(|vector| {
            let mut count = [0; 8];
            match rustix::io::read(&self.vectors[vector], &mut count) {
                Ok(_) => u64::from_ne_bytes(count),
                Err(_) => 0,
            }
        })
    }

    /// Gives the device a buffer for a fault.
    pub fn post_event_buffer(&mut self) {
        self.memory.write(EVENT_BUFFER, &[POISON; EVENT_BYTES]);
        let desc = Desc::new(EVENT_BUFFER, EVENT_BYTES as u32, WRITE, 0);
        self.events.set_desc(&self.memory, 0, desc);
        self.events.enable_notification(&self.memory);
        self.events.publish(&self.memory, 0);
        if self.events.kick(&self.memory) {
            self.kick(1);
        }
    }

    /// The bytes of that buffer.
    pub fn event_buffer(&self) -> Vec<u8> {
        self.memory.read(EVENT_BUFFER, EVENT_BYTES)
    }

    /// Sets the device up with rings of `size` entries, as a stock driver does.
    pub fn start(&mut self, size: u16) {
        // Memory and bus master; MSI-X.
        self.client.write(SPACE, 4, &[6, 0]);
        self.client.write(SPACE, 0x42, &[0, 0x80]);
        self.reset();
        self.write(20, &[1]);
        self.write(20, &[3]);
        let mut offered = 0;
        for select in 0..2u32 {
            self.write(0, &select.to_le_bytes());
            offered |= self.read(4, 4) << (32 * select);
        }
        assert_ne!(offered & wire::F_VERSION_1, 0);
        for select in 0..2u32 {
            self.write(8, &select.to_le_bytes());
            self.write(12, &(offered >> (32 * select)).to_le_bytes()[..4]);
        }
        self.write(20, &[11]);
        assert_eq!(self.status(), 11);
        self.write(16, &[0, 0]);
        assert_eq!(self.read(16, 2), 0);
        self.requests = Queue::new(0, size, RINGS[0], true);
        self.events = Queue::new(1, size, RINGS[1], true);
        self.requests.reset(&self.memory);
        self.events.reset(&self.memory);
        for (queue, vector) in [(0u16, 1u16), (1, 2)] {
            let ring = if queue == 0 {
                &self.requests
            } else {
                &self.events
            };
            let addresses = [ring.desc, ring.avail, ring.used];
            self.write(22, &queue.to_le_bytes());
            assert_eq!(self.read(24, 2), 1024);
            self.write(24, &size.to_le_bytes());
            self.write(26, &vector.to_le_bytes());
            assert_eq!(self.read(26, 2), u64::from(vector));
            for (at, address) in [32, 40, 48].into_iter().zip(addresses) {
                self.write(at, &address.to_le_bytes()[..4]);
                self.write(at + 4, &address.to_le_bytes()[4..]);
            }
            self.write(28, &[1, 0]);
            assert_eq!(self.read(28, 2), 1);
        }
        self.write(20, &[15]);
        assert_eq!(self.status(), 15);
    }

    /// Notifies the device of a queue.
    pub fn kick(&mut self, queue: u16) {
        self.write(22, &queue.to_le_bytes());
        let at = self.notify.offset + self.read(30, 2) * self.multiplier;
        self.client.write(self.notify.bar, at, &queue.to_le_bytes());
        self.kicks += 1;
    }

    /// Notifies the device of the request queue, with one message.
    pub fn kick_requests(&mut self) {
        self.client.write(0, NOTIFY_REQUESTS, &[0, 0]);
        self.kicks += 1;
    }

    /// Puts a request into slot `slot` of the ring. Notifies the device if it asks for that.
    pub fn publish(&mut self, slot: u16, readable: &[u8], writable: usize) {
        let buffer = BUFFERS + 0x1000 * u64::from(slot);
        self.memory.write(buffer, readable);
        self.memory.write(buffer + 0x800, &vec![POISON; writable]);
        let head = 2 * slot;
        let first = Desc::new(buffer, readable.len() as u32, NEXT, head + 1);
        self.requests.set_desc(&self.memory, head, first);
        let second = Desc::new(buffer + 0x800, writable as u32, WRITE, 0);
        self.requests.set_desc(&self.memory, head + 1, second);
        self.requests.publish(&self.memory, head);
        if self.requests.kick(&self.memory) {
            self.kick(0);
        }
    }

    /// Makes a request and waits for its answer. Returns what the device has written.
    pub fn request(&mut self, daemon: &Daemon, readable: &[u8], writable: usize) -> Vec<u8> {
        self.publish(0, readable, writable);
        daemon.wait_for("an answer", || self.requests.has_used(&self.memory));
        let used = self.requests.take_used(&self.memory);
        assert_eq!(used, Some((0, writable as u32)));
        self.memory.read(BUFFERS + 0x800, writable)
    }

    /// The status of a request without other output.
    pub fn call(&mut self, daemon: &Daemon, readable: &[u8]) -> u8 {
        self.request(daemon, readable, TAIL)[0]
    }
}
