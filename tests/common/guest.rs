//! A VMM and its guest's driver: negotiation, memory slots, rings, requests.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::daemon::{Daemon, connect};
use super::memory::{Memory, Region};
use super::ring::{Desc, INDIRECT, NEXT, Queue, WRITE};
use super::wire::{self, Config, Resv, TAIL};

/// The driver fills writable buffers with this byte, so that a test sees whether the device wrote anything.
pub const POISON: u8 = 0xa5;

/// RAM from address 0, which holds the buffers.
pub const LOW_RAM: u64 = 0;
/// Bytes of [`LOW_RAM`].
pub const LOW_LEN: u64 = 16 << 20;
/// A slot for the rings alone: the device's writes to wrong buffers do not reach them.
pub const RING_RAM: u64 = 0x4000_0000;
/// Bytes of [`RING_RAM`].
pub const RING_LEN: u64 = 8 << 20;
/// RAM above 4 GiB.
pub const HIGH_RAM: u64 = 0x1_0000_0000;
/// Bytes of [`HIGH_RAM`].
pub const HIGH_LEN: u64 = 8 << 20;

/// First byte of the area for request buffers.
const BUFFERS: u64 = 0x10_0000;
/// Bytes of [`BUFFERS`].
const BUFFERS_LEN: u64 = 8 << 20;

/// The time limit of a request. An UNMAP of 200 000 windows, and a MAP of 2^52 bytes in emulation, have taken more than 20 s
/// on a machine that was busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);

/// The features that a stock driver accepts.
pub const STOCK: u64 = wire::F_VERSION_1
    | wire::F_EVENT_IDX
    | wire::F_INPUT_RANGE
    | wire::F_DOMAIN_RANGE
    | wire::F_MAP_UNMAP
    | wire::F_PROBE
    | wire::F_MMIO
    | wire::F_BYPASS_CONFIG;

/// The choices of a VMM and its guest.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Features that the driver accepts if the device offers them.
    pub features: u64,
    /// Number of entries of each ring.
    pub queue_size: u16,
    /// Whether the VMM sends ADD_MEM_REG for each slot instead of one SET_MEM_TABLE.
    pub slots_one_by_one: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            features: STOCK,
            queue_size: 256,
            slots_one_by_one: false,
        }
    }
}

/// The descriptors of a request.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Lengths of the readable descriptors.
    pub readable: Vec<usize>,
    /// Lengths of the writable descriptors.
    pub writable: Vec<usize>,
    /// The tables that hold them.
    pub table: Table,
}

/// The tables that hold a request's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The ring's own table.
    Direct,
    /// An indirect table.
    Indirect,
    /// The ring's table for this many, then an indirect table for the others.
    Mixed(usize),
}

impl Layout {
    /// One readable and one writable descriptor.
    pub fn plain(readable: usize, writable: usize) -> Self {
        Self {
            readable: vec![readable],
            writable: vec![writable],
            table: Table::Direct,
        }
    }

    /// Descriptors of at most `size` bytes for the readable and the writable part.
    pub fn split(readable: usize, writable: usize, size: usize, table: Table) -> Self {
        let split = |len: usize| {
            let mut parts = vec![size; len / size];
            parts.extend((!len.is_multiple_of(size)).then_some(len % size));
            parts
        };
        Self {
            readable: split(readable),
            writable: split(writable),
            table,
        }
    }
}

/// The device's reply to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Used length.
    pub len: u32,
    /// The whole writable part.
    pub bytes: Vec<u8>,
}

impl Reply {
    /// The status. Fails the test unless the used length covers the whole writable part and the reserved bytes of
    /// the tail are zero.
    pub fn status(&self) -> u8 {
        assert_eq!(self.len as usize, self.bytes.len(), "used length");
        let tail = &self.bytes[self.bytes.len() - TAIL..];
        assert_eq!(tail[1..], [0; 3], "reserved bytes of the tail");
        tail[0]
    }

    /// Whether the device returned the chain with used length 0 and wrote nothing.
    pub fn is_untouched(&self) -> bool {
        self.len == 0 && self.bytes.iter().all(|&byte| byte == POISON)
    }
}

