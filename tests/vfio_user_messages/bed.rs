//! A guest's IOMMU with one emulated device: the core, the backend and its interposer. The tests take the roles of the
//! client and the servers.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_iommu::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::backends::MemorySlot;
use vhost_device_iommu::backends::vfio_user::{
    self, Deadlines, EmulatedDevice, Isolation, KeptDevice, Watch,
};
use vhost_device_iommu::faults::{Fault, FaultReason, FaultSink};
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Iommu, RequestError, Settings};
use vhost_device_iommu::page_table::Encoding;
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::process::life::Life;
use vhost_device_iommu::topology::{EndpointSpec, PciAddress, PciRange, ReservedRegions, Topology};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::connection::{
    Connection, DMA_MAP, DMA_UNMAP, Msg, REGION_READ, REGION_WRITE, RESET, SET_IRQS, VERSION,
    version_body,
};

/// The server's deadline.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// First guest-physical address of guest RAM.
pub const RAM: u64 = 0x10_0000;
/// Length of guest RAM in bytes.
pub const RAM_LEN: u64 = 0x40_0000;
/// Offset of guest RAM in its file.
pub const RAM_OFFSET: u64 = 0x3000;
pub const DOMAIN: DomainId = DomainId(1);
pub const SERVER_TEXT: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#;
pub const CLIENT_TEXT: &str = r#"{"capabilities":{"max_msg_fds":16,"max_dma_maps":65535,
    "max_data_xfer_size":1048576,"pgsizes":4096,"write_multiple":true}}"#;
/// The capabilities of a server that sends a socket for its commands.
const TWIN_TEXT: &str = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;

/// The faults that the backend has reported.
#[derive(Default)]
pub struct Faults(Mutex<Vec<Fault>>);

impl FaultSink for Faults {
    fn report(&self, fault: Fault) {
        self.0.lock().unwrap().push(fault);
    }
}

impl Faults {
    /// Takes the faults since the last call: reason and address.
    pub fn take(&self) -> Vec<(FaultReason, u64)> {
        let taken = std::mem::take(&mut *self.0.lock().unwrap());
        taken.into_iter().map(|f| (f.reason, f.address.0)).collect()
    }
}

/// The core with one emulated device whose endpoint is 00:06.0.
pub struct Bed {
    iommu: Mutex<Iommu>,
    pub faults: Arc<Faults>,
    pub watch: Watch,
    pub slot: MemorySlot,
    pub client_path: PathBuf,
    pub server_path: PathBuf,
    _folder: tempfile::TempDir,
}

/// A server that serves one connection in a thread of its own.
pub struct ScriptedServer {
    /// The messages received so far.
    pub received: Arc<Mutex<Vec<Msg>>>,
    pub thread: JoinHandle<()>,
}

impl Bed {
    pub fn new(isolation: Isolation) -> Self {
        Self::with_deadline(isolation, DEADLINE)
    }

    pub fn with_deadline(isolation: Isolation, deadline: Duration) -> Self {
        Self::with_deadlines(isolation, Deadlines::with_answer(deadline))
    }

    pub fn with_deadlines(isolation: Isolation, deadlines: Deadlines) -> Self {
        Self::with(isolation, deadlines, false, u64::MAX)
    }

    /// A bed whose servers are told up to `max_windows` windows.
    pub fn with_max_windows(isolation: Isolation, max_windows: u64) -> Self {
        let deadlines = Deadlines::with_answer(DEADLINE);
        Self::with(isolation, deadlines, false, max_windows)
    }

    /// A bed whose connections are kept for a later process. The keeper closes what it gets.
    pub fn kept(isolation: Isolation) -> Self {
        let (manager, ours) = UnixDatagram::pair().expect("sockets");
        std::thread::spawn(move || while manager.recv(&mut [0; 256]).is_ok_and(|len| len > 0) {});
        let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
        let life = Arc::new(Life::new(true));
        let kept = KeptDevice::open(&keeper, &life, endpoint(), "device", false);
        let deadlines = Deadlines::with_answer(DEADLINE);
        let kept = Some(kept.expect("memory"));
        Self::start(isolation, deadlines, false, u64::MAX, kept)
    }

    /// A bed whose clients take no refusal for an answer.
    pub fn answering_all_accesses() -> Self {
        let deadlines = Deadlines::with_answer(DEADLINE);
        Self::with(Isolation::Messages, deadlines, true, u64::MAX)
    }

    fn with(
        isolation: Isolation,
        deadlines: Deadlines,
        answers_all_accesses: bool,
        max_windows: u64,
    ) -> Self {
        Self::start(
            isolation,
            deadlines,
            answers_all_accesses,
            max_windows,
            None,
        )
    }

