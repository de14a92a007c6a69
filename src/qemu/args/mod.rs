//! QEMU's arguments for a configuration.

mod emulated;
mod exported;
mod passthrough;
mod present;
mod vfio_user;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{Config, DeviceKind, Socket};
use crate::topology::{EndpointRange, PciAddress};
use passthrough::{PassthroughArguments, on_root_bus};
use present::PresentOptions;

/// The first QEMU whose vhost-user test device takes any virtio device ID.
pub const OLDEST_QEMU: &str = "10.2";

/// Arguments, and notes on the settings that arguments cannot express.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuArgs {
    /// The arguments, without the program's name.
    pub arguments: Vec<String>,
    /// Notes for the operator or the program that adds the devices.
    pub notes: Vec<String>,
}

impl QemuArgs {
    /// The arguments for a VM with `config`, whose VIOT table is at `viot`.
    ///
    /// # Errors
    ///
    /// The configuration lacks a setting that QEMU needs, or has one that QEMU's q35 machine cannot have.
    pub fn new(config: &Config, viot: &Path) -> Result<Self, QemuArgsError> {
        Self::make(config, viot, PresentOptions::default())
    }

    /// The arguments to append to `others`. They leave out the machine type, the RAM and its size if
    /// `others` have them.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and if no argument can put a passthrough device at its endpoint's
    /// address.
    pub fn appended_to(
        config: &Config,
        viot: &Path,
        others: &[OsString],
    ) -> Result<Self, QemuArgsError> {
        let endpoints = config
            .devices
            .passthrough
            .iter()
            .map(|device| device.endpoint);
        if let Some(endpoint) = endpoints.into_iter().find(|&it| !on_root_bus(it)) {
            return Err(QemuArgsError::DeviceNotOnRootBus { endpoint });
        }
        Self::make(config, viot, PresentOptions::new(others))
    }

