//! Ending devices at the keeper: those of the process before that this one does not take over, and those that could not be
//! plugged in.

use std::collections::BTreeSet;

use log::warn;

use super::kept::{DeviceKeeping, FACTS, IOMMUFD, device_name};
use crate::process::keeper::Keeper;
use crate::topology::HostAddress;
use crate::vfio::{Attach, Cdev};

/// Closes all devices, containers and iommufds that the process before has left. Returns their names.
///
/// For a process that knows nothing of their address spaces: the kernel destroys these with the descriptors, and closes the
/// devices, which ends their DMA.
pub fn discard_devices(keeper: &Keeper) -> Vec<String> {
    let names = keeper.unclaimed().into_iter();
    let names: Vec<_> = names
        .filter(|name| is_iommufd(name) || name.starts_with("vfio."))
        .collect();
    // The devices first: they keep their address spaces.
    let (devices, rest): (Vec<_>, Vec<_>) = names.iter().partition(|name| !is_iommufd(name));
    for name in devices.into_iter().chain(rest) {
        keeper.drop_file(name);
    }
    names
}

/// Stops the devices that the process before has left and that this one has not taken over: nobody knows what they may reach.
/// The kernel closes each one when the keeper has closed it, too, which may take a moment. Returns their names.
pub fn end_stray_devices(keeper: &Keeper) -> Vec<String> {
    let unclaimed = keeper.unclaimed().into_iter();
    let strays: Vec<_> = unclaimed.filter(|name| is_device(name)).collect();
    strays.iter().for_each(|name| stop_and_drop(keeper, name));
    strays
}

/// Whether a name is that of a device. The others are containers, groups and facts, which do nothing.
fn is_device(name: &str) -> bool {
    let others = ["vfio.container.", "vfio.group.", FACTS];
    name.starts_with("vfio.") && !others.iter().any(|other| name.starts_with(other))
}

/// Ends the DMA of a device if the name is that of one, and has the keeper close the file.
fn stop_and_drop(keeper: &Keeper, name: &str) {
    if is_device(name)
        && let Some(file) = keeper.claim(name)
        && let Ok(file) = file.try_clone()
    {
        let device = Cdev::adopt(file);
        // Each of both is enough. A device of type1 has no address space to leave.
        let stopped = device.clear_bus_master();
        if device.detach().is_err()
            && let Err(cause) = stopped
        {
            warn!("{name} is not in use any more, and cannot be stopped: {cause}");
        }
    }
    keeper.drop_file(name);
}

/// Ends the device if the process before has left it under another name than that of `keeping`: it is bound to another iommufd.
/// Returns whether it has.
pub(super) fn end_other(keeping: &DeviceKeeping<'_>, host: HostAddress) -> bool {
    let of_start = device_name(host);
    let own = keeping.device_name(host);
    let of_host = |name: &String| {
        let rest = name.strip_prefix(&of_start);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-')) && *name != own
    };
    let mut others = keeping.keeper.unclaimed();
    others.retain(of_host);
    drop_devices(keeping.keeper, &others);
    !others.is_empty()
}

/// Ends the DMA of devices, and has the keeper close them and what they share.
pub(in super::super) fn drop_devices(keeper: &Keeper, names: &[String]) {
    names.iter().for_each(|name| stop_and_drop(keeper, name));
}

/// An attempt to plug a device in. If it fails, the keeper must have nothing of it.
///
/// Other threads may keep files of other devices meanwhile, for example of one that is opened again after a hot reset.
pub(in super::super) struct PlugAttempt<'a> {
    keeper: &'a Keeper,
    /// The names that nobody else can have kept: those of the device.
    own: [String; 3],
    in_use_before: BTreeSet<String>,
    has_succeeded: bool,
}

impl<'a> PlugAttempt<'a> {
    /// Begins an attempt with the device `host`. No other one may begin before its end.
    pub(in super::super) fn begin(keeping: &DeviceKeeping<'a>, host: HostAddress) -> Self {
        Self {
            keeper: keeping.keeper,
            own: [
                keeping.device_name(host),
                keeping.iommufd_name(),
                keeping.facts_name(),
            ],
            in_use_before: in_use(keeping.keeper),
            has_succeeded: false,
        }
    }

    /// Whether only this attempt can have kept a name that was not in use before. Only the start of the daemon and attempts
    /// keep containers and groups.
    fn is_own(&self, name: &str) -> bool {
        let shared = ["vfio.container.", "vfio.group."];
        self.own.iter().any(|own| own == name)
            || shared.iter().any(|prefix| name.starts_with(prefix))
    }

