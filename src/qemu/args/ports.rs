//! Arguments for ports.

use super::VmmOptionError;
use super::places::{ROOT_BUS, bus_number, has_several_functions, port_id, slot};
use crate::config::Config;
use crate::topology::{Port, PortKind, Ports};

/// Devices of QEMU behind which firmware numbers a bus.
const BRIDGES: [&str; 11] = [
    "cxl-downstream",
    "cxl-rp",
    "cxl-upstream",
    "i82801b11-bridge",
    "ioh3420",
    "pci-bridge",
    "pci-bridge-seat",
    "pcie-pci-bridge",
    "pcie-root-port",
    "x3130-upstream",
    "xio3130-downstream",
];

/// The arguments for the ports, each after the one behind which it is.
pub(super) fn arguments(config: &Config) -> impl Iterator<Item = (&'static str, String)> {
    let ports = config.ports.iter();
    ports.map(|port| ("-device", argument(config, port)))
}

/// The argument for one port.
pub(super) fn argument(config: &Config, port: &Port) -> String {
    let driver = match port.kind {
        PortKind::RootPort => "pcie-root-port",
        PortKind::UpstreamPort => "x3130-upstream",
        PortKind::DownstreamPort => "xio3130-downstream",
        PortKind::PciBridge => "pcie-pci-bridge",
    };
    let bus = match port.path.parent() {
        None => ROOT_BUS.to_owned(),
        Some(parent) => port_id(&parent),
    };
    let mut text = format!(
        "{driver},id={},bus={bus},addr={}",
        port_id(&port.path),
        slot(port.address)
    );
    if has_several_functions(config, port.address) {
        text.push_str(",multifunction=on");
    }
    if port.kind.is_link() {
        // QEMU wants a different pair of numbers for each port. The bus has such a number.
        text.push_str(&format!(",chassis={0},slot={0}", port.bus));
    }
    if port.reserved_buses > 0 {
        text.push_str(&format!(",bus-reserve={}", port.reserved_buses));
    }
    if let Some(speed) = port.link.speed {
        text.push_str(&format!(",x-speed={speed}"));
    }
    if let Some(width) = port.link.width {
        text.push_str(&format!(",x-width={width}"));
    }
    text
}

