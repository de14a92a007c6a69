//! A guest's IOMMU with one emulated device: the core, the backend and its interposer, between a
//! client and servers that a test plays.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::backends::MemorySlot;
use vhost_device_iommu::backends::vfio_user::{EmulatedDevice, Isolation, VfioUser};
use vhost_device_iommu::faults::{Fault, FaultReason, FaultSink};
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Iommu, RequestError, Settings};
use vhost_device_iommu::topology::{EndpointSpec, PciAddress, PciRange, ReservedRegions, Topology};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::connection::{
    Connection, DMA_MAP, DMA_UNMAP, Msg, REGION_READ, REGION_WRITE, RESET, SET_IRQS, VERSION,
    version_body,
};

/// What the device's server has to answer in.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// Where guest RAM begins, and its length.
pub const RAM: u64 = 0x10_0000;
pub const RAM_LEN: u64 = 0x40_0000;
/// Where in its file.
pub const RAM_OFFSET: u64 = 0x3000;
pub const DOMAIN: DomainId = DomainId(1);
pub const SERVER_TEXT: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#;
pub const CLIENT_TEXT: &str = r#"{"capabilities":{"max_msg_fds":16,"max_dma_maps":65535,
    "max_data_xfer_size":1048576,"pgsizes":4096,"write_multiple":true}}"#;

#[derive(Default)]
pub struct Faults(Mutex<Vec<Fault>>);

impl FaultSink for Faults {
    fn report(&self, fault: Fault) {
        self.0.lock().unwrap().push(fault);
    }
}

impl Faults {
    /// Those since the last call: why, and where.
    pub fn take(&self) -> Vec<(FaultReason, u64)> {
        let taken = std::mem::take(&mut *self.0.lock().unwrap());
        taken.into_iter().map(|f| (f.reason, f.address.0)).collect()
    }
}

pub struct Bed {
    iommu: Mutex<Iommu>,
    pub faults: Arc<Faults>,
    pub slot: MemorySlot,
    pub client_path: PathBuf,
    pub server_path: PathBuf,
    _folder: tempfile::TempDir,
}

/// Whether a script has dealt with a message; else it is answered as a server does that does
/// nothing in particular.
pub type Handled = bool;

/// A server's connection, played in a thread of its own.
pub struct Played {
    /// The commands that came.
    pub seen: Arc<Mutex<Vec<Msg>>>,
    pub thread: JoinHandle<()>,
}

impl Bed {
    pub fn new(isolation: Isolation) -> Self {
        Self::with_deadline(isolation, DEADLINE)
    }

