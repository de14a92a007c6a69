//! QEMU's arguments for a configuration.

mod beside_libvirt;
mod emulated;
mod exported;
mod operator;
mod passthrough;
mod places;
mod ports;
mod refused;
mod tree_source;
mod vfio_user;
mod vmm_options;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{Config, DeviceKind, Machine, SlotProblem, Socket, VmmTransport};
use crate::topology::{EndpointRange, PciAddress, PciRange};
use operator::Q35_SLEEP_CONTROLLER;
use places::{
    bus, check_hotplug_ranges, check_slots, has_bus, has_device, on_root_bus, place, slot,
};

pub use beside_libvirt::beside_libvirt;
pub use operator::OperatorOptions;
pub use passthrough::PassthroughArguments;
pub(crate) use places::has_several_functions;
pub use places::port_id;
pub use refused::VmmOptionError;
pub use tree_source::{TreeSource, dump_arguments};
pub use vmm_options::ReadConfigError;

/// The first QEMU whose vhost-user test device takes any virtio device ID.
pub const OLDEST_QEMU: &str = "10.2";
/// The beginning of the IDs of all objects, character devices and devices in the arguments. `launch` refuses IDs
/// of the operator that begin like this.
const PREFIX: &str = "viommu-";

/// Arguments, and notes on the settings that arguments cannot express.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuArgs {
    /// The arguments, without the program's name.
    pub arguments: Vec<String>,
    /// Notes for the operator or the program that adds the devices.
    pub notes: Vec<String>,
}

impl QemuArgs {
    /// The arguments for a VM with `config`, whose VIOT table or device tree is at `table`.
    ///
    /// # Errors
    ///
    /// The configuration lacks a setting that QEMU needs, or has one that the machine cannot have.
    pub fn new(config: &Config, table: &Path) -> Result<Self, QemuArgsError> {
        Self::make(config, table, None)
    }

    /// The arguments to append to `others`, with the VIOT table or device tree at `table`. A machine type, RAM and its size are left out where
    /// `others` give them. The notes name the endpoints for which neither these arguments nor `others`
    /// have a device.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), where no argument can put a device at its endpoint's address, and where
    /// `others` have an option with which the guest would have no working IOMMU.
    pub fn appended_to(
        config: &Config,
        table: &Path,
        others: &[OsString],
    ) -> Result<Self, QemuArgsError> {
        let others = OperatorOptions::new(others)?;
        others.check(config.machine)?;
        others.check_bridges(&config.ports)?;
        check_buses(config)?;
        Self::make(config, table, Some(&others))
    }

    fn make(
        config: &Config,
        table: &Path,
        others: Option<&OperatorOptions>,
    ) -> Result<Self, QemuArgsError> {
        let has = |question: fn(&OperatorOptions) -> bool| others.is_some_and(question);
        let socket = socket_path(config)?;
        let memory = if has(OperatorOptions::has_memory_backend) {
            None
        } else {
            Some(config.memory.ok_or(QemuArgsError::NoMemory)?)
        };
        let problems = slot_problems(config)?;
        let functions = others.map(|others| others.functions(&config.ports));
        if let Some(functions) = &functions {
            check_slots(config, functions)?;
            check_hotplug_ranges(config, functions)?;
        }
        let description = description(config.machine, table)?;
        let devices = PassthroughArguments::new(config)?;

        let mut arguments = Vec::new();
        let its = "gic-version=3".to_owned();
        let machine: Vec<_> = [
            (!has(OperatorOptions::has_machine)).then(|| config.machine.name().to_owned()),
            // Firmware would pass ACPI tables in place of the device tree.
            (config.machine == Machine::Virt).then(|| "acpi=off".to_owned()),
            // The default interrupt controller has no ITS, whose doorbell is the MSI region.
            (config.machine == Machine::Virt && !has(OperatorOptions::has_gic_version))
                .then_some(its),
            memory.map(|_| format!("memory-backend={PREFIX}ram")),
        ]
        .into_iter()
        .flatten()
        .collect();
        if !machine.is_empty() {
            arguments.push(("-machine", machine.join(",")));
        }
        if let Some(memory) = memory {
            if !has(OperatorOptions::has_size) {
                arguments.push(("-m", format!("{}M", memory >> 20)));
            }
            arguments.push((
                "-object",
                format!("memory-backend-memfd,id={PREFIX}ram,size={memory},share=on"),
            ));
        }
        arguments.extend(ports::arguments(config));
        arguments.extend(devices.iter().flat_map(PassthroughArguments::arguments));
        // After a sleep the guest's driver waits for answers on rings that it has not set up again.
        let controller = match (config.machine, others) {
            (Machine::Virt, _) => None,
            (Machine::Q35, None) => Some(Q35_SLEEP_CONTROLLER),
            (Machine::Q35, Some(others)) => others.sleep_controller(),
        };
        if let Some(controller) = controller {
            arguments.push(("-global", format!("{controller}.disable_s3=1")));
            arguments.push(("-global", format!("{controller}.disable_s4=1")));
        }
        arguments.extend(iommu_device(config, socket)?);
        arguments.extend(vfio_user_devices(config));
        arguments.push(description);
        arguments.extend(monitor(config)?);
        let mut notes = Vec::new();
        let arguments = words(arguments);
        if let Some(functions) = functions {
            let ranges = config.topology.ranges();
            let missing = ranges.filter(|entry| !has_device(config, &functions, entry.range));
            notes.extend(missing.map(|entry| {
                let note = endpoint_note(config, None, entry);
                format!("no argument gives this endpoint a device; {note}")
            }));
            notes.extend(problems.iter().map(ToString::to_string));
            return Ok(Self { arguments, notes });
        }
        notes.extend([
            format!("needs QEMU {OLDEST_QEMU} or later"),
            description_note(config.machine, table),
        ]);
        notes.extend(devices.iter().flat_map(|devices| devices.notes("QEMU")));
        notes.extend(
            config
                .topology
                .ranges()
                .map(|entry| endpoint_note(config, devices.as_ref(), entry)),
        );
        notes.extend(problems.iter().map(ToString::to_string));
        Ok(Self { arguments, notes })
    }
}

