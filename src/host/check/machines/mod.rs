//! Machines with the devices and groups of real ones, and the report that each operator gets. A file has a description, a
//! line `---`, and the report; `VIOMMU_REGENERATE=1` writes the latter. Each description says which public listing has its IDs,
//! classes and groups, and what is not in that listing.
//!
//! - `pci PATH ID CLASS DRIVER GROUP [PORT]`: a function; `-` stands for none; PORT is the kind of a PCI Express port
//! - `file PATH TEXT` (`\n` ends a line), `link TARGET AT`, `remove PATH`: in the tree of the host
//! - `vfio ADDRESS`: a device that the VM is to have
//! - `keep ADDRESS`: a device that the host cannot do without: its root disk, its console, its network. No command names it

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use super::Report;
use crate::config::Config;
use crate::host::sysfs::fake::{FakeConfigSpace, FakeHost, Function};

fn function(host: &FakeHost, words: &[&str]) {
    let [path, id, class, driver, group, port @ ..] = words else {
        panic!("a function: {words:?}");
    };
    let kind = port.first().map_or(0, |kind| kind.parse().expect("a kind"));
    host.function(&Function {
        path,
        driver: (*driver != "-").then_some(*driver),
        group: group.parse().ok(),
        class,
        config: FakeConfigSpace::express(kind, None).multi(),
        vfio: None,
    });
    let (vendor, device) = id.split_once(':').expect("an ID");
    for (name, number) in [("vendor", vendor), ("device", device)] {
        let file = format!("sys/devices/pci0000:00/{path}/{name}");
        host.file(&file, format!("0x{number}\n"));
    }
}

/// The report for the machine, and the devices that the host must keep.
fn report(description: &str) -> (Report, Vec<String>) {
    let host = FakeHost::new();
    let mut config = "address = '00:05.0'\nmemory = '2G'\n".to_owned();
    let mut slot = 0x10;
    let mut kept = Vec::new();
    let lines = description.lines();
    for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["pci", words @ ..] => function(&host, words),
            ["file", path, text @ ..] => {
                host.file(path, text.join(" ").replace("\\n", "\n") + "\n");
            }
            ["link", target, at] => host.link(target, at),
            ["remove", path] => host.remove(path),
            ["keep", address] => kept.push((*address).to_owned()),
            ["vfio", address] => {
                let endpoint = format!("address = '00:{slot:02x}.0'\nvfio = '{address}'\n");
                write!(config, "[[endpoint]]\n{endpoint}").expect("a string");
                slot += 1;
            }
            _ => panic!("unknown line: {line}"),
        }
    }
    let config = Config::from_text(Path::new("vm.toml"), &config).expect("a configuration");
    (Report::new(&host.root(), &config), kept)
}

/// The commands of a report are a script that a shell reads, and none of them names a device that the host must keep.
fn check_commands(name: &str, report: &Report, kept: &[String]) -> usize {
    let of_endpoints = report.endpoints.iter().flat_map(|(_, findings)| findings);
    let findings = report.host.iter().chain(&report.addresses);
    let commands: Vec<_> = findings
        .chain(of_endpoints)
        .flat_map(|finding| &finding.commands)
        .collect();
    for command in &commands {
        for address in kept {
            assert!(!command.contains(address.as_str()), "{name}: {command}");
        }
        let words: Vec<_> = command.split_whitespace().collect();
        let ["modprobe" | "echo" | "chgrp" | "chmod", ..] = words.as_slice() else {
            panic!("{name}: an unknown command: {command}");
        };
        let shell = Command::new("bash")
            .args(["-n", "-c", command])
            .output()
            .expect("bash");
        let error = String::from_utf8_lossy(&shell.stderr);
        assert!(
            shell.status.success() && error.is_empty(),
            "{name}: {command}: {error}"
        );
    }
    commands.len()
}

#[test]
fn the_reports_of_machines() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/host/check/machines");
    let (mut count, mut commands) = (0, 0);
    for entry in fs::read_dir(folder).expect("the machines") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|end| end != "txt") {
            continue;
        }
        count += 1;
        let text = fs::read_to_string(&path).expect("a machine");
        let (description, expected) = text.split_once("---\n").expect("two parts");
        let source = description.contains("https://");
        assert!(source, "{} names no listing", path.display());
        let (report, kept) = report(description);
        commands += check_commands(&path.display().to_string(), &report, &kept);
        let report = report.to_string();
        if env::var_os("VIOMMU_REGENERATE").is_some() {
            fs::write(&path, format!("{description}---\n{report}")).expect("written");
        } else {
            assert_eq!(report, expected, "{}", path.display());
        }
    }
    assert!(count >= 13, "{count} machines");
    assert!(commands >= 30, "{commands} commands");
}
