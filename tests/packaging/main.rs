//! The files of a package besides the program: each is generated from the sources or must agree
//! with them.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failure here is a failed test wherever it happens"
)]

mod hosts;
mod manual;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_complete::aot::generate;
use vhost_device_iommu::args::Args;
use vhost_device_iommu::config::Config;
use vhost_device_iommu::process::keeper::MAX_KEPT;

const PROGRAM: &str = "vhost-device-iommu";

/// Compares a generated text with the file. VIOMMU_REGENERATE=1 writes the file instead.
fn assert_up_to_date(path: &Path, made: &str) {
    if env::var_os("VIOMMU_REGENERATE").is_some() {
        fs::write(path, made).expect("written");
        return;
    }
    let kept = fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == made,
        "{} does not match what it is made from; run VIOMMU_REGENERATE=1 cargo test --test packaging",
        path.display()
    );
}

#[test]
fn the_completions_are_up_to_date() {
    for (shell, file) in [
        (Shell::Bash, "vhost-device-iommu"),
        (Shell::Zsh, "_vhost-device-iommu"),
        (Shell::Fish, "vhost-device-iommu.fish"),
    ] {
        let mut made = Vec::new();
        generate(shell, &mut Args::command(), PROGRAM, &mut made);
        let made = String::from_utf8(made).expect("text");
        // For a command with `-` in its name, the bash generator defines a function under one name
        // and looks it up under another.
        let made = made.replace(
            "vhost__subcmd__device__subcmd__iommu",
            "vhost__device__iommu",
        );
        assert_up_to_date(
            &tree("packaging/completions").join(file),
            &without_hidden(made),
        );
    }
}

/// Leaves the hidden options out of completions, which the generator does not do.
fn without_hidden(made: String) -> String {
    let command = Args::command();
    let hidden = command
        .get_arguments()
        .filter(|option| option.is_hide_set());
    hidden.fold(made, |made, option| {
        let name = option.get_long().expect("only long options");
        // Lines for zsh and fish, and the branches for bash.
        let is_line = |line: &str| {
            line.starts_with(&format!("'--{name}="))
                || line.starts_with(&format!("'*--{name}="))
                || line.contains(&format!(" -l {name} "))
        };
        let mut in_branch = false;
        let mut lines = Vec::new();
        for line in made.lines() {
            in_branch |= line.trim() == format!("--{name})");
            if !in_branch && !is_line(line) {
                lines.push(line);
            }
            in_branch &= line.trim() != ";;";
        }
        // The lists of all options for bash and fish.
        let made = lines.join("\n") + "\n";
        let made = made.replace(&format!(" --{name} "), " ");
        made.replace(&format!(" {name}= "), " ")
    })
}

#[test]
fn bash_loads_and_uses_its_completions() {
    let file = tree("packaging/completions").join(PROGRAM);
    let script = "source \"$0\"; COMP_WORDS=(vhost-device-iommu ctl /run/s sta); COMP_CWORD=3; \
                  _vhost__device__iommu vhost-device-iommu sta /run/s; echo \"${COMPREPLY[*]}\"";
    let output = Command::new("bash").args(["-c", script]).arg(file).output();
    let output = output.expect("bash");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.split_whitespace().any(|word| word == "status"),
        "{output:?}"
    );
}

#[test]
fn the_manual_page_of_the_file_is_up_to_date() {
    let text = fs::read_to_string(tree("docs/configuration.md")).expect("the page");
    let title = format!(
        ".TH vhost-device-iommu.toml 5 \"\" \"vhost-device-iommu {}\"",
        env!("CARGO_PKG_VERSION")
    );
    let name = "vhost\\-device\\-iommu.toml \\- the IOMMU of one virtual machine";
    let made = manual::page(&text, &title, name);
    assert_up_to_date(&tree("docs/vhost-device-iommu.toml.5"), &made);
    // The manual page must have every key of the tables.
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let key = line.split('`').nth(1).expect("a key");
        let key = key.replace('-', "\\-").replace("\\|", "|");
        assert!(made.contains(&format!("\\fB{key}\\fR")), "{key}");
    }
}

