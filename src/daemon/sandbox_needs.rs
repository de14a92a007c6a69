//! What a configuration asks of the sandbox.

use std::path::{Path, PathBuf};

use crate::config::{Config, ConfiguredDevice, Socket};
use crate::process::sandbox::{Needs, Plugging};
use crate::vfio::{ioctls_of_backends, ioctls_of_exports, ioctls_of_opening};

/// What the daemon with this configuration does once it serves.
pub fn needs(config: &Config) -> Needs {
    let of = |wanted: bool, numbers: fn() -> Vec<u32>| {
        if wanted { numbers() } else { Vec::new() }
    };
    let socket = match &config.socket {
        Some(Socket::Path(path)) => Some(path),
        Some(Socket::Fd(_)) | None => None,
    };
    let mut socket_folders: Vec<_> = socket
        .into_iter()
        .chain(&config.control)
        .chain(
            config
                .devices
                .iter()
                .filter_map(ConfiguredDevice::listens_at),
        )
        .chain(&config.metrics.socket)
        .map(|path| folder(path))
        .collect();
    socket_folders.sort_unstable();
    socket_folders.dedup();
    // What may come counts as what is there.
    let hotplug = !config.topology.expected().is_empty();
    Needs {
        iommu_ioctls: of(
            hotplug || !config.devices.passthrough.is_empty(),
            ioctls_of_backends,
        ),
        device_ioctls: of(
            hotplug || !config.devices.exported.is_empty(),
            ioctls_of_exports,
        ),
        qmp: config.qmp.is_some(),
        emulated: hotplug || !config.devices.emulated.is_empty(),
        realtime: config.realtime_priority.is_some(),
        shadow: !config.devices.shadow.is_empty(),
        plugging: hotplug.then(|| Plugging {
            ioctls: ioctls_of_opening(),
            nodes: ["/dev/vfio", "/dev/iommu"].map(Into::into).into(),
            facts: vec!["/sys".into()],
        }),
        textfile_folder: config
            .metrics
            .textfile
            .as_ref()
            .map(|file| folder(&file.path)),
        socket_folders,
    }
}

/// Where a file is; a bare name is of one in the folder that the daemon is in.
fn folder(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        Some(_) | None => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs_of(text: &str) -> Needs {
        needs(&Config::from_text(Path::new("vm.toml"), text).expect("a configuration"))
    }

    const PLAIN: &str = "socket = \"/run/vm/iommu.sock\"\ncontrol = \"ctl.sock\"\n\
                         address = \"00:05.0\"\n";

    #[test]
    fn only_what_is_configured_is_needed() {
        let plain = needs_of(&format!("{PLAIN}[[endpoint]]\naddress = \"00:06.0\"\n"));
        assert_eq!(
            plain,
            Needs {
                socket_folders: vec![PathBuf::from("/run/vm"), PathBuf::from(".")],
                ..Needs::default()
            }
        );
        let plugging = needs_of(&format!("{PLAIN}hotplug = [\"01:00.0-01:1f.7\"]\n"));
        assert!(plugging.plugging.is_some() && plugging.emulated);
        assert!(!plugging.iommu_ioctls.is_empty() && !plugging.device_ioctls.is_empty());
        let shadow = "[[endpoint]]\naddress = \"00:06.0\"\nshadow = \"/run/readers/r.sock\"\n";
        let shadow = needs_of(&format!("{PLAIN}{shadow}"));
        assert!(shadow.shadow && !shadow.emulated && shadow.iommu_ioctls.is_empty());
        assert!(
            shadow
                .socket_folders
                .contains(&PathBuf::from("/run/readers"))
        );
    }
}
