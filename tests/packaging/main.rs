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
use std::process::Command;
use std::{env, fs};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_complete::aot::generate;
use vhost_device_iommu::args::Args;

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
        assert_up_to_date(&tree("packaging/completions").join(file), &made);
    }
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
    let built = Command::new(tree("packaging/deb.sh"))
        .args([
            "--binary",
            env!("CARGO_BIN_EXE_vhost-device-iommu"),
            "--output",
        ])
        .arg(output.path())
        .output()
        .expect("the script runs");
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
    assert!(
        !listed.contains(".json"),
        "a description in another folder: {listed}"
    );
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
