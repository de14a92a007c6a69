//! The QEMU arguments that go with a configuration.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{Config, Socket};
use crate::topology::{EndpointRange, PciAddress};

/// The first QEMU with a vhost-user device that takes any virtio device ID.
pub const OLDEST_QEMU: &str = "10.2";

/// Arguments, and what no argument can say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuArgs {
    /// The arguments, without the program's name.
    pub arguments: Vec<String>,
    /// For the person or program that adds the devices.
    pub notes: Vec<String>,
}

impl QemuArgs {
    /// The arguments for a VM with `config`, whose VIOT table is found at `viot`.
    ///
    /// # Errors
    ///
    /// Where the configuration leaves out something QEMU must be told, or asks for what QEMU's
    /// q35 machine has not got.
    pub fn new(config: &Config, viot: &Path) -> Result<Self, QemuArgsError> {
        let socket = match &config.socket {
            Some(Socket::Path(path)) => path,
            Some(Socket::Fd(_)) | None => return Err(QemuArgsError::NoSocket),
        };
        let memory = config.memory.ok_or(QemuArgsError::NoMemory)?;
        let iommu = config.topology.iommu();
        if iommu.segment() != 0 || iommu.bus() != 0 {
            return Err(QemuArgsError::NotOnRootBus { iommu });
        }
        let socket = option_value(socket)?;
        let table = option_value(viot)?;

        let arguments = [
            ("-machine", "q35,memory-backend=mem0".to_owned()),
            ("-m", format!("{}M", memory >> 20)),
            (
                "-object",
                format!("memory-backend-memfd,id=mem0,size={memory},share=on"),
            ),
            ("-chardev", format!("socket,id=viommu,path={socket}")),
            (
                "-device",
                format!(
                    "vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,\
                     config_size=40,chardev=viommu,addr={}",
                    slot(iommu)
                ),
            ),
            ("-acpitable", format!("file={table}")),
        ];
        let mut notes = vec![
            format!("needs QEMU {OLDEST_QEMU} or later"),
            format!(
                "the VIOT table is expected at {}; `vhost-device-iommu viot` writes it",
                viot.display()
            ),
        ];
        notes.extend(
            config
                .topology
                .ranges()
                .map(|entry| endpoint_note(config, entry)),
        );
        Ok(Self {
            arguments: arguments
                .into_iter()
                .flat_map(|(name, value)| [name.to_owned(), value])
                .collect(),
            notes,
        })
    }

    /// The arguments as one line for a POSIX shell.
    pub fn shell_line(&self) -> String {
        let quoted: Vec<_> = self
            .arguments
            .iter()
            .map(|text| shell_quote(text))
            .collect();
        quoted.join(" ")
    }
}

/// Where the table for the configuration in `file` is expected: beside it, ending in `.viot`.
pub fn default_viot_path(file: &Path) -> PathBuf {
    file.with_extension("viot")
}

/// A configuration that QEMU cannot be told of.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum QemuArgsError {
    /// No path to connect to.
    #[error(
        "QEMU must be told a socket, and the configuration has none; \
         give `socket = \"/run/vm0/iommu.sock\"`"
    )]
    NoSocket,
    /// No size of guest RAM.
    #[error(
        "QEMU must be told the size of guest RAM, and the configuration has none; \
         give `memory = \"2G\"`"
    )]
    NoMemory,
    /// The IOMMU is not where `addr=` can put it.
    #[error(
        "the IOMMU's address {iommu} is not on bus 00 of segment 0, the only bus whose number \
         QEMU's q35 machine fixes; give an address such as `address = \"00:05.0\"`"
    )]
    NotOnRootBus {
        /// The address.
        iommu: PciAddress,
    },
    /// A path that cannot stand in an argument.
    #[error(
        "the path {path:?} is not UTF-8 or has a line break, so it cannot be printed as an \
         argument; use another"
    )]
    Path {
        /// The path.
        path: PathBuf,
    },
}

/// A path as the value of a QEMU option, where a comma is doubled.
fn option_value(path: &Path) -> Result<String, QemuArgsError> {
    path.to_str()
        .filter(|text| !text.contains(['\n', '\r']))
        .map(|text| text.replace(',', ",,"))
        .ok_or_else(|| QemuArgsError::Path {
            path: path.to_owned(),
        })
}

/// `device.function` as QEMU's `addr=` takes it.
fn slot(address: PciAddress) -> String {
    format!("{:02x}.{:x}", address.device(), address.function())
}

