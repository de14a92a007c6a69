//! The device argument of QEMU's vfio-user client.

use std::path::Path;

use serde_json::json;

use super::PREFIX;
use super::places::{has_several_functions, slot};
use crate::config::Config;
use crate::topology::PciAddress;

/// A device at `endpoint` whose server listens at `socket`.
pub(super) fn argument(config: &Config, endpoint: PciAddress, socket: &Path) -> String {
    let (bus, number, function) = (endpoint.bus(), endpoint.device(), endpoint.function());
    let mut argument = json!({
        "driver": "vfio-user-pci",
        "id": format!("{PREFIX}vfio-user-{bus:02x}-{number:02x}-{function}"),
        "addr": slot(endpoint),
        "socket": { "type": "unix", "path": socket },
    });
    if has_several_functions(config, endpoint)
        && let Some(keys) = argument.as_object_mut()
    {
        keys.insert("multifunction".to_owned(), true.into());
    }
    argument.to_string()
}
