//! Merges the figures of all benches: their fragments and criterion's medians.
//!
//! `qemu-scripts/bench.sh --json FILE` runs this last.
#![allow(clippy::expect_used, reason = "a bench ends by panicking")]

#[path = "common/fragment.rs"]
#[allow(dead_code, reason = "the other benches write fragments")]
mod fragment;

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

/// Group and name of a figure, criterion's folder for it, and the number of requests in one
/// iteration.
const MEDIANS: [(&str, &str, &str, f64); 4] = [
    ("engine", "pair_64k_ns", "page_table/map+unmap/65536", 1.0),
    ("engine", "pair_1m_ns", "page_table/map+unmap/1048576", 1.0),
    (
        "engine",
        "bulk_unmap_page_ns",
        "page_table_bulk/unmap single pages",
        65536.0,
    ),
    (
        "engine",
        "translate_64k_ns",
        "page_table_translate_65536",
        1.0,
    ),
];

fn main() {
    let Some(directory) = fragment::directory() else {
        return;
    };
    let mut all = Map::new();
    for entry in fs::read_dir(&directory).expect("a directory of fragments") {
        let text = fs::read_to_string(entry.expect("a fragment").path()).expect("a fragment");
        let fragment: Map<String, Value> = serde_json::from_str(&text).expect("a fragment");
        for (group, figures) in fragment {
            merge(&mut all, &group, figures);
        }
    }
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    for (group, name, folder, requests) in MEDIANS {
        let path = Path::new(&target)
            .join("criterion")
            .join(folder)
            .join("new/estimates.json");
        let text = fs::read_to_string(&path)
            .unwrap_or_else(|cause| panic!("{}: {cause}; run the bench first", path.display()));
        let estimates: Value = serde_json::from_str(&text).expect("criterion's estimates");
        let median = estimates["median"]["point_estimate"]
            .as_f64()
            .expect("a median");
        merge(&mut all, group, json!({ name: median / requests }));
    }
    println!("{:#}", Value::Object(all));
}

fn merge(all: &mut Map<String, Value>, group: &str, figures: Value) {
    let into = all.entry(group).or_insert_with(|| json!({}));
    let (Some(into), Value::Object(figures)) = (into.as_object_mut(), figures) else {
        panic!("{group} is no object");
    };
    into.extend(figures);
}
