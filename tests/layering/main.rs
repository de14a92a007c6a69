//! The rules of the source tree, checked in the sources: allowed imports (`docs/architecture.md` shows the table),
//! places and lengths of files, and names that only certain files may use.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use source::{Source, file_imports, sources};

/// Modules that every module may import.
const IMPORTED_BY_ALL: [&str; 5] = ["address", "ids", "locks", "logging", "metrics"];

/// The other imports that each module may have. The modules stand from the top down: a module imports only
/// modules below it.
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
    (
        "endpoints",
        &[
            "adopt",
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
    ("vmms", &["qemu", "host", "config", "process", "topology"]),
    ("qemu", &["host", "config", "process", "topology"]),
    ("adopt", &["host", "config", "vfio", "process", "topology"]),
    ("host", &["config", "topology"]),
    ("config", &["args", "topology"]),
    ("ctl", &["args"]),
    ("transport", &["device", "vfio_user", "process"]),
    (
        "device",
        &[
            "iommu", "backends", "store", "protocol", "faults", "process", "topology",
        ],
    ),
    (
        "iommu",
        &["backends", "store", "page_table", "faults", "topology"],
    ),
    (
        "backends",
        &["shadow", "vfio_user", "vfio", "page_table", "faults"],
    ),
    ("export", &["vfio_user", "vfio", "process"]),
    ("shadow", &["page_table", "faults", "process"]),
    ("store", &["protocol", "page_table"]),
    ("protocol", &["faults"]),
    ("faults", &["process"]),
    ("vfio_user", &["process"]),
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

#[test]
fn modules_import_only_what_they_may() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let mut wrong = Vec::new();
    for source in &sources() {
        let module = source.module();
        if module == "lib" || WIRING.contains(&module.as_str()) || source.is_test() {
            continue;
        }
        let Some(may) = allowed.get(module.as_str()) else {
            wrong.push(format!("{module} is not in the table"));
            continue;
        };
        for name in source.imports() {
            let own_or_common = name == module || IMPORTED_BY_ALL.contains(&name.as_str());
            if !own_or_common && !may.contains(&name.as_str()) {
                wrong.push(format!("{} imports {name}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn modules_import_only_modules_below_them() {
    let order: Vec<&str> = ALLOWED.iter().map(|(module, _)| *module).collect();
    let place = |name: &str| order.iter().position(|module| *module == name);
    let wrong: Vec<_> = ALLOWED
        .iter()
        .flat_map(|(module, may)| may.iter().map(move |name| (*module, *name)))
        .filter(|(module, name)| place(module) >= place(name))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?} run upward");
}

/// The file of the `DmaBackend` trait.
#[test]
fn the_backend_trait_knows_no_backend() {
    let sources = sources();
    let of_trait = sources
        .iter()
        .find(|source| source.path == Path::new("backends/mod.rs"));
    assert!(!of_trait.expect("the trait").imports().contains("vfio"));
}

#[test]
fn the_core_knows_no_virtio_and_no_sockets() {
    const CORE: [&str; 4] = ["iommu", "page_table", "topology", "protocol"];
    const NAMES: [&str; 5] = [
        "vhost",
        "virtio_queue",
        "vm_memory",
        "std::net",
        "unix::net",
    ];
    for source in sources()
        .iter()
        .filter(|source| CORE.contains(&source.module().as_str()))
    {
        for name in NAMES {
            let used = source
                .text
                .lines()
                .any(|line| line.trim_start().starts_with("use ") && line.contains(name));
            assert!(!used, "{} uses {name}", source.path.display());
        }
    }
}

/// A second transport is added beside the first, without a change to the device.
#[test]
fn only_the_vhost_user_transport_names_the_vhost_user_crates() {
    const CRATES: [&str; 2] = ["vhost::", "vhost_user_backend"];
    let transport = Path::new("transport/vhost_user");
    let sources = sources();
    assert!(
        sources
            .iter()
            .any(|source| source.path.starts_with(transport))
    );
    let mut wrong = Vec::new();
    for source in sources
        .iter()
        .filter(|source| !source.path.starts_with(transport))
    {
        let mut code = source
            .text
            .lines()
            .filter_map(|line| line.split("//").next());
        if code.any(|line| CRATES.iter().any(|name| line.contains(name))) {
            wrong.push(source.path.display().to_string());
        }
    }
    assert!(wrong.is_empty(), "{wrong:?} name a vhost-user crate");
}

/// A thread that is made elsewhere would have no filter.
#[test]
fn threads_of_the_daemon_are_made_by_the_sandbox() {
    // The sandbox itself, threads that end before the daemon is confined, and threads of other processes.
    const ALLOWED_TO_SPAWN: [&str; 6] = [
        "process/sandbox/mod.rs",
        "process/socket.rs",
        "process/realtime.rs",
        "vmms/launch/descriptor_store.rs",
        "vmms/launch/events.rs",
        "shadow/reader/registration.rs",
    ];
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test()) {
        let code = source.code();
        let spawns = code.contains("thread::spawn(") || code.contains("thread::Builder::new(");
        if spawns
            && !ALLOWED_TO_SPAWN
                .iter()
                .any(|path| source.path == Path::new(path))
        {
            wrong.push(source.path.display().to_string());
        }
    }
    assert!(wrong.is_empty(), "use sandbox::spawn in {wrong:?}");
}

/// A lock without a rank would be outside the order that `locks` checks.
#[test]
fn every_lock_has_a_rank() {
    let unranked = |line: &str| {
        line.contains("parking_lot")
            || (line.contains("std::sync::") && (line.contains("Mutex") || line.contains("RwLock")))
    };
    let wrong: Vec<_> = sources()
        .iter()
        .filter(|source| !source.is_test() && source.module() != "locks")
        // The locks of the rings belong to the vhost-user-backend crate.
        .filter(|source| source.path != Path::new("transport/vhost_user/ring.rs"))
        .filter(|source| source.code().lines().any(unranked))
        .map(|source| source.path.display().to_string())
        .collect();
    assert!(wrong.is_empty(), "use locks::Mutex in {wrong:?}");
}

/// `lib.rs` begins with a map of one line for each module.
#[test]
fn the_map_in_lib_names_every_module_once() {
    let sources = sources();
    let lib = sources
        .iter()
        .find(|source| source.path == Path::new("lib.rs"))
        .expect("lib.rs");
    let mapped: BTreeSet<_> = lib
        .module_comment()
        .lines()
        .filter_map(|line| {
            line.strip_prefix("//! | `")?
                .split_once('`')
                .map(|(name, _)| name.to_string())
        })
        .collect();
    let modules: BTreeSet<_> = lib
        .text
        .lines()
        .filter_map(|line| {
            line.strip_prefix("pub mod ")?
                .strip_suffix(';')
                .map(str::to_string)
        })
        .collect();
    assert_eq!(mapped, modules);
}

/// The files at the top of `src/`; everything else is in folders.
const TOP_FILES: [&str; 6] = [
    "address.rs",
    "args.rs",
    "ids.rs",
    "lib.rs",
    "main.rs",
    "metrics.rs",
];

#[test]
fn the_top_of_src_is_folders_and_six_files() {
    let sources = sources();
    let at_top: Vec<_> = sources
        .iter()
        .filter(|source| source.path.components().count() == 1)
        .map(|source| source.path.display().to_string())
        .collect();
    assert_eq!(at_top, TOP_FILES);
}

#[test]
fn a_module_with_children_is_a_folder_with_mod_rs() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let wrong: Vec<_> = sources()
        .into_iter()
        .filter(|source| src.join(source.path.with_extension("")).is_dir())
        .map(|source| source.path.display().to_string())
        .collect();
    assert!(wrong.is_empty(), "move to folder/mod.rs: {wrong:?}");
}

/// A file with more lines must give the reason in its module comment.
const LONG: usize = 500;
/// No file may have more lines than this. Its inline test module does not count.
const TOO_LONG: usize = 700;
/// The module comment gives the reason after these words.
const REASON: &str = "long because";

#[test]
fn long_files_give_a_reason() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test()) {
        let path = source.path.display();
        let lines = source.code().lines().count();
        if lines > TOO_LONG {
            wrong.push(format!("{path}: {lines} lines are more than {TOO_LONG}"));
        }
        let all = source.text.lines().count();
        if all > LONG
            && !source
                .module_comment()
                .replace("\n//!", "")
                .contains(REASON)
        {
            wrong.push(format!(
                "{path} has {all} lines; give the reason in the module comment, after `{REASON}`"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_two_types_have_one_name() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources().iter().filter(|source| !source.is_test()) {
        for name in source.types() {
            places
                .entry(name)
                .or_default()
                .push(source.path.display().to_string());
        }
    }
    let wrong: Vec<_> = places
        .iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(name, places)| format!("{name}: {}", places.join(", ")))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_do_not_import_each_other_in_circles() {
    let sources: Vec<_> = sources()
        .into_iter()
        .filter(|source| !source.is_test())
        .collect();
    let imports = file_imports(&sources);
    let edges: usize = imports.iter().map(BTreeSet::len).sum();
    assert!(edges > 200, "{edges} imports were found");
    let wrong: Vec<_> = (0..sources.len())
        .filter_map(|start| circle_through(start, &imports))
        .filter(|circle| circle.iter().min() == circle.first())
        .map(|circle| {
            let names: Vec<_> = circle
                .iter()
                .map(|&at| sources[at].path.display().to_string())
                .collect();
            names.join(" -> ")
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The shortest way from a file back to itself.
fn circle_through(start: usize, imports: &[BTreeSet<usize>]) -> Option<Vec<usize>> {
    let mut ways = vec![vec![start]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for &next in &imports[*way.last().expect("a way begins somewhere")] {
                if next == start {
                    return Some(way);
                }
                if seen.insert(next) {
                    longer.push([way.clone(), vec![next]].concat());
                }
            }
        }
        ways = longer;
    }
    None
}

#[test]
fn the_reader_of_sources_finds_circles() {
    let source = |path: &str, text: &str| Source {
        path: path.into(),
        text: text.into(),
    };
    let sources = [
        source("lib.rs", "pub mod a;\n"),
        source("a/mod.rs", "mod one;\nmod two;\npub use self::one::One;\n"),
        source(
            "a/one.rs",
            "use super::two::{Two, help};\npub struct One;\n",
        ),
        source("a/two.rs", "use crate::a::One;\npub struct Two;\n"),
    ];
    let imports = file_imports(&sources);
    assert_eq!(circle_through(2, &imports), Some(vec![2, 3]));
    assert_eq!(circle_through(1, &imports), None);
    assert_eq!(sources[2].types(), ["One"]);
}

const TABLE_BEGIN: &str = "<!-- begin: who may import whom -->\n";
const TABLE_END: &str = "<!-- end: who may import whom -->\n";

/// `docs/architecture.md` shows the table above; `VIOMMU_REGENERATE=1` writes it there.
#[test]
fn the_document_shows_this_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    let text = fs::read_to_string(&path).expect("the document");
    let (before, rest) = text
        .split_once(TABLE_BEGIN)
        .expect("the begin of the table");
    let (_, after) = rest.split_once(TABLE_END).expect("the end of the table");
    let mut table = String::from("| module | may import |\n|---|---|\n");
    let list = |names: &[&str]| {
        names
            .iter()
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    table.push_str(&format!("| {} | everything |\n", list(WIRING)));
    for (module, may) in ALLOWED
        .iter()
        .filter(|(module, _)| !IMPORTED_BY_ALL.contains(module))
    {
        let may = if may.is_empty() {
            "-".to_string()
        } else {
            list(may)
        };
        table.push_str(&format!("| `{module}` | {may} |\n"));
    }
    table.push_str(&format!(
        "| {} | only each other; every module may import them |\n",
        list(&IMPORTED_BY_ALL)
    ));
    let wanted = format!("{before}{TABLE_BEGIN}{table}{TABLE_END}{after}");
    if std::env::var_os("VIOMMU_REGENERATE").is_some() {
        fs::write(&path, wanted).expect("the document is written");
    } else {
        assert!(
            text == wanted,
            "run VIOMMU_REGENERATE=1 cargo test --test layering"
        );
    }
}
