//! The domain of libvirt for a configuration.
//!
//! libvirt has elements for shared memory, the table, ports and devices of the host. It has none for the IOMMU and for
//! devices that QEMU reaches over vfio-user: these are arguments in `<qemu:commandline>`. libvirt does not read them, so it
//! knows neither the addresses of such devices nor their sockets.
//!
//! Rejected: a `<filesystem>` of type virtiofs whose driver `<qemu:override>` replaces. libvirt would then know address and
//! socket, but a reader of the domain would see a file system, and libvirt would treat the IOMMU as one.

mod error;
mod ports;
mod xml;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::config::{Config, DeviceKind, Machine, Passthrough, Socket};
use crate::qemu::args::{
    OLDEST_QEMU, PassthroughArguments, beside_libvirt, check_table_path, default_table_path,
    has_several_functions,
};
use crate::topology::{PciAddress, PciRange, Port, PortKind};
pub use error::LibvirtError;
use ports::PciControllers;
use xml::Xml;

/// The namespace of `<qemu:commandline>`.
const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
/// The first libvirt with tables of type `raw`.
const OLDEST: &str = "11.2";
/// The first libvirt with iommufd.
const OLDEST_WITH_IOMMUFD: &str = "12.1";

/// The folder of the tables. The program of libvirt that makes AppArmor's profiles refuses files in /etc, and QEMU's user must
/// be able to read the file.
const TABLES: &str = "/var/lib/vhost-device-iommu";

/// The usual path of the table or device tree for the configuration in `file`.
pub fn table_path(file: &Path, machine: Machine) -> PathBuf {
    let beside = default_table_path(file, machine);
    Path::new(TABLES).join(beside.file_name().unwrap_or_default())
}

/// A domain for a VM with `config`, whose VIOT table or device tree is at `table`. It has what the IOMMU needs, and no disks
/// and networks.
///
/// # Errors
///
/// The configuration lacks a setting that QEMU needs, or has one that libvirt or the machine cannot have.
pub fn domain(config: &Config, table: &Path) -> Result<String, LibvirtError> {
    // The errors of devices that the daemon alone can hold.
    PassthroughArguments::new(config)?;
    let hostdevs = hostdevs(config);
    if let Some(device) = hostdevs.first()
        && !config.takes_vmm_files()
    {
        let endpoint = device.endpoint;
        return Err(LibvirtError::InheritedFiles { endpoint });
    }
    check_ids(config, &hostdevs)?;
    if config.name.contains('/') {
        let name = config.name.clone();
        return Err(LibvirtError::Name { name });
    }
    let controllers = PciControllers::new(config, &hostdevs)?;
    let memory = config.memory.ok_or(LibvirtError::NoMemory)?;
    let arguments = beside_libvirt(config, |port| controllers.index(port).is_none())?;
    check_paths(config, table)?;
    check_table_path(config.machine, table)?;
    let table = table.to_str().unwrap_or_default();
    if let Some(text) = arguments
        .iter()
        .chain([&table.to_owned()])
        .find(|it| !xml::is_text(it))
    {
        let text = text.clone();
        return Err(LibvirtError::Character { text });
    }

    let mut xml = Xml::default();
    xml.comment(&head(config, !hostdevs.is_empty()));
    xml.open("domain", &[("type", "kvm"), ("xmlns:qemu", QEMU_NAMESPACE)]);
    xml.text("name", &[], &config.name);
    xml.text("memory", &[("unit", "KiB")], &(memory >> 10).to_string());
    xml.comment("The daemon and the devices behind the IOMMU share the guest's memory.");
    xml.open("memoryBacking", &[]);
    xml.empty("source", &[("type", "memfd")]);
    xml.empty("access", &[("mode", "shared")]);
    xml.close();
    machine(&mut xml, config.machine, table);
    xml.open("devices", &[]);
    controllers.write(&mut xml, config);
    for device in &hostdevs {
        hostdev(&mut xml, config, &controllers, device);
    }
    for note in endpoint_notes(config, &controllers) {
        xml.comment(&note);
    }
    xml.close();
    xml.comment(&unknown_devices(config, &controllers));
    xml.open("qemu:commandline", &[]);
    for argument in &arguments {
        xml.empty("qemu:arg", &[("value", argument)]);
    }
    xml.close();
    controllers.write_overrides(&mut xml);
    xml.close();
    Ok(xml.finish())
}

