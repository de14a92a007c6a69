//! The helper of `vfio-from = "vmm"` as systemd starts it, with a socket for each VM.
//!
//! The kernel of this machine has no iommufd, so no VMM has anything to take. What is tested is everything before that: the
//! helper knows the service that asks, reads its file, and may look at the files of another user's process; no daemon can use
//! up the helper of another VM.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vhost_device_iommu::adopt::message::ask;
use vhost_device_iommu::topology::HostAddress;

use crate::machine::{Vm, install_once, run, run_ok};

const FOLDER: &str = "/run/vhost-device-iommu-adopt";
const NOBODY: u32 = 65534;
const DEVICE: &str = "0000:65:00.0";
const VARIABLE: &str = "VIOMMU_TEST_ADOPT";

/// Another user's process: it connects, has files open, and waits for its end.
#[test]
#[ignore = "a process of the other test"]
fn the_vmm() {
    let Ok(socket) = std::env::var(VARIABLE) else {
        return;
    };
    let open = |path: &str| {
        fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("a file")
    };
    let _files = [open("/dev/null"), open("/dev/zero")];
    let mut daemon = UnixStream::connect(socket).expect("a daemon");
    daemon.write_all(b"ready\n").expect("sent");
    // Until the test ends.
    let _ = std::io::stdin().read_line(&mut String::new());
}

fn vmm(listener: &UnixListener, path: &Path) -> (Child, UnixStream) {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "adopt::the_vmm", "--nocapture"])
        .env(VARIABLE, path)
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("a process");
    let (socket, _) = listener.accept().expect("connected");
    let mut line = String::new();
    let mut reader = BufReader::new(&socket);
    reader.read_line(&mut line).expect("its files are open");
    (child, socket)
}

/// The socket of a VM's helper.
fn socket_of(vm: &str) -> PathBuf {
    Path::new(FOLDER).join(vm).join("adopt.sock")
}

/// What the helper of the VM `adopted` answers this process, in this control group.
fn answer(group: &str, vmm: &UnixStream, device: &str) -> Result<usize, String> {
    let folder = format!("/sys/fs/cgroup{group}");
    fs::create_dir_all(&folder).expect("a control group");
    let own = std::process::id().to_string();
    let before = fs::read_to_string("/proc/self/cgroup").expect("a control group");
    let before = before
        .trim()
        .strip_prefix("0::")
        .expect("the unified hierarchy")
        .to_owned();
    fs::write(format!("{folder}/cgroup.procs"), &own).expect("moved");
    let helper = UnixStream::connect(socket_of("adopted")).expect("the helper's socket");
    let device: HostAddress = device.parse().expect("an address");
    let deadline = Instant::now() + Duration::from_secs(60);
    let found = ask(&helper, vmm.as_fd(), &[device], deadline);
    fs::write(format!("/sys/fs/cgroup{before}/cgroup.procs"), &own).expect("moved back");
    found
        .map(|found| found.devices.len())
        .map_err(|cause| cause.to_string())
}

/// A VM whose devices come from its VMM. The service cannot start in this machine, and starts the helper's socket.
fn start_helper() {
    install_once();
    let text = format!(
        "address = '00:05.0'\nvfio-from = 'vmm'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '{DEVICE}'\n"
    );
    fs::write("/etc/vhost-device-iommu/adopted.toml", text).expect("written");
    run_ok(&["systemctl", "daemon-reload"]);
    run(&["systemctl", "start", "vhost-device-iommu@adopted.service"]);
    let socket = "vhost-device-iommu-adopt@adopted.socket";
    let state = run_ok(&["systemctl", "show", "--value", "-p", "ActiveState", socket]);
    assert_eq!(state, "active\n");
    run(&["systemctl", "stop", "vhost-device-iommu@adopted.service"]);
    run(&[
        "systemctl",
        "reset-failed",
        "vhost-device-iommu@adopted.service",
    ]);
}

fn stop_helpers() {
    run_ok(&["systemctl", "stop", "vhost-device-iommu-adopt@*.socket"]);
    fs::remove_file("/etc/vhost-device-iommu/adopted.toml").expect("removed");
    run_ok(&["systemctl", "daemon-reload"]);
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn the_helper_serves_the_daemon_of_its_vm_alone() {
    start_helper();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vhost-user.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    for path in [folder.path(), &path] {
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(path, all).expect("changed");
    }
    let (mut child, socket) = vmm(&listener, &path);
    let service = "/viommu.slice/vhost-device-iommu@adopted.service";
    // It has looked at all descriptors of the process, and none is a device.
    assert_eq!(answer(service, &socket, DEVICE), Ok(0));
    let refusal = answer(service, &socket, "0000:66:00.0").expect_err("another device");
    assert!(
        refusal.contains("no endpoint with vfio = \"0000:66:00.0\""),
        "{refusal}"
    );
    for stranger in [
        "/viommu.slice/vhost-device-iommu@other.service",
        "/viommu.slice/other.service",
        "/viommu.slice/x@y.service/vhost-device-iommu@adopted.service",
    ] {
        let refusal = answer(stranger, &socket, DEVICE).expect_err("a stranger");
        assert!(
            refusal.contains("not that of vhost-device-iommu@adopted.service"),
            "{refusal}"
        );
    }
    // Another daemon uses its own helper up: more connections than any helper serves at once.
    run_ok(&[
        "systemctl",
        "start",
        "vhost-device-iommu-adopt@other.socket",
    ]);
    let flood: Vec<_> = (0..100)
        .map_while(|_| {
            let socket = UnixStream::connect(socket_of("other"));
            socket.ok()
        })
        .collect();
    assert!(flood.len() > 64, "{}", flood.len());
    assert_eq!(answer(service, &socket, DEVICE), Ok(0));
    drop(flood);
    child.kill().expect("it runs");
    child.wait().expect("it has ended");
    let refusal = answer(service, &socket, DEVICE).expect_err("it has ended");
    assert!(
        refusal.contains("has ended") || refusal.contains("may have ended"),
        "{refusal}"
    );
    stop_helpers();
    for unit in [
        "vhost-device-iommu-adopt@x.service",
        "vhost-device-iommu-adopt@x.socket",
    ] {
        let faults = run_ok(&["systemd-analyze", "verify", "--man=no", unit]);
        assert_eq!(faults, "", "{unit}");
    }
}

/// A daemon that a guest has taken over could connect to whatever it sees.
#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn a_daemon_sees_the_socket_of_its_own_helper_alone() {
    let (one, two) = (Vm::new("one", ""), Vm::new("two", ""));
    for vm in ["one", "three"] {
        let socket = format!("vhost-device-iommu-adopt@{vm}.socket");
        run_ok(&["systemctl", "start", &socket]);
    }
    let seen = |vm: &Vm| {
        vm.start();
        let daemon = vm.property("MainPID");
        run_ok(&[
            "nsenter", "--mount", "--target", &daemon, "find", FOLDER, "-type", "s",
        ])
    };
    let own = format!("{}\n", socket_of("one").display());
    assert_eq!(seen(&one), own);
    assert_eq!(seen(&two), "");
    // Its folder stays, so a socket that is started again is the one that the daemon sees.
    run_ok(&[
        "systemctl",
        "restart",
        "vhost-device-iommu-adopt@one.socket",
    ]);
    assert_eq!(seen(&one), own);
    run_ok(&["systemctl", "stop", "vhost-device-iommu-adopt@*.socket"]);
}