    fn start(
        isolation: Isolation,
        deadlines: Deadlines,
        answers_all_accesses: bool,
        max_windows: u64,
        kept: Option<KeptDevice>,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let client_path = folder.path().join("client");
        let server_path = folder.path().join("server");
        let faults = Arc::new(Faults::default());
        let device = EmulatedDevice {
            endpoint: endpoint(),
            name: "device".into(),
            server: server_path.clone(),
            isolation,
            max_windows,
            reserved: vec![range(0xfee0_0000, 0x10_0000)],
            deadlines,
            answers_all_accesses,
        };
        let listener = UnixListener::bind(&client_path).expect("a socket");
        let (backend, watch) =
            vfio_user::start_kept(device, listener, faults.clone(), kept).expect("a backend");
        let mut iommu = core_without_device();
        iommu
            .add_backend(backend, &[endpoint()])
            .expect("a backend of its own");
        let slot = ram();
        iommu.connect();
        iommu.set_memory(vec![slot.clone()]);
        Self {
            iommu: Mutex::new(iommu),
            faults,
            watch,
            slot,
            client_path,
            server_path,
            _folder: folder,
        }
    }

    pub fn endpoint(&self) -> EndpointId {
        endpoint()
    }

    /// Locks the core, as the worker does while it serves requests.
    pub fn iommu(&self) -> MutexGuard<'_, Iommu> {
        self.iommu.lock().unwrap()
    }

    pub fn attach(&self) {
        let mut iommu = self.iommu();
        iommu
            .attach(self.endpoint(), DOMAIN, false)
            .expect("attached");
    }

    /// Maps `len` bytes at `iova` to guest RAM from its offset `at`.
    pub fn map(&self, iova: u64, at: u64, len: u64, access: Access) -> Result<(), RequestError> {
        self.iommu().map(DOMAIN, &mapping(iova, at, len, access))
    }

    pub fn unmap(&self, iova: u64, len: u64) -> Result<(), RequestError> {
        self.iommu().unmap(DOMAIN, range(iova, len)).map(drop)
    }

    /// Writes to guest RAM at its offset `at`.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        let ram = self.slot.memory.as_volatile_slice();
        ram.write_slice(bytes, at as usize)
            .expect("inside guest RAM");
    }

    /// Reads guest RAM at its offset `at`.
    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let ram = self.slot.memory.as_volatile_slice();
        ram.read_slice(&mut bytes, at as usize)
            .expect("inside guest RAM");
        bytes
    }

    /// Listens as the device's server.
    pub fn listen(&self) -> UnixListener {
        let _ = std::fs::remove_file(&self.server_path);
        UnixListener::bind(&self.server_path).expect("a socket")
    }

    /// Connects a client, which sends nothing.
    pub fn connect(&self) -> Connection {
        Connection::new(UnixStream::connect(&self.client_path).expect("connected"))
    }

    /// A server that runs `script` (see [`start_scripted_server`]), and a client that has negotiated with it.
    pub fn pair(
        &self,
        script: impl FnMut(&mut Connection, &mut Msg) -> bool + Send + 'static,
    ) -> (Connection, ScriptedServer) {
        let listener = self.listen();
        let scripted = start_scripted_server(listener, script);
        (self.client(), scripted)
    }

    /// A client that has negotiated with the server that listens.
    pub fn client(&self) -> Connection {
        let mut client = self.connect();
        let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
        assert_eq!(answer.errno(), 0);
        client
    }

    /// A client and a server that have negotiated. The test sends all further messages.
    pub fn raw_pair(&self) -> (Connection, Connection) {
        self.raw_pair_with(SERVER_TEXT)
    }

    /// Like [`Self::raw_pair`]. `text` has the server's capabilities.
    pub fn raw_pair_with(&self, text: &str) -> (Connection, Connection) {
        self.negotiated(text, &[])
    }

    /// Like [`Self::raw_pair`]. The server has a socket for its commands, which comes last.
    pub fn raw_pair_with_twin(&self) -> (Connection, Connection, Connection) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let (client, server) = self.negotiated(TWIN_TEXT, &[theirs.as_fd()]);
        (client, server, Connection::new(ours))
    }

    /// A client and a server that have negotiated. The server sends these capabilities and descriptors.
    fn negotiated(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> (Connection, Connection) {
        let listener = self.listen();
        let mut client = self.connect();
        client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        let mut server = accept(&listener);
        let request = server.recv().expect("VERSION");
        server.reply(&request, &version_body(text), descriptors);
        let answer = client.recv().expect("an answer");
        // The server's descriptors are for the interposer.
        assert_eq!((answer.errno(), answer.fds.len()), (0, 0));
        (client, server)
    }
}

/// The endpoint of the beds: 00:06.0.
pub fn endpoint() -> EndpointId {
    let address = PciAddress::new(0, 0, 6, 0).expect("an address");
    address.endpoint_id()
}

