//! Tests of the helper with processes in the place of VMMs.
//!
//! Other character devices stand for those of the host: `/dev/zero` for `/dev/iommu`, `/dev/null` and `/dev/full` for nodes
//! of VFIO. A fake sysfs has their numbers, so the helper tells them apart as it does on a host.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::message::{FoundFiles, ask};
use super::peer::PeerProcess;
use super::pick::{WantedNodes, pick};
use super::server::serve_connection;
use super::{AdoptError, Policy};
use crate::host::sysfs::fake::{FakeHost, Function};
use crate::topology::HostAddress;

const ZERO: &str = "0000:65:00.0";
const FULL: &str = "0000:66:00.0";
const IOMMUFD: &str = "/dev/zero";
const DEVICE: &str = "/dev/null";
const OTHER_DEVICE: &str = "/dev/full";

/// The variables of the process below: the socket to connect to, and the files to open.
const SOCKET: &str = "VIOMMU_TEST_ADOPT_SOCKET";
const FILES: &str = "VIOMMU_TEST_ADOPT_FILES";

fn host(text: &str) -> HostAddress {
    text.parse().expect("an address")
}

/// The process in the place of a VMM. A run of all tests starts it without variables, and it does nothing.
#[test]
fn the_vmm_of_the_other_tests() {
    let (Ok(socket), Ok(files)) = (std::env::var(SOCKET), std::env::var(FILES)) else {
        return;
    };
    let mut open = Vec::new();
    for path in files.split(' ').filter(|path| !path.is_empty()) {
        let (path, mode) = path.split_once('=').unwrap_or((path, "rw"));
        let mut options = std::fs::File::options();
        options.read(true).write(mode == "rw" || mode == "twice");
        if mode == "path" {
            use std::os::unix::fs::OpenOptionsExt;
            options.custom_flags(libc::O_PATH);
        }
        open.push(options.open(path).expect("a file"));
        if mode == "twice" {
            let copy = open
                .last()
                .map(|file| file.try_clone().expect("a descriptor"));
            open.extend(copy);
        }
    }
    let mut daemon = UnixStream::connect(socket).expect("a daemon");
    daemon.write_all(b"x").expect("sent");
    // Its end ends this process, too.
    let order = std::io::stdin().lines().next();
    if order.is_some_and(|order| order.is_ok_and(|order| order == "exec")) {
        use std::os::unix::process::CommandExt;
        panic!("{}", Command::new("sleep").arg("1000").exec());
    }
}

/// A running process in the place of a VMM, and the daemon's end of its connection.
struct Vmm {
    child: Child,
    socket: UnixStream,
}

impl Vmm {
    fn start(files: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vhost-user.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args([
                "--exact",
                "adopt::tests::the_vmm_of_the_other_tests",
                "--nocapture",
            ])
            .env(SOCKET, &path)
            .env(FILES, files)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("a process");
        let (socket, _) = listener.accept().expect("connected");
        let mut byte = [0];
        std::io::Read::read_exact(&mut &socket, &mut byte).expect("its files are open");
        Self { child, socket }
    }

    fn order(&mut self, text: &str) {
        let input = self.child.stdin.as_mut().expect("its input");
        writeln!(input, "{text}").expect("sent");
    }

    fn program(&self) -> PathBuf {
        std::fs::read_link(format!("/proc/{}/exe", self.child.id())).unwrap_or_default()
    }

    fn end(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        self.child.wait().expect("it has ended");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.end();
    }
}

/// A host whose VFIO devices are `DEVICE` and `OTHER_DEVICE`, and the file of a VM with the first and the second.
struct Bed {
    host: FakeHost,
    file: PathBuf,
}

impl Bed {
    fn new() -> Self {
        let host = FakeHost::new();
        let number = |path: &str| {
            let node = std::fs::metadata(path).expect("a device").rdev();
            format!("{}:{}\n", libc::major(node), libc::minor(node))
        };
        host.file("sys/class/misc/iommu/dev", number(IOMMUFD));
        for (address, vfio, node) in [(ZERO, "vfio0", DEVICE), (FULL, "vfio1", OTHER_DEVICE)] {
            host.function(&Function {
                vfio: Some((vfio, true)),
                ..Function::ready(address, 7)
            });
            let folder = format!("sys/devices/pci0000:00/{address}/vfio-dev/{vfio}");
            host.file(&format!("{folder}/dev"), number(node));
        }
        let file = host.path("vm1.toml");
        let bed = Self { host, file };
        bed.write(&format!(
            "[[endpoint]]\naddress = '00:06.0'\nvfio = '{ZERO}'\n\
             [[endpoint]]\naddress = '00:07.0'\nvfio = '{FULL}'\n"
        ));
        bed
    }