    pub fn with_deadline(isolation: Isolation, deadline: Duration) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let client_path = folder.path().join("client");
        let server_path = folder.path().join("server");
        let address = PciAddress::new(0, 0, 6, 0).expect("an address");
        let faults = Arc::new(Faults::default());
        let device = EmulatedDevice {
            endpoint: address.endpoint_id(),
            name: "device".into(),
            server: server_path.clone(),
            isolation,
            reserved: vec![range(0xfee0_0000, 0x10_0000)],
            deadline,
        };
        let listener = UnixListener::bind(&client_path).expect("a socket");
        let backend = VfioUser::start(device, listener, faults.clone()).expect("a backend");
        let spec = EndpointSpec {
            range: PciRange::new(address, address).expect("a range"),
            group: None,
            reserved: Vec::new(),
        };
        let own = PciAddress::new(0, 0, 5, 0).expect("an address");
        let topology = Topology::new(own, ReservedRegions::default(), &[spec]).expect("fits");
        let settings = Settings {
            address_width: 48,
            page_sizes: PageMask::TABLE,
            last_domain: 255,
            bypass_at_boot: false,
            arena_limit: 64 << 20,
        };
        let mut iommu = Iommu::new(settings, topology).expect("a core");
        iommu
            .add_backend(Box::new(backend), &[address.endpoint_id()])
            .expect("goes together");
        let slot = ram();
        iommu.connect();
        iommu.set_memory(vec![slot.clone()]);
        Self {
            iommu: Mutex::new(iommu),
            faults,
            slot,
            client_path,
            server_path,
            _folder: folder,
        }
    }

    pub fn endpoint(&self) -> EndpointId {
        PciAddress::new(0, 0, 6, 0).expect("valid").endpoint_id()
    }

    /// The core, locked as it is while requests are served.
    pub fn iommu(&self) -> MutexGuard<'_, Iommu> {
        self.iommu.lock().unwrap()
    }

    pub fn attach(&self) {
        let mut iommu = self.iommu();
        iommu
            .attach(self.endpoint(), DOMAIN, false)
            .expect("attached");
    }

    /// Maps `len` bytes at `iova` to the RAM at `at` in it.
    pub fn map(&self, iova: u64, at: u64, len: u64, access: Access) -> Result<(), RequestError> {
        let mapping = Mapping {
            range: range(iova, len),
            gpa: Gpa(RAM + at),
            access,
            mmio: false,
        };
        self.iommu().map(DOMAIN, &mapping)
    }

    pub fn unmap(&self, iova: u64, len: u64) -> Result<(), RequestError> {
        self.iommu().unmap(DOMAIN, range(iova, len)).map(drop)
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        let ram = self.slot.memory.as_volatile_slice();
        ram.write_slice(bytes, at as usize).expect("inside");
    }

    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let ram = self.slot.memory.as_volatile_slice();
        ram.read_slice(&mut bytes, at as usize).expect("inside");
        bytes
    }

    pub fn listen(&self) -> UnixListener {
        let _ = std::fs::remove_file(&self.server_path);
        UnixListener::bind(&self.server_path).expect("a socket")
    }

    /// Connects a client, which says nothing.
    pub fn connect(&self) -> Connection {
        Connection::new(UnixStream::connect(&self.client_path).expect("connected"))
    }

    /// A client that has agreed with a server played by `script`.
    pub fn pair(
        &self,
        script: impl FnMut(&mut Connection, &mut Msg) -> Handled + Send + 'static,
    ) -> (Connection, Played) {
        let listener = self.listen();
        let played = play(listener, script);
        (self.client(), played)
    }

    /// A client that has agreed with whatever server there is.
    pub fn client(&self) -> Connection {
        let mut client = self.connect();
        let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
        assert_eq!(answer.errno(), 0);
        client
    }

    /// A client and a server that do nothing by themselves but agree.
    pub fn raw_pair(&self) -> (Connection, Connection) {
        self.raw_pair_with(SERVER_TEXT)
    }

    pub fn raw_pair_with(&self, text: &str) -> (Connection, Connection) {
        let listener = self.listen();
        let mut client = self.connect();
        client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        let mut server = accept(&listener);
        let asked = server.recv().expect("VERSION");
        server.reply(&asked, &version_body(text), &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        (client, server)
    }
}

pub fn range(first: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova(first), len).expect("not empty")
}

pub fn accept(listener: &UnixListener) -> Connection {
    Connection::new(listener.accept().expect("a connection").0)
}

/// Plays one connection of a server.
pub fn play(
    listener: UnixListener,
    mut script: impl FnMut(&mut Connection, &mut Msg) -> Handled + Send + 'static,
) -> Played {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let thread = std::thread::spawn(move || {
        let mut server = accept(&listener);
        drop(listener);
        while let Some(mut msg) = server.recv() {
            // Whoever looks after a reply has come finds its command here.
            let mut log = log.lock().unwrap();
            if !script(&mut server, &mut msg) {
                plainly(&mut server, &msg);
            }
            log.push(msg);
        }
    });
    Played { seen, thread }
}

/// Answers as a server does that does nothing in particular.
pub fn plainly(server: &mut Connection, msg: &Msg) {
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

impl Played {
    /// The commands of one kind, as what `look` makes of them.
    pub fn each<T>(&self, cmd: u16, look: impl Fn(&Msg) -> T) -> Vec<T> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|m| m.cmd == cmd).map(look).collect()
    }

    /// First addresses of the windows there are.
    pub fn windows(&self) -> Vec<u64> {
        let mut windows = Vec::new();
        for msg in self.seen.lock().unwrap().iter() {
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

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ram() -> MemorySlot {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(RAM_OFFSET + RAM_LEN).expect("grows");
    let metadata = file.metadata().expect("known");
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
        is_shared_memory: true,
    }
}
