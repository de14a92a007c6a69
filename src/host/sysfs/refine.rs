//! Merges the host's groups and reserved regions into the topology of the configuration.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::{HostFacts, HostGroup, merge};
use crate::address::IovaRange;
use crate::topology::{
    GroupId, GroupName, GroupNames, HostAddress, PciAddress, PciRange, Topology,
};

/// Result of [`refine`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refined {
    /// The topology to serve.
    pub topology: Topology,
    /// Notes for the operator on groups of the configuration that had to be joined.
    pub notes: Vec<String>,
}

/// Why a topology contradicts the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RefineError {
    /// A device of the host is given to several endpoints at once.
    #[error(
        "{0} stands for a device of the host but is not an endpoint by itself; \
         give it an [[endpoint]] of its own, with `address`"
    )]
    NotAnEndpoint(PciAddress),
}

/// Adds the host's groups and reserved regions to the passthrough endpoints of `topology`.
///
/// `passthrough` lists them with the addresses of the endpoint in the guest and of the device on the host.
/// `allowed` has the ranges that VFIO or iommufd lets a device map, by the address of its endpoint; a
/// device with unknown ranges is absent. `input` is the range that the guest can map.
///
/// - Reserved regions are those of the configuration and of the host, [merged](merge).
/// - Endpoints whose devices are in one group of the host become one group for the guest. Its name is
///   the one that the configuration gives an endpoint, else `host-group-N`. Groups of the
///   configuration with devices of one host group become one, with the name that comes first. A
///   group of the configuration is never split.
/// - Devices that are missing, or in no group, keep the groups and regions of the configuration.
///
/// # Errors
///
/// `passthrough` names an address that is not a single endpoint of `topology`.
pub fn refine(
    topology: &Topology,
    passthrough: &[(PciAddress, HostAddress)],
    facts: &HostFacts,
    allowed: &BTreeMap<PciAddress, Vec<IovaRange>>,
    input: IovaRange,
) -> Result<Refined, RefineError> {
    let mut refined = topology.clone();
    let mut links = Links::new(topology);
    let mut placed: Vec<(usize, &HostGroup)> = Vec::new();
    for &(endpoint, host) in passthrough {
        let index = refined
            .entries
            .binary_search_by_key(&PciRange::from(endpoint), |entry| entry.range)
            .ok()
            .ok_or(RefineError::NotAnEndpoint(endpoint))?;
        let group = facts.group_of(host);
        let regions = group.map_or(&[][..], |group| &group.regions);
        let allowed = allowed.get(&endpoint).map(Vec::as_slice);
        let entry = &mut refined.entries[index];
        let old = &refined.reserved_sets[entry.reserved_set];
        let merged = merge(old, regions, allowed, input);
        if merged != *old {
            entry.reserved_set = refined.reserved_sets.len();
            refined.reserved_sets.push(merged);
        }
        if let Some(group) = group {
            links.link(entry.group, group.number);
            placed.push((index, group));
        }
    }
    let notes = links.notes(topology);
    name_groups(&mut refined, &links, &placed);
    Ok(Refined {
        topology: refined,
        notes,
    })
}

/// The groups of the configuration that share a group of the host.
struct Links {
    /// By the ID of a configuration's group: the lowest ID among the groups joined with it.
    lowest: Vec<u32>,
    /// By the number of a host group: a group of the configuration that has a device in that host group.
    of_host: BTreeMap<u32, u32>,
    /// Two groups of the configuration, and the host group that joins them.
    joined: Vec<(u32, u32, u32)>,
}

impl Links {
    fn new(topology: &Topology) -> Self {
        Self {
            lowest: (0u32..).take(topology.group_count()).collect(),
            of_host: BTreeMap::new(),
            joined: Vec::new(),
        }
    }

    fn link(&mut self, named: Option<GroupId>, host: u32) {
        let Some(GroupId(named)) = named else { return };
        let Some(&other) = self.of_host.get(&host) else {
            self.of_host.insert(host, named);
            return;
        };
        let (one, two) = (self.find(named), self.find(other));
        if one != two {
            self.joined.push((one.min(two), one.max(two), host));
            for lowest in &mut self.lowest {
                if *lowest == one.max(two) {
                    *lowest = one.min(two);
                }
            }
        }
    }