    fn write(&self, endpoints: &str) {
        self.write_all(&format!("vfio-from = 'vmm'\n{endpoints}"));
    }

    /// Writes the file, without `vfio-from`.
    fn write_all(&self, keys: &str) {
        let text = format!("address = '00:05.0'\n{keys}");
        std::fs::write(&self.file, text).expect("written");
    }

    /// Asks a helper for the devices, as the daemon does. Returns the helper's own error, too.
    fn ask(
        &self,
        policy: &Policy,
        vmm: impl AsFd,
        devices: &[HostAddress],
    ) -> (Result<FoundFiles, String>, Result<(), AdoptError>) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let root = self.host.root();
        let policy = policy.clone();
        let helper = std::thread::spawn(move || serve_connection(&theirs, &policy, &root));
        let deadline = Instant::now() + Duration::from_secs(60);
        let found = ask(&ours, vmm.as_fd(), devices, deadline);
        let served = helper.join().expect("no panic");
        (found.map_err(|cause| cause.to_string()), served)
    }

    /// Asks the helper of this VM for both devices.
    fn found(&self, vmm: &Vmm) -> Result<FoundFiles, String> {
        let policy = Policy::OneFile(self.file.clone());
        self.ask(&policy, &vmm.socket, &[host(ZERO), host(FULL)]).0
    }

    fn nodes(&self) -> WantedNodes {
        WantedNodes::read(&self.host.root(), &[host(ZERO)])
    }
}

fn is_open_on(file: &OwnedFd, path: &str) -> bool {
    let file = std::fs::File::from(file.try_clone().expect("a descriptor"));
    file.metadata().expect("a file").rdev() == std::fs::metadata(path).expect("a file").rdev()
}

#[test]
fn the_daemon_gets_the_iommufd_and_the_named_devices_that_the_vmm_has_bound() {
    let bed = Bed::new();
    let vmm = Vmm::start("/dev/null /dev/zero /etc/passwd=r /dev/random");
    let found = bed.found(&vmm).expect("found");
    assert!(is_open_on(&found.iommufd.expect("an iommufd"), IOMMUFD));
    let devices: Vec<_> = found.devices.keys().copied().collect();
    assert_eq!(
        devices,
        [host(ZERO)],
        "the VMM has not opened the other one"
    );
    assert!(is_open_on(&found.devices[&host(ZERO)], DEVICE));
}

/// A flag of an open file shows in each process that has it.
#[test]
fn the_open_files_are_those_of_the_vmm_and_not_new_ones() {
    let bed = Bed::new();
    let vmm = Vmm::start("/dev/null /dev/zero");
    let found = bed.found(&vmm).expect("found");
    let nonblocking = || {
        let folder = format!("/proc/{}/fd", vmm.child.id());
        let entries = std::fs::read_dir(folder).expect("its files").flatten();
        let is_set = |entry: &std::fs::DirEntry| {
            let info = entry.path().to_string_lossy().replace("/fd/", "/fdinfo/");
            let text = std::fs::read_to_string(info).unwrap_or_default();
            let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
            flags.is_some_and(|flags| flags & libc::O_NONBLOCK != 0)
        };
        let paths = entries
            .filter(is_set)
            .map(|entry| std::fs::read_link(entry.path()));
        paths
            .flatten()
            .filter(|path| path.starts_with("/dev"))
            .count()
    };
    assert_eq!(nonblocking(), 0);
    for file in found.devices.values().chain(&found.iommufd) {
        rustix::io::ioctl_fionbio(file, true).expect("set");
    }
    assert_eq!(nonblocking(), 2);
}

#[test]
fn a_vmm_without_the_devices_gives_nothing() {
    let bed = Bed::new();
    // An iommufd alone; nothing; the device's node opened for one direction, and as a mere name.
    for files in [
        "/dev/zero",
        "",
        "/dev/zero /dev/null=r",
        "/dev/zero /dev/null=path",
    ] {
        let vmm = Vmm::start(files);
        let found = bed.found(&vmm).expect("an answer");
        assert!(
            found.iommufd.is_none() && found.devices.is_empty(),
            "{files}: {found:?}"
        );
    }
}

