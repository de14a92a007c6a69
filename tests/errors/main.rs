//! `docs/errors.md` lists every error that an operator can make in the configuration or on the
//! command line, with its cure. The table is generated from the sources. This test provokes each
//! row, and fails if an error has no case.
//!
//! `VIOMMU_REGENERATE=1 cargo test --test errors` writes the table.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod cases;
mod messages;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cases::{CASES, Case, ELSEWHERE, Input};
use messages::{Message, matches};
use tempfile::TempDir;

/// Source files with errors of the configuration and the command line, and their headings.
const SOURCES: [(&str, &str); 25] = [
    ("src/config/error.rs", "The configuration"),
    ("src/topology/pci.rs", "PCI addresses and ranges"),
    ("src/topology/ports/path.rs", "Ports"),
    ("src/topology/ports/error.rs", "Ports"),
    ("src/topology/groups.rs", "Names of host groups"),
    ("src/topology/reserved.rs", "Reserved regions"),
    ("src/topology/mod.rs", "Conflicts between endpoints"),
    ("src/topology/viot.rs", "`viot`"),
    (
        "src/config/slots.rs",
        "Places of devices: `check`, `qemu-args` and `launch`",
    ),
    ("src/qemu/args/mod.rs", "`qemu-args` and `launch`"),
    ("src/qemu/resolve/error.rs", "`resolve`"),
    (
        "src/topology/device_tree.rs",
        "`dtb`, and `launch` of Arm guests",
    ),
    (
        "src/vmms/launch/device_tree.rs",
        "`dtb`, and `launch` of Arm guests",
    ),
    (
        "src/vmms/mod.rs",
        "`cloud-hypervisor-args` and `crosvm-args`",
    ),
    ("src/vmms/libvirt/error.rs", "`libvirt-xml`"),
    (
        "src/qemu/args/refused.rs",
        "`launch`, options of the VMM's own",
    ),
    (
        "src/qemu/args/vmm_options.rs",
        "`launch`, options of the VMM's own",
    ),
    (
        "src/vmms/cloud_hypervisor/operator.rs",
        "`launch`, options of the VMM's own",
    ),
    (
        "src/vmms/launch/devices.rs",
        "`launch`, passthrough devices",
    ),
    ("src/vmms/launch/error.rs", "`launch`"),
    ("src/daemon/mod.rs", "The daemon"),
    ("src/transport/vhost_user/serve.rs", "The daemon"),
    ("src/endpoints/start.rs", "The daemon"),
    ("src/ctl/ask.rs", "`ctl`"),
    (
        "src/endpoints/kind.rs",
        "`ctl add-endpoint` and `remove-endpoint`",
    ),
];
/// More source files of the last headings.
const MORE: [(&str, &str); 9] = [
    (
        "src/topology/changes.rs",
        "`ctl add-endpoint` and `remove-endpoint`",
    ),
    (
        "src/iommu/hotplug.rs",
        "`ctl add-endpoint` and `remove-endpoint`",
    ),
    ("src/endpoints/passthrough/error.rs", "Passthrough devices"),
    ("src/process/realtime.rs", "Priorities"),
    ("src/process/service.rs", "Services"),
    ("src/process/supervisor.rs", "Services"),
    ("src/logging/mod.rs", "`ctl log-level`"),
    ("src/store/loaded.rs", "Taking over from the daemon before"),
    ("src/iommu/restore.rs", "Taking over from the daemon before"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All messages under their headings, in the order of the sources.
fn all() -> Vec<(&'static str, Message)> {
    let mut all = Vec::new();
    for (file, heading) in SOURCES.into_iter().chain(MORE) {
        let text = fs::read_to_string(root().join(file)).expect("a source");
        let found = messages::in_source(&text);
        assert!(!found.is_empty(), "{file} has no errors: it has moved");
        all.extend(found.into_iter().map(|message| (heading, message)));
    }
    for (heading, name, pattern) in cases::IN_CODE {
        let pattern = pattern.to_string();
        let name = name.to_string();
        all.push((heading, Message { name, pattern }));
    }
    all
}

#[test]
fn every_error_has_a_case_or_a_test_elsewhere() {
    let known: BTreeSet<_> = all().into_iter().map(|(_, m)| m.name).collect();
    let cases: BTreeSet<_> = CASES.iter().map(|case| case.name.to_owned()).collect();
    let elsewhere: BTreeSet<_> = ELSEWHERE.iter().map(|(name, _)| name.to_string()).collect();
    let both: Vec<_> = cases.intersection(&elsewhere).collect();
    assert!(
        both.is_empty(),
        "a case here and a test elsewhere: {both:?}"
    );
    let named: BTreeSet<_> = cases.union(&elsewhere).cloned().collect();
    let missing: Vec<_> = known.difference(&named).collect();
    assert!(missing.is_empty(), "no case provokes {missing:?}");
    let stale: Vec<_> = named.difference(&known).collect();
    assert!(stale.is_empty(), "there is no error {stale:?}");
    // The tests that `ELSEWHERE` names must exist.
    for (name, test) in ELSEWHERE {
        if let Some((file, function)) = test.split_once(".rs::") {
            let file = format!("{file}.rs");
            let text = fs::read_to_string(root().join(&file)).expect(&file);
            assert!(text.contains(&format!("fn {function}(")), "{name}: {test}");
        }
    }
}

#[test]
fn every_case_gives_its_message() {
    let patterns: BTreeMap<_, _> = all()
        .into_iter()
        .map(|(_, m)| (m.name, m.pattern))
        .collect();
    let mut wrong = Vec::new();
    for case in CASES {
        let Some(pattern) = patterns.get(case.name) else {
            continue;
        };
        let printed = provoke(case);
        // Messages break lines only between problems.
        if !printed.lines().any(|line| matches(pattern, line)) && !matches(pattern, &printed) {
            wrong.push(format!(
                "{}\n  wanted:  {pattern}\n  printed: {printed}",
                case.name
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_matches_the_sources() {
    let mut text = String::from(cases::HEAD);
    let mut heading = "";
    for (under, message) in all() {
        let Some((what, cure)) = message.halves() else {
            continue;
        };
        if under != heading {
            heading = under;
            text += &format!("\n## {heading}\n\n| message | cure |\n|---|---|\n");
        }
        text += &format!("| {what} | {cure} |\n");
    }
    let path = root().join("docs/errors.md");
    if std::env::var_os("VIOMMU_REGENERATE").is_some() {
        fs::write(&path, &text).expect("written");
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == text,
        "docs/errors.md does not match the sources; \
         VIOMMU_REGENERATE=1 cargo test --test errors writes it"
    );
}

/// A folder with the files that the cases need; runs the program in it.
struct Bed {
    folder: TempDir,
    _listener: UnixListener,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let listener = UnixListener::bind(at("taken.sock")).expect("a socket");
        answer(&at("mute.sock"), drop);
        answer(&at("nonsense.sock"), |mut stream| {
            let _ = BufReader::new(&stream).read_line(&mut String::new());
            let _ = stream.write_all(b"Hello?\n");
        });
        for name in [
            "quiet-qemu.sock",
            "odd-qemu.sock",
            "root-qemu.sock",
            "no-qemu.sock",
        ] {
            answer(&at(name), move |stream| qemu(stream, name));
        }
        fs::write(at("file"), "text").expect("written");
        fs::write(at("long.toml"), vec![b'#'; (1 << 20) + 1]).expect("written");
        fs::write(at("bytes.toml"), b"\xff\xfe").expect("written");
        Self {
            folder,
            _listener: listener,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// Runs the program with these arguments; it must fail soon. Returns its standard error.
    fn run(&self, args: &[&str]) -> String {
        let mut command = Command::new("timeout");
        command
            .args(["-k", "1", "20", env!("CARGO_BIN_EXE_vhost-device-iommu")])
            .args(args)
            .current_dir(self.path())
            .stdin(Stdio::null());
        let output = command.output().expect("it runs");
        let text = fs::read_to_string(self.path().join("vm.toml")).unwrap_or_default();
        assert!(
            !output.status.success(),
            "{args:?} is no error: {text:.1000}"
        );
        assert_ne!(output.status.code(), Some(124), "{args:?} does not end");
        assert_ne!(output.status.code(), Some(101), "{args:?} panics");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

/// Listens at `path` in place of a daemon.
fn answer(path: &Path, with: impl FnOnce(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(path).expect("a socket");
    std::thread::spawn(move || listener.accept().map(|(stream, _)| with(stream)));
}

/// Stands for QEMU's monitor, and answers questions about devices as the socket's name says.
fn qemu(mut stream: UnixStream, name: &str) {
    let _ = stream.write_all(b"{\"QMP\": {}}\n");
    let reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    for line in reader.lines().map_while(Result::ok) {
        let has = |text: &str| line.contains(text);
        let number = line.split("\"id\":").nth(1).unwrap_or_default();
        let number: String = number.chars().take_while(char::is_ascii_digit).collect();
        let what = match name {
            _ if has("qmp_capabilities") => "\"return\": {}",
            "quiet-qemu.sock" => return,
            "no-qemu.sock" => "\"error\": {\"class\": \"DeviceNotFound\", \"desc\": \"no\"}",
            "root-qemu.sock" if has("parent_bus") => "\"return\": \"/machine/pxb/x\"",
            "root-qemu.sock" if has("peripheral") => "\"return\": 0",
            _ => "\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}",
        };
        let _ = writeln!(stream, "{{\"id\": {number}, {what}}}");
    }
}

fn provoke(case: &Case) -> String {
    let bed = Bed::new();
    let write = |text: &str| fs::write(bed.path().join("vm.toml"), text).expect("written");
    match case.input {
        Input::File(text) => {
            write(&format!("address = '00:05.0'\n{text}"));
            bed.run(&["check", "--file-only", "vm.toml"])
        }
        Input::Text(text) => {
            write(text);
            bed.run(&["check", "--file-only", "vm.toml"])
        }
        Input::Args(args) => bed.run(args),
        Input::With(text, args) => {
            write(&format!("address = '00:05.0'\n{text}"));
            bed.run(args)
        }
        Input::Made(make, args) => {
            write(&make());
            bed.run(args)
        }
        Input::Ctl(text, args) => {
            write(&format!(
                "address = '00:05.0'\nsocket = 's'\ncontrol = 'c'\n{text}"
            ));
            let mut daemon = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
                .args(["--config", "vm.toml"])
                .current_dir(bed.path())
                .stderr(Stdio::null())
                .spawn()
                .expect("it starts");
            let control = bed.path().join("c");
            for _ in 0..1000 {
                if control.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            let printed = bed.run(&[&["ctl", "c"], args].concat());
            daemon.kill().expect("killed");
            daemon.wait().expect("reaped");
            printed
        }
    }
}