    /// The device is open, and [`OpenDevice::kept`](super::super::kind::OpenDevice::kept) has its names.
    pub(in super::super) fn succeed(mut self) {
        self.has_succeeded = true;
    }
}

impl Drop for PlugAttempt<'_> {
    fn drop(&mut self) {
        if self.has_succeeded {
            return;
        }
        for name in in_use(self.keeper).difference(&self.in_use_before) {
            if self.is_own(name) {
                stop_and_drop(self.keeper, name);
            }
        }
    }
}

/// The names of devices, and of what they share, that this process uses.
fn in_use(keeper: &Keeper) -> BTreeSet<String> {
    let unclaimed: BTreeSet<_> = keeper.unclaimed().into_iter().collect();
    let names = keeper.names().into_iter();
    names
        .filter(|name| is_iommufd(name) || name.starts_with("vfio."))
        .filter(|name| !unclaimed.contains(name))
        .collect()
}

/// Whether a name is that of an iommufd.
fn is_iommufd(name: &str) -> bool {
    let more = name.strip_prefix(IOMMUFD);
    more.is_some_and(|more| more.is_empty() || more.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixDatagram;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_failed_attempt_drops_what_it_has_kept_and_nothing_else() {
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
        let keep = |name: &String| {
            let file = OwnedFd::from(io::pipe().expect("a pipe").0);
            keeper.keep_as(name, file.as_fd()).expect("kept");
        };
        let host: HostAddress = "0000:65:00.0".parse().expect("an address");
        let endpoint = "01:00.0".parse().expect("an address");
        let keeping = DeviceKeeping::of_plugged(&keeper, endpoint, true);
        let mut own = keeping.names_of(host, 7);
        assert_eq!(own.len(), 5, "{own:?}");
        own.sort_unstable();
        let before = ["vfio.container.8", "vfio.0000-66-00.0"].map(String::from);
        let meanwhile = ["iommufd", "vfio.0000-67-00.0", "iommufd.0000-02-00.0"].map(String::from);
        before.iter().for_each(keep);
        for succeeds in [false, true] {
            let attempt = PlugAttempt::begin(&keeping, host);
            own.iter().chain(&meanwhile).for_each(keep);
            let mut expected = [&before[..], &meanwhile[..]].concat();
            if succeeds {
                attempt.succeed();
                expected.extend(own.clone());
            } else {
                drop(attempt);
            }
            expected.sort_unstable();
            assert_eq!(keeper.names(), expected);
            let later = own.iter().chain(&meanwhile);
            later.for_each(|name| {
                keeper.drop_file(name);
            });
        }
    }

    /// A device of the start and one that was plugged in are bound to different iommufds, so neither passes for the other.
    #[test]
    fn a_device_that_is_bound_to_another_iommufd_ends() {
        let endpoint = "00:06.0".parse().expect("an address");
        let names = ["vfio.0000-65-00.0", "vfio.0000-65-00.0-0000-00-06.0"];
        let others = [
            "vfio.0000-65-00.1",
            "vfio.facts",
            "vfio.0000-65-00.1-0000-00-07.0",
        ];
        for is_plugged in [false, true] {
            let (_manager, ours) = UnixDatagram::pair().expect("sockets");
            let left = names.iter().chain(&others);
            let left = left.map(|name| ((*name).to_owned(), io::pipe().expect("a pipe").0.into()));
            let keeper = Arc::new(Keeper::new(ours, left).expect("a keeper"));
            let keeping = if is_plugged {
                DeviceKeeping::of_plugged(&keeper, endpoint, false)
            } else {
                DeviceKeeping::of_start(&keeper)
            };
            let (own, other) = if is_plugged {
                (names[1], names[0])
            } else {
                (names[0], names[1])
            };
            let device = "0000:65:00.0".parse().expect("an address");
            assert_eq!(keeping.device_name(device), own);
            assert!(end_other(&keeping, device));
            assert!(!keeper.names().contains(&other.to_owned()), "ended");
            assert!(keeping.claim(own).is_some());
            assert!(!end_other(&keeping, device));
            let left = keeper.names();
            assert!(others.iter().all(|name| left.contains(&(*name).to_owned())));
        }
        // What this process has in use stays: it is that of another endpoint.
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let left = [(names[0].to_owned(), io::pipe().expect("a pipe").0.into())];
        let keeper = Arc::new(Keeper::new(ours, left).expect("a keeper"));
        keeper.claim(names[0]).expect("left");
        let plugged = DeviceKeeping::of_plugged(&keeper, endpoint, true);
        assert!(!end_other(
            &plugged,
            "0000:65:00.0".parse().expect("an address")
        ));
    }
}