/// libvirt discards the descriptions of all vhost-user programs when one has a type that it does not know, and then
/// starts no VM with virtiofs. `iommu` is in no list of types yet.
#[test]
fn the_package_installs_no_vhost_user_description() {
    let output = tempfile::tempdir().expect("a folder");
    let built = deb(&[
        "--binary",
        env!("CARGO_BIN_EXE_vhost-device-iommu"),
        "--output",
        output.path().to_str().expect("text"),
    ]);
    if !built.status.success() {
        let reason = String::from_utf8_lossy(&built.stderr);
        assert!(reason.contains(" not found: "), "{reason}");
        println!("SKIPPED: {reason}");
        return;
    }
    let package = String::from_utf8_lossy(&built.stdout);
    let listed = Command::new("dpkg-deb")
        .args(["--contents", package.trim()])
        .output()
        .expect("dpkg-deb");
    let listed = String::from_utf8_lossy(&listed.stdout);
    assert!(
        listed.contains("./usr/bin/vhost-device-iommu\n"),
        "{listed}"
    );
    for folder in ["qemu/vhost-user", "libvirt"] {
        assert!(!listed.contains(folder), "{listed}");
    }
    let dashboard = "./usr/share/vhost-device-iommu/grafana-dashboard.json";
    let json: Vec<_> = listed
        .split_whitespace()
        .filter(|word| word.ends_with(".json"))
        .collect();
    assert_eq!(json, [dashboard], "a description in another folder");
    assert!(listed.contains("./usr/share/vhost-device-iommu/prometheus-rules.yml\n"));
}

/// Runs `packaging/deb.sh`.
fn deb(arguments: &[&str]) -> Output {
    let script = tree("packaging/deb.sh");
    let output = Command::new(script).args(arguments).output();
    output.expect("the script runs")
}

/// On any machine with a compiler for both processors: a program for arm64 makes a package for arm64.
#[test]
fn a_package_is_for_the_processor_of_its_program() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    let (source, output) = (at("program.c"), at("packages"));
    fs::write(&source, "int main(void) { return 0; }").expect("written");
    // Architecture, name of the compiler and of QEMU's package, number of the processor in `elf.h`.
    for (arch, compiler, qemu, machine) in [
        ("amd64", "x86_64-linux-gnu-gcc", "qemu-system-x86", 62_u16),
        ("arm64", "aarch64-linux-gnu-gcc", "qemu-system-arm", 183),
    ] {
        let program = at(arch);
        let compiled = Command::new(compiler)
            .args(["-o", &program, &source])
            .status();
        if compiled.is_err() {
            println!("SKIPPED: {compiler} not found");
            continue;
        }
        assert!(compiled.is_ok_and(|status| status.success()), "{compiler}");
        let built = deb(&["--binary", &program, "--output", &output]);
        let reason = String::from_utf8_lossy(&built.stderr);
        if reason.contains(" not found: ") {
            println!("SKIPPED: {reason}");
            continue;
        }
        assert!(built.status.success(), "{reason}");
        let package = String::from_utf8_lossy(&built.stdout);
        let package = package.trim();
        assert!(package.ends_with(&format!("_{arch}.deb")), "{package}");
        let info = Command::new("dpkg-deb").args(["--info", package]).output();
        let info = info.expect("dpkg-deb").stdout;
        let info = String::from_utf8_lossy(&info);
        assert!(info.contains(&format!(" Architecture: {arch}\n")), "{info}");
        assert!(info.contains(&format!(" Suggests: {qemu} (")), "{info}");
        assert!(info.contains(" Depends: libc6 (>= 2."), "{info}");
        let root = at("root");
        let unpacked = Command::new("dpkg-deb")
            .args(["-x", package, &root])
            .status();
        assert!(unpacked.is_ok_and(|status| status.success()));
        let program = fs::read(at("root/usr/bin/vhost-device-iommu")).expect("a program");
        assert_eq!(program[..5], *b"\x7fELF\x02", "64 bits");
        assert_eq!(program[18..20], machine.to_le_bytes(), "{arch}");
        // The tool that strips the program must be that of its processor, or it leaves the program as it is.
        let sections = Command::new("readelf")
            .args(["-WS", &at("root/usr/bin/vhost-device-iommu")])
            .output();
        let sections = sections.expect("readelf").stdout;
        let sections = String::from_utf8_lossy(&sections);
        assert!(sections.contains(" .dynsym "), "{sections}");
        assert!(!sections.contains(" .symtab "), "{sections}");
    }
}

#[test]
fn packages_are_for_known_processors_only() {
    for (arguments, cause) in [
        (&["--arch", "mips"][..], "give amd64 or arm64"),
        (
            &["--arch", "arm64", "--binary", "/bin/true"],
            "exclude each other",
        ),
    ] {
        let refused = deb(arguments);
        let reason = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success());
        // A tool may be missing on this machine.
        assert!(
            reason.contains(cause) || reason.contains(" not found: "),
            "{reason}"
        );
    }
}

/// The units, the package and the example must use the same paths.
#[test]
fn units_and_example_agree() {
    let read = |name: &str| fs::read_to_string(tree(name)).expect("a file");
    let service = read("packaging/systemd/vhost-device-iommu@.service");
    let socket = read("packaging/systemd/vhost-device-iommu@.socket");
    let example: toml::Table = read("docs/examples/service.toml").parse().expect("TOML");
    let listens = socket
        .lines()
        .find_map(|line| line.strip_prefix("ListenStream="))
        .expect("a socket");
    assert_eq!(
        example["socket"].as_str(),
        Some(&*listens.replace("%i", "vm1"))
    );
    assert!(service.contains("\nRuntimeDirectory=vhost-device-iommu/%i\n"));
    let run = "/run/vhost-device-iommu/vm1/";
    assert!(
        example["control"]
            .as_str()
            .expect("a path")
            .starts_with(run)
    );
    for unit in [&service, &socket] {
        for line in unit.lines().filter(|line| line.contains("man:")) {
            let (_, page) = line.split_once("man:").expect("a page");
            assert!(page.starts_with(PROGRAM), "{line}");
        }
    }
}