/// The devices that QEMU reaches over vfio-user. Their arguments must come after the IOMMU's: there QEMU waits for the daemon's
/// answer, and a daemon that systemd starts for QEMU's connection has made the sockets of these devices before it answers.
fn vfio_user_devices(config: &Config) -> Vec<(&'static str, String)> {
    let mut arguments = Vec::new();
    for kind in DeviceKind::ALL {
        match kind {
            DeviceKind::Exported => arguments.extend(exported::arguments(config)),
            DeviceKind::Emulated => arguments.extend(emulated::arguments(config)),
            // QEMU opens the device, or the process with the shadow reader offers it to QEMU itself.
            DeviceKind::Passthrough | DeviceKind::ShadowReader => {}
        }
    }
    arguments
}

/// The path of the VMM's socket.
fn socket_path(config: &Config) -> Result<&Path, QemuArgsError> {
    match &config.socket {
        Some(Socket::Path(path)) => Ok(path),
        Some(Socket::Fd(_)) | None => Err(QemuArgsError::NoSocket),
    }
}

/// Refuses devices at whose addresses no argument can put them.
fn check_buses(config: &Config) -> Result<(), QemuArgsError> {
    let mut endpoints = config.placed_functions();
    match endpoints.find(|&it| !has_bus(config, it) && it != config.topology.iommu()) {
        Some(endpoint) => Err(QemuArgsError::DeviceNotOnRootBus { endpoint }),
        None => Ok(()),
    }
}

/// The problems with which the guest finds the IOMMU and all devices.
fn slot_problems(config: &Config) -> Result<Vec<SlotProblem>, QemuArgsError> {
    let iommu = config.topology.iommu();
    if !on_root_bus(iommu) {
        return Err(QemuArgsError::NotOnRootBus { iommu });
    }
    let problems = config.slot_problems();
    match problems.iter().find(|problem| problem.is_fatal()) {
        Some(problem) => Err((*problem).into()),
        None => Ok(problems),
    }
}

/// The monitor for the daemon. Each monitor serves one client.
fn monitor(config: &Config) -> Result<Option<(&'static str, String)>, QemuArgsError> {
    let path = config.qmp.as_deref().map(option_value).transpose()?;
    Ok(path.map(|path| ("-qmp", format!("unix:{path},server=on,wait=off"))))
}