/// The other endpoint of the beds: 00:07.0. It never has a backend. A domain that it is attached to stays.
pub fn neighbour() -> EndpointId {
    let address = PciAddress::new(0, 0, 7, 0).expect("an address");
    address.endpoint_id()
}

/// A core with [`endpoint`] and [`neighbour`]. They have no backend.
pub fn core_without_device() -> Iommu {
    let specs = [6, 7].map(|device| {
        let address = PciAddress::new(0, 0, device, 0).expect("an address");
        EndpointSpec {
            range: PciRange::new(address, address).expect("a range"),
            group: None,
            reserved: Vec::new(),
        }
    });
    let own = PciAddress::new(0, 0, 5, 0).expect("an address");
    let topology = Topology::new(own, ReservedRegions::default(), &specs).expect("a topology");
    let settings = Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 255,
        bypass_at_boot: false,
        arena_limit: 64 << 20,
        encoding: Encoding::default(),
    };
    Iommu::new(settings, topology).expect("a core")
}

/// A mapping of `len` bytes at `iova` to guest RAM from its offset `at`.
pub fn mapping(iova: u64, at: u64, len: u64, access: Access) -> Mapping {
    Mapping {
        range: range(iova, len),
        gpa: Gpa(RAM + at),
        access,
        mmio: false,
    }
}

pub fn range(first: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova(first), len).expect("not empty")
}

pub fn accept(listener: &UnixListener) -> Connection {
    Connection::new(listener.accept().expect("a connection").0)
}

/// Starts a server for one connection in a thread of its own. It calls `script` with each message. `script` returns
/// whether it has answered the message; if not, [`answer`] does.
pub fn start_scripted_server(
    listener: UnixListener,
    mut script: impl FnMut(&mut Connection, &mut Msg) -> bool + Send + 'static,
) -> ScriptedServer {
    let received = Arc::new(Mutex::new(Vec::new()));
    let log = received.clone();
    let thread = std::thread::spawn(move || {
        let mut server = accept(&listener);
        drop(listener);
        while let Some(mut msg) = server.recv() {
            // Locked before the reply: a test that has received the reply must find its command in the log.
            let mut log = log.lock().unwrap();
            if !script(&mut server, &mut msg) {
                answer(&mut server, &msg);
            }
            log.push(msg);
        }
    });
    ScriptedServer { received, thread }
}

/// Answers a command of the client or the interposer with success. Refuses all other commands with ENOTSUP.
pub fn answer(server: &mut Connection, msg: &Msg) {
    if msg.flags & 0x10 != 0 {
        return;
    }
    match msg.cmd {
        VERSION => server.reply(msg, &version_body(SERVER_TEXT), &[]),
        DMA_UNMAP => server.reply(msg, &msg.body, &[]),
        DMA_MAP | SET_IRQS | RESET => server.reply(msg, &[], &[]),
        REGION_WRITE => server.reply(msg, &msg.body[..16], &[]),
        REGION_READ => {
            let data = vec![msg.u64_at(0) as u8; msg.u32_at(12) as usize];
            server.reply(msg, &[&msg.body[..], &data].concat(), &[]);
        }
        _ => server.refuse(msg, libc::ENOTSUP.unsigned_abs()),
    }
}

impl ScriptedServer {
    /// `inspect` of each received command of this kind.
    pub fn each<T>(&self, cmd: u16, inspect: impl Fn(&Msg) -> T) -> Vec<T> {
        let received = self.received.lock().unwrap();
        received
            .iter()
            .filter(|m| m.cmd == cmd)
            .map(inspect)
            .collect()
    }

    /// First addresses of the present windows, in order.
    pub fn windows(&self) -> Vec<u64> {
        let mut windows = Vec::new();
        for msg in self.received.lock().unwrap().iter() {
            match msg.cmd {
                DMA_MAP => windows.push(msg.u64_at(16)),
                DMA_UNMAP => windows.retain(|w| *w != msg.u64_at(8)),
                _ => {}
            }
        }
        windows.sort_unstable();
        windows
    }
}

/// Waits until `holds` returns true. Fails the test with `what` after 20 s.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ram() -> MemorySlot {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(RAM_OFFSET + RAM_LEN).expect("a length");
    let metadata = file.metadata().expect("metadata");
    let identity = (metadata.dev(), metadata.ino());
    let file: Arc<File> = Arc::new(file);
    let backing = FileOffset::from_arc(file.clone(), RAM_OFFSET);
    let memory = MmapRegion::from_file(backing, RAM_LEN as usize).expect("mapped");
    MemorySlot {
        range: GpaRange::from_len(Gpa(RAM), RAM_LEN).expect("not empty"),
        memory: Arc::new(memory),
        file,
        offset: RAM_OFFSET,
        identity,
        block_len: 4096,
        is_shared_memory: true,
    }
}

/// An eventfd, as a client gives one for each interrupt.
pub fn event() -> OwnedFd {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    eventfd(0, flags).expect("an eventfd")
}
