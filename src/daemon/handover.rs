//! What this program can take over, and what a configuration offers to the guest.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::address::IovaRange;
use crate::config::{Config, EndpointChanges, VmmTransport};
use crate::device::Device;
use crate::device::execute::probe_size;
use crate::endpoints::changes;
use crate::endpoints::hotplug::Hotplug;
use crate::iommu::GuestOffer;
use crate::page_table::layout::ABI_VERSION;
use crate::process::handover::Handover;
use crate::store;
use crate::topology::{EndpointInfo, ReservedRegions, Topology};
use crate::transport::vhost_user::RECORD_VERSION;
use crate::vfio_user::{self, server};

/// The names of the formats that some daemons do not use.
const VMM: &str = "VMM's connection";
const CLIENTS: &str = "vfio-user clients";
const EMULATED: &str = "emulated devices";
const CHANGES: &str = "endpoints changed by ctl";

/// The formats of the memory that a daemon leaves to the next one. This program reads no other version of them.
pub(super) fn formats() -> BTreeMap<String, u64> {
    let formats = [
        ("page tables", ABI_VERSION),
        ("state", store::FORMAT_VERSION),
        (VMM, RECORD_VERSION),
        (CLIENTS, server::RECORD_VERSION),
        (EMULATED, vfio_user::RECORD_VERSION),
        (CHANGES, changes::VERSION),
    ];
    formats
        .map(|(name, version)| (name.to_owned(), version))
        .into()
}

/// The formats of what a daemon with this configuration leaves. The record of changes is among them even if there are none:
/// whoever finds one that it cannot read refuses the state.
fn left_formats(config: &Config) -> BTreeMap<String, u64> {
    let mut left = formats();
    let devices = &config.devices;
    let is_pci = config.transport == VmmTransport::VirtioPci;
    for (name, is_used) in [
        (VMM, !is_pci),
        (CLIENTS, is_pci || !devices.exported.is_empty()),
        (EMULATED, !devices.emulated.is_empty()),
    ] {
        if !is_used {
            left.remove(name);
        }
    }
    left
}

/// The property that endpoints decide that were there at the start.
pub(super) const ROOM: &str = "room for reserved regions";

/// Describes a running daemon that offers this to its guest, with the endpoints that it has now.
pub(super) fn describer(
    hotplug: Arc<Hotplug>,
    offer: GuestOffer,
) -> impl Fn() -> Handover + Send + Sync + use<> {
    let room = offer.probe_size();
    move || hotplug.describe(|config, changes| handover_with(config, changes, room))
}

/// How a daemon describes itself that is started with this configuration, and with the changes that the daemon before has
/// made. `least_room`: the bytes of PROBE's property list that the daemon before offers.
pub(super) fn handover_with(
    config: &Config,
    changes: &EndpointChanges,
    least_room: u32,
) -> Handover {
    // Not the file that runs: the path may lead to another one by now, and that is what the keeper starts.
    let program = std::env::args_os().next().map(PathBuf::from);
    let room = probe_size(config.topology.max_reserved_count()).max(least_room);
    let mut offer = offer(config);
    offer.insert(ROOM.into(), room.to_string());
    Handover {
        program: program.filter(|path| path.is_absolute()),
        formats: left_formats(config),
        offer,
        features: Device::offered_features(),
        endpoints: endpoints(config),
        // This version keeps all of them.
        ends: Vec::new(),
        changes: serde_json::to_value(changes).unwrap_or_default(),
    }
}

/// The properties that must not change under a running guest.
fn offer(config: &Config) -> BTreeMap<String, String> {
    let transport = match config.transport {
        VmmTransport::VhostUser => "vhost-user",
        VmmTransport::VirtioPci => "vfio-user",
    };
    let devices = config.devices.passthrough.iter();
    let mut devices: Vec<_> = devices
        .map(|device| format!("{} is {}", device.endpoint, device.host))
        .collect();
    devices.sort();
    let mut offer = BTreeMap::from([
        ("address of the IOMMU", config.topology.iommu().to_string()),
        (
            "addresses",
            IovaRange::of_width(config.address_width).to_string(),
        ),
        ("domains", config.max_domains.to_string()),
        ("machine", config.machine.name().into()),
        ("page sizes", format!("{:#x}", config.page_mask.bits())),
        ("transport", transport.into()),
    ]);
    let reserved = config.topology.common_reserved();
    if reserved.iter().next().is_some() {
        offer.insert("reserved regions", regions(reserved));
    }
    if !devices.is_empty() {
        offer.insert("devices of the host", devices.join(", "));
        offer.insert(
            "interface to the host's IOMMU",
            config.host_iommu.name().into(),
        );
    }
    let owned = |(name, value): (&str, String)| (name.to_owned(), value);
    offer.into_iter().map(owned).collect()
}

