//! The lists of `calls` on each processor: which calls a processor lacks, and what its C library makes instead.
//!
//! On a new processor, the compiler finds a name that the processor lacks. It does not find a missing replacement: the
//! list has `poll`, which AArch64 lacks, and not `ppoll`. The daemon would then be killed there. These tests read the
//! source of the lists, so they check all processors on each of them.

use std::collections::BTreeSet;

use seccompiler::{TargetArch, compile_from_json};

/// The processors that have filters.
const PROCESSORS: [(&str, TargetArch); 3] = [
    ("x86_64", TargetArch::x86_64),
    ("aarch64", TargetArch::aarch64),
    ("riscv64", TargetArch::riscv64),
];

/// A call that some processors lack, and the calls with the same effect there.
struct Older {
    call: &'static str,
    processors: &'static [&'static str],
    /// The C library makes one of these on the other processors. A list with the older call must have one.
    newer: &'static [&'static str],
}

/// All calls of the lists that a processor lacks. The kernel gave later processors only the call with a folder's
/// descriptor (`*at`), a signal mask (`p*`) or flags, because it can do what the older one does.
const OLDER: [Older; 11] = [
    x86("chmod", &["fchmodat"]),
    x86("epoll_wait", &["epoll_pwait"]),
    x86("lchown", &["fchownat"]),
    x86("lstat", &["newfstatat", "statx"]),
    x86("open", &["openat"]),
    x86("poll", &["ppoll"]),
    x86("readlink", &["readlinkat"]),
    x86("rename", &["renameat", "renameat2"]),
    x86("stat", &["newfstatat", "statx"]),
    x86("unlink", &["unlinkat"]),
    // RISC-V came after `renameat2`. x86-64 has this call, but the C library makes `rename` there.
    Older {
        call: "renameat",
        processors: &["x86_64", "aarch64"],
        newer: &["renameat2"],
    },
];

/// Lists that have a newer call without an older one, and the reason.
const WITHOUT_OLDER: [(&str, &str, &str); 2] = [
    ("MEMORY_FILES", "newfstatat", "looks at a descriptor only"),
    ("MEMORY_FILES", "statx", "looks at a descriptor only"),
];