/// The arguments as words, in their order.
fn words(arguments: Vec<(&'static str, String)>) -> Vec<String> {
    let both = |(name, value): (&str, String)| [name.to_owned(), value];
    arguments.into_iter().flat_map(both).collect()
}

/// Arguments as one line for a POSIX shell.
pub fn shell_line(arguments: &[String]) -> String {
    let quoted: Vec<_> = arguments.iter().map(|text| shell_quote(text)).collect();
    quoted.join(" ")
}

/// The arguments for the IOMMU itself, whose daemon listens at `socket`.
fn iommu_device(
    config: &Config,
    socket: &Path,
) -> Result<Vec<(&'static str, String)>, QemuArgsError> {
    let iommu = config.topology.iommu();
    let socket_value = option_value(socket)?;
    Ok(match config.transport {
        VmmTransport::VhostUser => vec![
            (
                "-chardev",
                format!("socket,id={PREFIX}socket,path={socket_value}"),
            ),
            (
                "-device",
                format!(
                    "vhost-user-test-device-pci,virtio-id=23,num_vqs=2,vq_size=256,\
                     config_size=40,chardev={PREFIX}socket,{}",
                    place(config, iommu)
                ),
            ),
        ],
        VmmTransport::VirtioPci => {
            vec![("-device", vfio_user::argument(config, iommu, socket))]
        }
    })
}

/// The argument from which the guest learns the endpoints: an ACPI table, or a device tree, at `path`.
fn description(machine: Machine, path: &Path) -> Result<(&'static str, String), QemuArgsError> {
    let value = option_value(path)?;
    match machine {
        // QEMU separates files by colons.
        Machine::Q35 if value.contains(':') => Err(QemuArgsError::Colon {
            path: path.to_owned(),
        }),
        Machine::Q35 => Ok(("-acpitable", format!("file={value}"))),
        // The value is the path alone, not a list of properties.
        Machine::Virt => Ok(("-dtb", value.replace(",,", ","))),
    }
}

/// Whether QEMU takes a table or device tree at this path.
///
/// # Errors
/// The path cannot stand in an argument.
pub fn check_table_path(machine: Machine, path: &Path) -> Result<(), QemuArgsError> {
    description(machine, path).map(drop)
}

fn description_note(machine: Machine, path: &Path) -> String {
    let path = path.display();
    match machine {
        Machine::Q35 => {
            format!("the VIOT table is expected at {path}; `vhost-device-iommu viot` writes it")
        }
        Machine::Virt => format!(
            "the device tree is expected at {path}; `vhost-device-iommu dtb` makes it of the tree that QEMU writes \
             with the same -machine, -cpu and -smp options and -machine dumpdtb=BASE"
        ),
    }
}

/// The usual path of the VIOT table or the device tree for the configuration in `file`: beside it, with the extension
/// `.viot` or `.dtb`.
pub fn default_table_path(file: &Path, machine: Machine) -> PathBuf {
    file.with_extension(match machine {
        Machine::Q35 => "viot",
        Machine::Virt => "dtb",
    })
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
         QEMU's machine fixes; give an address such as `address = \"00:05.0\"`"
    )]
    NotOnRootBus {
        /// The address.
        iommu: PciAddress,
    },
    /// `addr=` cannot put a device at its address.
    #[error(
        "endpoint {endpoint} has a device, and is neither on bus 00 of segment 0 nor behind a port of the file, so its \
         bus is not known; give it an address such as `address = \"00:10.0\"`, or a port, such as `port = \"00:02.0\"`"
    )]
    DeviceNotOnRootBus {
        /// The address.
        endpoint: PciAddress,
    },
    /// The guest would not find the IOMMU or a device.
    #[error(transparent)]
    Slot(#[from] SlotProblem),
    /// QEMU's other options would leave the guest without a working IOMMU.
    #[error(transparent)]
    VmmOption(#[from] VmmOptionError),
    /// A device of the operator stands at an endpoint that the guest would not find.
    #[error(
        "no device is at {zero}, function 0 of the slot of {function}, and a guest looks for other functions \
         only where it finds function 0; add a -device with addr={} and multifunction=on", slot(*.zero)
    )]
    NoFunctionZero {
        /// The function with a device.
        function: PciAddress,
        /// Function 0 of its slot.
        zero: PciAddress,
    },
    /// A device of the operator stands where only endpoints that are added later may be.
    #[error(
        "the device at {function} is no endpoint, and is in the range {range} of `hotplug`: the guest's table says that all \
         devices there are behind the IOMMU, and Linux 7.3 gives no device a group if one of them is not; give the \
         device another addr=, or make it an [[endpoint]]"
    )]
    InHotplugRange {
        /// The function with a device.
        function: PciAddress,
        /// The range of `hotplug`.
        range: PciRange,
    },
    /// With type1, QEMU would need a device that the daemon holds.
    #[error(
        "with `host-iommu = \"type1\"` the daemon alone holds the devices of the host, and the VMM \
         cannot have them too; set `host-iommu = \"iommufd\"`, or export them to the VMM's \
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
    } else if config.ports.is_alias(entry.range) {
        "the bridge there gives this ID to all accesses from behind it; no device has it".to_owned()
    } else if first.segment() != 0 {
        "QEMU's machine has segment 0 only, so QEMU can put no device there".to_owned()
    } else if first.bus() == last.bus()
        && let Some(bus) = bus(config, first)
    {
        if first == last {
            format!("give its device {}", place(config, first))
        } else {
            format!(
                "give devices bus={bus} and addr={} to addr={}, and multifunction=on where a slot has several",
                slot(first),
                slot(last)
            )
        }
    } else if first.bus() != last.bus() {
        format!(
            "give a device there the addr= of its device.function, \
             on the bridge that the guest numbers as its bus ({:02x} to {:02x})",
            first.bus(),
            last.bus()
        )
    } else {
        let slots = if first == last {
            format!("give its device {}", place(config, first))
        } else {
            format!(
                "give devices addr={} to addr={}, and multifunction=on where a slot has several",
                slot(first),
                slot(last)
            )
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
mod tests;
