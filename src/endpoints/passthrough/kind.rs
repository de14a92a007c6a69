//! Passthrough devices as a kind of endpoint.

use std::fmt::Write;
use std::time::Duration;

use crate::config::{Config, HostIommu};
use crate::endpoints::kind::{
    EndpointKind, OpenDevice, Plug, PlugError, Resources, check_prepared,
};
use crate::endpoints::status::StatusNames;
use crate::process::sandbox::Needs;
use crate::vfio::ioctls_of_backends;

/// The kernel charges the host's IOMMU tables to the daemon. In bypass mode they take 8 bytes for each 4 KiB of guest
/// memory; this share is twice that. For domains they take what the daemon's own page tables take in the arena: both have
/// 512 entries in a frame of 4 KiB.
const HOST_TABLE_SHARE: u64 = 256;
/// Bytes that each mapping takes in the daemon's page tables, and at the least: an entry.
const ENTRY_BYTES: u64 = 8;
/// The most bytes that the kernel charges to the daemon for its record of a mapping of iommufd. Linux 7.3.4 took 160 bytes
/// for each of 5000 copies of guest RAM (`iopt_area`), and 357 with `pin = "mapped"` (`iopt_pages`, too). From their sizes,
/// rounded up to those of the kernel's allocator, and with the accounting of both, they take 464.
pub const IOMMUFD_RECORD: u64 = 640;
/// As [`IOMMUFD_RECORD`], for a mapping of type1 (`vfio_dma`): 104 bytes were measured, and 136 follow from its size.
pub const TYPE1_RECORD: u64 = 160;
/// The most mappings of a type1 container (`dma_entry_limit`), unless the host changes the kernel's module parameter.
const TYPE1_MAPPINGS: u64 = 65535;

/// Devices of the host whose DMA the host's IOMMU translates.
pub struct PassthroughKind;

impl EndpointKind for PassthroughKind {
    fn add_needs(&self, config: &Config, needs: &mut Needs) {
        if needs.plugging.is_some() || !config.devices.passthrough.is_empty() {
            needs.iommu_ioctls = ioctls_of_backends();
        }
    }

    fn resources(&self, config: &Config) -> Resources {
        if config.devices.passthrough.is_empty() {
            return Resources::default();
        }
        Resources {
            devices: config.devices.passthrough.len(),
            memory: kernel_memory(config),
            directives: directives(config),
            wait: Duration::ZERO,
            files: 0,
        }
    }

    /// Always refuses: the VMM would need the daemon's descriptor of the device, and the daemon cannot pass it
    /// to a running VMM.
    fn plug(&self, _: &Plug<'_>) -> Result<OpenDevice, PlugError> {
        Err(PlugError::Shared)
    }

    fn check_unplug(&self, config: &Config) -> Result<(), PlugError> {
        check_prepared(config)
    }

    /// No names: VFIO reports nothing about a device that the VMM drives itself.
    fn status_names(&self) -> Option<StatusNames> {
        None
    }
}

/// The most bytes that the kernel charges to the daemon for the devices' mappings. The arena bounds the number of the
/// guest's mappings, however little memory they lead to: a guest may map one page many times.
fn kernel_memory(config: &Config) -> u64 {
    let devices = u64::try_from(config.devices.passthrough.len()).unwrap_or(u64::MAX);
    let guest = config.memory.unwrap_or(0);
    let tables = (guest / HOST_TABLE_SHARE).saturating_add(config.arena_limit);
    let mappings = config.arena_limit / ENTRY_BYTES;
    let records = match config.host_iommu {
        // One record for a domain, whatever the number of devices in it.
        HostIommu::Iommufd => mappings.saturating_mul(IOMMUFD_RECORD),
        // Each group has a container.
        HostIommu::Type1 => mappings
            .min(TYPE1_MAPPINGS)
            .saturating_mul(TYPE1_RECORD)
            .saturating_mul(devices),
    };
    tables.saturating_mul(devices).saturating_add(records)
}

/// The unit's directives that let the daemon lock the guest's memory and open the devices' nodes.
///
/// Locked memory has no limit of its own, because no limit fits: iommufd counts all processes of a user against each
/// one's limit, and all daemons run as one user; a page counts once for each mapping that does not share its pin, and
/// the guest decides how often it maps a page. The limit keeps a process from locking the host's RAM; here `MemoryMax`
/// does that. Not `CAP_IPC_LOCK`: the daemon would have to keep the capability for all its life. Not
/// `IOMMU_OPTION_RLIMIT_MODE`, which counts each process for itself: it needs `CAP_SYS_RESOURCE`.
fn directives(config: &Config) -> String {
    let mut text = String::from("LimitMEMLOCK=infinity\nPrivateDevices=no\n");
    let nodes: &[&str] = match config.host_iommu {
        HostIommu::Iommufd => &["/dev/iommu", "char-vfio-dev", "char-vfio"],
        HostIommu::Type1 => &["/dev/vfio/vfio", "char-vfio"],
    };
    for node in nodes {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "DeviceAllow={node} rw");
    }
    // /proc has the numbers of interrupts and the devices' files.
    text.push_str("ProcSubset=all\n");
    text
}
