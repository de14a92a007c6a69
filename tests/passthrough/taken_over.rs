//! A QEMU that a shell of another user starts, with `-object iommufd -device vfio-pci,host=...`, and a daemon that nobody has
//! passed anything to: the daemon takes the open files over through the helper.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::bed::{Backend, Bed, endpoint};
use crate::common::kept::Keeper;
use crate::common::wire::OK;
use crate::devices::{FaultLog, Function};
use crate::nested::{EDU, Nested, with_a_working_guest};
use crate::vm::{Control, Launcher, Process, Setup, TestDir, Vm, VmOptions, wait_for};
use crate::words;

/// A user that owns nothing here.
const NOBODY: &str = "65534";
const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-device-iommu");
/// Longer than anything here takes, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// A daemon with a keeper, and its helper.
struct Daemon {
    keeper: Keeper,
    config: PathBuf,
    control: Control,
    log: PathBuf,
    child: Child,
    _helper: Process,
}

impl Daemon {
    fn start(test_dir: &TestDir, host: &str) -> Self {
        let path = |name: &str| test_dir.path(name).display().to_string();
        let config = test_dir.path("vm.toml");
        let text = format!(
            "socket = '{}'\nsocket-mode = '0666'\ncontrol = '{}'\nmemory = '512M'\naddress = '00:05.0'\n\
             vfio-from = 'vmm'\nvfio-helper = '{}'\n[[endpoint]]\naddress = '{EDU}'\nvfio = '{host}'\n",
            path("iommu.sock"),
            path("control.sock"),
            path("adopt.sock"),
        );
        fs::write(&config, text).expect("written");
        let keeper = Keeper::empty();
        let log = test_dir.path("daemon.log");
        let child = spawn(&config, &log, &keeper);
        let control = Control(test_dir.path("control.sock"));
        wait_for("the daemon", LIMIT, || control.answers().then_some(()));
        let mut helper = Command::new(PROGRAM);
        helper.args(["adopt", "--socket-path", &path("adopt.sock"), "--config"]);
        helper.arg(&config);
        let helper = Process::start("the helper", &mut helper, &test_dir.path("helper.log"));
        Self {
            keeper,
            config,
            control,
            log,
            child,
            _helper: helper,
        }
    }

    /// Kills the daemon, and starts it again with all that it has left.
    fn die(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it has ended");
        self.keeper.take();
        self.child = spawn(&self.config, &self.log, &self.keeper);
        wait_for("the next daemon", LIMIT, || {
            let answers = self.control.answers();
            (answers && self.control.status().0["life"]["state"] == "taken-over").then_some(())
        });
    }

