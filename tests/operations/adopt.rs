//! The helper of `vfio-from = "vmm"` as systemd starts it.
//!
//! The kernel of this machine has no iommufd, so no VMM has anything to take. What is tested is everything before that: the
//! helper knows the service that asks, reads its file, and may look at the files of another user's process.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vhost_device_iommu::adopt::message::ask;
use vhost_device_iommu::topology::HostAddress;

use crate::machine::{install_once, run_ok};

const SOCKET: &str = "/run/vhost-device-iommu/adopt.sock";
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

/// What the helper answers this process, in this control group.
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
    let helper = UnixStream::connect(SOCKET).expect("the helper's socket");
    let device: HostAddress = device.parse().expect("an address");
    let deadline = Instant::now() + Duration::from_secs(60);
    let found = ask(&helper, vmm.as_fd(), &[device], deadline);
    fs::write(format!("/sys/fs/cgroup{before}/cgroup.procs"), &own).expect("moved back");
    found
        .map(|found| found.devices.len())
        .map_err(|cause| cause.to_string())
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn the_helper_serves_the_services_of_daemons_alone() {
    install_once();
    run_ok(&[
        "systemctl",
        "enable",
        "--now",
        "vhost-device-iommu-adopt.socket",
    ]);
    let file = "/etc/vhost-device-iommu/adopted.toml";
    let text =
        format!("address = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '{DEVICE}'\n");
    fs::write(file, text).expect("written");
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
    let refusal = answer(
        "/viommu.slice/vhost-device-iommu@none.service",
        &socket,
        DEVICE,
    );
    assert!(
        refusal
            .expect_err("no file")
            .contains("file of the daemon's VM")
    );
    for stranger in [
        "/viommu.slice/other.service",
        "/viommu.slice/x@y.service/vhost-device-iommu@adopted.service",
    ] {
        let refusal = answer(stranger, &socket, DEVICE).expect_err("a stranger");
        assert!(
            refusal.contains("no service vhost-device-iommu@NAME.service"),
            "{refusal}"
        );
    }
    child.kill().expect("it runs");
    child.wait().expect("it has ended");
    let refusal = answer(service, &socket, DEVICE).expect_err("it has ended");
    assert!(
        refusal.contains("has ended") || refusal.contains("may have ended"),
        "{refusal}"
    );
    // Nothing of it stays.
    let units = run_ok(&[
        "systemctl",
        "list-units",
        "--all",
        "--plain",
        "--no-legend",
        "vhost-device-iommu-adopt@*",
    ]);
    assert!(!units.contains("failed"), "{units}");
    fs::remove_file(file).expect("removed");
    run_ok(&[
        "systemctl",
        "disable",
        "--now",
        "vhost-device-iommu-adopt.socket",
    ]);
    let exposure = run_ok(&[
        "systemd-analyze",
        "verify",
        "--man=no",
        "vhost-device-iommu-adopt@x.service",
    ]);
    assert_eq!(exposure, "");
}
