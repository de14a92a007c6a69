//! The rights that the sandbox must grant a daemon with a given configuration.

use std::path::{Path, PathBuf};

use crate::config::{Config, ConfiguredDevice, Socket, SocketAccess};
use crate::endpoints::kinds;
use crate::process::sandbox::{Needs, Plugging};

/// The system calls, ioctls and files that a daemon with this configuration needs while it serves.
pub fn needs(config: &Config) -> Needs {
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
    let can_plug = !config.topology.expected().is_empty();
    let mut needs = Needs {
        qmp: config.qmp.is_some(),
        realtime: config.realtime_priority.is_some(),
        socket_rights: config.socket_access != SocketAccess::default(),
        plugging: can_plug.then(Plugging::default),
        textfile_folder: config
            .metrics
            .textfile
            .as_ref()
            .map(|file| folder(&file.path)),
        socket_folders,
        ..Needs::default()
    };
    for kind in kinds::all() {
        kind.add_needs(config, &mut needs);
    }
    needs
}

/// The folder of a file. A bare name stands for a file in the working directory.
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