struct Pending {
    descs: Vec<u16>,
    writable: Vec<(u64, usize)>,
}

/// A VMM connected to the daemon, with a driver in its guest.
pub struct Guest {
    /// The vhost-user connection.
    pub frontend: Frontend,
    /// Guest memory.
    pub memory: Memory,
    /// Request queue.
    pub requests: Queue,
    /// Event queue.
    pub events: Queue,
    /// Features that the daemon offered.
    pub offered: u64,
    /// Features that the driver accepted.
    pub features: u64,
    /// Protocol features that the daemon offered.
    pub protocol: VhostUserProtocolFeatures,
    free: Vec<u16>,
    pending: HashMap<u16, Pending>,
    next_buffer: u64,
    event_buffers: HashMap<u16, (u64, usize)>,
    /// The indices at which the rings start next.
    pub bases: [u16; 2],
}

impl Guest {
    /// A stock guest whose driver runs.
    pub fn boot(daemon: &Daemon) -> Self {
        Self::boot_with(daemon, Setup::default())
    }

    /// A guest whose driver runs.
    pub fn boot_with(daemon: &Daemon, setup: Setup) -> Self {
        let mut guest = Self::connect(daemon, setup);
        guest.driver_ok();
        daemon.wait_for_driver();
        guest
    }

    /// Connects and negotiates, but starts no ring yet.
    pub fn connect(daemon: &Daemon, setup: Setup) -> Self {
        Self::connect_to(daemon.socket(), setup)
    }

    /// [`Self::connect`] to the daemon that listens at `socket`.
    pub fn connect_to(socket: impl AsRef<Path>, setup: Setup) -> Self {
        Self::connect_with(connect(socket.as_ref()), setup, Self::regions())
    }

    /// The memory of a guest.
    pub fn regions() -> Vec<Region> {
        vec![
            Region::new(LOW_RAM, LOW_LEN),
            Region::new(RING_RAM, RING_LEN),
            Region::new(HIGH_RAM, HIGH_LEN),
        ]
    }

    /// Negotiates over a connection. `regions` must contain [`RING_RAM`].
    pub fn connect_with(stream: UnixStream, setup: Setup, regions: Vec<Region>) -> Self {
        let mut frontend = Frontend::from_stream(stream, 2);
        frontend.set_owner().expect("SET_OWNER");
        let offered = frontend.get_features().expect("GET_FEATURES");
        assert_ne!(offered & wire::F_PROTOCOL, 0, "protocol features");
        let protocol = frontend.get_protocol_features().expect("protocol features");
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        frontend
            .set_protocol_features(protocol & wanted)
            .expect("SET_PROTOCOL_FEATURES");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let memory = Memory { regions };
        let infos: Vec<VhostUserMemoryRegionInfo> =
            memory.regions.iter().map(Region::info).collect();
        if setup.slots_one_by_one {
            for info in &infos {
                frontend.add_mem_region(info).expect("ADD_MEM_REG");
            }
        } else {
            frontend.set_mem_table(&infos).expect("SET_MEM_TABLE");
        }
        Self::behind(frontend, offered, protocol, memory, setup)
    }

    /// The guest of a VMM that has negotiated over `frontend`, by whatever messages. No ring runs yet.
    pub fn behind(
        frontend: Frontend,
        offered: u64,
        protocol: VhostUserProtocolFeatures,
        memory: Memory,
        setup: Setup,
    ) -> Self {
        let features = offered & setup.features;
        let event_idx = features & wire::F_EVENT_IDX != 0;
        let queue = |index: usize| {
            let base = RING_RAM + 0x20_0000 * index as u64;
            Queue::new(index, setup.queue_size, base, event_idx)
        };
        Self {
            frontend,
            memory,
            requests: queue(0),
            events: queue(1),
            offered,
            features,
            protocol,
            free: (0..setup.queue_size).rev().collect(),
            pending: HashMap::new(),
            next_buffer: BUFFERS,
            event_buffers: HashMap::new(),
            bases: [0; 2],
        }
    }

