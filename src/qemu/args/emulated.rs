//! Arguments and notes for emulated devices.

use super::places::has_bus;
use super::vfio_user;
use crate::config::{Config, Emulated};
use crate::topology::PciAddress;

/// The arguments for the devices whose bus is known.
pub(super) fn arguments(config: &Config) -> impl Iterator<Item = (&'static str, String)> {
    let placed = config
        .devices
        .emulated
        .iter()
        .filter(|d| has_bus(config, d.endpoint));
    placed.map(|device| ("-device", argument(config, device)))
}

/// The note for an endpoint with an emulated device.
pub(super) fn endpoint_note(config: &Config, endpoint: PciAddress) -> Option<String> {
    let device = config
        .devices
        .emulated
        .iter()
        .find(|d| d.endpoint == endpoint)?;
    let server = device.connect.display();
    Some(if has_bus(config, endpoint) {
        format!(
            "the device at {server}, among the arguments; start the daemon and that server first"
        )
    } else if endpoint.segment() != 0 {
        format!(
            "the device at {server}, but QEMU's machine has segment 0 only, so QEMU can put no device there"
        )
    } else {
        format!(
            "the device at {server}; add `-device '{}'` with the bus= of the bridge that the guest \
             numbers as bus {:02x}",
            argument(config, device),
            endpoint.bus()
        )
    })
}

fn argument(config: &Config, device: &Emulated) -> String {
    vfio_user::argument(config, device.endpoint, &device.listen)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;
    use crate::qemu::args::QemuArgs;

    #[test]
    fn qemu_connects_to_the_daemon_and_not_to_the_server() {
        let text = "socket = '/s'\nmemory = '1G'\naddress = '00:05.0'\n\
             [[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = '/run/a \"b\"', connect = '/run/c' }\n\
             [[endpoint]]\naddress = '01:00.0'\n\
             vfio-user = { listen = '/run/d', connect = '/run/e' }\n\
             [[endpoint]]\naddress = '0001:00:00.0'\n\
             vfio-user = { listen = '/run/f', connect = '/run/g' }\n";
        let config = Config::from_text(Path::new("vm.toml"), text).expect("good");
        let made = QemuArgs::new(&config, Path::new("t")).expect("arguments");
        let devices: Vec<_> = made
            .arguments
            .iter()
            .filter(|text| text.contains("vfio-user"))
            .collect();
        assert_eq!(
            devices,
            [
                r#"{"addr":"06.0","driver":"vfio-user-pci","id":"viommu-vfio-user-00-06-0","socket":{"path":"/run/a \"b\"","type":"unix"}}"#
            ]
        );
        let notes = made.notes.join("\n");
        for part in [
            "endpoint 0000:00:06.0: the device at /run/c, among the arguments",
            "endpoint 0000:01:00.0: the device at /run/e; add `-device '{",
            "the guest numbers as bus 01",
            "the device at /run/g, but QEMU's machine has segment 0 only",
        ] {
            assert!(notes.contains(part), "{part} in {notes}");
        }
    }
}
