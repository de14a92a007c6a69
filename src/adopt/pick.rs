//! Which of a process's descriptors are the wanted devices and their iommufd.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, StatxFlags, makedev};

use super::AdoptError;
use super::message::FoundFiles;
use super::peer::PeerProcess;
use crate::host::sysfs::{HostFacts, HostRoot};
use crate::process::inherited::is_same_file;
use crate::topology::HostAddress;
use crate::vfio::{Attach, Cdev};

/// The most duplicates at a time. The limit of descriptors is 1024 unless somebody has changed it.
const MAX_DUPLICATES: usize = 768;

/// The device numbers of the wanted nodes, from sysfs.
pub(super) struct WantedNodes {
    /// `None` on a host without iommufd.
    iommufd: Option<u64>,
    devices: BTreeMap<u64, HostAddress>,
}

impl WantedNodes {
    /// The nodes of the wanted devices that VFIO has, on the host below `root`.
    pub(super) fn read(root: &HostRoot, wanted: &[HostAddress]) -> Self {
        let number = |path: String| {
            let text = root.value(path)?;
            let (major, minor) = text.split_once(':')?;
            Some(makedev(major.parse().ok()?, minor.parse().ok()?))
        };
        let facts = HostFacts::read(root, wanted.iter().copied());
        let node = |host: &HostAddress| {
            let vfio = facts.device(*host)?.vfio.as_ref()?;
            let folder = format!("sys/bus/pci/devices/{host}/vfio-dev/{}", vfio.name);
            Some((number(format!("{folder}/dev"))?, *host))
        };
        Self {
            iommufd: number("sys/class/misc/iommu/dev".into()),
            devices: wanted.iter().filter_map(node).collect(),
        }
    }
}

/// What was found, and duplicates of other files. Closing one of these may take as long as its file likes, so they must be
/// closed last.
pub(super) struct Picked {
    pub(super) found: FoundFiles,
    pub(super) _others: Vec<OwnedFd>,
}

/// Duplicates the wanted descriptors of a process.
pub(super) fn pick(process: &PeerProcess, wanted: &WantedNodes) -> Result<Picked, AdoptError> {
    let mut iommufds: Vec<OwnedFd> = Vec::new();
    let mut devices = BTreeMap::new();
    let mut others = Vec::new();
    for number in process.descriptors()? {
        if others.len() + iommufds.len() + devices.len() >= MAX_DUPLICATES {
            return Err(AdoptError::TooMany(MAX_DUPLICATES));
        }
        let Some(file) = process.duplicate(number)? else {
            continue;
        };
        // The duplicate: under that number the process may have another file by now.
        let node = node_number(file.as_fd());
        let host = node.and_then(|node| wanted.devices.get(&node));
        if node.is_some() && node == wanted.iommufd {
            let is_known =
                |known: &OwnedFd| is_same_file(known.as_fd(), file.as_fd()) == Some(true);
            if iommufds.iter().any(is_known) {
                others.push(file);
            } else {
                iommufds.push(file);
            }
        } else if let Some(host) = host
            && !devices.contains_key(host)
            && Cdev::adopt(file.try_clone().map_err(no_descriptor)?).is_bound()
        {
            devices.insert(*host, file);
        } else {
            others.push(file);
        }
    }
    let count = iommufds.len();
    let iommufd = match (devices.is_empty(), count) {
        (true, _) => {
            others.append(&mut iommufds);
            None
        }
        (false, 0) => return Err(AdoptError::NoIommufd),
        (false, 1) => iommufds.pop(),
        (false, count) => return Err(AdoptError::SeveralIommufds(count)),
    };
    Ok(Picked {
        found: FoundFiles { iommufd, devices },
        _others: others,
    })
}

fn no_descriptor(source: std::io::Error) -> AdoptError {
    AdoptError::System {
        step: "duplicate a descriptor",
        source,
    }
}

/// The device number of a file that is a character device. Asks no file system, which the process may have chosen.
fn node_number(file: BorrowedFd<'_>) -> Option<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(file, "", flags, StatxFlags::TYPE).ok()?;
    let kind = FileType::from_raw_mode(found.stx_mode.into());
    (kind == FileType::CharacterDevice).then(|| makedev(found.stx_rdev_major, found.stx_rdev_minor))
}