    fn make(config: &Config, viot: &Path, present: PresentOptions) -> Result<Self, QemuArgsError> {
        let socket = match &config.socket {
            Some(Socket::Path(path)) => path,
            Some(Socket::Fd(_)) | None => return Err(QemuArgsError::NoSocket),
        };
        let memory = if present.backend {
            None
        } else {
            Some(config.memory.ok_or(QemuArgsError::NoMemory)?)
        };
        let iommu = config.topology.iommu();
        if !on_root_bus(iommu) {
            return Err(QemuArgsError::NotOnRootBus { iommu });
        }
        let socket = option_value(socket)?;
        // QEMU separates files by colons.
        let table = option_value(viot)?;
        if table.contains(':') {
            return Err(QemuArgsError::Colon {
                path: viot.to_owned(),
            });
        }
        let devices = PassthroughArguments::new(config)?;

        let mut arguments = Vec::new();
        let machine: Vec<_> = [
            (!present.machine).then_some("q35"),
            memory.map(|_| "memory-backend=mem0"),
        ]
        .into_iter()
        .flatten()
        .collect();
        if !machine.is_empty() {
            arguments.push(("-machine", machine.join(",")));
        }
        if let Some(memory) = memory {
            if !present.size {
                arguments.push(("-m", format!("{}M", memory >> 20)));
            }
            arguments.push((
                "-object",
                format!("memory-backend-memfd,id=mem0,size={memory},share=on"),
            ));
        }
        for kind in DeviceKind::ALL {
            match kind {
                DeviceKind::Passthrough => {
                    arguments.extend(devices.iter().flat_map(PassthroughArguments::arguments));
                }
                DeviceKind::Exported => arguments.extend(exported::arguments(config)),
                DeviceKind::Emulated => arguments.extend(emulated::arguments(config)),
                // No arguments: the process with the shadow reader offers the device to QEMU itself.
                DeviceKind::ShadowReader => {}
            }
        }
        arguments.extend([
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
        ]);
        if let Some(path) = &config.qmp {
            // A monitor of its own: each serves one client.
            let path = option_value(path)?;
            arguments.push(("-qmp", format!("unix:{path},server=on,wait=off")));
        }
        let mut notes = vec![
            format!("needs QEMU {OLDEST_QEMU} or later"),
            format!(
                "the VIOT table is expected at {}; `vhost-device-iommu viot` writes it",
                viot.display()
            ),
        ];
        notes.extend(devices.iter().flat_map(PassthroughArguments::notes));
        notes.extend(
            config
                .topology
                .ranges()
                .map(|entry| endpoint_note(config, devices.as_ref(), entry)),
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

/// The usual path of the VIOT table for the configuration in `file`: beside it, with the extension
/// `.viot`.
pub fn default_viot_path(file: &Path) -> PathBuf {
    file.with_extension("viot")
}

/// A configuration that QEMU's arguments cannot express.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum QemuArgsError {
    /// No path for QEMU to connect to.
    #[error(
        "QEMU needs the path of a socket, and the configuration has none; \
         give `socket = \"/run/vm0/iommu.sock\"`"
    )]
    NoSocket,
    /// No size of guest RAM.
    #[error(
        "QEMU needs the size of guest RAM, and the configuration has none; \
         give `memory = \"2G\"`"
    )]
    NoMemory,
    /// `addr=` cannot put the IOMMU at its address.
    #[error(
        "the IOMMU's address {iommu} is not on bus 00 of segment 0, the only bus whose number \
         QEMU's q35 machine fixes; give an address such as `address = \"00:05.0\"`"
    )]
    NotOnRootBus {
        /// The address.
        iommu: PciAddress,
    },
    /// `addr=` cannot put a passthrough device at its address.
    #[error(
        "endpoint {endpoint} is a device of the host and not on bus 00 of segment 0, the only bus \
         whose number QEMU's q35 machine fixes; give it an address such as `address = \"00:10.0\"`"
    )]
    DeviceNotOnRootBus {
        /// The address.
        endpoint: PciAddress,
    },
    /// With type1, QEMU would need a device that the daemon holds.
    #[error(
        "with `host-iommu = \"type1\"` the daemon alone holds the devices of the host, and QEMU's \
         vfio-pci cannot have them too; set `host-iommu = \"iommufd\"`, or export them to QEMU's \
         vfio-user client with `export = \"...\"` under each [[endpoint]]"
    )]
    Type1,
    /// QEMU reads the path as two paths.
    #[error(
        "the path {path:?} of the table has a colon, at which QEMU splits it in two; use another"
    )]
    Colon {
        /// The path.
        path: PathBuf,
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

fn endpoint_note(
    config: &Config,
    devices: Option<&PassthroughArguments>,
    entry: EndpointRange<'_>,
) -> String {
    let (first, last) = (entry.range.first(), entry.range.last());
    let group = entry
        .info
        .group
        .and_then(|id| config.topology.group_name(id))
        .map_or_else(String::new, |name| format!(" (host group {name})"));
    let device = match config.devices.kind_of(first) {
        Some(DeviceKind::Passthrough) => devices.and_then(|devices| devices.endpoint_note(first)),
        Some(DeviceKind::Exported) => exported::endpoint_note(config, first),
        Some(DeviceKind::Emulated) => emulated::endpoint_note(config, first),
        Some(DeviceKind::ShadowReader) | None => None,
    };
    let place = if let Some(note) = device {
        note
    } else if first.segment() != 0 {
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
    fn arguments_describe_the_whole_configuration() {
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
    fn inexpressible_configurations_are_refused_with_a_cure() {
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
            (
                "socket = 'a'\nmemory = '2G'\naddress = '00:05.0'\nhost-iommu = 'type1'\n\
                 [[endpoint]]\naddress = '00:10.0'\nvfio = '65:00.0'",
                "set `host-iommu = \"iommufd\"`",
            ),
        ] {
            let error = arguments(text).expect_err(text).to_string();
            assert!(error.contains(cure), "{error}");
        }
        let good = config("socket = 'a'\nmemory = '2G'\naddress = '00:05.0'");
        for path in ["two\nlines", "/run/vm:0.viot"] {
            let error = QemuArgs::new(&good, Path::new(path)).expect_err(path);
            assert!(error.to_string().contains("use another"), "{error}");
        }
    }

    const DEVICES: &str = "socket = '/run/s'\nmemory = '2G'\naddress = '00:05.0'\n\
         [[endpoint]]\naddress = '00:11.1'\nvfio = '66:00.1'\n\
         [[endpoint]]\naddress = '00:11.0'\nvfio = '66:00.0'\n\
         [[endpoint]]\naddress = '00:10.0'\nvfio = '0001:65:00.0'\n\
         [[endpoint]]\naddress = '01:00.0'\nvfio = '67:00.0'\n\
         [[endpoint]]\naddress = '0001:00:00.0'\nvfio = '68:00.0'\n";

    #[test]
    fn devices_of_the_host_come_before_the_iommu() {
        let made = arguments(DEVICES).expect("arguments");
        assert_eq!(
            made.arguments[6..14],
            [
                "-object",
                "iommufd,id=iommufd0,fd=3",
                "-device",
                "vfio-pci,id=vfio-00-10-0,fd=4,iommufd=iommufd0,addr=10.0",
                "-device",
                "vfio-pci,id=vfio-00-11-0,fd=5,iommufd=iommufd0,addr=11.0,multifunction=on",
                "-device",
                "vfio-pci,id=vfio-00-11-1,fd=6,iommufd=iommufd0,addr=11.1,multifunction=on",
            ]
        );
        assert_eq!(
            made.arguments[14..16],
            ["-chardev", "socket,id=viommu,path=/run/s"]
        );
        let notes = made.notes.join("\n");
        for part in [
            "exec 3<>/dev/iommu",
            "exec 4<>/dev/vfio/devices/$(ls /sys/bus/pci/devices/0001:65:00.0/vfio-dev)",
            "--iommufd-fd 3 --vfio-fd 0000:00:10.0=4 --vfio-fd 0000:00:11.0=5 \
             --vfio-fd 0000:00:11.1=6 --vfio-fd 0000:01:00.0=7 --vfio-fd 0001:00:00.0=8",
            "endpoint 0000:00:10.0: the host's device 0001:65:00.0, among the arguments",
            "add `-device vfio-pci,id=vfio-01-00-0,fd=7,iommufd=iommufd0,addr=00.0`, on the bridge \
             that the guest numbers as bus 01 and before",
            "the host's device 0000:68:00.0, but q35 has segment 0 only",
        ] {
            assert!(notes.contains(part), "{part} in {notes}");
        }
    }

    #[test]
    fn configured_descriptors_keep_their_numbers() {
        let mut config = config(DEVICES);
        let second = config.devices.passthrough[1].endpoint;
        config.descriptors.iommufd = Some(4);
        config.descriptors.devices.insert(second, 20);
        let made = QemuArgs::new(&config, Path::new("t")).expect("arguments");
        let fds: Vec<_> = made
            .arguments
            .iter()
            .filter_map(|text| text.split_once("fd=")?.1.split(',').next())
            .collect();
        assert_eq!(fds, ["4", "3", "20", "5"]);
    }

    #[test]
    fn options_of_the_operator_are_not_repeated() {
        let text = "socket = 's'\nmemory = '1G'\naddress = '00:05.0'";
        let beside = |line: &str| {
            let others: Vec<_> = line.split_whitespace().map(OsString::from).collect();
            let made = QemuArgs::appended_to(&config(text), Path::new("t"), &others).expect(line);
            let own = made.arguments.len() - 6;
            made.arguments[..own].join(" ")
        };
        let object = "-object memory-backend-memfd,id=mem0,size=1073741824,share=on";
        for (line, own) in [
            (
                "-nodefaults",
                format!("-machine q35,memory-backend=mem0 -m 1024M {object}"),
            ),
            (
                "-M q35",
                format!("-machine memory-backend=mem0 -m 1024M {object}"),
            ),
            (
                "-M q35 -m 1G",
                format!("-machine memory-backend=mem0 {object}"),
            ),
            ("-M q35,memory-backend=ram", String::new()),
            ("-numa node,memdev=ram", "-machine q35".into()),
        ] {
            assert_eq!(beside(line), own, "{line}");
        }
        let unknown = config("socket = 's'\naddress = '00:05.0'");
        let others = ["-M".into(), "q35,memory-backend=ram".into()];
        QemuArgs::appended_to(&unknown, Path::new("t"), &others).expect("others bring the RAM");
        QemuArgs::appended_to(&unknown, Path::new("t"), &[]).expect_err("no size");
        let error = QemuArgs::appended_to(&config(DEVICES), Path::new("t"), &[]);
        let error = error.expect_err("a device on another bus").to_string();
        assert!(
            error.contains("endpoint 0000:01:00.0 is a device"),
            "{error}"
        );
    }

    #[test]
    fn the_table_is_expected_beside_the_file() {
        assert_eq!(
            default_viot_path(Path::new("/etc/vm0.toml")),
            Path::new("/etc/vm0.viot")
        );
    }
}
