//! Finds out what the host uses a device for: mounted disks, network interfaces, displays, consoles, open nodes.
//!
//! A device that is unbound from its driver takes all of these with it. The kernel has no single answer, so each
//! subsystem's part of sysfs and procfs is read.
//!
//! Neither file system shows an IPv4 address of an interface that is down, or to a user other than root the files
//! that other users' processes have open.

mod disks;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::read::{link_name, names, printable, read_value};
use super::{HostRoot, SysfsDevice};
use disks::Disks;

/// PCI base class of network controllers.
const CLASS_NETWORK: u32 = 0x02;
/// `IFF_UP` in an interface's flags.
const IFF_UP: u32 = 1;
/// The most uses that are listed.
const MAX_USES: usize = 6;

/// The host's uses of `device` and of everything behind it, each as a clause such as `sda2 is mounted at /`. Empty if
/// no use is known.
pub fn uses(root: &HostRoot, device: &SysfsDevice) -> Vec<String> {
    let Some(folder) = folder(root, device) else {
        // Unbinding is not suggested for a device about which nothing is known.
        return vec!["sysfs does not show its use".to_owned()];
    };
    let tree = Tree { root, folder };
    let mut found = Disks::of(&tree).uses(root);
    found.extend(tree.interfaces(device));
    found.extend(tree.displays());
    found.extend(tree.consoles());
    found.extend(tree.virtual_devices());
    found.extend(tree.open_nodes());
    if found.len() > MAX_USES {
        let more = found.len() - MAX_USES;
        found.truncate(MAX_USES);
        found.push(format!("and {more} more"));
    }
    found
}

/// The device's own folder in the tree of devices.
fn folder(root: &HostRoot, device: &SysfsDevice) -> Option<PathBuf> {
    let pci = root.path(format!("sys/bus/pci/devices/{}", device.name));
    let group = device.group.map(|number| {
        let below = format!("sys/kernel/iommu_groups/{number}/devices/{}", device.name);
        root.path(below)
    });
    let mut links = std::iter::once(pci).chain(group);
    links.find_map(|link| fs::canonicalize(link).ok())
}

/// The part of the tree of devices that a device takes with it.
struct Tree<'a> {
    root: &'a HostRoot,
    folder: PathBuf,
}

