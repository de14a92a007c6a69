//! An NVMe disk that a process serves, with or without the daemon, and a guest that uses it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::vm::{
    Daemon, Kernel, LONG_ANSWER, Process, Setup, TestDir, Vm, VmOptions, bound_command, wait_for,
};

/// PCI address of the first disk.
pub const DISK: &str = "0000:00:06.0";
/// Size of guest memory. An offset in QEMU's file is the guest-physical address.
const MEMORY: &str = "256M";
/// A processor with RDRAND: without it mkfs waits for random numbers for seconds.
pub const CPU: [&str; 2] = ["-cpu", "max"];
/// Size of a disk in bytes.
const DISK_BYTES: u64 = 64 << 20;
/// The server answers between its commands to the disk, and to write a file out can take longer than the default of a
/// second while other programs write.
const DEADLINE_MS: u32 = 10_000;
/// Time limit of short steps.
const SOON: Duration = Duration::from_secs(20);

/// How the disk accesses guest memory behind the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaMode {
    /// Through the interposer, with `isolation = "messages"`.
    Messages,
    /// Through the interposer, with `isolation = "mappings"`.
    Mappings,
    /// As a shadow reader.
    Shadow,
}

/// The disk's server, a child process.
pub struct Server {
    process: Process,
    socket: PathBuf,
    access_socket: PathBuf,
}

