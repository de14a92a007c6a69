//! Finds the options that the operator's QEMU arguments have already.

use std::ffi::OsString;

/// Options that need not be added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PresentOptions {
    /// The arguments have `-machine`.
    pub machine: bool,
    /// The arguments have `-m`.
    pub size: bool,
    /// The machine or a NUMA node has a memory backend.
    pub backend: bool,
}

impl PresentOptions {
    /// The options in `arguments`. Each argument that looks like an option counts as one.
    pub fn new(arguments: &[OsString]) -> Self {
        let mut present = Self::default();
        for (at, argument) in arguments.iter().enumerate() {
            let argument = argument.to_string_lossy();
            // QEMU accepts one dash or two.
            let Some(name) = argument.strip_prefix('-') else {
                continue;
            };
            let value = || {
                let value = arguments.get(at + 1);
                value.map(|value| value.to_string_lossy())
            };
            match name.strip_prefix('-').unwrap_or(name) {
                "machine" | "M" => {
                    present.machine = true;
                    present.backend |=
                        value().is_some_and(|value| has_key(&value, "memory-backend"));
                }
                "numa" => present.backend |= value().is_some_and(|value| has_key(&value, "memdev")),
                "m" => present.size = true,
                _ => {}
            }
        }
        present
    }
}

/// Whether `key=` stands in an option's value.
fn has_key(value: &str, key: &str) -> bool {
    value
        .split(',')
        .filter_map(|part| part.split_once('='))
        .any(|(found, _)| found.trim() == key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_however_they_are_written() {
        for (line, machine, size, backend) in [
            ("", false, false, false),
            (
                "-nodefaults -smp 4 -device pc-dimm,memdev=m",
                false,
                false,
                false,
            ),
            ("-M q35", true, false, false),
            ("--machine q35,accel=kvm -m 4G", true, true, false),
            ("-machine type=q35,memory-backend=ram", true, false, true),
            ("-numa node,nodeid=0,memdev=ram --m 1G", false, true, true),
            ("-numa node,nodeid=0,mem=1G", false, false, false),
            ("-M q35 -machine memory-backend=ram", true, false, true),
            (
                "-object memory-backend-memfd,id=memory-backend",
                false,
                false,
                false,
            ),
            ("-machine", true, false, false),
            ("m machine -mem-prealloc -", false, false, false),
        ] {
            let arguments: Vec<_> = line.split_whitespace().map(OsString::from).collect();
            let expected = PresentOptions {
                machine,
                size,
                backend,
            };
            assert_eq!(PresentOptions::new(&arguments), expected, "{line}");
        }
    }
}
