//! cloud-hypervisor's arguments for a configuration.
//!
//! That VMM takes no ACPI tables. The guest's kernel reads the root pointer from a BAR of the IOMMU (`acpi_rsdp=`), and
//! the device adds VIOT to the guest's tables meanwhile. So the arguments must fix the address of that BAR. The VMM
//! creates its virtio devices first, then `--device`, then `--user-device`, each in the order of the arguments.

mod aperture;
mod operator;

use std::ffi::OsString;
use std::iter;
use std::os::fd::RawFd;

use super::{VmmArgs, VmmArgsError, check_guest, plain, socket};
use crate::config::{Config, DeviceKind, VmmTransport};
use crate::host::sysfs::HostRoot;
use crate::qemu::args::PassthroughArguments;
use crate::topology::{HostAddress, PciAddress};
use aperture::Aperture;
use operator::{OwnArguments, OwnDevice};

pub use operator::OwnArgumentError;

/// The BAR that answers with the root pointer.
const TRIGGER_BAR_LEN: u64 = 0x1000;
/// The BAR of a virtio disk on segment 0, which is 32-bit for firmware's sake; all other virtio devices have 64-bit
/// BARs.
const DISK_BAR_LEN: u64 = 0x8_0000;
/// The kernel's parameter with the address of the root pointer.
const RSDP_PARAMETER: &str = "acpi_rsdp=";
/// The other way to the guest's table.
const FIRMWARE: &str =
    "firmware boots need GRUB's command acpi with the table that `vhost-device-iommu viot` writes";
/// The VMM's host bridge is slot 0.
const LAST_SLOT: u8 = 31;

const IORESOURCE_IO: u64 = 0x100;
const IORESOURCE_MEM: u64 = 0x200;
const IORESOURCE_MEM_64: u64 = 0x10_0000;
/// BARs and expansion ROM: the lines of sysfs' `resource` that VFIO shows.
const REGIONS: usize = 7;

/// The options that stand once on the command line, so that the operator's values join ours.
const JOINED: [&str; 2] = ["cmdline", "platform"];

/// The operator's own part of the command line.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloudHypervisorOptions<'a> {
    /// The number of `--disk` options.
    pub disks: u16,
    /// The kernel's command line, to which `acpi_rsdp=` is added.
    pub cmdline: &'a str,
}

/// The arguments for a VM with `config`, on the host whose sysfs is below `host`.
///
/// # Errors
///
/// The configuration lacks a setting that the VMM needs, or has one that it cannot have.
pub fn arguments(
    config: &Config,
    options: CloudHypervisorOptions<'_>,
    host: &HostRoot,
) -> Result<VmmArgs, VmmArgsError> {
    let disks = iter::repeat_n("--disk=x", options.disks.into());
    let cmdline = format!("--cmdline={}", options.cmdline);
    let own: Vec<_> = disks
        .chain([cmdline.as_str()])
        .map(OsString::from)
        .collect();
    let Made {
        arguments,
        address,
        mut notes,
        descriptors,
    } = make(config, &OwnArguments::new(&own), host)?;
    notes.push(
        "start the daemon first, then the servers of emulated devices; add --kernel (direct boot only), --disk and all \
         other options to these arguments"
            .to_owned(),
    );
    if let Some(address) = address {
        notes.push(format!(
            "acpi_rsdp={address:#x} is right with {} --disk (say how many with --disks) and with every other \
             --user-device behind these",
            options.disks
        ));
    }
    if let Some(descriptors) = &descriptors {
        notes.extend(descriptors.notes("cloud-hypervisor"));
    }
    Ok(VmmArgs { arguments, notes })
}

/// All arguments for a VM with `config` that is started with the operator's arguments `own`: ours first, so that the
/// IOMMU is the first `--user-device`, then the operator's. A `--memory` of the operator replaces ours; `--cmdline` and
/// `--platform` are joined with ours.
///
/// # Errors
///
/// As for [`arguments`], and where `own` has an argument with which the guest would have no working IOMMU.
pub fn launched(
    config: &Config,
    own: &[OsString],
    host: &HostRoot,
) -> Result<LaunchedArgs, VmmArgsError> {
    let own = OwnArguments::new(own);
    let made = make(config, &own, host)?;
    let ours = made.arguments.into_iter().map(OsString::from);
    Ok(LaunchedArgs {
        arguments: ours.chain(own.words_without(&JOINED).cloned()).collect(),
        notes: made.notes,
    })
}

/// The arguments of a VMM that `launch` starts, the operator's among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchedArgs {
    /// The arguments, without the program's name.
    pub arguments: Vec<OsString>,
    /// Notes for the operator.
    pub notes: Vec<String>,
}

