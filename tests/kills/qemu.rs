//! Unmodified QEMU, killed while it starts.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::common::daemon::Daemon;
use crate::common::rng::Rng;
use crate::process::Role;

const ROUNDS: usize = 10;
/// The test kills QEMU at most this many milliseconds after its start.
const MAX_AGE_MS: u64 = 2_000;
/// KiB by which the daemon's memory may grow.
const SLACK_KIB: u64 = 512;

#[test]
#[ignore = "needs QEMU; run the suite `emulated`"]
fn an_unmodified_qemu_killed_while_it_starts_leaves_nothing_behind() {
    let qemu = std::env::var("VIOMMU_QEMU");
    let qemu = qemu.expect("VIOMMU_QEMU is set by qemu-scripts/test.sh, which runs this");
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let config = format!(
        "memory = '64M'\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\n\
         vfio-user = {{ listen = {:?}, connect = {:?} }}\n",
        at("client"),
        at("server")
    );
    let daemon = Daemon::with_config(&config);
    let arguments = arguments(&config, &daemon.socket(), &at("vm.viot"));
    let seed = std::process::id();
    println!("seed {seed}");
    let mut rng = Rng::new(u64::from(seed) << 1 | 1);
    let mut server = Role::start("server of a PCI device", &[("KILLS_SOCKET", &at("server"))]);
    server.wait_for("listens");
    let start = || {
        let mut command = Command::new(&qemu);
        command
            .args(["-accel", "tcg", "-nodefaults", "-no-user-config"])
            .args(["-display", "none"])
            .args(&arguments)
            .stderr(Stdio::inherit());
        Role::of("QEMU", &mut command)
    };
    let figures = |most: Option<(usize, usize)>| {
        let mut before = (0, 0);
        daemon.wait_for("quiet, with the first descriptors and threads", || {
            sleep(Duration::from_millis(20));
            let now = (daemon.fd_count(), daemon.thread_count());
            let status = daemon.status();
            let client = &status["emulated"][0]["client"];
            let has_no_vmm = status["connected"] == false && client == false;
            let is_high = most.is_some_and(|most| now.0 > most.0 || now.1 > most.1);
            std::mem::replace(&mut before, now) == now && has_no_vmm && !is_high
        });
        (before, daemon.rss_kib())
    };
    let mut before = None;
    for round in 0..=ROUNDS {
        let mut vmm = start();
        if round == 0 || rng.one_in(3) {
            // QEMU has made its device when it reads a register.
            server.wait_for("read");
        }
        sleep(Duration::from_millis(rng.below(MAX_AGE_MS)));
        vmm.kill();
        daemon.assert_alive();
        server.assert_alive();
        let now = figures(before.map(|(counts, _)| counts));
        let kib = before.map_or(now.1, |(_, kib)| kib);
        before = Some((now.0, kib));
        assert!(now.1 <= kib + SLACK_KIB, "{kib} KiB, then {}", now.1);
    }
    server.drop_lines();
    let mut last = start();
    server.wait_for("read");
    last.assert_alive();
    daemon.wait_for("client and server", || {
        let status = daemon.status();
        let device = &status["emulated"][0];
        device["client"] == true && device["server"] == true
    });
}

/// The output of `qemu-args` for the daemon's socket.
fn arguments(config: &str, socket: &Path, viot: &Path) -> Vec<String> {
    let file = viot.with_extension("toml");
    fs::write(&file, format!("socket = {socket:?}\n{config}")).expect("written");
    let run = |arguments: &[&Path]| {
        let daemon = env!("CARGO_BIN_EXE_vhost-device-iommu");
        let output = Command::new(daemon).args(arguments).output();
        let output = output.expect("it runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    run(&["viot".as_ref(), &file, "-o".as_ref(), viot]);
    let text = run(&["qemu-args".as_ref(), &file, "--viot".as_ref(), viot]);
    text.lines().map(str::to_owned).collect()
}