const fn x86(call: &'static str, newer: &'static [&'static str]) -> Older {
    Older {
        call,
        processors: &["x86_64"],
        newer,
    }
}

/// A list of the source.
#[derive(Default)]
struct List {
    name: String,
    everywhere: BTreeSet<String>,
    /// Processor and call.
    some: BTreeSet<(String, String)>,
}

impl List {
    fn on(&self, processor: &str) -> BTreeSet<&str> {
        let own = self.some.iter().filter(|(name, _)| name == processor);
        let own = own.map(|(_, call)| call.as_str());
        self.everywhere
            .iter()
            .map(String::as_str)
            .chain(own)
            .collect()
    }
}

/// The lists of `calls`, and its functions that name calls.
fn lists() -> Vec<List> {
    let source = include_str!("calls.rs");
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let mut lists = vec![List::default()];
    let mut processor: Option<String> = None;
    for line in source.lines().filter(|line| !line.trim().starts_with("//")) {
        if let Some(name) = beginning(line) {
            lists.push(List {
                name: name.into(),
                ..List::default()
            });
            processor = None;
        }
        let list = lists.last_mut().expect("one");
        // Words, and the marks that begin and end the part of a processor.
        let mut rest = line;
        while let Some(at) = rest.find(['"', ']', 'S']) {
            rest = &rest[at..];
            if let Some(name) = rest.strip_prefix('"') {
                let (name, after) = name.split_once('"').expect("a second mark");
                processor = Some(name.into());
                rest = after;
            } else if let Some(name) = rest.strip_prefix("SYS_") {
                let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                let (name, after) = name.split_at(end.unwrap_or(name.len()));
                match &processor {
                    Some(processor) => {
                        list.some.insert((processor.clone(), name.into()));
                    }
                    None => {
                        list.everywhere.insert(name.into());
                    }
                }
                rest = after;
            } else {
                if rest.starts_with(']') {
                    processor = None;
                }
                rest = &rest[1..];
            }
        }
    }
    lists.retain(|list| !list.everywhere.is_empty() || !list.some.is_empty());
    lists
}

/// The name of the list or function that begins in this line.
fn beginning(line: &str) -> Option<&str> {
    let item = line.trim_start_matches("pub(super) ");
    let item = item.strip_prefix("const ").or(item.strip_prefix("fn "));
    let item = item.or_else(|| {
        let (name, _) = line.strip_prefix("    ")?.split_once(" = [")?;
        let is_name = name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        is_name.then_some(name)
    })?;
    item.split([':', '(', ' ']).next()
}

/// Whether the kernel has a call of this name on a processor.
fn exists(call: &str, processor: TargetArch) -> bool {
    let filter = format!(
        r#"{{"t": {{"mismatch_action": "trap", "match_action": "allow", "filter": [{{"syscall": "{call}"}}]}}}}"#
    );
    compile_from_json(filter.as_bytes(), processor).is_ok()
}

#[test]
fn the_lists_are_found() {
    let lists = lists();
    let names: Vec<_> = lists.iter().map(|list| list.name.as_str()).collect();
    for name in [
        "EVERYWHERE",
        "WAIT",
        "TEXTFILE",
        "SPAWN",
        "calls",
        "threads_only",
    ] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    let wait = lists.iter().find(|list| list.name == "WAIT").expect("it");
    assert_eq!(
        wait.on("x86_64"),
        ["epoll_pwait", "epoll_wait", "poll", "ppoll"].into()
    );
    assert_eq!(wait.on("aarch64"), ["epoll_pwait", "ppoll"].into());
}

#[test]
fn every_call_exists_on_its_processors() {
    assert!(exists("read", TargetArch::aarch64));
    assert!(!exists("open", TargetArch::aarch64));
    for list in lists() {
        for (name, processor) in PROCESSORS {
            for call in list.on(name) {
                assert!(exists(call, processor), "{call} in {} on {name}", list.name);
            }
        }
        for (name, _) in &list.some {
            assert!(PROCESSORS.iter().any(|known| known.0 == name), "{name}");
        }
    }
}

/// A call that some processors lack is in the table above, and the table is right.
#[test]
fn the_table_has_all_calls_that_a_processor_lacks() {
    for list in lists() {
        for (_, call) in &list.some {
            let known = OLDER.iter().any(|older| older.call == call);
            assert!(known, "{call} in {}: add it to the table", list.name);
        }
    }
    for older in &OLDER {
        for (name, processor) in PROCESSORS {
            let has = older.processors.contains(&name);
            assert_eq!(
                exists(older.call, processor),
                has,
                "{} on {name}",
                older.call
            );
        }
        let last = older.newer.last().expect("a newer call");
        for (name, processor) in PROCESSORS {
            assert!(exists(last, processor), "{last} on {name}");
        }
    }
}

/// What a list allows on one processor, it allows on each.
#[test]
fn a_call_that_a_processor_lacks_has_its_replacement() {
    for list in lists() {
        for (name, processor) in PROCESSORS {
            let there = list.on(name);
            for older in &OLDER {
                let wanted = PROCESSORS
                    .iter()
                    .any(|(other, _)| list.on(other).contains(older.call));
                if !wanted || there.contains(older.call) {
                    continue;
                }
                let found = older.newer.iter().any(|newer| there.contains(newer));
                assert!(
                    found,
                    "{} has {}, which {name} lacks or has not in the list, and none of {:?}",
                    list.name, older.call, older.newer
                );
                // A call that the processor has is left out only if its C library does not make it.
                let left_out = older.call == "renameat" && name == "x86_64";
                assert!(!exists(older.call, processor) || left_out, "{}", list.name);
            }
        }
    }
}

/// C libraries and their versions differ in the call that they make: with a newer call, an older one is in the list, too.
#[test]
fn a_newer_call_has_the_older_one_beside_it() {
    for list in lists() {
        let there = list.on("x86_64");
        for newer in &there {
            let older = OLDER.iter().filter(|older| older.processors == ["x86_64"]);
            let mut older = older.filter(|older| older.newer.contains(newer)).peekable();
            let excused = WITHOUT_OLDER
                .iter()
                .any(|(name, call, _)| *name == list.name && call == newer);
            if older.peek().is_none() || excused {
                continue;
            }
            // One of `stat` and `lstat` is enough: whether a link is followed matters.
            assert!(
                older.any(|older| there.contains(older.call)),
                "{} has {newer} and no older call with its effect",
                list.name
            );
        }
    }
}
