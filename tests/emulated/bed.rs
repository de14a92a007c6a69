//! An NVMe disk in a process of its own, behind the daemon or not, and a guest that has it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::vm::{
    Daemon, Kernel, Process, Setup, Vm, VmOptions, Workplace, bound_command, wait_for,
};

/// Where the first disk sits.
pub const DISK: &str = "0000:00:06.0";
/// Bytes of guest memory, which QEMU has at its addresses from the start of its file.
const MEMORY: &str = "256M";
/// One with random numbers: without them, who makes a file system waits for seconds.
pub const CPU: [&str; 2] = ["-cpu", "max"];
/// Bytes of a disk.
const DISK_BYTES: u64 = 64 << 20;
/// Until a server or the guest has done what takes no time.
const SOON: Duration = Duration::from_secs(20);

/// How the disk reaches guest memory behind the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Interposed, `isolation = "messages"`.
    Messages,
    /// Interposed, `isolation = "mappings"`.
    Mappings,
    /// By the daemon's page tables.
    Shadow,
}

/// The disk's server, a child.
pub struct Server {
    process: Process,
    socket: PathBuf,
    orders: PathBuf,
}

impl Server {
    /// Serves `image`. Sockets and log are named after `name`. `dma` is its option of that name.
    pub fn start(place: &Workplace, name: &str, image: &Path, dma: &str) -> Self {
        let (socket, orders) = (place.path(name), place.path(&format!("{name}.orders")));
        let program = example();
        let mut command = bound_command(&program);
        command
            .arg("serve")
            .arg("--socket")
            .arg(&socket)
            .arg("--disk")
            .arg(image);
        command.arg("--orders").arg(&orders).args(["--dma", dma]);
        if dma.starts_with("shadow") {
            command.args(["--endpoint", DISK]);
        }
        let log = place.path(&format!("{name}.log"));
        let mut process = Process::start("the disk's server", &mut command, &log);
        wait_for("the disk's server", SOON, || {
            process.assert_alive();
            socket.exists().then_some(())
        });
        Self {
            process,
            socket,
            orders,
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Has the server make an access of its own: `read ADDRESS LENGTH`, `write ADDRESS BYTE LENGTH`.
    /// What it read, in hexadecimal, or why it could not.
    pub fn order(&self, order: &str) -> Result<String, String> {
        let stream = UnixStream::connect(&self.orders).expect("the server takes orders");
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        (&stream)
            .write_all(format!("{order}\n").as_bytes())
            .expect("ordered");
        let mut answer = String::new();
        let read = BufReader::new(&stream).read_line(&mut answer);
        read.unwrap_or_else(|e| panic!("`{order}` has no answer: {e}"));
        match answer.trim_end().split_at_checked(2) {
            Some(("ok", data)) => Ok(data.trim_start().to_owned()),
            _ => Err(answer),
        }
    }

    /// What QEMU must be told to have it at `slot` with nobody between.
    pub fn qemu_args(&self, slot: &str) -> [String; 2] {
        let device = json!({
            "driver": "vfio-user-pci",
            "addr": slot,
            "socket": { "type": "unix", "path": self.socket },
        });
        ["-device".into(), device.to_string()]
    }
}

/// The program of the example, which lies beside this one.
pub fn example() -> PathBuf {
    let own = std::env::current_exe().expect("a program");
    let built = own
        .ancestors()
        .nth(2)
        .expect("target")
        .join("examples/nvme");
    assert!(
        built.exists(),
        "{} is not there: run `cargo build --example nvme`",
        built.display()
    );
    built
}

/// An empty disk.
pub fn new_image(place: &Workplace, name: &str) -> PathBuf {
    let path = place.path(name);
    let file = File::create(&path).expect("an image");
    file.set_len(DISK_BYTES).expect("an image's length");
    path
}

/// A disk, the daemon and a guest whose IOMMU it is.
pub struct Bed {
    pub vm: Vm,
    pub daemon: Daemon,
    pub server: Server,
}

impl Bed {
    /// Boots a guest with `image` as its disk; the guest has it when this returns.
    pub fn start(
        setup: &Setup,
        kernel: &Kernel,
        place: &Workplace,
        name: &str,
        image: &Path,
        manner: Manner,
        append: &str,
    ) -> Self {
        let shadow = place.path("shadow.sock");
        let dma = match manner {
            Manner::Messages => "messages".to_owned(),
            Manner::Mappings => "mapped".to_owned(),
            Manner::Shadow => format!("shadow={}", shadow.display()),
        };
        let server = Server::start(place, name, image, &dma);
        let listen = place.path("iommu-nvme.sock");
        let interposed = |isolation: &str| {
            format!(
                "vfio-user = {{ listen = '{}', connect = '{}', isolation = '{isolation}' }}",
                listen.display(),
                server.socket.display()
            )
        };
        let device = match manner {
            Manner::Messages => interposed("messages"),
            Manner::Mappings => interposed("mappings"),
            Manner::Shadow => format!("shadow = '{}'", shadow.display()),
        };
        let daemon = Daemon::start(
            place,
            &format!(
                "memory = '{MEMORY}'\naddress = '00:05.0'\n[[endpoint]]\naddress = '{DISK}'\n{device}\n"
            ),
        );
        let mut extra = CPU.map(str::to_owned).to_vec();
        match manner {
            Manner::Messages | Manner::Mappings => {}
            Manner::Shadow => extra.extend(server.qemu_args("06.0")),
        }
        let options = VmOptions {
            kernel,
            append: append.into(),
            iommu: daemon.qemu_args.clone(),
            extra,
        };
        let mut vm = Vm::start(setup, place, name, &options);
        vm.wait_until_up();
        place.note(&format!("{name} is up"));
        load_drivers(&mut vm, 1);
        Self { vm, daemon, server }
    }

    /// Ends the guest and all the rest.
    pub fn stop(mut self) {
        self.vm.begin("poweroff -f");
        assert!(self.vm.wait_for_end().success());
        self.daemon.stop();
    }
}

/// Boots a guest that has these disks and no IOMMU.
pub fn without_iommu(
    setup: &Setup,
    kernel: &Kernel,
    place: &Workplace,
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
    let mut vm = Vm::start(setup, place, name, &options);
    vm.wait_until_up();
    place.note(&format!("{name} is up"));
    load_drivers(&mut vm, servers.len());
    vm
}

fn load_drivers(vm: &mut Vm, disks: usize) {
    vm.run("load-storage");
    vm.run(&format!(
        "for _ in $(seq 100); do set -- /dev/nvme?n1; [ -e $1 ] && [ $# -eq {disks} ] && break; \
         sleep 0.1; done; [ -e $1 ] && [ $# -eq {disks} ]"
    ));
}

/// The descriptors of a process that stand for this file, and its mappings of it.
pub fn uses_of(pid: u32, file: &Path) -> (usize, usize) {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let wanted = identity(file).expect("a file");
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let fds = entries.flatten();
    let fds = fds
        .filter(|fd| identity(&fd.path()) == Some(wanted))
        .count();
    // No device number here: that of a memfd is not told alike in both places. Inode numbers of
    // memfds are unique among memfds.
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its mappings");
    let maps = maps.lines().filter(|line| {
        let inode = line.split_whitespace().nth(4);
        line.contains("/memfd:") && inode == Some(wanted.1.to_string().as_str())
    });
    (fds, maps.count())
}

/// Guest memory: QEMU's file of it.
pub struct Ram(pub PathBuf);

impl Ram {
    pub fn of(vm: &Vm) -> Self {
        let entries = fs::read_dir(format!("/proc/{}/fd", vm.pid())).expect("QEMU's descriptors");
        let found = entries.flatten().map(|fd| fd.path()).find(|fd| {
            fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().contains("memory-backend-memfd"))
        });
        Self(found.expect("QEMU's memory is a memfd"))
    }

    /// All of it, while nothing changes it.
    pub fn snapshot(&self) -> Vec<u8> {
        fs::read(&self.0).expect("guest memory")
    }

    /// Bytes at a guest-physical address.
    pub fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        let file = File::open(&self.0).expect("guest memory");
        file.read_exact_at(&mut bytes, gpa).expect("guest memory");
        bytes
    }
}
