//! The sources of `src/` as text: files, their imports, and the types that they define.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// One file of `src/`.
pub struct Source {
    /// Its path below `src/`.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

impl Source {
    /// The file up to its inline test module.
    pub fn code(&self) -> &str {
        self.text.split("#[cfg(test)]\nmod ").next().unwrap_or("")
    }

    /// Whether the whole file is compiled for tests alone.
    pub fn is_test(&self) -> bool {
        const TEST_ONLY: [&str; 13] = [
            "page_table/crash.rs",
            "device/plain_ring.rs",
            "device/testing.rs",
            "backends/recorder.rs",
            "backends/testing.rs",
            "vfio/fake/checks.rs",
            "vfio/fake/mod.rs",
            "vfio/fake/nesting/checks.rs",
            "vfio/fake/nesting/iommu.rs",
            "vfio/fake/nesting/mod.rs",
            "host/sysfs/fake.rs",
            "process/keeper_testing.rs",
            "vfio_user/kept/testing.rs",
        ];
        self.path
            .iter()
            .any(|part| part == "tests" || part == "tests.rs")
            || TEST_ONLY.iter().any(|path| self.path == Path::new(path))
    }

    /// The folder or file at the top of `src/` that it belongs to.
    pub fn module(&self) -> String {
        let first = self.path.iter().next().expect("a component");
        first.to_string_lossy().trim_end_matches(".rs").to_string()
    }

    /// Its `//!` lines.
    pub fn module_comment(&self) -> String {
        self.text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The modules at the top of the crate that its code imports.
    pub fn imports(&self) -> BTreeSet<String> {
        paths_after(self.code(), "crate::")
            .iter()
            .map(|path| path.split("::").next().unwrap_or("").to_string())
            .filter(|name| !name.ends_with("_limited"))
            .collect()
    }

    /// The names of the types that it defines outside of tests.
    pub fn types(&self) -> Vec<String> {
        let mut found = Vec::new();
        for line in self.code().lines() {
            // A type within a function or an `impl` has no name elsewhere.
            let mut words = line.split_whitespace().peekable();
            if line.starts_with(char::is_whitespace) || line.starts_with("//") {
                continue;
            }
            while words
                .next_if(|word| word.starts_with("pub") || *word == "unsafe")
                .is_some()
            {}
            if matches!(
                words.next(),
                Some("struct" | "enum" | "trait" | "type" | "union")
            ) {
                let name = words.next().unwrap_or("");
                found.push(
                    name.chars()
                        .take_while(|c| c.is_alphanumeric() || *c == '_')
                        .collect(),
                );
            }
        }
        found
    }
}

/// Every file of `src/`.
pub fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    collect(&src, &src, &mut found);
    assert!(found.len() > 20, "the sources were found");
    found.sort_by(|one, other| one.path.cmp(&other.path));
    found
}

fn collect(folder: &Path, src: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).expect("src can be read") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, src, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            let path = path.strip_prefix(src).expect("below src").to_owned();
            found.push(Source { path, text });
        }
    }
}

/// The paths that follow `prefix` in code. A group in braces gives one path for each of its members.
fn paths_after(code: &str, prefix: &str) -> Vec<String> {
    let code: String = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .collect::<Vec<_>>()
        .join(" ");
    let mut found = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
            continue;
        }
        expand(&code[at + prefix.len()..], String::new(), &mut found);
    }
    found
}

/// Adds the path or the group of paths at the start of `text` to `found`. Returns the rest of `text`.
fn expand<'a>(text: &'a str, so_far: String, found: &mut Vec<String>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            if rest.is_empty() {
                return rest;
            }
            rest = expand(rest, so_far.clone(), found).trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest);
            // Anything else is no group of paths.
            if !rest.starts_with(|c: char| c.is_alphanumeric() || "_*}{ ".contains(c)) {
                return rest;
            }
        }
    }
    let end = text
        .find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*')
        .unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let path = if so_far.is_empty() {
        name.to_string()
    } else {
        format!("{so_far}::{name}")
    };
    match rest.strip_prefix("::") {
        Some(rest) if !rest.trim_start().starts_with('<') => expand(rest, path, found),
        _ => {
            found.push(path);
            // `as other`
            let rest = rest.trim_start();
            rest.strip_prefix("as ").map_or(rest, |rest| {
                let rest = rest.trim_start();
                rest.split_at(
                    rest.find(|c: char| !c.is_alphanumeric() && c != '_')
                        .unwrap_or(rest.len()),
                )
                .1
            })
        }
    }
}