#[test]
fn a_vmm_whose_iommufd_is_in_doubt_is_refused() {
    let bed = Bed::new();
    let refusal = bed
        .found(&Vmm::start("/dev/zero /dev/zero /dev/null"))
        .expect_err("two");
    assert!(refusal.contains("has 2 open /dev/iommu"), "{refusal}");
    let refusal = bed.found(&Vmm::start("/dev/null")).expect_err("none");
    assert!(
        refusal.contains("no /dev/iommu; let it use iommufd"),
        "{refusal}"
    );
    // Two descriptors of one open file are one.
    let found = bed
        .found(&Vmm::start("/dev/zero=twice /dev/null"))
        .expect("found");
    assert!(found.iommufd.is_some());
}

#[test]
fn devices_that_the_file_does_not_name_are_refused() {
    let bed = Bed::new();
    let vmm = Vmm::start("/dev/zero /dev/null /dev/full");
    let wanted = format!("[[endpoint]]\naddress = '00:06.0'\nvfio = '{ZERO}'\n");
    bed.write(&wanted);
    let refusal = bed.found(&vmm).expect_err("not named");
    assert!(
        refusal.contains(&format!("no endpoint with vfio = \"{FULL}\"")),
        "{refusal}"
    );
    bed.write("nonsense");
    let refusal = bed.found(&vmm).expect_err("no file");
    assert!(
        refusal.contains("the file of the daemon's VM cannot be used"),
        "{refusal}"
    );
}

/// A file that names a device for another purpose is no way to it: neither for `launch`, nor for an export.
#[test]
fn a_file_without_vfio_from_gives_nothing() {
    let bed = Bed::new();
    let vmm = Vmm::start("/dev/zero /dev/null /dev/full");
    assert!(bed.found(&vmm).is_ok());
    let devices = |export: &str| {
        format!(
            "[[endpoint]]\naddress = '00:06.0'\nvfio = '{ZERO}'\n{export}\
             [[endpoint]]\naddress = '00:07.0'\nvfio = '{FULL}'\n"
        )
    };
    for file in [
        devices(""),
        format!("vfio-from = 'start'\n{}", devices("")),
        format!("host-iommu = 'type1'\n{}", devices("")),
        devices("export = '/run/x'\n"),
    ] {
        bed.write_all(&file);
        let refusal = bed.found(&vmm).expect_err("not the VMM's");
        assert!(refusal.contains("add the key"), "{refusal}");
    }
}

/// The tests run in no service of a daemon.
#[test]
fn a_stranger_is_refused_and_gets_nothing() {
    let bed = Bed::new();
    let vmm = Vmm::start("/dev/zero /dev/null");
    let policy = Policy::OneService(bed.file.clone());
    let (found, served) = bed.ask(&policy, &vmm.socket, &[host(ZERO)]);
    let refusal = found.expect_err("a stranger");
    assert!(
        refusal.contains("not that of vhost-device-iommu@vm1.service"),
        "{refusal}"
    );
    assert!(matches!(served, Err(AdoptError::Stranger { .. })));
}

#[test]
fn what_is_no_socket_of_a_process_is_refused() {
    let bed = Bed::new();
    let policy = Policy::OneFile(bed.file.clone());
    let file = std::fs::File::open("/dev/null").expect("a file");
    let network = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    for refused in [file.as_fd(), network.as_fd()] {
        let (found, _) = bed.ask(&policy, refused, &[host(ZERO)]);
        let refusal = found.expect_err("no process");
        assert!(
            refusal.contains("at the other end of the VMM's socket"),
            "{refusal}"
        );
    }
}

#[test]
fn a_vmm_that_has_ended_is_refused_at_each_step() {
    let bed = Bed::new();
    let files = "/dev/zero /dev/null";
    let mut vmm = Vmm::start(files);
    let before = PeerProcess::of(vmm.socket.as_fd(), "VMM's").expect("it runs");
    let image = before.image().expect("it runs");
    vmm.end();
    // Before the first step; between the others.
    assert!(bed.found(&vmm).is_err());
    assert!(matches!(before.check_alive(), Err(AdoptError::Ended)));
    assert!(matches!(before.image(), Err(AdoptError::Ended)));
    assert!(matches!(before.check_image(&image), Err(AdoptError::Ended)));
    assert!(matches!(before.descriptors(), Err(AdoptError::Ended)));
    assert!(matches!(before.duplicate(0), Err(AdoptError::Ended)));
    assert!(matches!(
        pick(&before, &bed.nodes()),
        Err(AdoptError::Ended)
    ));
}