/// Refuses a bridge of the operator beside declared ports: it would take one of their numbers.
///
/// # Errors
/// `driver` on the bus `bus` is such a bridge.
pub(super) fn check_bridge(
    ports: &Ports,
    driver: Option<&str>,
    bus: Option<&str>,
) -> Result<(), VmmOptionError> {
    match driver {
        Some(driver)
            if !ports.is_empty()
                && BRIDGES.contains(&driver)
                && bus_number(ports, bus).is_some() =>
        {
            Err(VmmOptionError::UndeclaredPort {
                driver: driver.to_owned(),
            })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::path::Path;

    use super::*;
    use crate::qemu::args::QemuArgs;

    const FILE: &str = "socket = '/s'\nmemory = '1G'\naddress = '00:05.0'\n\
         [[port]]\naddress = '00:03.0'\nhotplug = true\nreserve-buses = 2\n\
         [[port]]\naddress = '00:02.1'\nspeed = 32\nwidth = 16\n\
         [[port]]\naddress = '00:1c.0/00.0'\nkind = 'pcie-pci-bridge'\n\
         [[endpoint]]\nport = '00:02.0'\nvfio = '65:00.0'\n\
         [[endpoint]]\nport = '00:02.1'\naddress = '00.1'\nvfio = '66:00.1'\nexport = '/e'\n\
         [[endpoint]]\nport = '00:02.1'\nvfio-user = { listen = '/l', connect = '/k' }\n\
         [[endpoint]]\nport = '00:04.0/00.0/01.0'\n\
         [[endpoint]]\nport = '00:1c.0/00.0'\nrange = '01.0-02.7'\n";

    fn config() -> Config {
        Config::from_text(Path::new("vm.toml"), &(FILE.to_owned() + DOWNSTREAM)).expect("good")
    }

    /// Function 0 of the slots of the others.
    const DOWNSTREAM: &str = "[[port]]\naddress = '00:04.0/00.0/00.0'\n";

    #[test]
    fn ports_come_before_their_devices() {
        let made = QemuArgs::new(&config(), Path::new("t")).expect("arguments");
        let devices: Vec<_> = made
            .arguments
            .iter()
            .filter(|text| text.contains("port-") && text.contains("addr"))
            .map(String::as_str)
            .collect();
        assert_eq!(
            devices,
            [
                "pcie-root-port,id=viommu-port-02-0,bus=pcie.0,addr=02.0,multifunction=on,chassis=1,slot=1",
                "pcie-root-port,id=viommu-port-02-1,bus=pcie.0,addr=02.1,multifunction=on,chassis=2,slot=2,\
                 x-speed=32,x-width=16",
                "pcie-root-port,id=viommu-port-03-0,bus=pcie.0,addr=03.0,chassis=3,slot=3,bus-reserve=2",
                "pcie-root-port,id=viommu-port-04-0,bus=pcie.0,addr=04.0,chassis=6,slot=6",
                "x3130-upstream,id=viommu-port-04-0-00-0,bus=viommu-port-04-0,addr=00.0",
                "xio3130-downstream,id=viommu-port-04-0-00-0-00-0,bus=viommu-port-04-0-00-0,addr=00.0,\
                 chassis=8,slot=8",
                "xio3130-downstream,id=viommu-port-04-0-00-0-01-0,bus=viommu-port-04-0-00-0,addr=01.0,\
                 chassis=9,slot=9",
                "pcie-root-port,id=viommu-port-1c-0,bus=pcie.0,addr=1c.0,chassis=10,slot=10",
                "pcie-pci-bridge,id=viommu-port-1c-0-00-0,bus=viommu-port-1c-0,addr=00.0",
                "vfio-pci,id=viommu-vfio-01-00-0,fd=4,iommufd=viommu-iommufd,bus=viommu-port-02-0,addr=00.0",
                r#"{"addr":"00.1","bus":"viommu-port-02-1","driver":"vfio-user-pci","id":"viommu-vfio-user-02-00-1","multifunction":true,"socket":{"path":"/e","type":"unix"}}"#,
                r#"{"addr":"00.0","bus":"viommu-port-02-1","driver":"vfio-user-pci","id":"viommu-vfio-user-02-00-0","multifunction":true,"socket":{"path":"/l","type":"unix"}}"#,
            ]
        );
        let notes = made.notes.join("\n");
        for part in [
            "endpoint 0000:01:00.0: the host's device 0000:65:00.0, among the arguments",
            "endpoint 0000:02:00.1: the host's device 0000:66:00.1, which the daemon exports, among",
            "endpoint 0000:02:00.0: the device at /k, among the arguments",
            "endpoint 0000:09:00.0: give its device bus=viommu-port-04-0-00-0-01-0,addr=00.0",
            "endpoint 0000:0b:00.0: the bridge there gives this ID",
            "endpoint 0000:0b:01.0-0000:0b:02.7: give devices bus=viommu-port-1c-0-00-0 and addr=01.0 to",
        ] {
            assert!(notes.contains(part), "{part} in {notes}");
        }
    }

    #[test]
    fn launch_knows_the_devices_behind_ports() {
        let made = |line: &str| {
            let others: Vec<_> = line.split_whitespace().map(OsString::from).collect();
            QemuArgs::appended_to(&config(), Path::new("t"), &others)
        };
        let notes = made("").expect("arguments").notes.join("\n");
        assert!(notes.contains("no argument gives this endpoint a device; endpoint 0000:09:00.0"));
        let line = "-device nvme,bus=viommu-port-04-0-00-0-01-0,addr=00.0 \
                    -device edu,bus=viommu-port-1c-0-00-0,addr=1.0";
        assert_eq!(made(line).expect("arguments").notes, [""; 0]);
        // A function that the guest would not find.
        let line = "-device nvme,bus=viommu-port-1c-0-00-0,addr=2.1";
        let error = made(line).expect_err("function 0 is missing").to_string();
        assert!(error.contains("no device is at 0000:0b:02.0"), "{error}");
        for line in [
            "-device pcie-root-port,id=mine,addr=10.0,chassis=99",
            "-device pcie-pci-bridge,bus=viommu-port-03-0",
            "-device {\"driver\":\"pci-bridge\",\"bus\":\"pcie.0\"}",
        ] {
            let error = made(line).expect_err(line).to_string();
            assert!(error.contains("would take a bus number"), "{error}");
        }
        // Behind another host bridge the numbers are apart.
        let line =
            "-device pxb-pcie,id=other,bus_nr=128 -device pcie-root-port,bus=other,chassis=99";
        assert!(made(line).is_ok());
    }
}
