//! The machine that runs the tests: a clean Debian with systemd, in which the package is installed
//! once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Limit for any operation; the machine may be emulated.
const PATIENCE: Duration = Duration::from_secs(60);
const PROGRAM: &str = "/usr/bin/vhost-device-iommu";

/// The result of a command.
#[derive(Debug)]
pub struct CommandResult {
    pub success: bool,
    /// Standard output, followed by standard error.
    pub text: String,
}

/// Runs a command.
pub fn run(words: &[&str]) -> CommandResult {
    let (program, arguments) = words.split_first().expect("a command");
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
    let text = [output.stdout, output.stderr].concat();
    CommandResult {
        success: output.status.success(),
        text: String::from_utf8_lossy(&text).into_owned(),
    }
}

/// Runs a command that must succeed. Returns its output.
pub fn run_ok(words: &[&str]) -> String {
    let result = run(words);
    assert!(result.success, "{words:?}: {}", result.text);
    result.text
}

/// Installs the package on the first call.
pub fn install_once() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        let package = fs::read_dir("/host").expect("the folder with the package");
        let package = package
            .map(|entry| entry.expect("an entry").path())
            .find(|path| path.extension().is_some_and(|e| e == "deb"))
            .expect("the package; run the suite with `qemu-scripts/test.sh operations`");
        run_ok(&["dpkg", "-i", package.to_str().expect("text")]);
    });
}

/// One VM and its service; drop stops the service and removes the VM's files.
pub struct Vm {
    name: &'static str,
}

impl Vm {
    /// Writes the example's file with `more` appended; does not start the service.
    pub fn new(name: &'static str, more: &str) -> Self {
        install_once();
        let example = "/usr/share/doc/vhost-device-iommu/examples/service.toml";
        let text = fs::read_to_string(example).expect("the example");
        let text = text.replace("/vm1/", &format!("/{name}/"));
        let vm = Self { name };
        fs::write(vm.file(), text + more).expect("its file");
        run_ok(&["systemctl", "daemon-reload"]);
        vm
    }

    pub fn file(&self) -> PathBuf {
        format!("/etc/vhost-device-iommu/{}.toml", self.name).into()
    }

    pub fn service(&self) -> String {
        format!("vhost-device-iommu@{}.service", self.name)
    }

    pub fn socket_unit(&self) -> String {
        format!("vhost-device-iommu@{}.socket", self.name)
    }

    /// Path of the VMM's socket.
    pub fn socket(&self) -> PathBuf {
        format!("/run/vhost-device-iommu/{}/vhost-user.sock", self.name).into()
    }

    pub fn start(&self) {
        let result = run(&["systemctl", "start", &self.service()]);
        assert!(result.success, "{}\n{}", result.text, self.journal());
    }

    /// Adds settings to the service, until the machine ends or the VM is dropped.
    pub fn set(&self, settings: &str) {
        let folder = format!("/run/systemd/system/{}.d", self.service());
        fs::create_dir_all(&folder).expect("a folder");
        let text = format!("[Service]\n{settings}\n");
        fs::write(Path::new(&folder).join("test.conf"), text).expect("a drop-in");
        run_ok(&["systemctl", "daemon-reload"]);
    }

    /// The value of a property of the service.
    pub fn property(&self, name: &str) -> String {
        let text = run_ok(&["systemctl", "show", "--value", "-p", name, &self.service()]);
        text.trim().into()
    }

    /// Waits until the property has this value.
    pub fn wait_for(&self, name: &str, value: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.property(name);
            if now == value {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{name} is {now}, not {value}\n{}",
                self.journal()
            );
            sleep(Duration::from_millis(200));
        }
    }

    /// The daemon's answer to `status`.
    pub fn status(&self) -> Value {
        let control = self.socket().with_file_name("control.sock");
        let control = control.to_str().expect("text");
        let text = run_ok(&[PROGRAM, "ctl", control, "--json", "status"]);
        serde_json::from_str(&text).expect("JSON")
    }

    /// The state of an endpoint.
    pub fn endpoint(&self, address: &str) -> String {
        let status = self.status();
        let endpoints = status["endpoints"].as_array().expect("endpoints");
        let found = endpoints.iter().find(|e| e["address"] == address);
        found.map_or("untouched".into(), |e| {
            e["state"].as_str().expect("text").into()
        })
    }

    /// The journal of the service.
    pub fn journal(&self) -> String {
        self.journal_from("debug")
    }

    /// The journal of the service, with this priority and above.
    pub fn journal_from(&self, priority: &str) -> String {
        run_ok(&["journalctl", "--sync"]);
        let (unit, priority) = (self.service(), format!("--priority={priority}"));
        run_ok(&["journalctl", "--no-pager", &priority, "-u", &unit])
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        run(&["systemctl", "stop", &self.socket_unit(), &self.service()]);
        run(&["systemctl", "reset-failed", &self.service()]);
        let _ = fs::remove_dir_all(format!("/run/systemd/system/{}.d", self.service()));
        let _ = fs::remove_file(self.file());
    }
}