impl Server {
    /// Starts a server for `image`. `name` begins the names of sockets and log. `dma` is the value of `--dma`.
    pub fn start(test_dir: &TestDir, name: &str, image: &Path, dma: &str) -> Self {
        let (socket, access_socket) = (
            test_dir.path(name),
            test_dir.path(&format!("{name}.access")),
        );
        let program = example();
        let mut command = bound_command(&program);
        command
            .arg("serve")
            .arg("--socket")
            .arg(&socket)
            .arg("--disk")
            .arg(image);
        command
            .arg("--access-socket")
            .arg(&access_socket)
            .args(["--dma", dma]);
        if dma.starts_with("shadow") {
            command.args(["--endpoint", DISK]);
        }
        let log = test_dir.path(&format!("{name}.log"));
        let mut process = Process::start("the disk's server", &mut command, &log);
        wait_for("the disk's server", SOON, || {
            process.assert_alive();
            socket.exists().then_some(())
        });
        Self {
            process,
            socket,
            access_socket,
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The socket at which it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Lets the server make an access: `read ADDRESS LENGTH` or `write ADDRESS BYTE LENGTH`. Returns the bytes read, in
    /// hexadecimal, or the server's error.
    pub fn access(&self, request: &str) -> Result<String, String> {
        let stream = UnixStream::connect(&self.access_socket).expect("the server accepts requests");
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        (&stream)
            .write_all(format!("{request}\n").as_bytes())
            .expect("the request is sent");
        let mut answer = String::new();
        let read = BufReader::new(&stream).read_line(&mut answer);
        read.unwrap_or_else(|e| panic!("`{request}` has no answer: {e}"));
        match answer.trim_end().split_at_checked(2) {
            Some(("ok", data)) => Ok(data.trim_start().to_owned()),
            _ => Err(answer),
        }
    }

    /// QEMU's arguments for this disk at `slot` without an interposer.
    pub fn qemu_args(&self, slot: &str) -> [String; 2] {
        let device = json!({
            "driver": "vfio-user-pci",
            "addr": slot,
            "socket": { "type": "unix", "path": self.socket },
        });
        ["-device".into(), device.to_string()]
    }
}

/// The path of the example's program, next to this program.
pub fn example() -> PathBuf {
    let own = std::env::current_exe().expect("a program");
    let built = own
        .ancestors()
        .nth(2)
        .expect("target")
        .join("examples/nvme");
    assert!(
        built.exists(),
        "{} does not exist: run `cargo build --example nvme`",
        built.display()
    );
    built
}

/// Makes an empty disk.
pub fn new_image(test_dir: &TestDir, name: &str) -> PathBuf {
    let path = test_dir.path(name);
    let file = File::create(&path).expect("an image");
    file.set_len(DISK_BYTES).expect("an image's length");
    path
}

/// The value of the server's `--dma` for this mode.
pub fn dma_of(test_dir: &TestDir, dma_mode: DmaMode) -> String {
    match dma_mode {
        DmaMode::Messages => "messages".to_owned(),
        DmaMode::Mappings => "mapped".to_owned(),
        DmaMode::Shadow => format!("shadow={}", shadow_socket(test_dir).display()),
    }
}

fn shadow_socket(test_dir: &TestDir) -> PathBuf {
    test_dir.path("shadow.sock")
}

/// The daemon's configuration for the disk of `server`, but for the VMM's socket.
pub fn config_of(test_dir: &TestDir, server: &Server, dma_mode: DmaMode) -> String {
    let listen = test_dir.path("iommu-nvme.sock");
    let interposed = |isolation: &str| {
        format!(
            "vfio-user = {{ listen = '{}', connect = '{}', isolation = '{isolation}', deadline-ms = {DEADLINE_MS} }}",
            listen.display(),
            server.socket.display()
        )
    };
    let device = match dma_mode {
        DmaMode::Messages => interposed("messages"),
        DmaMode::Mappings => interposed("mappings"),
        DmaMode::Shadow => format!("shadow = '{}'", shadow_socket(test_dir).display()),
    };
    format!(
        "memory = '{MEMORY}'\naddress = '00:05.0'\n[[endpoint]]\naddress = '{DISK}'\n{device}\n"
    )
}

/// A disk, the daemon and a guest.
pub struct Bed {
    pub vm: Vm,
    pub daemon: Daemon,
    pub server: Server,
}

impl Bed {
    /// Boots a guest with `image` as its disk, and waits until the guest has the disk.
    pub fn start(
        setup: &Setup,
        kernel: &Kernel,
        test_dir: &TestDir,
        name: &str,
        image: &Path,
        dma_mode: DmaMode,
        append: &str,
    ) -> Self {
        let dma = dma_of(test_dir, dma_mode);
        let server = Server::start(test_dir, name, image, &dma);
        let daemon = Daemon::start(test_dir, &config_of(test_dir, &server, dma_mode));
        let mut extra = CPU.map(str::to_owned).to_vec();
        match dma_mode {
            DmaMode::Messages | DmaMode::Mappings => {}
            DmaMode::Shadow => extra.extend(server.qemu_args("06.0")),
        }
        let options = VmOptions {
            kernel,
            append: append.into(),
            iommu: daemon.qemu_args.clone(),
            extra,
        };
        let mut vm = Vm::start(setup, test_dir, name, &options);
        vm.wait_until_up();
        test_dir.note(&format!("{name} is up"));
        load_drivers(&mut vm, 1);
        Self { vm, daemon, server }
    }

    /// Shuts down the guest, and then the daemon.
    pub fn stop(mut self) {
        self.vm.begin("poweroff -f");
        assert!(self.vm.wait_for_end().success());
        self.daemon.stop();
    }
}

/// Boots a guest with these disks and without an IOMMU.
pub fn without_iommu(
    setup: &Setup,
    kernel: &Kernel,
    test_dir: &TestDir,
    name: &str,
    servers: &[Server],
) -> Vm {
    let memory = format!("memory-backend-memfd,id=memory,size={MEMORY},share=on");
    let machine = ["-machine", "q35,memory-backend=memory", "-object", &memory];
    let mut iommu = machine.map(str::to_owned).to_vec();
    iommu.extend(["-m".into(), MEMORY.into()]);
    iommu.extend(CPU.map(str::to_owned));
    let slots = (6..).map(|number| format!("{number:02}.0"));
    let disks = servers.iter().zip(slots);
    let options = VmOptions {
        kernel,
        append: String::new(),
        iommu,
        extra: disks
            .flat_map(|(server, slot)| server.qemu_args(&slot))
            .collect(),
    };
    let mut vm = Vm::start(setup, test_dir, name, &options);
    vm.wait_until_up();
    test_dir.note(&format!("{name} is up"));
    load_drivers(&mut vm, servers.len());
    vm
}

/// Loads the disks' driver, and waits for the disks.
pub fn load_drivers(vm: &mut Vm, disks: usize) {
    vm.run("load-storage");
    vm.run(&format!(
        "for _ in $(seq 100); do set -- /dev/nvme?n1; [ -e $1 ] && [ $# -eq {disks} ] && break; \
         sleep 0.1; done; [ -e $1 ] && [ $# -eq {disks} ]"
    ));
}

/// The numbers of a process's descriptors and mappings of a file.
pub fn count_uses(pid: u32, file: &Path) -> (usize, usize) {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let wanted = identity(file).expect("a file");
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let fds = entries.flatten();
    let fds = fds
        .filter(|fd| identity(&fd.path()) == Some(wanted))
        .count();
    // Compares inode numbers alone: `stat` and `maps` show different device numbers for a memfd. The inode numbers of
    // memfds are unique among memfds.
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its mappings");
    let maps = maps.lines().filter(|line| {
        let inode = line.split_whitespace().nth(4);
        line.contains("/memfd:") && inode == Some(wanted.1.to_string().as_str())
    });
    (fds, maps.count())
}

/// Guest memory: the path of QEMU's file.
pub struct Ram(pub PathBuf);

impl Ram {
    pub fn of(vm: &Vm) -> Self {
        let entries = fs::read_dir(format!("/proc/{}/fd", vm.pid())).expect("QEMU's descriptors");
        let found = entries.flatten().map(|fd| fd.path()).find(|fd| {
            fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().contains("memory-backend-memfd"))
        });
        Self(found.expect("QEMU's memory is a memfd"))
    }

    /// A copy of guest memory. The guest should be stopped.
    pub fn snapshot(&self) -> Vec<u8> {
        fs::read(&self.0).expect("guest memory")
    }

    /// `len` bytes at a guest-physical address.
    pub fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        let file = File::open(&self.0).expect("guest memory");
        file.read_exact_at(&mut bytes, gpa).expect("guest memory");
        bytes
    }
}

/// Checks that the guest's kernel has logged no error of the disk.
pub fn assert_no_errors(vm: &mut Vm) {
    let complaints = "dmesg | grep -iE 'i/o error|nvme.*(timeout|abort|reset)|ext4-fs error|virtio_iommu.* fault '";
    let (lines, _) = vm.try_run(complaints, LONG_ANSWER);
    assert_eq!(lines, Vec::<String>::new());
}