/// Our arguments, with the operator's values of the options in [`JOINED`].
struct Made {
    arguments: Vec<String>,
    /// The address in `acpi_rsdp=`; `None` if the arguments do not have it.
    address: Option<u64>,
    notes: Vec<String>,
    descriptors: Option<PassthroughArguments>,
}

fn make(config: &Config, own: &OwnArguments, host: &HostRoot) -> Result<Made, VmmArgsError> {
    check_guest(config, host)?;
    let socket = socket(config, VmmTransport::VirtioPci)?;
    let descriptors = PassthroughArguments::new(config)?;
    own.check(descriptors.is_some())?;
    let iommu = config.topology.iommu();
    let placed = || config.placed_functions();
    if let Some(address) = placed().find(|&address| !is_slot(address)) {
        return Err(VmmArgsError::NotASlot { address });
    }
    let needed = placed()
        .map(PciAddress::segment)
        .max()
        .unwrap_or(0)
        .saturating_add(1);
    let segments = own.segments(needed)?;

    let mut bars = Bars::new(iommu.segment(), segments, own.disks());
    let mut platform: Vec<_> = own.platform().map(ToOwned::to_owned).into_iter().collect();
    let mut arguments = Vec::new();
    if !own.has("memory") {
        let size = match config.memory {
            // The VMM makes RAM of the zones alone.
            _ if own.has("memory-zone") => "0".to_owned(),
            Some(bytes) => format!("{}M", bytes >> 20),
            None => return Err(VmmArgsError::NoMemorySize),
        };
        arguments.extend(["--memory".to_owned(), format!("size={size},shared=on")]);
    }
    if segments > 1 && !own.platform_has("num_pci_segments") {
        platform.push(format!("num_pci_segments={segments}"));
    }
    let mut devices = Vec::new();
    if let Some(descriptors) = &descriptors {
        platform.push(format!("iommufd_fd={}", descriptors.iommufd()));
        if !own.platform_has("vfio_p2p_dma") {
            // The daemon maps device memory where the guest asks for it. The VMM's own mappings, which the daemon's
            // replace, would fail before Linux 6.19.
            platform.push("vfio_p2p_dma=off".to_owned());
        }
        for (device, fd) in descriptors.devices() {
            bars.add_host_device(host, device.endpoint.segment(), device.host);
            devices.extend(["--device".to_owned(), device_value(fd, device.endpoint)]);
        }
    }
    for device in own.devices(iommu.segment()) {
        match device {
            OwnDevice::Named(address) => bars.add_host_device(host, iommu.segment(), address),
            OwnDevice::Unknown => bars.notes.push(
                "a --device without the path of a PCI device in sysfs: if it has 32-bit BARs, acpi_rsdp= is too high"
                    .to_owned(),
            ),
        }
    }
    if !platform.is_empty() {
        arguments.extend(["--platform".to_owned(), platform.join(",")]);
    }
    arguments.extend(devices);
    // The IOMMU before all other vfio-user devices, so that their BARs do not move its own.
    let mut user_device = |socket: &str, address: PciAddress| {
        let place = place(address);
        arguments.extend([
            "--user-device".to_owned(),
            format!("socket={socket},{place}"),
        ]);
    };
    user_device(socket, iommu);
    for export in &config.devices.exported {
        user_device(plain(&export.path)?, export.endpoint);
    }
    for device in &config.devices.emulated {
        user_device(plain(&device.listen)?, device.endpoint);
    }
    let mut notes = bars.notes;
    let mut address = None;
    if own.has("firmware") || own.has("igvm") {
        notes.push(format!(
            "the VMM gives no parameters to a kernel that firmware starts; {FIRMWARE}"
        ));
    } else {
        let found = bars.aperture.place(TRIGGER_BAR_LEN);
        let (parameters, named) = parameters(own.cmdline(), found, &mut notes);
        address = named;
        if !parameters.is_empty() {
            arguments.extend(["--cmdline".to_owned(), parameters]);
        }
        notes.extend(address_notes(iommu));
    }
    notes.extend(config.topology.ranges().filter_map(|entry| {
        let kind = config.devices.kind_of(entry.range.first());
        endpoint_note(entry.range, kind)
    }));
    Ok(Made {
        arguments,
        address,
        notes,
        descriptors,
    })
}

