//! Virtual functions of a network card whose physical function VFIO holds, too: VFIO opens them only with a VF token.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use crate::client::{CONFIG, Client};
use crate::common::daemon::Daemon;
use crate::devices::Function;
use crate::program::run;
use crate::vm::Setup;
use crate::words;

/// The beginning of all tokens here.
const SECRET: &str = "83c4a35e-90b1-4c5c";
const OTHER: &str = "83c4a35e-90b1-4c5c-8e51-0a6b4f7d2e18";

/// The card with one virtual function, which is removed on drop.
struct Card {
    physical: Function,
    name: String,
}

impl Card {
    fn with_virtual_function() -> Self {
        let name = words("VIOMMU_IGB")[0].clone();
        let physical = Function::new(&name);
        fs::write(physical.path("sriov_numvfs"), "1").expect("a virtual function");
        Self { physical, name }
    }

    fn virtual_function(&self) -> String {
        crate::link_name(&self.physical.path("virtfn0"))
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // Fails only if the test has failed before.
        let _ = fs::write(self.physical.path("sriov_numvfs"), "0");
    }
}

/// A configuration file with one exported device, and the directory of its sockets.
struct Vm {
    folder: tempfile::TempDir,
    keys: String,
}

impl Vm {
    fn new(host_iommu: &str, device: &str, token: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut keys = format!(
            "address = '00:05.0'\nhost-iommu = '{host_iommu}'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '{device}'\n\
             export = '{}/e'\n",
            folder.path().display()
        );
        if let Some(token) = token {
            keys += &format!("vf-token = '{token}'\n");
        }
        Self { folder, keys }
    }

    /// Checks that the program refuses the device, with `cure`, and that nothing shows a token.
    fn expect_refusal(&self, cure: &str) {
        let socket = self.folder.path().join("s");
        let (output, is_started) = self.run(&["--config"], &format!("socket = {socket:?}\n"));
        assert!(!is_started && output.contains(cure), "{output}");
    }

    fn check(&self) -> (String, bool) {
        self.run(&["check"], "")
    }

    fn run(&self, arguments: &[&str], more: &str) -> (String, bool) {
        let file = self.folder.path().join("vm.toml");
        fs::write(&file, format!("{more}{}", self.keys)).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("changed");
        let (output, success) = run(arguments, &file);
        assert_shows_no_token(&output);
        (output, success)
    }

    fn start(&self) -> Daemon {
        Daemon::with_config(&self.keys)
    }

    /// The vendor and the device in the configuration space, as a client of the daemon reads them.
    fn identity(&self) -> u32 {
        Client::open(&self.folder.path().join("e")).read(CONFIG, 0)
    }
}

#[track_caller]
fn assert_shows_no_token(text: &str) {
    assert!(!text.contains(SECRET), "{text}");
}

fn end(daemon: &Daemon) {
    assert_shows_no_token(&daemon.log());
    assert_shows_no_token(&daemon.status().to_string());
    daemon.terminate();
    daemon.wait_for_end();
}

/// Whether QEMU can open the device with the property `vf-token`, or what QEMU prints.
fn qemu_with(host_iommu: &str, device: &str, token: &str) -> Result<(), String> {
    let mut qemu = Command::new(Setup::from_environment().qemu);
    qemu.args([
        "-S",
        "-accel",
        "tcg",
        "-machine",
        "q35",
        "-m",
        "64",
        "-nodefaults",
    ]);
    qemu.args(["-display", "none", "-monitor", "stdio"]);
    let mut argument = format!("vfio-pci,host={device},vf-token={token}");
    if host_iommu == "iommufd" {
        qemu.args(["-object", "iommufd,id=iommufd"]);
        argument += ",iommufd=iommufd";
    }
    qemu.args(["-device", &argument]);
    let pipes = (Stdio::piped(), Stdio::piped(), Stdio::piped());
    let qemu = qemu.stdin(pipes.0).stdout(pipes.1).stderr(pipes.2);
    let mut running = qemu.spawn().expect("QEMU");
    let mut monitor = running.stdin.take().expect("a pipe");
    // Fails if QEMU has ended.
    let _ = monitor.write_all(b"quit\n");
    let done = running.wait_with_output().expect("QEMU's end");
    let output = String::from_utf8_lossy(&done.stderr).into_owned();
    if done.status.success() {
        Ok(())
    } else {
        Err(output)
    }
}

