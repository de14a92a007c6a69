//! The library without the daemon: the crates that a device links with it, and the files of the published crate.
#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use common::daemon::{Daemon, EP};
use common::guest::Guest;
use common::memory::Region;
use common::wire;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(30);
const SOURCE: u64 = 0xf0_0000;
const TARGET: u64 = 0xf1_0000;
/// Files of a published crate are text; none is longer than this.
const MAX_FILE: u64 = 256 << 10;

/// All crates that a device may link beside the library. Each new crate makes every device heavier.
const LIGHT: [&str; 16] = [
    "cfg-if",
    "libc",
    "lock_api",
    "log",
    "parking_lot",
    "parking_lot_core",
    "proc-macro2",
    "quote",
    "rangemap",
    "scopeguard",
    "smallvec",
    "syn",
    "thiserror",
    "thiserror-impl",
    "unicode-ident",
    "vm-memory",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cargo(args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(args).arg("--offline");
    let output = command.output().expect("cargo starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {args:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

/// Names of the crates that the example device links, its own left out.
fn linked_crates() -> BTreeSet<String> {
    let tree = [
        "tree",
        "--locked",
        "--package=shadow-device",
        "--edges=normal",
        "--prefix=none",
        "--no-dedupe",
    ];
    let names = cargo(&tree);
    let names = names.lines().filter_map(|line| line.split(' ').next());
    let mut names: BTreeSet<String> = names.map(str::to_owned).collect();
    assert!(names.remove("shadow-device"), "the tree begins with it");
    names
}

#[test]
fn a_device_links_the_reader_and_nothing_of_the_daemon() {
    let mut linked = linked_crates();
    let readme = root().join("examples/shadow-device/README.md");
    let readme = std::fs::read_to_string(readme).expect("a README");
    let stated = format!("It links {} crates", linked.len());
    assert!(
        readme.contains(&stated),
        "the README does not say: {stated}"
    );
    assert!(linked.remove("vhost-device-iommu"));
    let light: BTreeSet<String> = LIGHT.map(str::to_owned).into();
    let heavy: Vec<_> = linked.difference(&light).collect();
    assert!(heavy.is_empty(), "a device links {heavy:?}");
    let gone: Vec<_> = light.difference(&linked).collect();
    assert!(gone.is_empty(), "no device links {gone:?} any more");
}

/// The example device's process.
struct Device {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Device {
    fn build() -> PathBuf {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("shadow-device");
        let folder = format!("--target-dir={}", target.display());
        cargo(&["build", "--locked", "--package=shadow-device", &folder]);
        target.join("debug/shadow-device")
    }

    fn start(program: &Path, socket: &Path) -> Self {
        let mut child = Command::new(program)
            .arg(socket)
            .arg(format!("{EP:#x}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the device starts");
        Self {
            commands: child.stdin.take().expect("piped"),
            answers: BufReader::new(child.stdout.take().expect("piped")),
            child,
        }
    }

    fn copy(&mut self, from: u64, to: u64, bytes: u64) -> String {
        writeln!(self.commands, "{from:#x} {to:#x} {bytes}").expect("the device reads");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("an answer");
        answer.trim_end().to_owned()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn assert_fault(guest: &mut Guest, reason: u8, access: u32, address: u64) {
    let fault = guest.take_event(SOON).expect("a fault");
    let fault = wire::Fault::parse(&fault.bytes);
    // Bit 8: the address is valid.
    assert_eq!((fault.reason, fault.flags), (reason, 0x100 | access));
    assert_eq!((fault.endpoint, fault.address), (EP, address));
}

#[test]
fn a_device_built_without_the_daemon_obeys_the_guest() {
    let program = Device::build();
    let folder = TempDir::new().expect("a folder");
    let socket = folder.path().join("copy.sock");
    let daemon = Daemon::with_config(&format!(
        "address = '00:05.0'\nbypass = false\n\
         [[endpoint]]\naddress = '00:06.0'\nshadow = '{}'\n\
         [readers]\npatience-ms = 20000\n",
        socket.display()
    ));
    let mut device = Device::start(&program, &socket);
    let mut guest = Guest::boot(&daemon);
    guest.post_event_buffer(24);
    // The device delivers faults only once the worker has handled an event. This answer shows that it has.
    guest.probe(EP);
    let refused = device.copy(0x5000, 0x6000, 16);
    assert!(
        refused.contains("endpoint 0000:00:06.0 has no r- access at 0x5000"),
        "{refused}"
    );
    assert_fault(&mut guest, 1, 1, 0x5000);

    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map(1, 0x5000, 0x6fff, SOURCE, wire::READ), 0);
    assert_eq!(guest.map(1, 0x1_0000, 0x1_1fff, TARGET, wire::RW), 0);
    let content: Vec<u8> = (0..6000u32).map(|n| (n % 251) as u8).collect();
    guest.memory.write(SOURCE, &content);
    assert_eq!(device.copy(0x5000, 0x1_0000, 6000), "copied");
    assert_eq!(guest.memory.read(TARGET, 6000), content);

    guest.post_event_buffer(24);
    let refused = device.copy(0x1_0000, 0x5008, 16);
    assert!(refused.contains("no -w access at 0x5008"), "{refused}");
    assert_fault(&mut guest, 2, 2, 0x5008);

    // Memory that the device learns of while it runs.
    guest.add_region(Region::new(0x8_0000_0000, 0x1000));
    assert_eq!(guest.map_page(1, 0x2_0000, 0x8_0000_0000), 0);
    assert_eq!(device.copy(0x5000, 0x2_0000, 4096), "copied");
    assert_eq!(guest.memory.read(0x8_0000_0000, 4096), content[..4096]);

    assert_eq!(guest.unmap(1, 0x1_0000, 0x1_1fff), 0);
    guest.post_event_buffer(24);
    let refused = device.copy(0x5000, 0x1_0000, 6000);
    assert!(refused.contains("no -w access at 0x10000"), "{refused}");
    assert_fault(&mut guest, 2, 2, 0x1_0000);
    assert_eq!(daemon.status()["readers"]["now"], 1);
}

#[test]
fn the_published_crate_holds_sources_documents_and_nothing_large() {
    let listed = cargo(&["package", "--locked", "--allow-dirty", "--list"]);
    let listed: BTreeSet<&str> = listed.lines().collect();
    for needed in [
        "Cargo.toml",
        "Cargo.lock",
        "CHANGELOG.md",
        "LICENSE-APACHE",
        "LICENSE-BSD-3-Clause",
        "README.md",
        "docs/shadow.md",
        "examples/nvme/main.rs",
        "src/lib.rs",
        "src/main.rs",
    ] {
        assert!(listed.contains(needed), "{needed} is missing");
    }
    for file in listed {
        let top = file.split('/').next().unwrap_or_default();
        let alien = ["fuzz", "qemu-scripts", "target"].contains(&top) || file.starts_with(".ci");
        assert!(!alien, "{file} is published");
        // Cargo makes some files itself.
        if let Ok(found) = root().join(file).metadata() {
            assert!(found.len() <= MAX_FILE, "{file} has {} bytes", found.len());
        }
    }
}
