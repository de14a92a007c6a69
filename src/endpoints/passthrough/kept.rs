//! The descriptors of the host's devices that outlive this process, and what this process has learned about the devices.
//!
//! A device that the daemon before has left open may be doing DMA. VFIO tells a device's allowed addresses only while the
//! device is attached to an empty address space, so the next process must know them without asking.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use log::warn;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::address::{Iova, IovaRange};
use crate::process::inherited::is_same_file;
use crate::process::keeper::Keeper;
use crate::topology::{HostAddress, PciAddress};
use crate::vfio::AllowedIovas;

/// The name of the daemon's iommufd at the keeper. That of a device that was plugged in is longer.
pub(super) const IOMMUFD: &str = "iommufd";
/// The name of the file with the properties of the devices.
pub(super) const FACTS: &str = "vfio.facts";
/// The most bytes that are read of this file.
const MAX_FACTS: usize = 1 << 20;
/// The most ranges of a device.
const MAX_RANGES: usize = 1024;

/// How the descriptors of some devices are kept.
#[derive(Clone, Copy)]
pub struct DeviceKeeping<'a> {
    pub(super) keeper: &'a Arc<Keeper>,
    /// The endpoint whose device is plugged in while the VM runs, or was. It has an iommufd of its own, which ends with it.
    pub(super) plugged: Option<PciAddress>,
    /// Takes over what the process before has left.
    takes_over: bool,
}

impl<'a> DeviceKeeping<'a> {
    /// For the devices of the configuration at the start.
    pub fn of_start(keeper: &'a Arc<Keeper>) -> Self {
        Self {
            keeper,
            plugged: None,
            takes_over: true,
        }
    }

    /// For a device that is plugged in: by this process, or by one before, whose descriptors this one takes over.
    pub fn of_plugged(
        keeper: &'a Arc<Keeper>,
        endpoint: PciAddress,
        by_this_process: bool,
    ) -> Self {
        Self {
            keeper,
            plugged: Some(endpoint),
            takes_over: !by_this_process,
        }
    }

    /// The name of the iommufd.
    pub(super) fn iommufd_name(&self) -> String {
        self.name(IOMMUFD, '.')
    }

    /// The name of a device's descriptor. That of a device that was plugged in is longer: the device is bound to another
    /// iommufd than the devices of the start.
    pub(super) fn device_name(&self, host: HostAddress) -> String {
        self.name(&device_name(host), '-')
    }

    /// The name of the file with the properties of the devices.
    pub(super) fn facts_name(&self) -> String {
        self.name(FACTS, '-')
    }

    fn name(&self, name: &str, separator: char) -> String {
        match self.plugged {
            Some(endpoint) => format!("{name}{separator}{endpoint}").replace(':', "-"),
            None => name.to_owned(),
        }
    }

    /// The file that the process before has left under a name.
    pub(super) fn claim(&self, name: &str) -> Option<OwnedFd> {
        let keeper = self.takes_over.then_some(self.keeper)?;
        let kept = keeper.claim(name)?;
        match kept.try_clone() {
            Ok(file) => Some(file),
            Err(cause) => {
                warn!("the descriptor {name} of the daemon before cannot be used: {cause}");
                keeper.release(name);
                None
            }
        }
    }

    /// The names of everything that may be kept of a device in this host group, and of nothing else.
    pub(super) fn names_of(&self, host: HostAddress, group: u32) -> Vec<String> {
        let mut names = vec![
            self.device_name(host),
            container_name(group),
            group_name(group),
        ];
        if self.plugged.is_some() {
            names.extend([self.iommufd_name(), self.facts_name()]);
        }
        names
    }
}

/// The name of the descriptor of a device of the start.
pub(in super::super) fn device_name(host: HostAddress) -> String {
    format!("vfio.{host}").replace(':', "-")
}

/// The name under which the clients of an endpoint's exported device are kept.
pub(in super::super) fn client_name(endpoint: PciAddress) -> String {
    format!("export.{endpoint}").replace(':', "-")
}

/// The name of the container of a host group.
pub(super) fn container_name(group: u32) -> String {
    format!("vfio.container.{group}")
}

/// The name of a host group's descriptor.
pub(super) fn group_name(group: u32) -> String {
    format!("vfio.group.{group}")
}

/// Keeps a file under a name. A file that cannot be kept is of no use to a later process, which opens another.
pub(super) fn keep(keeper: &Keeper, name: &str, file: BorrowedFd<'_>) {
    if let Err(cause) = keeper.keep_as(name, file) {
        warn!(
            "{name} will not survive this daemon, so its devices will stop if it restarts: {cause}"
        );
    }
}

