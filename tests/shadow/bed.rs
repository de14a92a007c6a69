//! A core with shadow endpoints, guest RAM, and reader processes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::backends::MemorySlot;
use vhost_device_iommu::backends::shadow::Shadow;
use vhost_device_iommu::faults::Fault;
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Iommu, Settings};
use vhost_device_iommu::page_table::Encoding;
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::process::socket::SocketRights;
use vhost_device_iommu::shadow::{
    Limits, Registry, ShadowEndpoint, ShadowReader, ShadowServer, ShadowSocket,
};
use vhost_device_iommu::topology::{
    EndpointSpec, ReservedKind, ReservedRegion, ReservedRegions, Topology,
};
use vm_memory::{FileOffset, MmapRegion};

/// The socket serves this endpoint.
pub const A: EndpointId = EndpointId(0x18);
pub const B: EndpointId = EndpointId(0x20);
/// The socket does not serve this endpoint.
pub const OTHER: EndpointId = EndpointId(0x28);
pub const D1: DomainId = DomainId(1);
pub const D2: DomainId = DomainId(2);
pub const PAGE: u64 = 4096;
/// Length of guest RAM, which begins at guest-physical address 0.
pub const RAM: u64 = 4 << 20;
/// A reserved region, which bypass mode does not reach.
pub const MSI: u64 = 0xfee0_0000;

/// A patience of the daemon that no reader exhausts, even on a busy machine.
pub const LONG: Duration = Duration::from_secs(60);

pub struct Bed {
    pub iommu: Iommu,
    pub registry: Arc<Registry>,
    pub server: Option<ShadowServer>,
    pub faults: Receiver<Fault>,
    fault_sender: Sender<Fault>,
    pub ram: Vec<MemorySlot>,
    pub folder: Arc<tempfile::TempDir>,
}

pub fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
}

pub fn mapping(iova: u64, bytes: u64, gpa: u64, access: Access) -> Mapping {
    Mapping {
        range: range(iova, iova + (bytes - 1)),
        gpa: Gpa(gpa),
        access,
        mmio: false,
    }
}

/// A slot of guest RAM in a file of its own.
pub fn slot(gpa: u64, bytes: u64) -> MemorySlot {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(bytes).expect("room");
    let file = Arc::new(file);
    let backing = FileOffset::from_arc(file.clone(), 0);
    let found = file.metadata().expect("a file");
    MemorySlot {
        range: GpaRange::from_len(Gpa(gpa), bytes).expect("not empty"),
        memory: Arc::new(MmapRegion::from_file(backing, bytes as usize).expect("mapped")),
        file,
        offset: 0,
        block_len: 4096,
        is_shared_memory: false,
        identity: (found.dev(), found.ino()),
    }
}

impl Bed {
    pub fn new() -> Self {
        Self::with(Limits {
            patience: Duration::from_millis(500),
            ..Limits::default()
        })
    }

    /// A bed whose daemon waits [`LONG`] for a reader.
    pub fn patient() -> Self {
        Self::with(Limits {
            patience: LONG,
            ..Limits::default()
        })
    }

    pub fn with(limits: Limits) -> Self {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        let mut bed = Self::before_serving(&folder, limits, vec![slot(0, RAM)]);
        bed.serve();
        bed
    }

    /// A bed whose socket will be in `folder`, with this guest RAM. It does not listen yet.
    pub fn before_serving(
        folder: &Arc<tempfile::TempDir>,
        limits: Limits,
        ram: Vec<MemorySlot>,
    ) -> Self {
        Self::kept(folder, limits, ram, Arc::new(Keeper::none()))
    }