/// `token` must be one that the physical function has not had: VFIO keeps the last one.
fn open_functions_with(host_iommu: &str, token: &str) {
    eprintln!("{host_iommu}");
    let right = Some(token);
    let card = Card::with_virtual_function();
    let (pf, vf) = (card.name.as_str(), &card.virtual_function());
    let vm = |device: &str, token| Vm::new(host_iommu, device, token);

    eprintln!("nobody has set a token");
    for (token, cure) in [(None, "set `vf-token`"), (right, "the same `vf-token`")] {
        vm(vf, token).expect_refusal(cure);
    }
    let (checked, is_ready) = vm(vf, None).check();
    assert!(
        !is_ready && checked.contains("VFIO asks for a VF token"),
        "{checked}"
    );
    let (checked, is_ready) = vm(vf, right).check();
    assert!(
        is_ready && checked.contains("every user can read"),
        "{checked}"
    );

    eprintln!("the daemon of the physical function has set it");
    let physical = vm(pf, right).start();
    for (token, cure) in [
        (None, "set `vf-token`"),
        (Some(OTHER), "the same `vf-token`"),
    ] {
        vm(vf, token).expect_refusal(cure);
    }
    eprintln!("QEMU gives it to a group, and not to an iommufd");
    let opened = qemu_with(host_iommu, vf, token);
    match host_iommu {
        "type1" => assert_eq!(opened, Ok(())),
        _ => {
            let output = opened.expect_err("refused");
            assert!(
                output.contains("to iommufd") && output.contains("Permission denied"),
                "{output}"
            );
        }
    }
    let of_vf = vm(vf, right);
    let daemon = of_vf.start();
    assert_eq!(of_vf.identity(), 0x10ca_8086);

    eprintln!("the physical function is closed, and its virtual function in use");
    end(&physical);
    for (token, cure) in [
        (None, "set `vf-token`"),
        (Some(OTHER), "the same `vf-token`"),
    ] {
        vm(pf, token).expect_refusal(cure);
    }
    let of_pf = vm(pf, right);
    let physical = of_pf.start();
    assert_eq!(of_pf.identity(), 0x10c9_8086);
    end(&physical);
    end(&daemon);

    eprintln!("a token of an added endpoint would be shown in the status");
    let keys = format!("address = '00:05.0'\nhost-iommu = '{host_iommu}'\nhotplug = ['00:06.0']\n");
    let daemon = Daemon::with_config(&keys);
    let added = daemon.control(&format!(
        "add-endpoint address = '00:06.0', vfio = '{vf}', export = '/e', vf-token = '{token}'"
    ));
    assert!(added.to_string().contains("into the file"), "{added}");
    assert_shows_no_token(&added.to_string());
    end(&daemon);

    eprintln!("VFIO takes no token for another device");
    let edu = &words("VIOMMU_EDU")[0];
    vm(edu, right).expect_refusal("remove `vf-token`");
    let (checked, is_ready) = vm(edu, right).check();
    assert!(
        !is_ready && checked.contains("remove `vf-token`"),
        "{checked}"
    );
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn functions_are_opened_with_the_token_that_vfio_asks_for() {
    open_functions_with("iommufd", "83c4a35e-90b1-4c5c-8e51-0a6b4f7d2e19");
    open_functions_with("type1", "83c4a35e-90b1-4c5c-8e51-0a6b4f7d2e20");
}
