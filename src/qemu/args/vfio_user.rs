//! The device argument of QEMU's vfio-user client.

use std::path::Path;

use serde_json::json;

use super::places::{bus, device_id, has_several_functions, slot};
use crate::config::Config;
use crate::topology::PciAddress;

/// A device at `endpoint` whose server listens at `socket`.
pub(super) fn argument(config: &Config, endpoint: PciAddress, socket: &Path) -> String {
    let mut argument = json!({
        "driver": "vfio-user-pci",
        "id": device_id(config, endpoint, "vfio-user"),

        "addr": slot(endpoint),
        "socket": { "type": "unix", "path": socket },
    });
    if has_several_functions(config, endpoint)
        && let Some(keys) = argument.as_object_mut()
    {
        keys.insert("multifunction".to_owned(), true.into());
    }
    if let Some(bus) = bus(config, endpoint)
        && let Some(keys) = argument.as_object_mut()
    {
        keys.insert("bus".to_owned(), bus.into());
    }
    argument.to_string()
}
