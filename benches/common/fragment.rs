//! Figures for `qemu-scripts/bench.sh --json`: each bench writes a fragment, and the last bench
//! merges them.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

/// The folder for fragments, if figures are wanted.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os("VIOMMU_FIGURES").map(PathBuf::from)
}

/// Writes figures, an object of groups, to a fragment of this name.
pub fn write(name: &str, figures: &Value) {
    if let Some(directory) = directory() {
        let path = directory.join(format!("{name}.json"));
        fs::write(path, figures.to_string()).expect("figures written");
    }
}
