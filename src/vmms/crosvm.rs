//! crosvm's arguments for a configuration.

use std::path::Path;

use super::{VmmArgs, VmmArgsError, check_guest, socket};
use crate::config::{Config, DeviceKind, VmmTransport};
use crate::host::sysfs::HostRoot;

/// The arguments of `crosvm run` for a VM with `config`, whose VIOT table is at `viot`.
///
/// # Errors
///
/// The configuration lacks a setting that the VMM needs, or has one that it cannot have.
pub fn arguments(config: &Config, viot: &Path, host: &HostRoot) -> Result<VmmArgs, VmmArgsError> {
    check_guest(config, host)?;
    let socket = socket(config, VmmTransport::VhostUser)?;
    let memory = config.memory.ok_or(VmmArgsError::NoMemorySize)?;
    let unusable = |kind| kind != DeviceKind::ShadowReader;
    let mut devices = config.devices.iter();
    if let Some(device) = devices.find(|device| unusable(device.kind())) {
        let endpoint = device.endpoint();
        return Err(VmmArgsError::NotForCrosvm { endpoint });
    }
    let iommu = config.topology.iommu();
    let slot = format!(
        "{:02x}:{:02x}.{:x}",
        iommu.bus(),
        iommu.device(),
        iommu.function()
    );
    let viot = viot.to_str().ok_or_else(|| VmmArgsError::UnusablePath {
        path: viot.to_owned(),
    })?;
    let arguments = vec![
        "--mem".to_owned(),
        format!("size={}", memory >> 20),
        "--vhost-user".to_owned(),
        format!("type=iommu,socket={socket},max-queue-size=256,pci-address={slot}"),
        "--acpi-table".to_owned(),
        viot.to_owned(),
    ];
    let mut notes = vec![
        format!("the VIOT table is expected at {viot}; `vhost-device-iommu viot` writes it"),
        "if the daemon ends, crosvm ends its VM".to_owned(),
    ];
    notes.extend(config.topology.ranges().map(|entry| {
        format!(
            "endpoint {}: give the device of another process pci-address= of this address; the daemon cannot \
             translate for devices inside crosvm",
            entry.range
        )
    }));
    Ok(VmmArgs { arguments, notes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sysfs::fake::FakeHost;

    #[test]
    fn crosvm_gets_the_device_and_the_table() {
        let text = "socket = '/run/i'\nmemory = '1G'\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\n";
        let config = Config::from_text(Path::new("vm.toml"), text).expect("good");
        let made = arguments(
            &config,
            Path::new("vm.viot"),
            &HostRoot::new("/nonexistent"),
        );
        let made = made.expect("arguments");
        assert_eq!(
            made.arguments,
            [
                "--mem",
                "size=1024",
                "--vhost-user",
                "type=iommu,socket=/run/i,max-queue-size=256,pci-address=00:05.0",
                "--acpi-table",
                "vm.viot",
            ]
        );
    }

    /// The guest would get an IOMMU that no table describes.
    #[test]
    fn guests_that_could_not_learn_their_endpoints_are_refused() {
        let text = "socket = '/run/i'\nmemory = '1G'\naddress = '00:05.0'\n";
        let made = |text: &str, host: &FakeHost| {
            let config = Config::from_text(Path::new("vm.toml"), text).expect("good");
            arguments(&config, Path::new("vm.viot"), &host.root()).map(|_| ())
        };
        let host = FakeHost::new();
        host.file("proc/sys/kernel/arch", "x86_64\n");
        assert_eq!(made(text, &host), Ok(()));
        let of_qemu = format!("machine = 'virt'\n{text}");
        assert_eq!(made(&of_qemu, &host), Err(VmmArgsError::MachineOfQemu));
        host.file("proc/sys/kernel/arch", "aarch64\n");
        assert_eq!(made(text, &host), Err(VmmArgsError::ArmHost));
    }
}