/// Another process with the devices, which has the number of the VMM that has ended.
#[test]
fn a_process_that_takes_the_number_of_the_vmm_is_not_the_vmm() {
    const LAST: &str = "/proc/sys/kernel/ns_last_pid";
    const ATTEMPTS: usize = 200;
    let bed = Bed::new();
    let files = "/dev/zero /dev/null";
    let mut vmm = Vmm::start(files);
    let before = PeerProcess::of(vmm.socket.as_fd(), "VMM's").expect("it runs");
    let number = vmm.child.id();
    vmm.end();
    // Only root can choose the next number, and only in kernels with CONFIG_CHECKPOINT_RESTORE.
    let same = (0..ATTEMPTS).find_map(|_| {
        std::fs::write(LAST, (number - 1).to_string()).ok()?;
        let other = Vmm::start(files);
        (other.child.id() == number).then_some(other)
    });
    let Some(other) = same else {
        eprintln!("no process has got the number {number} again");
        return;
    };
    assert!(bed.found(&other).is_ok(), "it has the devices");
    assert!(matches!(before.descriptors(), Err(AdoptError::Ended)));
    assert!(matches!(before.image(), Err(AdoptError::Ended)));
    assert!(matches!(
        pick(&before, &bed.nodes()),
        Err(AdoptError::Ended)
    ));
    assert!(
        bed.found(&vmm).is_err(),
        "its socket is that of the VMM that has ended"
    );
}

#[test]
fn a_vmm_that_begins_another_program_meanwhile_is_refused() {
    let mut vmm = Vmm::start("/dev/zero /dev/null");
    let process = PeerProcess::of(vmm.socket.as_fd(), "VMM's").expect("it runs");
    let image = process.image().expect("it runs");
    process.check_image(&image).expect("the same");
    vmm.order("exec");
    while !vmm.program().ends_with("sleep") {
        std::thread::sleep(Duration::from_millis(1));
    }
    let refusal = process.check_image(&image).expect_err("another program");
    assert!(matches!(refusal, AdoptError::Changed), "{refusal}");
    // Rust opens files so that another program does not inherit them.
    let picked = pick(&process, &Bed::new().nodes()).expect("nothing");
    assert!(picked.found.devices.is_empty() && picked.found.iommufd.is_none());
}

/// Messages of daemons, and a helper that answers nonsense.
#[test]
fn nonsense_is_refused_on_both_sides() {
    let bed = Bed::new();
    let policy = Policy::OneFile(bed.file.clone());
    let many = format!("viommu-adopt 1\n{}", format!("{ZERO}\n").repeat(65));
    let long = "x".repeat(5000);
    for request in [
        "",
        "hello\n",
        "viommu-adopt 1\n",
        "viommu-adopt 1\nx\n",
        "viommu-adopt 1\n0000:65:00.0\n",
        &many,
        &long,
        "\u{0}\n",
    ] {
        let (mut ours, theirs) = UnixStream::pair().expect("sockets");
        let root = bed.host.root();
        let policy = policy.clone();
        let helper = std::thread::spawn(move || serve_connection(&theirs, &policy, &root));
        // The helper may have refused it before all of it was sent.
        let _ = ours.write_all(request.as_bytes());
        let _ = ours.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        BufReader::new(&ours)
            .read_line(&mut answer)
            .expect("an answer");
        assert!(answer.starts_with("refused "), "{request:.20}: {answer}");
        helper.join().expect("no panic").expect_err("refused");
    }
    for answer in [
        "",
        "found\n0000:65:00.0\n",
        "found\niommufd\n",
        "x\n",
        "refused \u{7}no\n",
    ] {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        theirs.write_all(answer.as_bytes()).expect("sent");
        theirs.shutdown(std::net::Shutdown::Write).expect("ended");
        let vmm = theirs.as_fd();
        let deadline = Instant::now() + Duration::from_secs(60);
        let refused = ask(&ours, vmm, &[host(ZERO)], deadline).expect_err(answer);
        assert!(
            !refused.to_string().contains(char::is_control),
            "{refused:?}"
        );
    }
    let silent = UnixStream::pair().expect("sockets");
    let late = ask(&silent.0, silent.1.as_fd(), &[host(ZERO)], Instant::now());
    assert_eq!(
        late.expect_err("silence").kind(),
        std::io::ErrorKind::TimedOut
    );
}
