//! Which devices a daemon may ask for: those of its own VM's file.
//!
//! All daemons run as one user, so the user says nothing about the VM. The control group does: systemd puts each service
//! into its own, and only root can move a process to another one. A user's own service manager makes control groups with
//! names of the user's choice, so every folder above the service's must be a slice: these are root's.

use std::path::{Path, PathBuf};

use super::AdoptError;
use super::peer::PeerProcess;
use crate::config::{Config, VfioFrom};
use crate::topology::HostAddress;

/// The service of a daemon, without the name of its instance.
const SERVICE: &str = "vhost-device-iommu@";

/// How the file of a daemon's VM is found.
#[derive(Clone, Debug)]
pub enum Policy {
    /// Whoever may connect to the helper's socket is the daemon of this file.
    OneFile(PathBuf),
    /// The daemon of this file is the service whose instance has the name of the file.
    OneService(PathBuf),
}

impl Policy {
    /// The file of the VM of the daemon `asker`.
    pub(super) fn file(&self, asker: &PeerProcess) -> Result<PathBuf, AdoptError> {
        match self {
            Self::OneFile(file) => Ok(file.clone()),
            Self::OneService(file) => {
                let group = asker.control_group()?;
                let vm = file.file_stem().unwrap_or_default().to_string_lossy();
                if instance_of(&group) != Some(&*vm) {
                    let service = format!("{SERVICE}{vm}.service");
                    return Err(AdoptError::Stranger { group, service });
                }
                Ok(file.clone())
            }
        }
    }
}

/// Refuses devices that the VM's file does not let its VMM and its daemon share.
pub(super) fn check_named(file: &Path, wanted: &[HostAddress]) -> Result<(), AdoptError> {
    let config = Config::from_file(file)?;
    // Another VM's file may name the same device for `launch`. With this key the file exports none, and uses iommufd.
    if config.vfio_from != VfioFrom::Vmm {
        return Err(AdoptError::NotFromVmm(file.to_owned()));
    }
    let is_shared = |host: HostAddress| {
        let mut devices = config.devices.passthrough.iter();
        devices.any(|device| device.host == host)
    };
    match wanted.iter().find(|host| !is_shared(**host)) {
        None => Ok(()),
        Some(&host) => Err(AdoptError::NotNamed {
            host,
            file: file.to_owned(),
        }),
    }
}

/// The instance of the daemon's service in a control group's path.
fn instance_of(group: &str) -> Option<&str> {
    let (folders, service) = group.strip_prefix('/')?.rsplit_once('/')?;
    let are_slices = folders.split('/').all(|folder| folder.ends_with(".slice"));
    let name = service.strip_prefix(SERVICE)?.strip_suffix(".service")?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (are_slices && !name.is_empty() && name.chars().all(is_plain)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_services_of_the_host_have_an_instance() {
        for (group, name) in [
            ("/viommu.slice/vhost-device-iommu@vm1.service", Some("vm1")),
            (
                "/system.slice/system-x.slice/vhost-device-iommu@a-b_c.0.service",
                Some("a-b_c.0"),
            ),
            // A user's own service manager.
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/vhost-device-iommu@vm1.service",
                None,
            ),
            (
                "/machine.slice/c.scope/viommu.slice/vhost-device-iommu@vm1.service",
                None,
            ),
            // Below the service, and without a slice.
            ("/viommu.slice/vhost-device-iommu@vm1.service/x", None),
            ("/vhost-device-iommu@vm1.service", None),
            ("/viommu.slice/vhost-device-iommu@.service", None),
            ("/viommu.slice/vhost-device-iommu@..\\x2fx.service", None),
            ("/viommu.slice/vhost-device-iommu-adopt@vm1.service", None),
            ("/viommu.slice/qemu@vm1.service", None),
            ("/", None),
            ("", None),
        ] {
            assert_eq!(instance_of(group), name, "{group}");
        }
    }
}