/// Keeps a device that another process has opened and given to this one. Returns whether the process before has left the same
/// open file: then it is as that process has left it.
///
/// The file is open in the other process, too. The keeper has it so that this process can tell it from a file that was opened
/// since.
pub(super) fn keep_inherited(keeper: &Keeper, name: &str, file: BorrowedFd<'_>) -> bool {
    if let Some(left) = keeper.claim(name) {
        if is_same_file(left.as_fd(), file) == Some(true) {
            return true;
        }
        keeper.release(name);
    }
    keep(keeper, name, file);
    false
}

/// The answers of the kernel about a device's IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceFacts {
    /// The addresses.
    pub allowed: AllowedIovas,
    /// Whether the IOMMU makes all DMA of the device snoop the caches.
    pub is_coherent: bool,
}

/// What is known about the devices; `None` for a device whose IOMMU cannot be asked.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct KnownDevices(BTreeMap<HostAddress, Option<DeviceFacts>>);

impl KnownDevices {
    /// What the process before knew.
    pub(super) fn claim(keeping: &DeviceKeeping<'_>) -> Self {
        let Some(file) = keeping.claim(&keeping.facts_name()) else {
            return Self::default();
        };
        match read(&File::from(file)) {
            Ok(text) => Self::parse(&text),
            Err(cause) => {
                warn!("the properties of the devices are asked for again: {cause}");
                Self::default()
            }
        }
    }

    /// The knowledge about a device.
    pub(super) fn get(&self, host: HostAddress) -> Option<&Option<DeviceFacts>> {
        self.0.get(&host)
    }

    /// Adds a device.
    pub(super) fn add(&mut self, host: HostAddress, device: Option<DeviceFacts>) {
        self.0.insert(host, device);
    }

