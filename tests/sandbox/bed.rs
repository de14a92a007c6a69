//! A daemon with a VM and with every kind of thread that needs no passthrough device. A keeper makes it relay the VMM's
//! connection.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::Ordering;

use tempfile::TempDir;

use crate::common::daemon::{Daemon, EP};
use crate::common::guest::{Guest, Setup};
use crate::common::relayed;
use crate::common::wire::RW;
use crate::connection::{Connection, VERSION, version_body};

/// IOVA at which the guest maps memory for its device.
pub const IOVA: u64 = 0x7000_0000;
/// Guest-physical address of that memory.
pub const MEMORY: u64 = 0xa0_0000;
/// Its length in bytes.
pub const LENGTH: u64 = 0x10_0000;

/// Names of the threads except the main thread, whose thread ID is the process ID.
pub const THREADS: [&str; 12] = [
    "vhost-user",
    "relay",
    "vring_worker",
    "control",
    "shadow",
    "shadow-faults",
    "vfio-user",
    "faults",
    "signals",
    "connector",
    "metrics-file",
    "closer",
];

/// A daemon, a guest that has mapped memory, and the server of its emulated device.
pub struct Bed {
    pub daemon: Daemon,
    pub guest: Guest,
    /// The server's end of the device's connection.
    pub device: Connection,
    _client: Connection,
    _folder: TempDir,
}

impl Bed {
    pub fn new(more: &[&str]) -> Self {
        relayed::ALWAYS.store(true, Ordering::Relaxed);
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let listener = UnixListener::bind(at("server")).expect("a socket");
        let config = format!(
            "address = '00:05.0'\nbypass = false\n\
             [[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = {{ listen = {:?}, connect = {:?} }}\n\
             [[endpoint]]\naddress = '00:07.0'\nshadow = {:?}\n\
             [metrics]\ntextfile = {:?}\n",
            at("client"),
            at("server"),
            at("readers"),
            at("vm.prom"),
        );
        let daemon = Daemon::with_config_and(&config, more);
        let mut guest = Guest::boot_with(&daemon, Setup::default());
        assert_eq!(guest.attach(1, EP), 0);
        assert_eq!(guest.map(1, IOVA, IOVA + LENGTH - 1, MEMORY, RW), 0);
        let mut client = Connection::new(UnixStream::connect(at("client")).expect("connected"));
        client.ask(VERSION, &version_body("{}"), &[]);
        let (stream, _) = listener.accept().expect("the daemon connects");
        let mut device = Connection::new(stream);
        let asked = device.recv().expect("VERSION");
        device.reply(&asked, &version_body("{}"), &[]);
        let window = device.recv().expect("a window");
        device.reply(&window, &[], &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        Self {
            daemon,
            guest,
            device,
            _client: client,
            _folder: folder,
        }
    }

    /// The ID of the only thread with this name.
    pub fn thread(&self, name: &str) -> u32 {
        if name == "main" {
            return self.daemon.pid();
        }
        let found: Vec<u32> = threads(self.daemon.pid())
            .into_iter()
            .filter(|(_, found)| found == name)
            .map(|(number, _)| number)
            .collect();
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        found[0]
    }
}

/// IDs and names of the threads of a process.
pub fn threads(pid: u32) -> Vec<(u32, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    tasks
        .map(|task| {
            let path = task.expect("a thread").path();
            let number = path.file_name().unwrap().to_str().unwrap().parse();
            let name = fs::read_to_string(path.join("comm")).expect("its name");
            (number.expect("a number"), name.trim_end().to_owned())
        })
        .collect()
}

/// The value of `key` in `/proc/PID/task/TID/status`; `None` if this kernel has no such line.
pub fn status_of(pid: u32, tid: u32, key: &str) -> Option<String> {
    let path = format!("/proc/{pid}/task/{tid}/status");
    let text = fs::read_to_string(Path::new(&path)).expect("its status");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}
