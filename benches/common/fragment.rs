//! Figures for `qemu-scripts/bench.sh --json`: each bench leaves its own, the last one puts them
//! together.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

/// Where fragments lie, where somebody wants them.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os("VIOMMU_FIGURES").map(PathBuf::from)
}

/// Leaves figures, an object of groups, under a name of its own.
pub fn leave(name: &str, figures: &Value) {
    if let Some(directory) = directory() {
        let path = directory.join(format!("{name}.json"));
        fs::write(path, figures.to_string()).expect("figures written");
    }
}