/// The devices of the host that QEMU opens itself.
fn hostdevs(config: &Config) -> Vec<Passthrough> {
    let devices = config.devices.passthrough.iter();
    let shared = devices.filter(|it| config.devices.exported_at(it.endpoint).is_none());
    shared.copied().collect()
}

/// Refuses paths that depend on a current directory: libvirt starts QEMU in another one.
fn check_paths(config: &Config, table: &Path) -> Result<(), LibvirtError> {
    let socket = match &config.socket {
        Some(Socket::Path(path)) => Some(path.as_path()),
        Some(Socket::Fd(_)) | None => None,
    };
    let devices = config.devices.iter();
    // QEMU connects to these.
    let clients = devices.filter(|it| it.kind() != DeviceKind::ShadowReader);
    let listening = clients.filter_map(|it| it.listens_at());
    let all = [socket, config.qmp.as_deref(), Some(table)];
    let mut all = all
        .into_iter()
        .flatten()
        .chain(listening.map(AsRef::as_ref));
    match all.find(|path| !path.is_absolute()) {
        Some(path) => Err(LibvirtError::Relative {
            path: path.to_owned(),
        }),
        None => Ok(()),
    }
}

fn head(config: &Config, has_hostdevs: bool) -> String {
    let libvirt = if has_hostdevs {
        OLDEST_WITH_IOMMUFD
    } else {
        OLDEST
    };
    let writer = match config.machine {
        Machine::Q35 => "viot",
        Machine::Virt => "dtb",
    };
    format!(
        "Made by `vhost-device-iommu libvirt-xml`, for QEMU {OLDEST_QEMU} and libvirt {libvirt} or later.\n\
         `virsh define` takes it as it is: a VM with its IOMMU, without disks and networks. To give the IOMMU to a domain that\n\
         exists, copy each part into the same place there, and the attribute xmlns:qemu of <domain> with it.\n\
         `vhost-device-iommu {writer}` must have written the table before the VM starts, and the daemon must listen."
    )
}

fn machine(xml: &mut Xml, machine: Machine, table: &str) {
    xml.open("os", &[]);
    match machine {
        Machine::Q35 => {
            xml.text("type", &[("arch", "x86_64"), ("machine", "q35")], "hvm");
            xml.comment("The table (VIOT) names the devices behind the IOMMU.");
            xml.open("acpi", &[]);
            xml.text("table", &[("type", "raw")], table);
            xml.close();
        }
        Machine::Virt => {
            xml.text("type", &[("arch", "aarch64"), ("machine", "virt")], "hvm");
            xml.comment("The device tree names the devices behind the IOMMU. It must be that of this machine.");
            xml.text("dtb", &[], table);
        }
    }
    xml.close();
    match machine {
        Machine::Q35 => {
            xml.open("features", &[]);
            xml.empty("acpi", &[]);
            xml.close();
            xml.comment("After a sleep the guest's driver would wait for answers for ever.");
            xml.open("pm", &[]);
            xml.empty("suspend-to-mem", &[("enabled", "no")]);
            xml.empty("suspend-to-disk", &[("enabled", "no")]);
            xml.close();
        }
        Machine::Virt => {
            xml.comment("No <acpi/>: firmware would pass tables in place of the device tree.");
            xml.open("features", &[]);
            xml.empty("gic", &[("version", "3")]);
            xml.close();
        }
    }
}

/// Refuses an ID that libvirt would not give to a device. It takes those that begin with `ua-`, and otherwise numbers the
/// devices.
fn check_ids(config: &Config, hostdevs: &[Passthrough]) -> Result<(), LibvirtError> {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let mut numbered = 0;
    for device in hostdevs {
        let mut named = config.named.iter();
        let id = named.find(|it| it.endpoint == device.endpoint);
        let id = id.map(|named| &named.id);
        if id.is_some_and(|id| id.starts_with("ua-") && id.bytes().all(is_inner)) {
            continue;
        }
        let usual = format!("hostdev{numbered}");
        numbered += 1;
        if let Some(id) = id.filter(|id| **id != usual) {
            return Err(LibvirtError::Id {
                endpoint: device.endpoint,
                id: id.clone(),
                usual,
            });
        }
    }
    Ok(())
}