/// The endpoints that have a group or reserved regions of their own, with both.
fn endpoints(config: &Config) -> BTreeMap<String, String> {
    let topology = &config.topology;
    let described = topology.ranges().filter_map(|entry| {
        let text = describe_endpoint(topology, entry.info)?;
        Some((entry.range.to_string(), text))
    });
    described.collect()
}

/// The group of an endpoint, and its reserved regions if they are not the common ones; `None` if it has neither.
pub(super) fn describe_endpoint(topology: &Topology, info: EndpointInfo<'_>) -> Option<String> {
    let group = info.group.and_then(|id| topology.group_name(id));
    let group = group.map(|name| format!("group {name}"));
    let is_common = info.reserved == topology.common_reserved();
    let own = (!is_common).then(|| format!("reserved regions {}", regions(info.reserved)));
    let both: Vec<_> = group.into_iter().chain(own).collect();
    (!both.is_empty()).then(|| both.join(", "))
}

fn regions(reserved: &ReservedRegions) -> String {
    let regions: Vec<_> = reserved.iter().map(ToString::to_string).collect();
    regions.join(" ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn of(text: &str) -> Handover {
        let text = format!("address = \"00:05.0\"\n{text}");
        let config = Config::from_text(Path::new("vm.toml"), &text).expect("a configuration");
        of_config(&config)
    }

    fn of_config(config: &Config) -> Handover {
        handover_with(config, &EndpointChanges::default(), 0)
    }

    #[test]
    fn only_what_the_guest_sees_is_part_of_the_offer() {
        let endpoint = "[[endpoint]]\naddress = \"00:06.0\"\n";
        let plain = of(endpoint);
        for (same, text) in [
            (true, "name = \"other\"\nbatch = 7\n"),
            (true, "arena-limit = \"1G\"\nbypass = false\n"),
            (false, "address-width = 39\n"),
            (false, "granule = \"64k\"\n"),
            (false, "domains = 16\n"),
            (false, "machine = \"virt\"\n"),
            (false, "vfio-user-socket = \"/s\"\n"),
            (
                false,
                "reserved = [{ first = 0, last = 0xfff, kind = \"reserved\" }]\n",
            ),
        ] {
            let other = of(&format!("{text}{endpoint}"));
            assert_eq!(other.offer == plain.offer, same, "{text}");
        }
        let more = of(&format!("{endpoint}[[endpoint]]\naddress = \"00:07.0\"\n"));
        assert_eq!(more, plain, "an endpoint more");
        let device = of("[[endpoint]]\naddress = \"00:06.0\"\nvfio = \"0000:65:00.0\"\n");
        assert_ne!(device.offer, plain.offer);
        let moved = "address = \"00:04.0\"\n[[endpoint]]\naddress = \"00:06.0\"\n";
        let moved = Config::from_text(Path::new("vm.toml"), moved).expect("a configuration");
        assert_ne!(
            of_config(&moved).offer,
            plain.offer,
            "the IOMMU's own address"
        );
    }

    /// PROBE's answer has room for the regions of the endpoint that has most.
    #[test]
    fn the_room_for_reserved_regions_is_part_of_the_offer() {
        let endpoint = "[[endpoint]]\naddress = \"00:06.0\"\n";
        let own = |count: u64| {
            let region = |n: u64| {
                let first = n << 20;
                let last = first + 0xfff;
                format!("{{ first = {first}, last = {last}, kind = \"reserved\" }}")
            };
            let regions: Vec<_> = (1..=count).map(region).collect();
            of(&format!("{endpoint}reserved = [{}]\n", regions.join(", ")))
        };
        let (few, many) = (own(1).offer, own(40).offer);
        assert_ne!(few[ROOM], many[ROOM]);
    }

    /// Which device the guest has, and how its DMA is limited: the kernel's objects that are left are those of one interface.
    #[test]
    fn the_devices_of_the_host_are_part_of_the_offer() {
        let with = |host: &str, more: &str| {
            of(&format!(
                "{more}[[endpoint]]\naddress = \"00:06.0\"\nvfio = \"{host}\"\n"
            ))
        };
        let device = with("0000:65:00.0", "");
        assert_ne!(device.offer, with("0000:66:00.0", "").offer, "another one");
        let type1 = with("0000:65:00.0", "host-iommu = \"type1\"\n");
        assert_ne!(device.offer, type1.offer, "another interface");
    }

    #[test]
    fn no_connection_of_a_device_ends() {
        for host_iommu in ["iommufd", "type1"] {
            let ends = of(&format!(
                "host-iommu = \"{host_iommu}\"\n[[endpoint]]\naddress = \"00:06.0\"\n\
                 vfio = \"0000:65:00.0\"\nexport = \"/a\"\n"
            ));
            assert!(ends.ends.is_empty(), "{host_iommu}");
        }
    }

    /// The changes of `ctl` are told, and only a program that reads them may take over.
    #[test]
    fn changes_are_part_of_what_is_left() {
        let text = "address = \"00:05.0\"\n[[endpoint]]\naddress = \"00:06.0\"\n";
        let config = Config::from_text(Path::new("vm.toml"), text).expect("a configuration");
        assert!(of_config(&config).formats.contains_key(CHANGES));
        let keys = "address = \"00:07.0\", group = \"g\"";
        let (with, range) = config.with_endpoint(keys).expect("added");
        let mut changes = EndpointChanges::default();
        changes.add(keys, range).expect("room");
        let left = handover_with(&with, &changes, 4000);
        assert!(left.formats.contains_key(CHANGES));
        assert_eq!(left.endpoints["0000:00:07.0"], "group g");
        assert_eq!(left.offer[ROOM], "4000");
        let told: EndpointChanges = serde_json::from_value(left.changes).expect("decoded");
        assert_eq!(told, changes);
    }

    #[test]
    fn formats_that_no_connection_uses_are_not_named() {
        let endpoint = "[[endpoint]]\naddress = \"00:06.0\"\n";
        let plain = of(endpoint).formats;
        assert!(plain.contains_key(VMM) && !plain.contains_key(CLIENTS));
        assert!(!plain.contains_key(EMULATED));
        let emulated = "vfio-user = { listen = \"/a\", connect = \"/b\" }\n";
        let emulated = of(&format!("{endpoint}{emulated}")).formats;
        assert!(emulated.contains_key(EMULATED) && !emulated.contains_key(CLIENTS));
        let exported = "vfio = \"0000:65:00.0\"\nexport = \"/a\"\n";
        let exported = of(&format!("{endpoint}{exported}")).formats;
        assert!(exported.contains_key(CLIENTS));
        let pci = of(&format!("vfio-user-socket = \"/s\"\n{endpoint}")).formats;
        assert!(pci.contains_key(CLIENTS) && !pci.contains_key(VMM));
    }

    #[test]
    fn groups_and_reserved_regions_are_named() {
        let text = "reserved = [{ first = 0, last = 0xfff, kind = \"reserved\" }]\n\
                    [[endpoint]]\naddress = \"00:06.0\"\ngroup = \"g\"\n\
                    [[endpoint]]\naddress = \"00:07.0\"\n\n\
                    reserved = [{ first = 0x2000, last = 0x2fff, kind = \"reserved\" }]\n\
                    [[endpoint]]\naddress = \"00:08.0\"\n";
        let described = of(text);
        assert!(described.offer["reserved regions"].contains("0xfff"));
        assert_eq!(described.endpoints.len(), 2, "{described:?}");
        assert_eq!(described.endpoints["0000:00:06.0"], "group g");
        let own = &described.endpoints["0000:00:07.0"];
        assert!(own.contains("0xfff") && own.contains("0x2fff"), "{own}");
    }
}
