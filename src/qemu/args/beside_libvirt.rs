//! The arguments that libvirt has no elements for.

use super::{
    QemuArgsError, check_buses, iommu_device, monitor, ports, slot_problems, socket_path,
    vfio_user_devices, words,
};
use crate::config::Config;
use crate::topology::Port;

/// The arguments for a VM of libvirt: the IOMMU, the devices that QEMU reaches over vfio-user, the ports for which
/// `is_wanted`, and the monitor. The rest of [`QemuArgs`](super::QemuArgs) is for the domain's elements to say: the machine,
/// its memory, sleep states, the table, and devices that QEMU opens itself.
///
/// # Errors
/// As for [`QemuArgs::new`](super::QemuArgs::new), and where no argument can put a device at its endpoint's address.
pub fn beside_libvirt(
    config: &Config,
    is_wanted: impl Fn(&Port) -> bool,
) -> Result<Vec<String>, QemuArgsError> {
    let socket = socket_path(config)?;
    slot_problems(config)?;
    check_buses(config)?;
    let wanted = config.ports.iter().filter(|port| is_wanted(port));
    let mut arguments: Vec<_> = wanted
        .map(|port| ("-device", ports::argument(config, port)))
        .collect();
    arguments.extend(iommu_device(config, socket)?);
    arguments.extend(vfio_user_devices(config));
    arguments.extend(monitor(config)?);
    Ok(words(arguments))
}
