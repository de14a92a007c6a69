//! The program, run to its end.

use std::path::Path;
use std::process::Command;

/// Seconds after which a daemon that was to refuse its configuration, and runs, is ended.
const LIMIT: &str = "60";

/// The output of the program with a configuration file, and whether it succeeded.
pub fn run(arguments: &[&str], file: &Path) -> (String, bool) {
    let output = Command::new("timeout")
        .args([LIMIT, env!("CARGO_BIN_EXE_vhost-device-iommu")])
        .args(arguments)
        .arg(file)
        .output()
        .expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (text, output.status.success())
}