/// The files by their module path: `iommu/map.rs` is `iommu::map`, `iommu/mod.rs` is `iommu`.
pub fn by_module(sources: &[Source]) -> BTreeMap<String, usize> {
    let module = |source: &Source| {
        let path = source.path.with_extension("");
        let mut parts: Vec<_> = path
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        if parts.last().is_some_and(|last| last == "mod") {
            parts.pop();
        }
        parts.join("::")
    };
    sources
        .iter()
        .enumerate()
        .map(|(index, source)| (module(source), index))
        .collect()
}

/// For each file, the indices of the files whose names it imports. If a folder's `mod.rs` only re-exports a name, the
/// file that defines the name counts instead. Imports between a folder's `mod.rs` and the files below it do not count:
/// for Rust they are one unit, because the children use the names of `mod.rs` as `super::`.
pub fn file_imports(sources: &[Source]) -> Vec<BTreeSet<usize>> {
    let modules = by_module(sources);
    let names: BTreeMap<usize, String> = modules
        .iter()
        .map(|(name, index)| (*index, name.clone()))
        .collect();
    let reexports: Vec<BTreeMap<String, String>> = (0..sources.len())
        .map(|index| {
            let own = &names[&index];
            let mut found = BTreeMap::new();
            for statement in sources[index].code().split(';') {
                let statement = statement.trim_start();
                let statement = statement
                    .rfind("\npub")
                    .map_or(statement, |at| &statement[at + 1..]);
                if statement.starts_with("pub use self::")
                    || statement.starts_with("pub(crate) use self::")
                    || statement.starts_with("pub(super) use self::")
                {
                    for path in paths_after(statement, "self::") {
                        let last = path.rsplit("::").next().unwrap_or("").to_string();
                        found.insert(last, join(own, &path));
                    }
                }
            }
            found
        })
        .collect();
    (0..sources.len())
        .map(|index| {
            let own = &names[&index];
            let code = sources[index].code();
            let mut paths = paths_after(code, "crate::");
            let parent = own.rsplit_once("::").map_or("", |(parent, _)| parent);
            paths.extend(
                paths_after(code, "super::")
                    .iter()
                    .map(|path| join(parent, path)),
            );
            paths.extend(
                paths_after(code, "self::")
                    .iter()
                    .map(|path| join(own, path)),
            );
            paths
                .iter()
                .filter_map(|path| resolve(path, &modules, &reexports, 0))
                .filter(|other| *other != index)
                .filter(|other| !is_parent(own, &names[other]) && !is_parent(&names[other], own))
                .collect()
        })
        .collect()
}

fn is_parent(parent: &str, child: &str) -> bool {
    parent.is_empty()
        || child
            .strip_prefix(parent)
            .is_some_and(|rest| rest.starts_with("::"))
}

fn join(module: &str, path: &str) -> String {
    if module.is_empty() {
        path.to_string()
    } else {
        format!("{module}::{path}")
    }
}

fn resolve(
    path: &str,
    modules: &BTreeMap<String, usize>,
    reexports: &[BTreeMap<String, String>],
    depth: usize,
) -> Option<usize> {
    let mut module = path;
    loop {
        if let Some(&index) = modules.get(module) {
            let item = path[module.len()..]
                .trim_start_matches("::")
                .split("::")
                .next()
                .unwrap_or("");
            let handed_on = reexports[index].get(item).filter(|_| depth < 8);
            return match handed_on {
                Some(target) => resolve(target, modules, reexports, depth + 1),
                None => Some(index),
            };
        }
        module = module.rsplit_once("::")?.0;
    }
}