    /// Sends the messages of a VMM whose driver is ready: features, then both rings.
    pub fn driver_ok(&mut self) {
        self.accept_features();
        for index in 0..2 {
            self.start_ring(index);
        }
    }

    /// Accepts the features of the driver.
    pub fn accept_features(&mut self) {
        self.frontend
            .set_features(self.features | wire::F_PROTOCOL)
            .expect("SET_FEATURES");
    }

    /// Sets up and enables a ring. It begins at the base that the daemon returned when it was stopped, or at 0.
    pub fn start_ring(&mut self, index: usize) {
        self.set_up_ring(index);
        let front = &mut self.frontend;
        front.set_vring_enable(index, true).expect("enable");
    }

    /// Sets up a ring, without enabling it.
    pub fn set_up_ring(&mut self, index: usize) {
        let queue = if index == 0 {
            &self.requests
        } else {
            &self.events
        };
        let base = self.bases[index];
        let front = &mut self.frontend;
        front.set_vring_num(index, queue.size).expect("num");
        front.set_vring_base(index, base).expect("base");
        front.set_vring_addr(index, &queue.config()).expect("addr");
        front.set_vring_call(index, &queue.call).expect("call");
        front.set_vring_kick(index, &queue.kick).expect("kick");
    }

    /// Stops both rings, as a VMM does to pause or reset the guest. Returns the daemon's bases.
    pub fn stop_rings(&mut self) -> [u16; 2] {
        self.bases = [0, 1].map(|index| {
            // As QEMU and crosvm do.
            self.frontend
                .set_vring_enable(index, false)
                .expect("disabled");
            let base = self.frontend.get_vring_base(index).expect("a ring base");
            u16::try_from(base).expect("a ring index")
        });
        self.bases
    }

    /// Clears the driver's rings and buffers, as a reset of the guest does.
    pub fn clear_rings(&mut self) {
        self.requests.reset(&self.memory);
        self.events.reset(&self.memory);
        self.free = (0..self.requests.size).rev().collect();
        self.pending.clear();
        self.event_buffers.clear();
        self.bases = [0; 2];
    }

    /// Puts the driver's request ring at `index`, as if the driver had sent this many requests before.
    pub fn move_requests_to(&mut self, index: u16) {
        self.requests.move_to(&self.memory, index);
        self.bases[0] = index;
    }

    /// Stops and starts the rings as the VMM does when the guest is reset.
    pub fn reboot(&mut self) {
        self.stop_rings();
        self.clear_rings();
        self.driver_ok();
    }

    /// Adds a memory slot while the driver runs.
    pub fn add_region(&mut self, region: Region) {
        self.frontend
            .add_mem_region(&region.info())
            .expect("ADD_MEM_REG");
        self.memory.regions.push(region);
    }

    /// Removes the memory slot at `gpa` while the driver runs.
    pub fn remove_region(&mut self, gpa: u64) -> Region {
        let at = self.memory.regions.iter().position(|slot| slot.gpa == gpa);
        let region = self.memory.regions.remove(at.expect("a slot there"));
        self.frontend
            .remove_mem_region(&region.info())
            .expect("REM_MEM_REG");
        region
    }

    /// Reads the bytes `offset..offset + len` of the configuration space.
    pub fn config_bytes(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let (_, payload) = self
            .frontend
            .get_config(
                offset,
                len,
                VhostUserConfigFlags::empty(),
                &vec![0; len as usize],
            )
            .unwrap_or_else(|error| panic!("GET_CONFIG {offset} {len}: {error}"));
        payload
    }

    /// Reads the configuration space.
    pub fn config(&mut self) -> Config {
        Config::parse(&self.config_bytes(0, wire::CONFIG_LEN))
    }

