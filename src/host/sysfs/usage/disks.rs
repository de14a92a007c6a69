//! The uses of a device's disks: mounts, swap, and what is built on them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::super::HostRoot;
use super::super::read::{names, printable, read_value};
use super::Tree;

/// The block devices on a device: disks, partitions, and what is built on them.
pub(super) struct Disks {
    names: BTreeSet<String>,
    /// Block devices, each with one that is built on it: RAID, logical volumes, encryption.
    holders: BTreeSet<(String, String)>,
    /// Block devices by number, `major:minor`.
    numbers: BTreeMap<String, String>,
    /// Block devices by their paths below `/dev`.
    nodes: BTreeMap<String, String>,
}

impl Disks {
    pub(super) fn of(tree: &Tree<'_>) -> Self {
        let all = tree.members("sys/class/block");
        let below = |folder: &Path| {
            let below = all.iter().filter(|(_, path)| path.starts_with(folder));
            below.map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        let mut found: BTreeSet<String> = below(&tree.folder).into_iter().collect();
        // The disk of an NVMe controller with several ports is below its subsystem, which links to the controllers.
        for (_, subsystem) in tree.members("sys/class/nvme-subsystem") {
            let links = names(&subsystem);
            let mut targets = links
                .iter()
                .map(|name| fs::canonicalize(subsystem.join(name)));
            if targets.any(|target| target.is_ok_and(|target| tree.holds(&target))) {
                found.extend(below(&subsystem));
            }
        }
        let mut holders = BTreeSet::new();
        let mut new: Vec<String> = found.iter().cloned().collect();
        while let Some(name) = new.pop() {
            let mut above = names(&tree.root.path(format!("sys/class/block/{name}/holders")));
            holders.extend(above.iter().map(|above| (name.clone(), above.clone())));
            if let Some((_, folder)) = all.iter().find(|(other, _)| *other == name) {
                // The partitions of a RAID.
                above.extend(below(folder));
            }
            new.extend(
                above
                    .into_iter()
                    .filter(|above| found.insert(above.clone())),
            );
        }
        let (mut numbers, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        for name in &found {
            let folder = tree.root.path(format!("sys/class/block/{name}"));
            if let Some(number) = read_value(&folder.join("dev")) {
                numbers.insert(number, name.clone());
            }
            if let Some(volume) = read_value(&folder.join("dm/name")) {
                nodes.insert(format!("mapper/{volume}"), name.clone());
            }
            // sysfs writes `!` for the `/` of a node below a folder.
            nodes.insert(name.replace('!', "/"), name.clone());
        }
        Self {
            names: found,
            holders,
            numbers,
            nodes,
        }
    }

    /// The uses of the disks.
    pub(super) fn uses(&self, root: &HostRoot) -> Vec<String> {
        if self.names.is_empty() {
            return Vec::new();
        }
        let mut found = self.mounts(root);
        found.extend(self.swap(root));
        found.extend(self.holders.iter().map(|(disk, holder)| {
            let (disk, holder) = (printable(disk), printable(holder));
            format!("{holder} is built on {disk}")
        }));
        found.extend(self.btrfs(root));
        if found.is_empty() && !names(&root.path("proc/spl/kstat/zfs")).is_empty() {
            // ZFS is no holder, and its disks are not in the list of mounts.
            let names: Vec<_> = self.names.iter().map(|name| printable(name)).collect();
            let names = names.join(", ");
            found.push(format!("a ZFS pool of this host may be on {names}"));
        }
        found
    }

    fn by_node(&self, node: &str) -> Option<&String> {
        self.nodes.get(node.strip_prefix("/dev/")?)
    }

    /// The mounts in this process's view and in that of the host's first process.
    fn mounts(&self, root: &HostRoot) -> Vec<String> {
        let mut found = BTreeMap::new();
        for process in ["self", "1"] {
            let text = root.text(format!("proc/{process}/mountinfo"));
            for line in text.unwrap_or_default().lines() {
                let mut words = line.split(' ');
                let (number, point) = (words.nth(2), words.nth(1));
                // A file system on several disks has a number of its own, and names one of the disks.
                let source = line
                    .split(" - ")
                    .nth(1)
                    .and_then(|rest| rest.split(' ').nth(1));
                let disk = number
                    .and_then(|number| self.numbers.get(number))
                    .or_else(|| self.by_node(source?));
                if let (Some(disk), Some(point)) = (disk, point) {
                    let text = format!("{} is mounted at {}", printable(disk), printable(point));
                    found.entry(disk).or_insert(text);
                }
            }
        }
        found.into_values().collect()
    }

    fn swap(&self, root: &HostRoot) -> Vec<String> {
        let text = root.text("proc/swaps").unwrap_or_default();
        let nodes = text
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        nodes
            .filter_map(|node| self.by_node(node))
            .map(|disk| format!("the host swaps to {}", printable(disk)))
            .collect()
    }

    /// The disks of mounted btrfs file systems. The list of mounts has only one disk of each.
    fn btrfs(&self, root: &HostRoot) -> Vec<String> {
        let systems = names(&root.path("sys/fs/btrfs"));
        let disks = systems
            .iter()
            .flat_map(|system| names(&root.path(format!("sys/fs/btrfs/{system}/devices"))));
        disks
            .filter(|disk| self.names.contains(disk))
            .map(|disk| format!("{} is part of a mounted btrfs", printable(&disk)))
            .collect()
    }
}
