//! Whether the host's IOMMU makes all DMA of an exported device snoop the caches. The daemon asks the kernel, for which the
//! device must be bound; sysfs says it before.

use super::Finding;
use crate::host::sysfs::HostRoot;
use crate::topology::HostAddress;

/// Snoop control: bit 7 (SC) of VT-d's extended capabilities. Linux enforces coherency only with it, whatever the mode of
/// the IOMMU. AMD-Vi needs no such capability, and other architectures do not ask for it.
const SNOOP_CONTROL: u64 = 1 << 7;

/// The finding if the IOMMU of the device at `address` has no snoop control. `None` if sysfs does not show it.
pub(super) fn finding(root: &HostRoot, address: HostAddress) -> Option<Finding> {
    let file = format!("sys/bus/pci/devices/{address}/iommu/intel-iommu/ecap");
    let capabilities = u64::from_str_radix(root.value(file)?.trim_start_matches("0x"), 16).ok()?;
    (capabilities & SNOOP_CONTROL == 0).then(|| {
        Finding::missing(
            format!(
                "the IOMMU of {address} has no snoop control, so the daemon does not export the device: its DMA could bypass \
                 the caches, and KVM, which does not know of exported devices, would not let the guest flush them"
            ),
            "remove `export`, so that the VMM opens the device and tells KVM, or use a host with snoop control",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sysfs::fake::FakeHost;

    #[test]
    fn a_host_without_snoop_control_is_reported_before_the_device_is_bound() {
        let host = FakeHost::new();
        let address = "0000:01:00.0".parse().expect("an address");
        assert_eq!(finding(&host.root(), address), None, "no VT-d");
        for (capabilities, is_reported) in
            [("f0207a\n", true), ("f020fa\n", false), ("odd\n", false)]
        {
            let file = "sys/bus/pci/devices/0000:01:00.0/iommu/intel-iommu/ecap";
            host.file(file, capabilities);
            let found = finding(&host.root(), address);
            assert_eq!(found.is_some(), is_reported, "{capabilities}");
        }
    }
}
