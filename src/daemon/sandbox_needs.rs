//! The rights that the sandbox must grant a daemon with a given configuration.

use std::path::{Path, PathBuf};

use crate::config::{Config, ConfiguredDevice, Socket, SocketAccess, VmmTransport};
use crate::endpoints::kinds;
use crate::process::connector::ReachableSockets;
use crate::process::sandbox::{self, Needs, Plugging};

/// The system calls, ioctls and files that a daemon with this configuration needs while it serves. `is_kept`: another process
/// keeps its descriptors.
pub fn needs(config: &Config, is_kept: bool) -> Needs {
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
        relay: (is_kept || config.takes_vmm_files()) && config.transport == VmmTransport::VhostUser,
        vmm_devices: config.takes_vmm_files(),
        kept_clients: is_kept,
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

/// The sockets to which the threads of a daemon with this configuration may connect while it serves. With `hotplug` they
/// are all sockets in the folders in which the file has the sockets of endpoints and of the daemon: endpoints that are
/// added later have theirs there.
pub fn reachable_sockets(config: &Config) -> ReachableSockets {
    let servers = || config.devices.emulated.iter().map(|device| &device.connect);
    let helper = config.takes_vmm_files().then_some(&config.vfio_helper);
    let mut folders = Vec::new();
    if !config.topology.expected().is_empty() {
        folders = needs(config, false).socket_folders;
        folders.extend(servers().map(|path| folder(path)));
        folders.sort_unstable();
        folders.dedup();
    }
    ReachableSockets {
        paths: servers()
            .chain(&config.qmp)
            .chain(helper)
            .cloned()
            .collect(),
        folders,
    }
}

/// Whether a daemon with this configuration may make a socket at `path` while it serves: in the folders to which the sandbox
/// limits it, or below them. Always without a sandbox.
pub fn may_listen(config: &Config, path: &Path) -> bool {
    if !sandbox::is_armed() {
        return true;
    }
    let real = |folder: &Path| folder.canonicalize().ok();
    let Some(wanted) = real(&folder(path)) else {
        return false;
    };
    let folders = needs(config, true).socket_folders;
    let mut folders = folders.iter().filter_map(|folder| real(folder));
    folders.any(|folder| wanted.starts_with(folder))
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
        let config = Config::from_text(Path::new("vm.toml"), text);
        needs(&config.expect("a configuration"), false)
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

    #[test]
    fn only_configured_sockets_are_connected_to_and_with_hotplug_their_neighbours() {
        let file = "address = \"00:05.0\"\nsocket = \"/run/vm/iommu.sock\"\nqmp = \"/run/qemu/qmp.sock\"\n";
        let endpoint = "[[endpoint]]\naddress = \"00:06.0\"\n\
                        vfio-user = { listen = \"/run/vm/l\", connect = \"/run/server/c\" }\n";
        let of = |text: &str| {
            reachable_sockets(&Config::from_text(Path::new("vm.toml"), text).expect("good"))
        };
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        let plain = of(&format!("{file}{endpoint}"));
        assert_eq!(plain.paths, paths(&["/run/server/c", "/run/qemu/qmp.sock"]));
        assert_eq!(plain.folders, paths(&[]));
        let hotplug = "hotplug = [\"01:00.0-01:1f.7\"]\n";
        let plugging = of(&format!("{file}{hotplug}{endpoint}"));
        assert_eq!(plugging.paths, plain.paths);
        // QEMU's monitor gives control over the VMM: its folder is not among them.
        assert_eq!(plugging.folders, paths(&["/run/server", "/run/vm"]));
    }
}
