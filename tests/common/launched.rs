//! A VM that `launch` has started, whose daemon can be killed or ended.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::vm::machine::Machine;
use crate::vm::{ANSWER, Control, Launcher, Setup, Status, TestDir, Vm, VmOptions, wait_for};

/// `launch` and its daemon.
pub struct Launched {
    pub control: Control,
    /// The process of `launch`, the parent of the daemon.
    launcher: u32,
}

/// How a daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By SIGKILL.
    Killed,
    /// By SIGTERM.
    #[allow(dead_code, reason = "a part of the test programs plans an end")]
    Planned,
}

impl Launched {
    /// Starts a VM under `launch`, with this configuration and with the daemon's sockets in `test_dir`. `transport` is the
    /// configuration's key of the VMM's socket.
    pub fn start(
        setup: &Setup,
        test_dir: &TestDir,
        transport: &str,
        text: &str,
        options: &VmOptions<'_>,
    ) -> (Vm, Self) {
        let config = test_dir.path("vm.toml");
        let control = test_dir.path("control.sock");
        let sockets = format!(
            "{transport} = '{}'\ncontrol = '{}'\n",
            test_dir.path("iommu.sock").display(),
            control.display()
        );
        fs::write(&config, sockets + text).expect("written");
        let launcher = launcher(setup, &config);
        let mut vm = Vm::launch(setup, test_dir, "vm", &launcher, options);
        vm.wait_until_up();
        let launcher = vm.pid();
        let control = Control(control);
        (vm, Self { control, launcher })
    }

    /// The daemon's process; `None` while there is none.
    fn daemon(&self) -> Option<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.launcher)).expect("launch runs");
        let children = tasks
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: String = children.collect();
        let mut children = children.split_whitespace();
        let is_daemon = |pid: &&str| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.starts_with("vhost-device-io"))
        };
        children.find(is_daemon)?.parse().ok()
    }

    /// Ends the daemon, and waits until another one answers.
    pub fn end(&self, end: End) {
        let old = wait_for("a daemon", ANSWER, || self.daemon());
        let signal = match end {
            End::Killed => "KILL",
            End::Planned => "TERM",
        };
        let status = Command::new("sh")
            .args(["-c", &format!("kill -{signal} {old}")])
            .status();
        assert!(status.expect("sh runs").success());
        wait_for("another daemon", ANSWER, || {
            let new = self.daemon()?;
            (new != old && self.control.answers()).then_some(())
        });
    }

    /// The status, once the daemon has taken over.
    pub fn status(&self) -> Status {
        wait_for("the state of the daemon before", ANSWER, || {
            let status = self.control.status();
            (status.0["life"]["state"] != "taking-over").then_some(status)
        })
    }
}

fn launcher(setup: &Setup, config: &Path) -> Launcher {
    let binary = env!("CARGO_BIN_EXE_vhost-device-iommu");
    let words = ["launch", "--max-restarts", "1000000", "--config"];
    // `launch` learns the machine from it.
    let machine: &[&str] = match setup.machine {
        Machine::Q35 => &[],
        Machine::Virt => &["-M", "virt"],
    };
    Launcher {
        words: std::iter::once(binary)
            .chain(words)
            .map(str::to_owned)
            .chain([config.display().to_string(), "--".into()])
            .collect(),
        accel: machine
            .iter()
            .chain(setup.machine.accel())
            .map(|word| (*word).to_owned())
            .collect(),
    }
}
