//! Arguments and notes for exported devices.

use super::places::has_bus;
use super::vfio_user;
use crate::config::{Config, Exported};
use crate::topology::PciAddress;

/// The arguments for the devices whose bus is known.
pub(super) fn arguments(config: &Config) -> impl Iterator<Item = (&'static str, String)> {
    let placed = config
        .devices
        .exported
        .iter()
        .filter(|e| has_bus(config, e.endpoint));
    placed.map(|export| ("-device", argument(config, export)))
}

/// The note for an endpoint with an exported device.
pub(super) fn endpoint_note(config: &Config, endpoint: PciAddress) -> Option<String> {
    let export = config.devices.exported_at(endpoint)?;
    let device = config
        .devices
        .passthrough
        .iter()
        .find(|device| device.endpoint == endpoint)?;
    let host = device.host;
    Some(if has_bus(config, endpoint) {
        format!(
            "the host's device {host}, which the daemon exports, among the arguments; start the \
             daemon first"
        )
    } else if endpoint.segment() != 0 {
        format!(
            "the host's device {host}, but QEMU's machine has segment 0 only, so QEMU can put no device there"
        )
    } else {
        format!(
            "the host's device {host}, which the daemon exports; add `-device '{}'` with the bus= \
             of the bridge that the guest numbers as bus {:02x}",
            argument(config, export),
            endpoint.bus()
        )
    })
}

fn argument(config: &Config, export: &Exported) -> String {
    vfio_user::argument(config, export.endpoint, &export.path)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;
    use crate::qemu::args::{QemuArgs, QemuArgsError, shell_line};

    fn made(text: &str) -> Result<QemuArgs, QemuArgsError> {
        let text = format!("socket = '/s'\nmemory = '1G'\naddress = '00:05.0'\n{text}");
        let config = Config::from_text(Path::new("vm.toml"), &text).expect("good");
        QemuArgs::new(&config, Path::new("t"))
    }

    fn one(address: &str, host: &str, export: &str) -> String {
        let export = match export {
            "" => String::new(),
            path => format!("export = '{path}'\n"),
        };
        format!("[[endpoint]]\naddress = '{address}'\nvfio = '{host}'\n{export}")
    }

    const TYPE1: &str = "host-iommu = 'type1'\n";

    #[test]
    fn exported_devices_get_no_vfio_arguments() {
        let text = one("00:06.0", "65:00.0", "/run/a")
            + &one("00:06.1", "65:00.1", "/run/b")
            + &one("01:00.0", "66:00.0", "/run/c")
            + &one("0001:00:00.0", "67:00.0", "/run/d");
        for host_iommu in ["", TYPE1] {
            let made = made(&format!("{host_iommu}{text}")).expect("arguments");
            let line = made.arguments.join("\n");
            assert!(!line.contains("iommufd") && !line.contains("fd="), "{line}");
            let devices: Vec<_> = made
                .arguments
                .iter()
                .filter(|text| text.contains("vfio-user-pci"))
                .collect();
            assert_eq!(
                devices,
                [
                    r#"{"addr":"06.0","driver":"vfio-user-pci","id":"viommu-vfio-user-00-06-0","multifunction":true,"socket":{"path":"/run/a","type":"unix"}}"#,
                    r#"{"addr":"06.1","driver":"vfio-user-pci","id":"viommu-vfio-user-00-06-1","multifunction":true,"socket":{"path":"/run/b","type":"unix"}}"#,
                ]
            );
            let notes = made.notes.join("\n");
            assert!(!notes.contains("exec "), "{notes}");
            for part in [
                "endpoint 0000:00:06.0: the host's device 0000:65:00.0, which the daemon exports, \
                 among",
                "endpoint 0000:01:00.0: the host's device 0000:66:00.0, which the daemon exports; \
                 add `-device '{",
                "the guest numbers as bus 01",
                "the host's device 0000:67:00.0, but QEMU's machine has segment 0 only",
            ] {
                assert!(notes.contains(part), "{part} in {notes}");
            }
        }
    }

    #[test]
    fn exported_devices_get_no_descriptors() {
        let text = one("00:06.0", "65:00.0", "/run/a") + &one("00:07.0", "66:00.0", "");
        let made_both = made(&text).expect("arguments");
        let line = shell_line(&made_both.arguments);
        assert!(line.contains("iommufd,id=viommu-iommufd,fd=3"), "{line}");
        assert!(
            line.contains("vfio-pci,id=viommu-vfio-00-07-0,fd=4"),
            "{line}"
        );
        assert!(!line.contains("vfio-00-06-0,fd"), "{line}");
        let notes = made_both.notes.join("\n");
        assert!(notes.contains("devices/0000:66:00.0/vfio-dev"), "{notes}");
        assert!(!notes.contains("devices/0000:65:00.0/vfio-dev"), "{notes}");
        let refused = made(&format!("{TYPE1}{text}"));
        assert_eq!(
            refused.expect_err("QEMU keeps a device"),
            QemuArgsError::Type1
        );
    }
}