    fn arguments(&self, viot: &Path) -> Vec<String> {
        let run = |words: &[&str]| {
            let output = Command::new(PROGRAM).args(words).output().expect("it runs");
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{errors}");
            String::from_utf8(output.stdout).expect("text")
        };
        let (config, viot) = (self.config.to_str().unwrap(), viot.to_str().unwrap());
        run(&["viot", config, "-o", viot]);
        let arguments = run(&["qemu-args", config, "--viot", viot]);
        arguments.lines().map(str::to_owned).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(config: &Path, log: &Path, keeper: &Keeper) -> Child {
    let log = fs::File::options().append(true).create(true).open(log);
    let mut command = Command::new(PROGRAM);
    command.arg("--config").arg(config);
    command.env("RUST_LOG", "info").stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(log.expect("a log"));
    keeper.prepare(&mut command);
    command.spawn().expect("the daemon starts")
}

fn let_all_users(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
}

/// Takes a device from its driver and gives it back. The kernel waits for the last open file of the device.
fn rebind(host: &str) {
    let script = format!(
        "echo {host} >/sys/bus/pci/drivers/vfio-pci/unbind && echo {host} >/sys/bus/pci/drivers/vfio-pci/bind"
    );
    let limit = LIMIT.as_secs().to_string();
    let status = Command::new("timeout")
        .args([&limit, "sh", "-c", &script])
        .status();
    assert!(
        status.expect("a shell").success(),
        "somebody has {host} open"
    );
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_qemu_of_another_user_shares_its_device() {
    with_a_working_guest(share);
}

fn share() {
    let setup = Setup::from_environment();
    let host = words("VIOMMU_EDU")[0].clone();
    let test_dir = TestDir::new("taken-over");
    let_all_users(&test_dir.path(""), 0o777);
    // The folders of QEMU and of the kernel may be root's. L1 forgets the change.
    let programs = [
        &setup.qemu,
        &setup.newest().image,
        &setup.newest().initramfs,
    ];
    for folder in programs.iter().flat_map(|path| path.ancestors().skip(1)) {
        let mode = fs::metadata(folder).expect("a folder").permissions().mode();
        if mode & 0o5 != 0o5 {
            let_all_users(folder, mode | 0o755);
        }
    }
    for node in ["/dev/iommu", "/dev/kvm", &Function::new(&host).node()] {
        let_all_users(node.as_ref(), 0o666);
    }
    // QEMU connects to sockets that the test makes.
    rustix::process::umask(rustix::fs::Mode::empty());
    let mut daemon = Daemon::start(&test_dir, &host);
    let become_another = [
        "setpriv",
        "--reuid",
        NOBODY,
        "--regid",
        NOBODY,
        "--clear-groups",
        "--",
    ];
    let launcher = Launcher {
        words: become_another.map(str::to_owned).into(),
        // See `Nested::launch`.
        accel: ["-accel", "kvm", "-cpu", "max,-tsc-deadline,-kvm-pv-eoi"]
            .map(str::to_owned)
            .into(),
    };
    let options = VmOptions {
        kernel: setup.newest(),
        append: "quiet no_timer_check".to_owned(),
        iommu: daemon.arguments(&test_dir.path("vm.viot")),
        extra: Vec::new(),
    };
    let vm = Vm::launch(&setup, &test_dir, "vm", &launcher, &options);
    let control = Control(test_dir.path("control.sock"));
    // QEMU has made its devices, and the guest's driver does not run yet.
    let status = control.status();
    assert_eq!(status.endpoint(EDU)["taken_over"], false, "{}", status.0);
    let mut nested = Nested::of(vm, control, test_dir);
    nested.vm.wait_until_up();
    let status = nested.control.status();
    assert_eq!(status.endpoint(EDU)["taken_over"], true, "{}", status.0);
    nested.test_dir.note("taken over");
    let mut faults = FaultLog::now();
    nested.drive(&mut faults);
    nested.test_dir.note("driven");

    daemon.die();
    let status = nested.control.status();
    assert_eq!(status.endpoint(EDU)["taken_over"], true, "{}", status.0);
    assert_eq!(status.dma_of(EDU), "translated");
    nested.drive_on();
    nested.test_dir.note("driven under the next daemon");

    nested.vm.begin("poweroff -f");
    nested.vm.wait_for_end();
    wait_for("the end of what is kept", LIMIT, || {
        daemon.keeper.take();
        let names = daemon.keeper.files.keys();
        let mut devices = names.filter(|name| *name == "iommufd" || name.starts_with("vfio.0"));
        devices.next().is_none().then_some(())
    });
    assert!(
        daemon.child.try_wait().expect("a child").is_none(),
        "it waits for the next VMM"
    );
    rebind(&host);
    // Before the folder, which names its processes.
    drop(daemon);
}

/// A VMM ends, and another one comes to the same daemon.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn the_next_vmm_shares_its_devices_too() {
    let name = words("VIOMMU_EDU")[0].clone();
    let mut vm = Bed::new(Backend::TakenOver, &[&name]);
    for round in 0..3 {
        let status = vm.daemon.endpoint(endpoint(0));
        assert_eq!(status["taken_over"], true, "{round}: {}", vm.daemon.log());
        assert_eq!(vm.guest.attach(1, endpoint(0)), OK);
        vm.disconnect();
        let status = vm.daemon.endpoint(endpoint(0));
        assert_eq!(status["taken_over"], false, "{round}");
        vm.replace_vmm(|| rebind(&name));
    }
}
