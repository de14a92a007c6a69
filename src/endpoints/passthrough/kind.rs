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

/// The kernel charges the host's IOMMU tables to the daemon. They take 8 bytes for each 4 KiB of guest memory;
/// this share is twice that.
const HOST_TABLE_SHARE: u64 = 256;
/// The kernel charges its record of each mapping to the daemon, too. iommufd's (`iopt_area`, `iopt_pages`) takes up to 512
/// bytes; this share is enough for a record of each page of 4 KiB of guest memory.
const RECORD_SHARE: u64 = 8;
/// type1's records (`vfio_dma`): 65535 for each host group (`dma_entry_limit`), of up to 128 bytes.
const TYPE1_RECORDS: u64 = 65535 * 128;

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

/// Bytes that the kernel charges to the daemon for the devices' mappings.
fn kernel_memory(config: &Config) -> u64 {
    let guest = config.memory.unwrap_or(0);
    let records = match config.host_iommu {
        HostIommu::Iommufd => guest / RECORD_SHARE,
        HostIommu::Type1 => {
            let groups = u64::try_from(config.devices.passthrough.len()).unwrap_or(u64::MAX);
            TYPE1_RECORDS.saturating_mul(groups)
        }
    };
    (guest / HOST_TABLE_SHARE).saturating_add(records)
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
