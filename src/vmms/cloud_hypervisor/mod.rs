//! cloud-hypervisor's arguments for a configuration.
//!
//! That VMM takes no ACPI tables. The guest's kernel reads the root pointer from a BAR of the IOMMU (`acpi_rsdp=`), and
//! the device adds VIOT to the guest's tables meanwhile. So the arguments must fix the address of that BAR. The VMM
//! creates its virtio devices first, then `--device`, then `--user-device`, each in the order of the arguments.

mod aperture;

use std::os::fd::RawFd;

use super::{VmmArgs, VmmArgsError, plain, socket};
use crate::config::{Config, DeviceKind, VmmTransport};
use crate::host::sysfs::HostRoot;
use crate::qemu::args::PassthroughArguments;
use crate::topology::{HostAddress, PciAddress};
use aperture::Aperture;

/// The BAR that answers with the root pointer.
const TRIGGER_BAR_LEN: u64 = 0x1000;
/// The BAR of a virtio disk on segment 0, which is 32-bit for firmware's sake; all other virtio devices have 64-bit
/// BARs.
const DISK_BAR_LEN: u64 = 0x8_0000;
/// The VMM's host bridge is slot 0.
const LAST_SLOT: u8 = 31;

const IORESOURCE_IO: u64 = 0x100;
const IORESOURCE_MEM: u64 = 0x200;
const IORESOURCE_MEM_64: u64 = 0x10_0000;
/// BARs and expansion ROM: the lines of sysfs' `resource` that VFIO shows.
const REGIONS: usize = 7;

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
    let socket = socket(config, VmmTransport::VirtioPci)?;
    let memory = config.memory.ok_or(VmmArgsError::NoMemorySize)?;
    let descriptors = PassthroughArguments::new(config)?;
    let iommu = config.topology.iommu();
    let placed = || config.placed_functions();
    if let Some(address) = placed().find(|&address| !is_slot(address)) {
        return Err(VmmArgsError::NotASlot { address });
    }
    let segments = placed()
        .map(PciAddress::segment)
        .max()
        .unwrap_or(0)
        .saturating_add(1);

    let mut bars = Bars::new(iommu.segment(), segments, options.disks);
    let mut platform = Vec::new();
    let mut arguments = vec![
        "--memory".to_owned(),
        format!("size={}M,shared=on", memory >> 20),
    ];
    if segments > 1 {
        platform.push(format!("num_pci_segments={segments}"));
    }
    let mut devices = Vec::new();
    if let Some(descriptors) = &descriptors {
        platform.push(format!("iommufd_fd={}", descriptors.iommufd()));
        // The daemon maps device memory where the guest asks for it. The VMM's own mappings, which the daemon's
        // replace, would fail before Linux 6.19.
        platform.push("vfio_p2p_dma=off".to_owned());
        for (device, fd) in descriptors.devices() {
            bars.add_host_device(host, device.endpoint, device.host);
            devices.extend(["--device".to_owned(), device_value(fd, device.endpoint)]);
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
    if let Some(address) = bars.aperture.place(TRIGGER_BAR_LEN) {
        let own = options.cmdline.trim();
        let space = if own.is_empty() { "" } else { " " };
        arguments.extend([
            "--cmdline".to_owned(),
            format!("{own}{space}acpi_rsdp={address:#x}"),
        ]);
        notes.extend(address_notes(address, iommu, options.disks));
    } else {
        notes.push("the 32-bit BARs before the IOMMU's leave no room for it".to_owned());
    }
    if let Some(descriptors) = &descriptors {
        notes.extend(descriptors.notes("cloud-hypervisor"));
    }
    notes.extend(config.topology.ranges().filter_map(|entry| {
        let kind = config.devices.kind_of(entry.range.first());
        endpoint_note(entry.range, kind)
    }));
    Ok(VmmArgs { arguments, notes })
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

    /// Takes the places of a passthrough device's BARs.
    fn add_host_device(&mut self, host: &HostRoot, endpoint: PciAddress, device: HostAddress) {
        if endpoint.segment() != self.segment {
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

fn address_notes(address: u64, iommu: PciAddress, disks: u16) -> [String; 4] {
    [
        "start the daemon first, then the servers of emulated devices; add --kernel (direct boot only), --disk and all \
         other options to these arguments"
            .to_owned(),
        format!(
            "acpi_rsdp={address:#x} is right with {disks} --disk (say how many with --disks) and with every other \
             --user-device behind these"
        ),
        format!(
            "if the guest has no IOMMU, `ctl status` and the daemon's log say whether the guest has read that address; \
             look the right one up in the guest with `lspci -vs {iommu}`: the 32-bit memory of 4K"
        ),
        "the guest's kernel needs CONFIG_KEXEC, as Debian's has, and no lockdown; firmware boots need GRUB's command \
         acpi with the table that `vhost-device-iommu viot` writes"
            .to_owned(),
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
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const BASE: &str = "vfio-user-socket = '/run/i'\nmemory = '4G'\naddress = '00:02.0'\n";

    fn made(text: &str, options: CloudHypervisorOptions<'_>) -> Result<VmmArgs, VmmArgsError> {
        let config = Config::from_text(Path::new("vm.toml"), text).expect("good");
        let dir = tempfile::tempdir().expect("a directory");
        let device = dir.path().join("sys/bus/pci/devices/0000:65:00.0");
        fs::create_dir_all(&device).expect("made");
        let resource = "0xfe000000 0xfe0fffff 0x0000000000040200\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                        0x380000000000 0x38000000ffff 0x000000000014220c\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                        0x000000000000e000 0x000000000000e07f 0x0000000000040101\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                        0x00000000fe100000 0x00000000fe10ffff 0x0000000000046200\n\
                        0x00000000f0000000 0x00000000f0ffffff 0x0000000000040200\n";
        fs::write(device.join("resource"), resource).expect("written");
        arguments(&config, options, &HostRoot::new(dir.path()))
    }

    #[test]
    fn the_iommu_comes_before_all_other_vfio_user_devices() {
        let text = format!(
            "{BASE}[[endpoint]]\naddress = '00:01.0'\nvfio-user = {{ listen = '/run/a', connect = '/run/b' }}\n\
             [[endpoint]]\naddress = '00:09.0'\n"
        );
        let made = made(
            &text,
            CloudHypervisorOptions {
                disks: 0,
                cmdline: "console=ttyS0",
            },
        );
        let made = made.expect("arguments");
        assert_eq!(
            made.arguments,
            [
                "--memory",
                "size=4096M,shared=on",
                "--user-device",
                "socket=/run/i,pci_device_id=2",
                "--user-device",
                "socket=/run/a,pci_device_id=1",
                "--cmdline",
                "console=ttyS0 acpi_rsdp=0xe7fff000",
            ]
        );
        assert!(
            made.notes
                .iter()
                .any(|note| note.contains("endpoint 0000:00:09.0: no argument"))
        );
    }

    #[test]
    fn disks_and_passthrough_devices_move_the_bar() {
        let disks = CloudHypervisorOptions {
            disks: 2,
            cmdline: "",
        };
        let last = |text: &str| {
            let made = made(text, disks).expect("arguments");
            made.arguments.last().cloned().expect("a command line")
        };
        assert_eq!(last(BASE), "acpi_rsdp=0xe7eff000");
        // 1 MiB below the disks, then a ROM of 64 KiB above the IOMMU's BAR.
        let text = format!("{BASE}[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n");
        assert_eq!(last(&text), "acpi_rsdp=0xe7def000");
        let made = made(&text, disks).expect("arguments");
        assert_eq!(
            made.arguments[2..6],
            [
                "--platform",
                "iommufd_fd=3,vfio_p2p_dma=off",
                "--device",
                "fd=4,pci_device_id=6"
            ]
        );
        assert!(
            made.notes
                .iter()
                .any(|note| note.contains("exec 3<>/dev/iommu"))
        );
    }

    #[test]
    fn segments_are_numbered_and_counted() {
        let text = format!(
            "{BASE}[[endpoint]]\naddress = '0001:00:03.0'\nvfio-user = {{ listen = '/run/a', connect = '/run/b' }}\n"
        );
        let made = made(&text, CloudHypervisorOptions::default()).expect("arguments");
        assert!(made.arguments.contains(&"num_pci_segments=2".to_owned()));
        let device = "socket=/run/a,pci_segment=1,pci_device_id=3".to_owned();
        assert!(made.arguments.contains(&device));
        assert_eq!(
            made.arguments.last().map(String::as_str),
            Some("acpi_rsdp=0xd3fff000")
        );
    }
}
