//! Where the device tree of an Arm VM comes from: the operator has one, or QEMU writes it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::vmm_options::{WrittenOption, split};

/// The option that adds a serial port. QEMU's machine `virt` has a second one only if there are two of these.
const SERIAL: &str = "serial";
/// Options on which the device tree depends: the machine, its processors, its memory and its serial ports.
const MACHINE: [&str; 11] = [
    "M",
    "accel",
    "cpu",
    "enable-kvm",
    "m",
    "machine",
    "numa",
    "object",
    "readconfig",
    SERIAL,
    "smp",
];

/// The source of a device tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TreeSource {
    /// This file of the operator.
    File(PathBuf),
    /// QEMU writes it, if it gets these arguments and those of [`dump_arguments`].
    Qemu(Vec<OsString>),
}

impl TreeSource {
    /// The source for a VM whose QEMU gets `arguments` from the operator.
    pub fn new(arguments: &[OsString]) -> Self {
        let own = split(arguments).filter(|option| option.name == "dtb");
        if let Some(path) = own.filter_map(|option| option.value).last() {
            return Self::File(path.into());
        }
        let of_machine = split(arguments).filter(is_of_machine);
        let words = of_machine.flat_map(|option| {
            let value = if option.name == SERIAL {
                option.value.map(unconnected)
            } else {
                option.value.cloned()
            };
            std::iter::once(option.written.clone()).chain(value)
        });
        Self::Qemu(words.collect())
    }
}

/// The value of a serial port that is there as the operator's with `value` is, but connects to nothing: the operator's
/// may open a socket, or read what a person types.
fn unconnected(value: &OsString) -> OsString {
    match value.to_str() {
        Some("none") => value.clone(),
        _ => "null".into(),
    }
}

/// Whether the device tree depends on this option. Of the objects only memory counts: others may connect to a process.
fn is_of_machine(option: &WrittenOption) -> bool {
    let is_memory = |value: &OsString| value.to_string_lossy().contains("memory-backend-");
    MACHINE.contains(&&*option.name)
        && (option.name != "object" || option.value.is_some_and(is_memory))
}

/// The arguments with which QEMU writes its device tree to `file` and ends. It makes no device and shows no window.
pub fn dump_arguments(file: &Path) -> Vec<OsString> {
    let mut dump = OsString::from("dumpdtb=");
    // A comma would end the property.
    dump.push(file.to_string_lossy().replace(',', ",,"));
    let fixed = ["-nodefaults", "-no-user-config", "-display", "none", "-S"];
    let mut arguments: Vec<OsString> = fixed.iter().map(OsString::from).collect();
    arguments.extend(["-machine".into(), dump]);
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(line: &str) -> TreeSource {
        let words: Vec<_> = line.split_whitespace().map(OsString::from).collect();
        TreeSource::new(&words)
    }

    #[test]
    fn qemu_gets_the_machine_and_no_device() {
        let found = source(
            "-M virt,gic-version=3 --cpu max -smp 4 -m 2G -drive file=d,if=none -device virtio-blk-pci,drive=d \
             -object memory-backend-memfd,id=ram,size=2G -object secret,id=s -append -machine -enable-kvm \
             -chardev socket,path=/s,id=c -machine memory-backend=ram",
        );
        let wanted = "-M virt,gic-version=3 --cpu max -smp 4 -m 2G -object memory-backend-memfd,id=ram,size=2G \
                      -enable-kvm -machine memory-backend=ram";
        let wanted = wanted.split_whitespace().map(OsString::from).collect();
        assert_eq!(found, TreeSource::Qemu(wanted));
    }

    #[test]
    fn serial_ports_are_counted_and_not_opened() {
        let found = source(
            "-M virt -chardev socket,path=/s,id=c --serial chardev:c -serial none -serial mon:stdio",
        );
        let wanted = "-M virt --serial null -serial none -serial null";
        let wanted = wanted.split_whitespace().map(OsString::from).collect();
        assert_eq!(found, TreeSource::Qemu(wanted));
    }

    #[test]
    fn the_operators_last_tree_is_extended() {
        let found = source("-M virt -dtb one.dtb -dtb two,3.dtb -append -dtb");
        assert_eq!(found, TreeSource::File("two,3.dtb".into()));
    }

    #[test]
    fn commas_in_the_dumps_path_are_doubled() {
        let arguments = dump_arguments(Path::new("/tmp/a,b/tree"));
        assert_eq!(arguments.last(), Some(&"dumpdtb=/tmp/a,,b/tree".into()));
    }
}