    /// The same, with a keeper of descriptors.
    pub fn kept(
        folder: &Arc<tempfile::TempDir>,
        limits: Limits,
        ram: Vec<MemorySlot>,
        keeper: Arc<Keeper>,
    ) -> Self {
        let settings = Settings {
            address_width: 48,
            page_sizes: PageMask::TABLE,
            last_domain: 15,
            bypass_at_boot: false,
            arena_limit: 8 << 20,
            encoding: Encoding::default(),
        };
        let msi = ReservedRegion {
            range: range(MSI, MSI + 0xf_ffff),
            kind: ReservedKind::Msi,
        };
        let specs = [A, B, OTHER].map(|e| EndpointSpec {
            range: format!("00:{:02x}.0", e.0 >> 3)
                .parse()
                .expect("an address"),
            group: None,
            reserved: Vec::new(),
        });
        let topology = Topology::new(
            "00:01.0".parse().expect("an address"),
            ReservedRegions::new(vec![msi]).expect("one region"),
            &specs,
        );
        let mut iommu = Iommu::new(settings, topology.expect("a topology")).expect("an arena");
        let endpoints = [A, B, OTHER].map(|id| ShadowEndpoint {
            id,
            reserved: vec![msi.range],
        });
        let registry = Registry::new(iommu.arena_mut(), endpoints.into(), limits).expect("shared");
        let registry = Arc::new(registry.kept_by(keeper));
        let all = [A, B, OTHER];
        let backend = Shadow::new(registry.clone(), &all);
        iommu.add_backend(Box::new(backend), &all).expect("added");
        iommu.set_memory(ram.clone());
        let (fault_sender, faults) = channel();
        Self {
            iommu,
            registry,
            server: None,
            faults,
            fault_sender,
            ram,
            folder: folder.clone(),
        }
    }

    /// Admits the readers that wait.
    pub fn admit(&self) {
        let server = self.server.as_ref().expect("it listens");
        server.admit().expect("it runs");
    }

    /// Listens for readers, and admits them.
    pub fn serve(&mut self) {
        self.serve_held();
        self.admit();
    }

    /// Listens for readers. They wait until [`Self::admit`].
    pub fn serve_held(&mut self) {
        let path = self.path();
        let sockets = [ShadowSocket {
            path: &path,
            rights: SocketRights::default(),
            endpoints: vec![A, B],
        }];
        let sender = self.fault_sender.clone();
        let server = ShadowServer::start_held(self.registry.clone(), &sockets, move |fault| {
            // The test may have ended.
            let _ = sender.send(fault);
        });
        self.server = Some(server.expect("a socket"));
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    pub fn reader(&self, endpoint: EndpointId) -> ShadowReader {
        ShadowReader::connect(&self.path(), endpoint).expect("accepted")
    }

    pub fn fault(&self) -> Fault {
        let patience = Duration::from_secs(10);
        self.faults.recv_timeout(patience).expect("a fault")
    }

    /// Guest RAM, as the guest accesses it.
    pub fn file(&self) -> &File {
        &self.ram[0].file
    }

    pub fn poke(&self, gpa: u64, value: u64) {
        let done = self.file().write_all_at(&value.to_le_bytes(), gpa);
        done.expect("written");
    }

    pub fn peek(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file().read_exact_at(&mut bytes, gpa).expect("read");
        u64::from_le_bytes(bytes)
    }

    /// Starts another process in one of the roles of `roles`.
    pub fn process(&self, role: &str) -> Role {
        Role::start(role, &self.path())
    }

    /// Waits until there are `count` readers.
    pub fn wait_for_readers(&self, count: usize) {
        eventually("readers", || self.registry.reader_count() == count);
    }
}

pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub struct Role {
    pub child: Child,
    pub stdout: BufReader<ChildStdout>,
    pub stdin: ChildStdin,
}

impl Role {
    fn start(role: &str, socket: &Path) -> Self {
        Self::start_as(role, socket, None)
    }

    /// Starts the process as another user.
    pub fn start_as(role: &str, socket: &Path, user: Option<u32>) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        if let Some(user) = user {
            command.uid(user);
        }
        let mut child = command
            .args(["--ignored", "--exact", "roles::run_role", "--nocapture"])
            .env("SHADOW_ROLE", role)
            .env("SHADOW_SOCKET", socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let stdin = child.stdin.take().expect("piped");
        Self {
            child,
            stdout,
            stdin,
        }
    }

    /// Reads lines until the process prints `word`. Returns the line.
    pub fn wait_for(&mut self, word: &str) -> String {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            let read = self.stdout.read_line(&mut line).expect("readable");
            assert!(read > 0, "it ended before it printed {word}");
        }
        line
    }

    pub fn send_line(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").expect("an open pipe");
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
    }

    /// Whether the process exited by itself and with success.
    pub fn ended_well(&mut self) -> bool {
        self.child.wait().expect("its own child").success()
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
