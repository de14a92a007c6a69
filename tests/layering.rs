//! Who may import whom (`docs/architecture.md`), read from the sources.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Modules everybody may import.
const EVERYBODY: [&str; 5] = ["address", "ids", "locks", "logging", "metrics"];

/// What each module may import besides, from the top down: a module imports only modules below it.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "control",
        &[
            "endpoints",
            "device",
            "iommu",
            "backends",
            "export",
            "shadow",
            "protocol",
            "faults",
            "process",
            "topology",
        ],
    ),
    ("qemu", &["host", "config", "process", "topology"]),
    (
        "endpoints",
        &[
            "device",
            "iommu",
            "backends",
            "export",
            "shadow",
            "host",
            "config",
            "vfio",
            "vfio_user",
            "faults",
            "process",
            "topology",
        ],
    ),
    ("transport", &["device", "process"]),
    (
        "device",
        &[
            "iommu", "backends", "protocol", "faults", "process", "topology",
        ],
    ),
    ("iommu", &["backends", "page_table", "faults", "topology"]),
    (
        "backends",
        &["shadow", "vfio_user", "vfio", "page_table", "faults"],
    ),
    ("export", &["vfio_user", "vfio", "process"]),
    ("shadow", &["faults", "page_table", "process"]),
    ("host", &["config", "topology"]),
    ("config", &["args", "topology"]),
    ("ctl", &["args"]),
    ("vfio_user", &["process"]),
    ("protocol", &["faults"]),
    ("faults", &["process"]),
    ("vfio", &[]),
    ("page_table", &[]),
    ("process", &[]),
    ("topology", &[]),
    ("args", &[]),
    ("logging", &[]),
    ("locks", &[]),
    ("metrics", &[]),
    ("address", &[]),
    ("ids", &[]),
];

/// Modules that put the others together and may import anything.
const WIRING: &[&str] = &["daemon", "main"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("src can be read") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn module_of(path: &Path, src: &Path) -> String {
    let below = path.strip_prefix(src).expect("below src");
    let first = below.iter().next().expect("a component");
    first.to_string_lossy().trim_end_matches(".rs").to_string()
}

/// Names that follow `crate::` in the code of a file.
fn imports(text: &str) -> BTreeSet<String> {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .flat_map(|line| line.split("crate::").skip(1))
        .flat_map(|rest| match rest.strip_prefix('{') {
            Some(group) => group.split('}').next().unwrap_or("").split(',').collect(),
            None => vec![rest],
        })
        .map(|path| {
            path.trim()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect::<String>()
        })
        .filter(|name| !name.ends_with("_limited"))
        .collect()
}

#[test]
fn modules_import_only_what_they_may() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 20, "the sources were found");
    let mut wrong = Vec::new();
    for file in &files {
        let module = module_of(file, &src);
        if module == "lib" || WIRING.contains(&module.as_str()) {
            continue;
        }
        let Some(may) = allowed.get(module.as_str()) else {
            wrong.push(format!("{module} is not in the table"));
            continue;
        };
        let text = fs::read_to_string(file).expect("a source file");
        for name in imports(&text) {
            let own_or_common = name == module || EVERYBODY.contains(&name.as_str());
            if !own_or_common && !may.contains(&name.as_str()) {
                wrong.push(format!("{} imports {name}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_backend_trait_knows_no_backend() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let text = fs::read_to_string(src.join("backends/mod.rs")).expect("the trait");
    assert!(!imports(&text).contains("vfio"));
}

#[test]
fn the_core_knows_no_virtio_and_no_sockets() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for module in ["iommu", "page_table", "topology", "protocol"] {
        let mut files = Vec::new();
        sources(&src.join(module), &mut files);
        for file in files {
            let text = fs::read_to_string(&file).expect("a source file");
            for name in [
                "vhost",
                "virtio_queue",
                "vm_memory",
                "std::net",
                "unix::net",
            ] {
                let used = text
                    .lines()
                    .any(|l| l.trim_start().starts_with("use ") && l.contains(name));
                assert!(!used, "{} uses {name}", file.display());
            }
        }
    }
}

/// A second transport is added beside the first, without a change to the device.
#[test]
fn only_the_vhost_user_transport_names_the_vhost_user_crates() {
    const CRATES: [&str; 2] = ["vhost::", "vhost_user_backend"];
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let transport = src.join("transport/vhost_user");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.iter().any(|file| file.starts_with(&transport)));
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| !file.starts_with(&transport)) {
        let text = fs::read_to_string(file).expect("a source file");
        let mut code = text.lines().filter_map(|line| line.split("//").next());
        if code.any(|line| CRATES.iter().any(|name| line.contains(name))) {
            wrong.push(file.display().to_string());
        }
    }
    assert!(wrong.is_empty(), "{wrong:?} name a vhost-user crate");
}

/// A thread that is made elsewhere would have no filter.
#[test]
fn threads_of_the_daemon_are_made_by_the_sandbox() {
    // The sandbox itself; what ends before it is put on; other processes than the daemon.
    const MAY: [&str; 5] = [
        "process/sandbox/mod.rs",
        "process/socket.rs",
        "process/realtime.rs",
        "qemu/launch/events.rs",
        "shadow/reader/session.rs",
    ];
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let below = file.strip_prefix(&src).expect("below src");
        let text = fs::read_to_string(&file).expect("a source file");
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or("");
        let spawns = code.contains("thread::spawn(") || code.contains("thread::Builder::new(");
        if spawns && !MAY.iter().any(|may| below == Path::new(may)) && !below.ends_with("tests.rs")
        {
            wrong.push(below.display().to_string());
        }
    }
    assert!(wrong.is_empty(), "use sandbox::spawn in {wrong:?}");
}

/// A lock without a rank would be outside the order that `locks` checks.
#[test]
fn every_lock_has_a_rank() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let below = file.strip_prefix(&src).expect("below src");
        // The last two are compiled for tests alone; the rings' locks are the vhost-user crate's.
        let exempt = [
            "locks",
            "transport/vhost_user/backend.rs",
            "backends/recorder.rs",
            "vfio/fake.rs",
        ];
        if exempt.iter().any(|path| below.starts_with(path)) {
            continue;
        }
        let text = fs::read_to_string(&file).expect("a source file");
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or("");
        let unranked = |line: &&str| {
            line.contains("parking_lot")
                || (line.contains("std::sync::")
                    && (line.contains("Mutex") || line.contains("RwLock")))
        };
        if code.lines().any(|line| unranked(&line)) {
            wrong.push(below.display().to_string());
        }
    }
    assert!(wrong.is_empty(), "use locks::Mutex in {wrong:?}");
}