/// The helper of `vfio-from = "vmm"`: its socket is where daemons look for it, and is theirs alone; it has one right.
#[test]
fn the_helper_has_one_right_and_the_socket_of_the_configuration() {
    let read =
        |name: &str| fs::read_to_string(tree("packaging/systemd").join(name)).expect("a unit");
    let socket = read("vhost-device-iommu-adopt@.socket");
    let daemon = read("vhost-device-iommu@.service");
    let service = read("vhost-device-iommu-adopt@.service");
    let file = Path::new("/etc/vhost-device-iommu/%i.toml");
    let config = Config::from_text(file, "address = '00:05.0'\n");
    let helper = config.expect("a configuration").vfio_helper;
    let lines = |unit: &str| unit.lines().map(str::to_owned).collect::<Vec<_>>();
    for line in [
        format!("ListenStream={}", helper.display()),
        "SocketMode=0600".into(),
        "SocketUser=vhost-device-iommu".into(),
    ] {
        assert!(lines(&socket).contains(&line), "{line}");
    }
    for line in [
        "ExecStart=/usr/bin/vhost-device-iommu adopt --config /etc/vhost-device-iommu/%i.toml",
        // The socket has a limit; with this one, too, the daemon could be refused earlier.
        "StartLimitIntervalSec=0",
        "CapabilityBoundingSet=CAP_SYS_PTRACE",
        "AmbientCapabilities=CAP_SYS_PTRACE",
        "DynamicUser=yes",
        "NoNewPrivileges=yes",
        "PrivateDevices=yes",
        // With these it would not see the VMMs, or its capability would be worth nothing.
        "PrivateUsers=no",
        "ProtectProc=default",
        "ProcSubset=all",
    ] {
        assert!(lines(&service).contains(&line.to_owned()), "{line}");
    }
    // Each daemon sees the folder of its own helper alone.
    let folder = helper.parent().expect("a folder");
    let all = folder.parent().expect("a folder").display();
    for line in [
        format!("TemporaryFileSystem={all}:ro"),
        format!("BindReadOnlyPaths=-{}", folder.display()),
    ] {
        assert!(lines(&daemon).contains(&line), "{line}");
    }
    let folders = read("tmpfiles.conf");
    assert!(
        folders.contains(&format!("d {all} 0755 root root -")),
        "{folders}"
    );
}

/// The service manager keeps what the daemon leaves, and ends a loop of crashes.
#[test]
fn the_service_restarts_with_the_descriptors_of_the_daemon_before() {
    let service = tree("packaging/systemd/vhost-device-iommu@.service");
    let service = fs::read_to_string(service).expect("the unit");
    let value = |key: &str| {
        let found = service.lines().filter_map(|line| line.strip_prefix(key));
        let found: Vec<_> = found.filter_map(|rest| rest.strip_prefix('=')).collect();
        found.join(" ")
    };
    assert_eq!(value("FileDescriptorStoreMax"), MAX_KEPT.to_string());
    // `restart` is the default, and systemd before 254 warns about the key.
    assert_eq!(value("FileDescriptorStorePreserve"), "");
    assert_eq!(value("Type"), "notify");
    assert_eq!(value("NotifyAccess"), "main");
    assert_eq!(value("Restart"), "always");
    // Any other time costs the guest up to 250 ms more: systemd's timers have that slack.
    assert_eq!(value("RestartSec"), "0");
    // systemd before 254 warns about the key, and restarts units that are bound to this one.
    assert_eq!(value("RestartMode"), "direct");
    let reload = value("ExecReload");
    assert!(reload.contains(" upgrade --no-wait "), "{reload}");
    // As `launch` does.
    assert_eq!(value("StartLimitBurst"), "5");
    assert_eq!(value("StartLimitIntervalSec"), "60");
    let files: usize = value("LimitNOFILE").parse().expect("a number");
    assert!(files >= 2 * MAX_KEPT, "{files}");
    let calls = value("SystemCallFilter");
    assert!(calls.split(' ').any(|call| call == "kcmp"), "{calls}");
}

#[test]
fn a_drop_in_is_printed() {
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .arg("drop-in")
        .arg(tree("docs/examples/passthrough.toml"))
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("\n[Service]\n") && text.contains("\nDeviceAllow=/dev/iommu rw\n"));
}

fn tree(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}