    /// The group that stands for all groups joined with `named`.
    fn find(&self, named: u32) -> u32 {
        let at = usize::try_from(named).ok();
        let found = at.and_then(|at| self.lowest.get(at));
        found.copied().unwrap_or(named)
    }

    fn notes(&self, topology: &Topology) -> Vec<String> {
        let name = |id| {
            topology
                .group_name(GroupId(id))
                .map_or("?", GroupName::as_str)
        };
        self.joined
            .iter()
            .map(|&(one, two, host)| {
                format!(
                    "groups {} and {} become one, because both have a device of host group \
                     {host}; give them one name",
                    name(one),
                    name(two)
                )
            })
            .collect()
    }
}

/// Gives every endpoint its group, and renumbers the groups.
fn name_groups(topology: &mut Topology, links: &Links, placed: &[(usize, &HostGroup)]) {
    let names = std::mem::take(&mut topology.group_names);
    let taken: BTreeSet<&GroupName> = names.iter().collect();
    let mut numbering = GroupNames::default();
    let mut new_ids = Vec::with_capacity(names.len());
    for old in (0u32..).take(names.len()) {
        let kept = usize::try_from(links.find(old)).ok();
        let name = kept.and_then(|kept| names.get(kept));
        new_ids.push(name.map(|name| numbering.id(name)));
    }
    for entry in &mut topology.entries {
        let old = entry.group.and_then(|id| usize::try_from(id.0).ok());
        entry.group = old.and_then(|old| new_ids.get(old).copied().flatten());
    }
    let mut members: BTreeMap<u32, u32> = BTreeMap::new();
    for (_, group) in placed {
        *members.entry(group.number).or_default() += 1;
    }
    for (index, group) in placed {
        let entry = &mut topology.entries[*index];
        if entry.group.is_some() {
            continue;
        }
        let named = links.of_host.get(&group.number);
        let named = named.and_then(|named| usize::try_from(*named).ok());
        if let Some(id) = named.and_then(|named| new_ids.get(named).copied().flatten()) {
            entry.group = Some(id);
        } else if members.get(&group.number).is_some_and(|count| *count > 1) {
            let name = GroupName::of_host_group(group.number, |name| taken.contains(name));
            entry.group = Some(numbering.id(&name));
        }
    }
    topology.group_names = numbering.names;
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeHost, Function};
    use super::*;
    use crate::address::Iova;
    use crate::topology::{EndpointSpec, ReservedKind, ReservedRegion, ReservedRegions};

    fn address(text: &str) -> PciAddress {
        text.parse().expect("an address")
    }

    fn topology(endpoints: &[(&str, Option<&str>)]) -> Topology {
        let msi = ReservedRegion {
            range: IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).expect("a range"),
            kind: ReservedKind::Msi,
        };
        let common = ReservedRegions::new(vec![msi]).expect("one region");
        let spec = |&(range, group): &(&str, Option<&str>)| EndpointSpec {
            range: range.parse().expect("a range"),
            group: group.map(|name| GroupName::new(name).expect("a name")),
            reserved: Vec::new(),
        };
        let specs: Vec<_> = endpoints.iter().map(spec).collect();
        Topology::new(address("00:05.0"), common, &specs).expect("a topology")
    }

    fn group<'a>(topology: &'a Topology, endpoint: &str) -> Option<&'a str> {
        let info = topology.endpoint(address(endpoint).endpoint_id());
        let id = info.expect("an endpoint").group?;
        Some(topology.group_name(id).expect("a name").as_str())
    }

    /// Refines `endpoints`. Endpoint N is the host's device `0000:01:00.N`, in host group `host_groups[N]`.
    fn refined(endpoints: &[(&str, Option<&str>)], host_groups: &[u32]) -> Refined {
        let host = FakeHost::new();
        let mut pairs = Vec::new();
        for (n, group) in host_groups.iter().enumerate() {
            let path = format!("0000:01:00.{n}");
            host.function(&Function::ready(&path, *group));
            pairs.push((address(&format!("00:1{n}.0")), address(&path).into()));
        }
        let facts = HostFacts::read(&host.root(), pairs.iter().map(|(_, host)| *host));
        let none = BTreeMap::new();
        refine(&topology(endpoints), &pairs, &facts, &none, IovaRange::ALL).expect("endpoints")
    }

    #[test]
    fn one_host_group_is_one_group() {
        let made = refined(
            &[
                ("00:10.0", None),
                ("00:11.0", None),
                ("00:12.0", None),
                ("00:13.0", Some("host-group-9")),
                ("00:14.0-00:1e.7", Some("others")),
            ],
            &[9, 9, 4, 3],
        );
        let of = |endpoint| group(&made.topology, endpoint);
        // The configuration uses the name without `+` already.
        assert_eq!(of("00:10.0"), Some("host-group-9+"));
        assert_eq!(of("00:11.0"), Some("host-group-9+"));
        assert_eq!(of("00:12.0"), None, "alone in its group");
        assert_eq!(of("00:13.0"), Some("host-group-9"));
        assert_eq!(of("00:15.0"), Some("others"));
        assert_eq!(made.topology.group_count(), 3);
        assert_eq!(made.notes, Vec::<String>::new());
    }

    #[test]
    fn configured_names_win_and_clashing_groups_are_joined() {
        let made = refined(
            &[
                ("00:10.0", Some("nic")),
                ("00:11.0", None),
                ("00:12.0", Some("disk")),
                ("00:13.0", Some("disk")),
                ("00:14.0", Some("apart")),
                ("00:15.0", Some("disk")),
            ],
            &[9, 9, 9, 3, 4, 4],
        );
        for n in 0..6 {
            assert_eq!(group(&made.topology, &format!("00:1{n}.0")), Some("nic"));
        }
        assert_eq!(made.topology.group_count(), 1);
        assert_eq!(made.notes.len(), 2, "{:?}", made.notes);
        assert!(
            made.notes[0].contains("groups nic and disk"),
            "{:?}",
            made.notes
        );
        assert!(made.notes[0].contains("host group 9"));
    }

    #[test]
    fn a_group_of_the_configuration_is_never_split() {
        let made = refined(&[("00:10.0", Some("a")), ("00:11.0", Some("a"))], &[1, 2]);
        assert_eq!(group(&made.topology, "00:10.0"), Some("a"));
        assert_eq!(group(&made.topology, "00:11.0"), Some("a"));
        assert_eq!((made.topology.group_count(), made.notes.len()), (1, 0));
    }

    #[test]
    fn regions_of_configuration_and_host_are_merged() {
        let host = FakeHost::new();
        host.function(&Function::ready("0000:01:00.0", 1));
        host.file(
            "sys/kernel/iommu_groups/1/reserved_regions",
            "0xfee00000 0xfeefffff msi\n0xfd00000000 0xffffffffff reserved\nodd\n",
        );
        let made = topology(&[("00:10.0", None), ("00:11.0", None), ("00:12.0", None)]);
        let absent = address("0000:01:00.1").into();
        let pairs = [
            (address("00:10.0"), address("0000:01:00.0").into()),
            (address("00:12.0"), absent),
        ];
        let facts = HostFacts::read(&host.root(), pairs.map(|(_, host)| host));
        let top = IovaRange::new(Iova(0), Iova(0x7fff_ffff_ffff)).expect("a range");
        let allowed = BTreeMap::from([(address("00:10.0"), vec![top])]);
        let input = IovaRange::new(Iova(0), Iova(0xffff_ffff_ffff)).expect("a range");
        let refined = refine(&made, &pairs, &facts, &allowed, input).expect("endpoints");
        let regions = |endpoint| {
            let info = refined.topology.endpoint(address(endpoint).endpoint_id());
            let regions = info.expect("an endpoint").reserved.iter();
            regions.map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            regions("00:10.0"),
            [
                "0xfee00000..=0xfeefffff:msi",
                "0xfd00000000..=0xffffffffff:reserved",
                "0x800000000000..=0xffffffffffff:reserved",
            ]
        );
        assert_eq!(regions("00:11.0"), ["0xfee00000..=0xfeefffff:msi"]);
        assert_eq!(regions("00:12.0"), regions("00:11.0"));
        assert_eq!(refined.topology.max_reserved_count(), 3);
    }

    #[test]
    fn only_single_endpoints_can_be_devices() {
        let made = topology(&[("00:10.0-00:10.7", None)]);
        let facts = HostFacts::default();
        for endpoint in ["00:10.0", "00:11.0"] {
            let pairs = [(address(endpoint), address("01:00.0").into())];
            let error = refine(&made, &pairs, &facts, &BTreeMap::new(), IovaRange::ALL);
            assert_eq!(error, Err(RefineError::NotAnEndpoint(address(endpoint))));
        }
    }
}