    /// Keeps the knowledge for the next process. `left` is that of the process before.
    pub(super) fn keep(&self, left: &Self, keeping: &DeviceKeeping<'_>) {
        if !keeping.keeper.is_present() || self == left {
            return;
        }
        let written = || -> io::Result<File> {
            let mut file = File::from(memfd_create(FACTS, MemfdFlags::CLOEXEC)?);
            file.write_all(self.text().as_bytes())?;
            Ok(file)
        };
        match written() {
            Ok(file) => keep(keeping.keeper, &keeping.facts_name(), file.as_fd()),
            Err(cause) => warn!("the properties of the devices cannot be kept: {cause}"),
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (host, device) in &self.0 {
            // Writing to a String cannot fail.
            let _ = match device {
                None => writeln!(text, "{host} unknown"),
                Some(DeviceFacts {
                    allowed,
                    is_coherent,
                }) => {
                    let coherent = if *is_coherent {
                        "coherent"
                    } else {
                        "incoherent"
                    };
                    let _ = write!(text, "{host} {} {coherent}", allowed.granule);
                    for range in &allowed.ranges {
                        let _ = write!(text, " {:x}-{:x}", range.first().0, range.last().0);
                    }
                    writeln!(text)
                }
            };
        }
        text
    }

    /// Parses the text. Leaves out a line that is damaged: the device is then asked again.
    fn parse(text: &str) -> Self {
        let mut known = Self::default();
        for line in text.lines() {
            match parse_line(line) {
                Some((host, device)) => known.add(host, device),
                None => warn!("the properties of a device are damaged, and asked for again"),
            }
        }
        known
    }
}

fn read(file: &File) -> io::Result<String> {
    let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if len > MAX_FACTS {
        return Err(io::Error::other(format!(
            "they take {len} bytes, more than {MAX_FACTS}"
        )));
    }
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    String::from_utf8(bytes).map_err(io::Error::other)
}

fn parse_line(line: &str) -> Option<(HostAddress, Option<DeviceFacts>)> {
    let mut words = line.split(' ');
    let host = words.next()?.parse().ok()?;
    let granule = match words.next()? {
        "unknown" => return words.next().is_none().then_some((host, None)),
        number => number.parse::<u64>().ok().filter(|n| n.is_power_of_two())?,
    };
    let is_coherent = match words.next()? {
        "coherent" => true,
        "incoherent" => false,
        _ => return None,
    };
    let number = |text| u64::from_str_radix(text, 16).ok().map(Iova);
    let mut ranges: Vec<IovaRange> = Vec::new();
    for word in words {
        let (first, last) = word.split_once('-')?;
        let range = IovaRange::new(number(first)?, number(last)?)?;
        let is_next = ranges
            .last()
            .is_none_or(|before| before.last() < range.first());
        if !is_next || ranges.len() >= MAX_RANGES {
            return None;
        }
        ranges.push(range);
    }
    let allowed = AllowedIovas { ranges, granule };
    Some((
        host,
        Some(DeviceFacts {
            allowed,
            is_coherent,
        }),
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use proptest::prelude::*;

    use super::*;

    fn host(text: &str) -> HostAddress {
        text.parse().expect("an address")
    }

    fn known() -> KnownDevices {
        let range = |first, last| IovaRange::new(Iova(first), Iova(last)).expect("a range");
        let mut known = KnownDevices::default();
        known.add(host("0000:65:00.0"), None);
        let device = DeviceFacts {
            allowed: AllowedIovas {
                ranges: vec![range(0, 0xfedf_ffff), range(0xfef0_0000, u64::MAX)],
                granule: 4096,
            },
            is_coherent: true,
        };
        known.add(host("10000:01:1f.7"), Some(device));
        known
    }

    #[test]
    fn the_next_process_knows_the_devices() {
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
        known().keep(&KnownDevices::default(), &DeviceKeeping::of_start(&keeper));
        let file = DeviceKeeping::of_start(&keeper).claim(FACTS).expect("kept");
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let next = Arc::new(Keeper::new(ours, [(FACTS.to_owned(), file)]).expect("a keeper"));
        let next = DeviceKeeping::of_start(&next);
        let left = KnownDevices::claim(&next);
        assert_eq!(left, known());
        known().keep(&left, &next);
        assert_eq!(
            KnownDevices::claim(&DeviceKeeping::of_start(&Arc::new(Keeper::none()))),
            KnownDevices::default()
        );
    }

    /// The next process is given the descriptor, too, and perhaps that of another open file.
    #[test]
    fn a_device_that_was_given_by_number_is_left_if_it_is_the_same_open_file() {
        let file = || OwnedFd::from(io::pipe().expect("a pipe").0);
        let (device, other) = (file(), file());
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let keeper = Keeper::new(ours, []).expect("a keeper");
        assert!(!keep_inherited(&keeper, "vfio.a", device.as_fd()));
        let left = keeper.claim("vfio.a").expect("kept");
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let next = Keeper::new(
            ours,
            [("vfio.a".to_owned(), left.try_clone().expect("a copy"))],
        )
        .expect("a keeper");
        assert!(keep_inherited(&next, "vfio.a", device.as_fd()));
        assert!(next.unclaimed().is_empty());
        assert!(!keep_inherited(&next, "vfio.a", other.as_fd()));
        let kept = next.claim("vfio.a").expect("kept");
        assert_eq!(is_same_file(kept.as_fd(), other.as_fd()), Some(true));
        assert!(!keep_inherited(&Keeper::none(), "vfio.a", device.as_fd()));
    }

    #[test]
    fn damaged_lines_are_left_out() {
        let good = known().text();
        assert_eq!(KnownDevices::parse(&good), known());
        for bad in [
            "",
            "0000:65:00.0",
            "0000:65:00.0 unknown x",
            "65 unknown",
            "0000:65:00.0 4095 coherent",
            "0000:65:00.0 4096 perhaps",
            "0000:65:00.0 4096 coherent 5",
            "0000:65:00.0 4096 coherent 5-4",
            "0000:65:00.0 4096 coherent 5-9 9-a",
        ] {
            let parsed = KnownDevices::parse(&format!("{bad}\n{good}"));
            assert_eq!(parsed, known(), "{bad}");
        }
        let many: String = (0..2000)
            .map(|n| format!(" {:x}-{:x}", 2 * n, 2 * n))
            .collect();
        let parsed = KnownDevices::parse(&format!("0000:66:00.0 4096 coherent{many}\n"));
        assert_eq!(parsed, KnownDevices::default());
    }

    #[test]
    fn names_are_those_that_a_keeper_takes() {
        let keeper = Arc::new(Keeper::none());
        let of_start = DeviceKeeping::of_start(&keeper);
        let endpoint = "00:06.0".parse().expect("an address");
        let plugged = DeviceKeeping::of_plugged(&keeper, endpoint, true);
        let names = [
            plugged.device_name(host("10000:01:1f.7")),
            plugged.iommufd_name(),
            plugged.facts_name(),
            of_start.device_name(host("10000:01:1f.7")),
            container_name(7),
            group_name(7),
        ];
        assert_eq!(
            names,
            [
                "vfio.10000-01-1f.7-0000-00-06.0",
                "iommufd.0000-00-06.0",
                "vfio.facts-0000-00-06.0",
                "vfio.10000-01-1f.7",
                "vfio.container.7",
                "vfio.group.7"
            ]
        );
        for name in names {
            let allowed = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
            assert!(name.chars().all(allowed), "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in ".{0,200}") {
            let parsed = KnownDevices::parse(&text);
            prop_assert_eq!(KnownDevices::parse(&parsed.text()), parsed);
        }
    }
}