/// A device of the host. The operator has bound it to vfio-pci before the daemon starts, so libvirt does not manage it.
fn hostdev(xml: &mut Xml, config: &Config, controllers: &PciControllers<'_>, device: &Passthrough) {
    xml.open(
        "hostdev",
        &[("mode", "subsystem"), ("type", "pci"), ("managed", "no")],
    );
    xml.empty("driver", &[("iommufd", "yes")]);
    xml.open("source", &[]);
    let host = device.host;
    let [bus, slot, function] = [host.bus(), host.device(), host.function()];
    // Without the attribute `type`, which the schema refuses here.
    write_address(xml, &[], host.domain(), bus, slot, function);
    xml.close();
    let mut named = config.named.iter();
    let id = named.find(|it| it.endpoint == device.endpoint);
    // libvirt takes no other IDs from a domain.
    if let Some(device) = id.filter(|it| it.id.starts_with("ua-")) {
        xml.empty("alias", &[("name", &device.id)]);
    }
    address(xml, config, controllers, device.endpoint);
    xml.close();
}

/// The address of a device of this configuration at `function`.
fn address(xml: &mut Xml, config: &Config, controllers: &PciControllers<'_>, function: PciAddress) {
    let mut attributes = vec![("type", "pci")];
    if has_several_functions(config, function) {
        attributes.push(("multifunction", "on"));
    }
    let bus = controllers.bus(config, function).unwrap_or_default();
    let (slot, function) = (function.device(), function.function());
    write_address(xml, &attributes, 0, bus, slot, function);
}

/// An address with the attributes `others` before its numbers.
fn write_address(
    xml: &mut Xml,
    others: &[(&str, &str)],
    domain: u32,
    bus: u8,
    slot: u8,
    function: u8,
) {
    let numbers = [
        format!("0x{domain:04x}"),
        format!("0x{bus:02x}"),
        format!("0x{slot:02x}"),
        format!("0x{function:x}"),
    ];
    let names = ["domain", "bus", "slot", "function"];
    let mut attributes = others.to_vec();
    attributes.extend(names.into_iter().zip(numbers.iter().map(String::as_str)));
    xml.empty("address", &attributes);
}

/// Notes on the endpoints whose devices neither these elements nor the arguments have.
fn endpoint_notes(config: &Config, controllers: &PciControllers<'_>) -> Vec<String> {
    let without = config.topology.ranges().filter(|entry| {
        let kind = config.devices.kind_of(entry.range.first());
        matches!(kind, None | Some(DeviceKind::ShadowReader)) && !config.ports.is_alias(entry.range)
    });
    let note = |range: PciRange| {
        let first = range.first();
        let begin = format!("Endpoint {range}: ");
        match controllers.bus(config, first) {
            Some(bus) => format!(
                "{begin}devices are behind the IOMMU there, such as one with\n\
                 <address type='pci' bus='0x{bus:02x}' slot='0x{:02x}' function='0x{:x}'/>.",
                first.device(),
                first.function()
            ),
            None => format!("{begin}libvirt knows no bus there."),
        }
    };
    without.map(|entry| note(entry.range)).collect()
}

/// A note on the functions that libvirt must not give to other devices.
fn unknown_devices(config: &Config, controllers: &PciControllers<'_>) -> String {
    let is_hostdev = |it: &PciAddress| config.devices.kind_of(*it) == Some(DeviceKind::Passthrough);
    let is_controller = |it: &PciAddress| {
        let mut ports = config.ports.iter();
        let port = ports.find(|port| port.address == *it);
        port.is_some_and(|port| controllers.index(port).is_some())
    };
    // An exported device counts twice.
    let taken: BTreeSet<_> = config
        .placed_functions()
        .filter(|it| it.bus() == 0 && !is_hostdev(it) && !is_controller(it))
        .map(|it| format!("{:02x}.{:x}", it.device(), it.function()))
        .collect();
    let taken: Vec<_> = taken.into_iter().collect();
    format!(
        "The IOMMU, and the devices for which libvirt has no element. libvirt does not know that they have these addresses on\n\
         bus 00, and QEMU does not start if another device has one of them: {}.",
        taken.join(", ")
    )
}

/// libvirt's name for a kind of port.
fn model(port: &Port) -> &'static str {
    match port.kind {
        PortKind::RootPort => "pcie-root-port",
        PortKind::UpstreamPort => "pcie-switch-upstream-port",
        PortKind::DownstreamPort => "pcie-switch-downstream-port",
        PortKind::PciBridge => "pcie-to-pci-bridge",
    }
}

#[cfg(test)]
mod tests;