fn endpoint_note(config: &Config, entry: EndpointRange<'_>) -> String {
    let (first, last) = (entry.range.first(), entry.range.last());
    let group = entry
        .info
        .group
        .and_then(|id| config.topology.group_name(id))
        .map_or_else(String::new, |name| format!(" (host group {name})"));
    let place = if first.segment() != 0 {
        "q35 has segment 0 only, so QEMU can put no device there".to_owned()
    } else if first.bus() != last.bus() {
        format!(
            "give a device there the addr= of its device.function, \
             on the bridge that the guest numbers as its bus ({:02x} to {:02x})",
            first.bus(),
            last.bus()
        )
    } else {
        let slots = if first == last {
            format!("give its device addr={}", slot(first))
        } else {
            format!("give devices addr={} to addr={}", slot(first), slot(last))
        };
        match first.bus() {
            0 => format!("{slots} (bus=pcie.0)"),
            bus => format!("{slots}, on the bridge that the guest numbers as bus {bus:02x}"),
        }
    };
    format!("endpoint {}{group}: {place}", entry.range)
}

fn shell_quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=.,/:+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::from_text(Path::new("vm0.toml"), text).expect("a good configuration")
    }

    fn arguments(text: &str) -> Result<QemuArgs, QemuArgsError> {
        QemuArgs::new(&config(text), Path::new("/run/vm,0/it's.viot"))
    }

    #[test]
    fn everything_qemu_must_know_is_there() {
        let made = arguments(
            "socket = '/run/a b,c.sock'\nmemory = '2G'\naddress = '00:1e.3'\n\
             [[endpoint]]\naddress = '00:10.0'\ngroup = 'nic0'\n\
             [[endpoint]]\nrange = '00:11.0-00:11.7'\n\
             [[endpoint]]\nrange = '01:00.0-01:00.7'\n\
             [[endpoint]]\nrange = '02:00.0-03:1f.7'\n\
             [[endpoint]]\naddress = '0001:00:00.0'\n",
        )
        .expect("arguments");
        assert_eq!(
            made.arguments,
            [
                "-machine",
                "q35,memory-backend=mem0",
                "-m",
                "2048M",
                "-object",
                "memory-backend-memfd,id=mem0,size=2147483648,share=on",
                "-chardev",
                "socket,id=viommu,path=/run/a b,,c.sock",
                "-device",
                "vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,\
                 chardev=viommu,addr=1e.3",
                "-acpitable",
                "file=/run/vm,,0/it's.viot",
            ]
        );
        assert!(made.shell_line().ends_with(
            r"'socket,id=viommu,path=/run/a b,,c.sock' -device vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,chardev=viommu,addr=1e.3 -acpitable 'file=/run/vm,,0/it'\''s.viot'"
        ));
        let notes = made.notes.join("\n");
        for part in [
            "QEMU 10.2",
            "at /run/vm,0/it's.viot",
            "endpoint 0000:00:10.0 (host group nic0): give its device addr=10.0 (bus=pcie.0)",
            "give devices addr=11.0 to addr=11.7 (bus=pcie.0)",
            "addr=00.0 to addr=00.7, on the bridge that the guest numbers as bus 01",
            "(02 to 03)",
            "q35 has segment 0 only",
        ] {
            assert!(notes.contains(part), "{part} in {notes}");
        }
    }

    #[test]
    fn what_qemu_cannot_be_told_is_refused_with_the_cure() {
        for (text, cure) in [
            ("memory = '2G'\naddress = '00:05.0'", "give `socket ="),
            ("socket = 'a'\naddress = '00:05.0'", "give `memory ="),
            (
                "socket = 'a'\nmemory = '2G'\naddress = '01:05.0'",
                "not on bus 00",
            ),
            (
                "socket = 'a'\nmemory = '2G'\naddress = '0001:00:05.0'",
                "not on bus 00",
            ),
        ] {
            let error = arguments(text).expect_err(text).to_string();
            assert!(error.contains(cure), "{error}");
        }
        let good = config("socket = 'a'\nmemory = '2G'\naddress = '00:05.0'");
        let error = QemuArgs::new(&good, Path::new("two\nlines")).expect_err("a line break");
        assert!(error.to_string().contains("use another"));
    }

    #[test]
    fn the_table_is_expected_beside_the_file() {
        assert_eq!(
            default_viot_path(Path::new("/etc/vm0.toml")),
            Path::new("/etc/vm0.viot")
        );
    }
}
