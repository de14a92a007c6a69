//! No file of the tree names a server of a package registry. The operator of the machine decides
//! which servers a build contacts: through the configuration of APT and cargo, or `VIOMMU_MIRROR`.

use std::fs;
use std::path::{Path, PathBuf};

/// Servers of packages and toolchains, in pieces, so that this file does not name them either. A
/// host below one of these names counts as well.
const HOSTS: [&[&str]; 16] = [
    &["deb", "debian", "org"],
    &["debian", "org/debian"],
    &["security", "debian", "org"],
    &["snapshot", "debian", "org"],
    &["archive", "ubuntu", "com"],
    &["crates", "io"],
    &["rustup", "rs"],
    &["static", "rust-lang", "org"],
    &["pypi", "org"],
    &["pythonhosted", "org"],
    &["registry", "npmjs", "org"],
    &["proxy", "golang", "org"],
    &["docker", "io"],
    &["ghcr", "io"],
    &["quay", "io"],
    &["rsproxy", "cn"],
];

/// Folders with generated files, which are not part of the tree.
const NOT_OURS: [&str; 5] = [".git", "artifacts", "corpus", "coverage", "target"];

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        let name = entry.file_name();
        let kind = entry.file_type().expect("its type");
        if kind.is_dir() && !NOT_OURS.iter().any(|other| name == *other) {
            files(&entry.path(), found);
        } else if kind.is_file() && name != "Cargo.lock" {
            found.push(entry.path());
        }
    }
}

/// Whether `text` names the host. A longer word that contains the name does not count.
fn names(text: &str, host: &str) -> bool {
    text.match_indices(host).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + host.len()..].chars().next();
        let begins = before.is_none_or(|c| !c.is_alphanumeric() && c != '-' && c != '_');
        let ends = after.is_none_or(|c| !c.is_alphanumeric() && c != '-' && c != '_');
        begins && ends
    })
}

#[test]
fn no_file_names_a_package_registry() {
    let mut found = Vec::new();
    files(&super::tree(""), &mut found);
    assert!(found.len() > 200, "the files were found");
    let mut wrong = Vec::new();
    for file in found {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        for host in HOSTS.map(|pieces| pieces.join(".")) {
            if names(&text, &host) {
                wrong.push(format!("{} names {host}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