    /// Writes `bytes` to the configuration space at `offset`.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        self.frontend
            .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
            .expect("SET_CONFIG");
    }

    /// A buffer of `len` bytes of guest memory, aligned to 16. Buffers are reused after a while.
    pub fn buffer(&mut self, len: usize) -> u64 {
        let len = (len as u64).next_multiple_of(16);
        if self.next_buffer + len > BUFFERS + BUFFERS_LEN {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += len;
        at
    }

    /// Makes a request available without a kick. Returns its head.
    pub fn submit(&mut self, readable: &[u8], layout: &Layout) -> u16 {
        assert_eq!(layout.readable.iter().sum::<usize>(), readable.len());
        let mut chain = Vec::new();
        let mut at = 0;
        for &len in &layout.readable {
            let addr = self.buffer(len);
            self.memory.write(addr, &readable[at..at + len]);
            at += len;
            chain.push(Desc::new(addr, len as u32, 0, 0));
        }
        let mut writable = Vec::new();
        for &len in &layout.writable {
            let addr = self.buffer(len);
            self.memory.write(addr, &vec![POISON; len]);
            writable.push((addr, len));
            chain.push(Desc::new(addr, len as u32, WRITE, 0));
        }
        let direct = match layout.table {
            Table::Direct => chain.len(),
            Table::Indirect => 0,
            Table::Mixed(direct) => direct.min(chain.len()),
        };
        if direct < chain.len() {
            let rest = chain.split_off(direct);
            let table = self.buffer(16 * rest.len());
            let last = rest.len() - 1;
            for (index, mut desc) in rest.into_iter().enumerate() {
                if index < last {
                    desc.flags |= NEXT;
                    desc.next = index as u16 + 1;
                }
                self.memory.write(table + 16 * index as u64, &desc.bytes());
            }
            let len = 16 * (last as u32 + 1);
            chain.push(Desc::new(table, len, INDIRECT, 0));
        }
        let descs: Vec<u16> = (0..chain.len())
            .map(|_| self.free.pop().expect("a free descriptor"))
            .collect();
        for (index, mut desc) in chain.into_iter().enumerate() {
            if let Some(&next) = descs.get(index + 1) {
                desc.flags |= NEXT;
                desc.next = next;
            }
            self.requests.set_desc(&self.memory, descs[index], desc);
        }
        let head = descs[0];
        self.pending.insert(head, Pending { descs, writable });
        self.requests.publish(&self.memory, head);
        head
    }

    /// Notifies the device of the submitted requests.
    pub fn kick(&mut self) {
        self.requests.enable_notification(&self.memory);
        self.requests.kick(&self.memory);
    }

    /// Waits until the device returns a submitted request. Returns its head and the reply.
    pub fn complete(&mut self) -> (u16, Reply) {
        let (head, len) = self
            .wait_used(PATIENCE)
            .expect("the device returns the request in time");
        let head = u16::try_from(head).expect("a head");
        let pending = self.pending.remove(&head).expect("a head in flight");
        self.free.extend(&pending.descs);
        let mut bytes = Vec::new();
        for (addr, part) in pending.writable {
            bytes.extend(self.memory.read(addr, part));
        }
        (head, Reply { len, bytes })
    }

    /// Waits for a used entry of the request queue.
    pub fn wait_used(&mut self, patience: Duration) -> Option<(u32, u32)> {
        wait_used(&mut self.requests, &self.memory, patience)
    }

    /// Sends a request in a given layout and waits for its reply.
    pub fn request_in(&mut self, readable: &[u8], layout: &Layout) -> Reply {
        let head = self.submit(readable, layout);
        self.kick();
        let (back, reply) = self.complete();
        assert_eq!(head, back, "the device returned another chain");
        reply
    }

    /// Sends a request in the plain layout and waits for its reply.
    pub fn request(&mut self, readable: &[u8], writable: usize) -> Reply {
        self.request_in(readable, &Layout::plain(readable.len(), writable))
    }

    /// Sends a request whose writable part is the tail alone. Returns its status.
    pub fn call(&mut self, readable: &[u8]) -> u8 {
        self.request(readable, TAIL).status()
    }

    /// ATTACH to a translated domain.
    pub fn attach(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.call(&wire::attach(domain, endpoint, 0))
    }

    /// ATTACH to a bypass domain.
    pub fn attach_bypass(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.call(&wire::attach(domain, endpoint, wire::BYPASS))
    }

    /// DETACH.
    pub fn detach(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.call(&wire::detach(domain, endpoint))
    }

    /// MAP of `first..=last`.
    pub fn map(&mut self, domain: u32, first: u64, last: u64, gpa: u64, flags: u32) -> u8 {
        self.call(&wire::map(domain, first, last, gpa, flags))
    }

    /// MAP of a 4 KiB page for reading and writing.
    pub fn map_page(&mut self, domain: u32, iova: u64, gpa: u64) -> u8 {
        self.map(domain, iova, iova + 0xfff, gpa, wire::RW)
    }

    /// UNMAP of `first..=last`.
    pub fn unmap(&mut self, domain: u32, first: u64, last: u64) -> u8 {
        self.call(&wire::unmap(domain, first, last))
    }

    /// PROBE with room for `size` bytes of properties.
    pub fn probe_sized(&mut self, endpoint: u32, size: usize) -> Reply {
        self.request(&wire::probe(endpoint), size + TAIL)
    }

    /// PROBE as a driver sends it, with the size from the configuration space.
    pub fn probe(&mut self, endpoint: u32) -> Vec<Resv> {
        let size = self.config().probe_size as usize;
        let reply = self.probe_sized(endpoint, size);
        assert_eq!(reply.status(), wire::OK);
        wire::parse_properties(&reply.bytes[..size])
    }

    /// Writes the descriptors without checks, makes `head` available and waits for the device to return it.
    /// Returns the used length, or `None` if the device did not return the chain in time.
    pub fn try_raw_chain(
        &mut self,
        head: u16,
        descs: &[(u16, Desc)],
        patience: Duration,
    ) -> Option<u32> {
        for &(index, desc) in descs {
            self.requests.set_desc(&self.memory, index, desc);
        }
        self.requests.publish(&self.memory, head);
        self.kick();
        let (id, len) = self.wait_used(patience)?;
        assert_eq!(id, u32::from(head), "the device returned another chain");
        Some(len)
    }

    /// Like [`Self::try_raw_chain`], for chains that the device must return.
    pub fn raw_chain(&mut self, head: u16, descs: &[(u16, Desc)]) -> u32 {
        self.try_raw_chain(head, descs, PATIENCE)
            .unwrap_or_else(|| panic!("the device did not return the chain: {head} {descs:x?}"))
    }

    /// Makes a buffer for a fault record available.
    pub fn post_event_buffer(&mut self, len: usize) {
        let addr = self.buffer(len);
        self.memory.write(addr, &vec![POISON; len]);
        let head = (0..self.events.size)
            .find(|head| !self.event_buffers.contains_key(head))
            .expect("a free descriptor");
        self.event_buffers.insert(head, (addr, len));
        let desc = Desc::new(addr, len as u32, WRITE, 0);
        self.events.set_desc(&self.memory, head, desc);
        self.events.publish(&self.memory, head);
        self.events.enable_notification(&self.memory);
        self.events.kick(&self.memory);
    }

    /// Waits for a fault record.
    pub fn take_event(&mut self, patience: Duration) -> Option<Reply> {
        let (head, len) = wait_used(&mut self.events, &self.memory, patience)?;
        let head = u16::try_from(head).expect("a head");
        let (addr, size) = self.event_buffers.remove(&head).expect("a posted buffer");
        let bytes = self.memory.read(addr, size);
        Some(Reply { len, bytes })
    }
}

/// Waits for a used entry. Polls without sleeping at first, then sleeps in between.
fn wait_used(queue: &mut Queue, memory: &Memory, patience: Duration) -> Option<(u32, u32)> {
    for _ in 0..200 {
        if let Some(entry) = queue.take_used(memory) {
            return Some(entry);
        }
        thread::yield_now();
    }
    let deadline = Instant::now() + patience;
    loop {
        if let Some(entry) = queue.take_used(memory) {
            return Some(entry);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_micros(50));
    }
}
