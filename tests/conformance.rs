//! `docs/conformance.md` has a row for every statement, and each row names tests that exist. The
//! tests that `docs/security.md` names exist, too.
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The number of statements in each group of the specification.
const STATEMENTS: [(&str, usize); 13] = [
    ("FEAT", 3),
    ("CFG", 5),
    ("INIT", 1),
    ("OPS", 8),
    ("ATTACH", 8),
    ("DETACH", 5),
    ("MAP", 6),
    ("UNMAP", 5),
    ("PROBE", 8),
    ("RESV", 5),
    ("FAULT", 5),
    ("PCI", 29),
    ("STATUS", 4),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Rows of the tables: identifier and test names.
fn rows() -> BTreeMap<String, Vec<String>> {
    let text = fs::read_to_string(root().join("docs/conformance.md")).expect("the document");
    text.lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [id, _, tests] = cells.as_slice() else {
                return None;
            };
            id.chars().next().filter(char::is_ascii_uppercase).map(|_| {
                let tests = tests
                    .split('`')
                    .filter(|t| t.contains("::"))
                    .map(str::to_owned)
                    .collect();
                ((*id).to_owned(), tests)
            })
        })
        .collect()
}

fn all_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    rust_files(&root().join("tests"), &mut files);
    files
}

/// Whether the test exists; `test` is named as `file::function`.
fn exists(files: &[PathBuf], test: &str) -> bool {
    let (file, function) = test.split_once("::").expect("file::function");
    let wanted = PathBuf::from(format!("{file}.rs"));
    let core = root().join("src/iommu/tests");
    files
        .iter()
        .filter(|path| match file {
            "core" => path.starts_with(&core),
            _ => path.ends_with(&wanted),
        })
        .any(|path| {
            let text = fs::read_to_string(path).unwrap();
            text.match_indices(&format!("fn {function}("))
                .any(|(at, _)| is_test(&text[..at]))
        })
}

/// Whether the attributes at the end of `before` mark the following function as a test.
fn is_test(before: &str) -> bool {
    let attributes = before.lines().rev().map(str::trim);
    attributes
        .skip_while(|line| line.is_empty())
        .take_while(|line| line.starts_with("#["))
        .any(|line| line == "#[test]")
}

#[test]
fn every_statement_has_a_row() {
    let expected: BTreeSet<_> = STATEMENTS
        .iter()
        .flat_map(|(group, count)| (1..=*count).map(move |n| format!("{group}-{n}")))
        .collect();
    let found: BTreeSet<_> = rows().into_keys().collect();
    assert_eq!(found, expected);
}

#[test]
fn every_row_names_tests_that_exist() {
    let files = all_files();
    let mut missing = Vec::new();
    for (id, tests) in rows() {
        assert!(!tests.is_empty(), "{id} has no test");
        for test in tests {
            if !exists(&files, &test) {
                missing.push(format!("{id}: {test}"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn the_page_on_security_names_tests_that_exist() {
    let text = fs::read_to_string(root().join("docs/security.md")).expect("the document");
    let files = all_files();
    let named = text.split('`').filter(|word| word.contains("::"));
    let tests: Vec<_> = named.filter(|word| *word != "file::function").collect();
    assert!(tests.len() > 40, "the tests were found");
    let missing: Vec<_> = tests.iter().filter(|test| !exists(&files, test)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn identifiers_in_the_code_have_rows() {
    let rows = rows();
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let mut seen = 0;
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-') {
            let Some((group, number)) = word.split_once('-') else {
                continue;
            };
            let is_id = STATEMENTS.iter().any(|(g, _)| *g == group)
                && !number.is_empty()
                && number.chars().all(|c| c.is_ascii_digit());
            if is_id {
                seen += 1;
                assert!(rows.contains_key(word), "{}: {word}", file.display());
            }
        }
    }
    assert!(seen > 15, "the identifiers were found");
}
