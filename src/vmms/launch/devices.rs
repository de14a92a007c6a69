//! Opens passthrough devices once for the daemon and the VMM.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{Config, Descriptors, Passthrough};
use crate::host::sysfs::{HostFacts, HostRoot};
use crate::topology::{HostAddress, PciAddress};

/// Open files of the host's IOMMU and devices.
#[derive(Debug, Default)]
pub struct OpenFiles {
    iommufd: Option<File>,
    /// By the address of the endpoint.
    devices: BTreeMap<PciAddress, File>,
}

impl OpenFiles {
    /// Opens `/dev/iommu` and each device that the VMM binds: `vfio` without `export`. Opens nothing if
    /// there is none; the daemon opens exported devices itself. Started programs do not inherit the
    /// files, unless they are passed on.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(root: &HostRoot, config: &Config) -> Result<Self, OpenError> {
        let mut files = Self::default();
        let devices = config.devices.passthrough.iter();
        let shared: Vec<_> = devices
            .filter(|device| config.devices.exported_at(device.endpoint).is_none())
            .collect();
        if shared.is_empty() {
            return Ok(files);
        }
        let path = root.path("dev/iommu");
        let iommufd = open(&path).map_err(|source| OpenError::Iommufd { path, source })?;
        files.iommufd = Some(iommufd);
        let facts = HostFacts::read(root, shared.iter().map(|device| device.host));
        for &Passthrough { endpoint, host, .. } in shared {
            let device = facts
                .device(host)
                .ok_or(OpenError::NoSuchDevice { endpoint, host })?;
            let path = device
                .node(root)
                .ok_or(OpenError::NotBound { endpoint, host })?;
            let file = open(&path).map_err(|source| OpenError::Device {
                endpoint,
                host,
                path,
                source,
            })?;
            files.devices.insert(endpoint, file);
        }
        Ok(files)
    }

    /// The descriptors by endpoint, valid while the files are open.
    pub fn descriptors(&self) -> Descriptors {
        Descriptors {
            iommufd: self.iommufd.as_ref().map(AsRawFd::as_raw_fd),
            devices: self
                .devices
                .iter()
                .map(|(endpoint, file)| (*endpoint, file.as_raw_fd()))
                .collect(),
            containers: BTreeMap::new(),
        }
    }

    /// The numbers of all descriptors.
    pub fn numbers(&self) -> Vec<RawFd> {
        self.iommufd
            .iter()
            .chain(self.devices.values())
            .map(AsRawFd::as_raw_fd)
            .collect()
    }
}