impl Tree<'_> {
    fn holds(&self, path: &Path) -> bool {
        path.starts_with(&self.folder)
    }

    /// The members of a class or a similar folder of links, with the folders that they lead to.
    fn members(&self, below: &str) -> Vec<(String, PathBuf)> {
        let folder = self.root.path(below);
        let member = |name: String| {
            let path = fs::canonicalize(folder.join(&name)).ok()?;
            Some((name, path))
        };
        names(&folder).into_iter().filter_map(member).collect()
    }

    /// The members of a class that this device has.
    fn own(&self, below: &str) -> Vec<(String, PathBuf)> {
        let mut members = self.members(below);
        members.retain(|(_, path)| self.holds(path));
        members
    }

    /// The uses of network interfaces.
    fn interfaces(&self, device: &SysfsDevice) -> Vec<String> {
        let own = self.own("sys/class/net");
        let mut found = Vec::new();
        if let Some(functions) = read_value(&self.folder.join("sriov_numvfs"))
            && functions != "0"
        {
            found.push(format!("it has {functions} virtual functions"));
        }
        let is_network = device
            .class
            .is_some_and(|class| class >> 16 == CLASS_NETWORK);
        if own.is_empty() && is_network && device.driver.is_some() && !device.is_held_by_vfio() {
            found.push("its interface may be in another network namespace".to_owned());
        }
        let addresses = self
            .root
            .text("proc/net/if_inet6")
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split_whitespace().last().map(str::to_owned))
            .collect::<BTreeSet<_>>();
        let routes = self
            .root
            .text("proc/net/route")
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
            .collect::<BTreeSet<_>>();
        for (name, folder) in own {
            let shown = printable(&name);
            let flags = read_value(&folder.join("flags"));
            let flags = flags.and_then(|flags| {
                u32::from_str_radix(flags.strip_prefix("0x").unwrap_or(&flags), 16).ok()
            });
            if flags.is_some_and(|flags| flags & IFF_UP != 0) {
                found.push(format!("{shown} is up"));
            } else if addresses.contains(&name) || routes.contains(&name) {
                found.push(format!("{shown} has an address"));
            }
            let mut above: BTreeSet<_> = names(&folder)
                .iter()
                .filter_map(|entry| entry.strip_prefix("upper_").map(printable))
                .collect();
            above.extend(link_name(&folder.join("master")));
            found.extend(
                above
                    .iter()
                    .map(|above| format!("{above} is above {shown}")),
            );
        }
        found
    }

    /// The uses as a display.
    fn displays(&self) -> Vec<String> {
        let mut found = Vec::new();
        if read_value(&self.folder.join("boot_vga")).as_deref() == Some("1") {
            found.push("it is the boot display".to_owned());
        }
        for (name, folder) in self.own("sys/class/drm") {
            if read_value(&folder.join("enabled")).as_deref() == Some("enabled") {
                found.push(format!("the display {} is on", printable(&name)));
            }
        }
        found
    }

    /// The consoles and the keyboards.
    fn consoles(&self) -> Vec<String> {
        let text = self.root.text("proc/consoles").unwrap_or_default();
        let consoles: BTreeSet<_> = text
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        let mut found = Vec::new();
        for (name, _) in self.own("sys/class/tty") {
            if consoles.contains(name.as_str()) {
                found.push(format!("the kernel's console is {}", printable(&name)));
            }
        }
        for (name, folder) in self.own("sys/class/input") {
            // The jacks of sound cards are input devices, too.
            let is_jack = folder.components().any(|part| part.as_os_str() == "sound");
            if name.starts_with("input") && !is_jack {
                let model = read_value(&folder.join("name")).unwrap_or_else(|| printable(&name));
                found.push(format!("the input device {model} is behind it"));
            }
        }
        found
    }

    /// The mediated devices of a driver, which other VMs may have.
    fn virtual_devices(&self) -> Vec<String> {
        let own = self.own("sys/bus/mdev/devices");
        own.iter()
            .map(|(name, _)| format!("it has the mediated device {}", printable(name)))
            .collect()
    }

    /// The device nodes that a process has open.
    fn open_nodes(&self) -> Vec<String> {
        let mut nodes = BTreeSet::new();
        for class in ["sys/dev/char", "sys/dev/block"] {
            for (_, folder) in self.own(class) {
                // A VFIO device is in use by a VM; VFIO reports that itself.
                let is_vfio = folder
                    .components()
                    .any(|part| part.as_os_str() == "vfio-dev");
                let event = fs::read_to_string(folder.join("uevent")).unwrap_or_default();
                let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME="));
                if let (Some(name), false) = (name, is_vfio) {
                    nodes.insert(Path::new("/dev").join(name));
                }
            }
        }
        if nodes.is_empty() {
            return Vec::new();
        }
        let mut found = BTreeMap::new();
        let processes = names(&self.root.path("proc"));
        let is_process = |name: &&String| name.bytes().all(|byte| byte.is_ascii_digit());
        for process in processes.iter().filter(is_process) {
            let files = self.root.path(format!("proc/{process}/fd"));
            for file in names(&files) {
                let Ok(target) = fs::read_link(files.join(file)) else {
                    continue;
                };
                if nodes.contains(&target) {
                    let name = self.root.value(format!("proc/{process}/comm"));
                    let name = name.unwrap_or_default();
                    let node = printable(&target.to_string_lossy());
                    let text = format!("process {process} ({name}) has {node} open");
                    found.entry(node).or_insert(text);
                }
            }
        }
        found.into_values().collect()
    }
}