/// The kernel's parameters, with `acpi_rsdp=` and the address `found`, unless `own` has that parameter. Returns the
/// address that was added, too.
fn parameters(own: &str, found: Option<u64>, notes: &mut Vec<String>) -> (String, Option<u64>) {
    let own = own.trim();
    if own
        .split_whitespace()
        .any(|word| word.starts_with(RSDP_PARAMETER))
    {
        let computed = found.map_or_else(String::new, |at| format!(", computed: {at:#x}"));
        notes.push(format!(
            "the kernel's parameters have {RSDP_PARAMETER} already, which stays{computed}"
        ));
        return (own.to_owned(), None);
    }
    let Some(address) = found else {
        notes.push("the 32-bit BARs before the IOMMU's leave no room for it".to_owned());
        return (own.to_owned(), None);
    };
    let space = if own.is_empty() { "" } else { " " };
    let all = format!("{own}{space}{RSDP_PARAMETER}{address:#x}");
    (all, Some(address))
}

/// The 32-bit BARs that come before the IOMMU's.
struct Bars {
    segment: u16,
    aperture: Aperture,
    notes: Vec<String>,
}

impl Bars {
    fn new(segment: u16, segments: u16, disks: u16) -> Self {
        let mut aperture = Aperture::new(segment, segments);
        let mut notes = Vec::new();
        let on_segment = if segment == 0 { disks } else { 0 };
        if (0..on_segment).any(|_| aperture.place(DISK_BAR_LEN).is_none()) {
            notes.push(format!("{disks} disks have no room for their BARs"));
        }
        Self {
            segment,
            aperture,
            notes,
        }
    }

    /// Takes the places of the BARs of a device of the host that the guest has on `segment`.
    fn add_host_device(&mut self, host: &HostRoot, segment: u16, device: HostAddress) {
        if segment != self.segment {
            return;
        }
        let path = format!("sys/bus/pci/devices/{device}/resource");
        match host.text(path) {
            Ok(table) => {
                for size in sizes_of_32_bit_bars(&table) {
                    self.aperture.place(size);
                }
            }
            Err(cause) => self.notes.push(format!(
                "the BARs of the host's device {device} cannot be read ({cause}); if it has 32-bit BARs, acpi_rsdp= is \
                 too high"
            )),
        }
    }
}

/// The sizes of the 32-bit memory BARs and the expansion ROM in sysfs' `resource`, in order.
fn sizes_of_32_bit_bars(table: &str) -> impl Iterator<Item = u64> {
    table.lines().take(REGIONS).filter_map(|line| {
        let mut fields = line.split_whitespace().map(|field| {
            let digits = field.strip_prefix("0x").unwrap_or(field);
            u64::from_str_radix(digits, 16).ok()
        });
        let (first, last, flags) = (fields.next()??, fields.next()??, fields.next()??);
        let is_32_bit =
            flags & IORESOURCE_MEM != 0 && flags & (IORESOURCE_IO | IORESOURCE_MEM_64) == 0;
        let len = last.checked_sub(first)?.checked_add(1)?;
        (is_32_bit && last > 0 && len.is_power_of_two()).then_some(len)
    })
}

fn is_slot(address: PciAddress) -> bool {
    let device = address.device();
    address.bus() == 0 && address.function() == 0 && (1..=LAST_SLOT).contains(&device)
}

/// The keys that put a device at `address`.
fn place(address: PciAddress) -> String {
    let device = address.device();
    match address.segment() {
        0 => format!("pci_device_id={device}"),
        segment => format!("pci_segment={segment},pci_device_id={device}"),
    }
}

fn device_value(fd: RawFd, endpoint: PciAddress) -> String {
    format!("fd={fd},{}", place(endpoint))
}

fn address_notes(iommu: PciAddress) -> [String; 2] {
    [
        format!(
            "if the guest has no IOMMU, `ctl status` and the daemon's log say whether the guest has read the address of \
             acpi_rsdp=; look the right one up in the guest with `lspci -vs {iommu}`: the 32-bit memory of 4K"
        ),
        format!(
            "the guest's kernel needs CONFIG_KEXEC, as Debian's has, and no lockdown; {FIRMWARE}"
        ),
    ]
}

fn endpoint_note(range: crate::topology::PciRange, kind: Option<DeviceKind>) -> Option<String> {
    match kind {
        Some(DeviceKind::Passthrough | DeviceKind::Exported | DeviceKind::Emulated) => None,
        Some(DeviceKind::ShadowReader) => Some(format!(
            "endpoint {range}: add the device of its process with the pci_device_id= of this address"
        )),
        None => Some(format!(
            "endpoint {range}: no argument gives it a device; the daemon cannot translate for devices inside the VMM \
             (--disk, --net)"
        )),
    }
}

#[cfg(test)]
mod tests;