/// A file of the host that cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// `/dev/iommu` cannot be opened.
    #[error(
        "cannot open {path}: {source}; `vhost-device-iommu check` with the configuration lists what \
         this host lacks"
    )]
    Iommufd {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The host has no such device.
    #[error(
        "the host has no PCI device {host}, which endpoint {endpoint} names; \
         give an address that `lspci -D` prints"
    )]
    NoSuchDevice {
        /// The address in the guest.
        endpoint: PciAddress,
        /// The address on the host.
        host: HostAddress,
    },
    /// VFIO has no node for the device.
    #[error(
        "the host's device {host} (endpoint {endpoint}) has no VFIO node: it is not bound to \
         vfio-pci, or the kernel lacks CONFIG_VFIO_DEVICE_CDEV; `vhost-device-iommu check` with the \
         configuration names the reason and the cure"
    )]
    NotBound {
        /// The address in the guest.
        endpoint: PciAddress,
        /// The address on the host.
        host: HostAddress,
    },
    /// A device's node cannot be opened.
    #[error(
        "cannot open {path}, the host's device {host} (endpoint {endpoint}): {source}; \
         `vhost-device-iommu check` with the configuration lists what is missing"
    )]
    Device {
        /// The address in the guest.
        endpoint: PciAddress,
        /// The address on the host.
        host: HostAddress,
        /// The node.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    const TEXT: &str = "address = '00:05.0'\n\
         [[endpoint]]\naddress = '00:10.0'\nvfio = '65:00.0'\n\
         [[endpoint]]\naddress = '00:11.0'\nvfio = '66:00.0'\n";

    fn host(files: &[&str]) -> TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for name in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, "").expect("written");
        }
        root
    }

    fn opened(root: &TempDir, text: &str) -> Result<OpenFiles, String> {
        let config = Config::from_text(Path::new("vm.toml"), text).expect("good");
        let host = HostRoot::new(root.path());
        OpenFiles::open(&host, &config).map_err(|error| error.to_string())
    }

    #[test]
    fn each_device_is_found_by_its_node() {
        let root = host(&[
            "dev/iommu",
            "dev/vfio/devices/vfio7",
            "dev/vfio/devices/vfio12",
            "sys/bus/pci/devices/0000:65:00.0/vfio-dev/vfio12/dev",
            "sys/bus/pci/devices/0000:66:00.0/vfio-dev/vfio7/dev",
            "sys/bus/pci/devices/0000:66:00.0/vfio-dev/power",
        ]);
        let files = opened(&root, TEXT).expect("all are there");
        let descriptors = files.descriptors();
        let target = |fd: Option<RawFd>| {
            let link = format!("/proc/self/fd/{}", fd.expect("open"));
            let target = fs::read_link(link).expect("a link");
            let inside = target.strip_prefix(root.path()).expect("below the root");
            inside.display().to_string()
        };
        let device = |text: &str| {
            let endpoint = text.parse().expect("an address");
            target(descriptors.devices.get(&endpoint).copied())
        };
        assert_eq!(target(descriptors.iommufd), "dev/iommu");
        assert_eq!(device("00:10.0"), "dev/vfio/devices/vfio12");
        assert_eq!(device("00:11.0"), "dev/vfio/devices/vfio7");
        assert_eq!(files.numbers().len(), 3);
    }

    #[test]
    fn exported_devices_are_not_opened() {
        let exported = TEXT.replacen("vfio = '65:00.0'", "vfio = '65:00.0'\nexport = '/e'", 1);
        let root = host(&[
            "dev/iommu",
            "dev/vfio/devices/vfio7",
            "sys/bus/pci/devices/0000:66:00.0/vfio-dev/vfio7/dev",
        ]);
        let files = opened(&root, &exported).expect("the other one is there");
        let devices = files.descriptors().devices;
        let endpoints: Vec<_> = devices.keys().map(ToString::to_string).collect();
        assert_eq!(endpoints, ["0000:00:11.0"]);
        let all = exported.replace("vfio = '66:00.0'", "vfio = '66:00.0'\nexport = '/f'");
        let files = opened(&host(&[]), &all).expect("nothing is needed");
        assert_eq!(files.descriptors(), Descriptors::default());
    }

    #[test]
    fn nothing_is_opened_for_a_vm_without_devices_of_the_host() {
        let files = opened(&host(&[]), "address = '00:05.0'").expect("nothing is needed");
        assert_eq!(files.descriptors(), Descriptors::default());
    }

    #[test]
    fn missing_files_are_named_with_a_cure() {
        let (first, second) = (
            "sys/bus/pci/devices/0000:65:00.0/vfio-dev/vfio0/dev",
            "sys/bus/pci/devices/0000:66:00.0",
        );
        let odd = format!("{second}/vfio-dev/vfio");
        let odder = format!("{second}/vfio-dev/vfio1..");
        let config = format!("{second}/config");
        let node = format!("{second}/vfio-dev/vfio1/dev");
        let whole = ["dev/iommu", "dev/vfio/devices/vfio0", first];
        for (files, parts) in [
            (&[][..], &["dev/iommu: ", "check"][..]),
            (&["dev/iommu"], &["no PCI device 0000:65:00.0", "lspci -D"]),
            (&whole, &["no PCI device 0000:66:00.0", "0000:00:11.0"]),
            (
                &[&whole[..], &[config.as_str()]].concat(),
                &["0000:66:00.0", "not bound to vfio-pci", "check"],
            ),
            (
                &[&whole[..], &[odd.as_str(), odder.as_str()]].concat(),
                &["0000:66:00.0", "not bound to vfio-pci"],
            ),
            (
                &[&whole[..], &[node.as_str()]].concat(),
                &[
                    "dev/vfio/devices/vfio1, ",
                    "0000:66:00.0",
                    "No such file",
                    "check",
                ],
            ),
        ] {
            let message = opened(&host(files), TEXT).expect_err("something is missing");
            for part in parts {
                assert!(message.contains(part), "{files:?}: {part} in {message}");
            }
        }
    }
}
