//! The topology: the address of the IOMMU, its endpoints, their host groups and their reserved
//! regions.

#![forbid(unsafe_code)]

pub mod changes;
#[cfg(feature = "daemon")]
pub mod device_tree;
pub mod groups;
pub mod pci;
pub mod ports;
pub mod reserved;
pub mod viot;

use std::collections::HashMap;

use thiserror::Error;

use crate::ids::EndpointId;

pub use changes::NoSuchEndpoints;
pub use groups::{GroupId, GroupName};
pub use pci::{HostAddress, PciAddress, PciRange};
pub use ports::{Port, PortError, PortKind, PortPath, Ports};
pub use reserved::{
    MAX_RESERVED_REGIONS, ReservedError, ReservedKind, ReservedRegion, ReservedRegions,
};

/// The maximum number of endpoints of one IOMMU: the number of functions in a PCI segment.
pub const MAX_ENDPOINTS: u64 = 65536;

/// Endpoints as the operator configures them: the input of [`Topology::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// The functions.
    pub range: PciRange,
    /// The host group that all of them belong to.
    pub group: Option<GroupName>,
    /// Their reserved regions, in addition to the common ones.
    pub reserved: Vec<ReservedRegion>,
}

/// All endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    iommu: PciAddress,
    /// Sorted and disjoint.
    pub(crate) entries: Vec<TopologyEntry>,
    pub(crate) group_names: Vec<GroupName>,
    /// The distinct sets of reserved regions, to which entries refer by index. Set 0 is the common
    /// set: that of endpoints without regions of their own.
    pub(crate) reserved_sets: Vec<ReservedRegions>,
    /// Ranges in which endpoints may be added later; they are announced to the guest, too.
    expected: Vec<PciRange>,
}

/// One configured range of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TopologyEntry {
    pub(crate) range: PciRange,
    pub(crate) group: Option<GroupId>,
    pub(crate) reserved_set: usize,
}

/// Properties of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointInfo<'a> {
    /// Its host group, if it has one.
    pub group: Option<GroupId>,
    /// Its reserved regions.
    pub reserved: &'a ReservedRegions,
}

/// A range of endpoints that differ only in their address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointRange<'a> {
    /// The functions.
    pub range: PciRange,
    /// The properties of each of them.
    pub info: EndpointInfo<'a>,
}

impl Topology {
    /// The topology of the IOMMU at `iommu` with the endpoints of `specs`, in any order. Each
    /// endpoint has the common regions `reserved` and its own.
    ///
    /// # Errors
    ///
    /// Two specs share a function, one contains the IOMMU's own function, there are more than
    /// [`MAX_ENDPOINTS`] endpoints, or the reserved regions of an endpoint are invalid together.
    pub fn new(
        iommu: PciAddress,
        reserved: ReservedRegions,
        specs: &[EndpointSpec],
    ) -> Result<Self, TopologyError> {
        check_ranges(iommu, specs)?;

        let mut groups = GroupNames::default();
        let mut reserved_sets = vec![reserved];
        let mut entries = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let reserved_set = if spec.reserved.is_empty() {
                0
            } else {
                let merged = reserved_sets[0].merged(&spec.reserved);
                reserved_sets.push(merged.map_err(|source| TopologyError::Reserved {
                    index,
                    range: spec.range,
                    source,
                })?);
                reserved_sets.len() - 1
            };
            entries.push(TopologyEntry {
                range: spec.range,
                group: spec.group.as_ref().map(|name| groups.id(name)),
                reserved_set,
            });
        }
        entries.sort_by_key(|entry| entry.range);
        Ok(Self {
            iommu,
            entries,
            group_names: groups.names,
            reserved_sets,
            expected: Vec::new(),
        })
    }

    /// The address of the IOMMU itself, which is not an endpoint.
    pub fn iommu(&self) -> PciAddress {
        self.iommu
    }

    /// The properties of `id`, or `None` if it is not an endpoint. O(log n).
    pub fn endpoint(&self, id: EndpointId) -> Option<EndpointInfo<'_>> {
        let address = PciAddress::from_endpoint_id(id);
        let at = self
            .entries
            .partition_point(|entry| entry.range.last() < address);
        self.entries
            .get(at)
            .filter(|entry| entry.range.contains(address))
            .map(|entry| self.info(entry))
    }

    /// The configured ranges of endpoints, in ascending order.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = EndpointRange<'_>> {
        self.entries.iter().map(|entry| EndpointRange {
            range: entry.range,
            info: self.info(entry),
        })
    }

    /// The ranges that the guest's description of its hardware puts behind the IOMMU: those of the endpoints, and those
    /// in which endpoints may be added later. Ascending; ranges that adjoin or overlap are joined.
    fn described(&self) -> Vec<PciRange> {
        let mut ranges: Vec<_> = self.ranges().map(|entry| entry.range).collect();
        ranges.extend(self.expected());
        ranges.sort_unstable();
        let mut joined: Vec<PciRange> = Vec::with_capacity(ranges.len());
        for next in ranges {
            if let Some(before) = joined.last_mut()
                && u32::from(next.first().bdf()) <= u32::from(before.last().bdf()) + 1
                && let Ok(both) = PciRange::new(before.first(), before.last().max(next.last()))
            {
                *before = both;
            } else {
                joined.push(next);
            }
        }
        joined
    }

    /// The number of endpoints.
    pub fn endpoint_count(&self) -> u64 {
        self.entries.iter().map(|entry| entry.range.count()).sum()
    }

    /// The name of a group of this topology.
    pub fn group_name(&self, id: GroupId) -> Option<&GroupName> {
        self.group_names.get(usize::try_from(id.0).ok()?)
    }

    /// The group of this topology with a name.
    pub fn group_named(&self, name: &GroupName) -> Option<GroupId> {
        let at = self.group_names.iter().position(|known| known == name)?;
        u32::try_from(at).ok().map(GroupId)
    }

    /// The number of groups. Their IDs are `0..group_count()`.
    pub fn group_count(&self) -> usize {
        self.group_names.len()
    }

    /// The common regions: those of endpoints without regions of their own.
    pub fn common_reserved(&self) -> &ReservedRegions {
        &self.reserved_sets[0]
    }

    /// The largest number of regions of an endpoint. A PROBE answer must have room for as many.
    pub fn max_reserved_count(&self) -> usize {
        self.reserved_sets
            .iter()
            .map(ReservedRegions::len)
            .max()
            .unwrap_or(0)
    }

    fn info(&self, entry: &TopologyEntry) -> EndpointInfo<'_> {
        EndpointInfo {
            group: entry.group,
            reserved: &self.reserved_sets[entry.reserved_set],
        }
    }
}

/// The endpoints conflict. `index` counts the specs passed to [`Topology::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TopologyError {
    /// Two specs have the same functions.
    #[error("endpoint {range} is given twice; remove one of the two")]
    Duplicate {
        /// The later of the two.
        index: usize,
        /// The functions of both.
        range: PciRange,
    },
    /// Two specs share some functions.
    #[error("endpoints {range} and {other} overlap; give each function to one of them")]
    Overlap {
        /// The later of the two.
        index: usize,
        /// Its functions.
        range: PciRange,
        /// The functions of the earlier one.
        other: PciRange,
    },
    /// A spec contains the IOMMU's own function.
    #[error(
        "endpoint {range} contains the IOMMU's own address {iommu}; \
         leave that function out (split the range around it) or move the IOMMU"
    )]
    ContainsIommu {
        /// The spec.
        index: usize,
        /// Its functions.
        range: PciRange,
        /// The address of the IOMMU.
        iommu: PciAddress,
    },
    /// There are more than [`MAX_ENDPOINTS`] endpoints.
    #[error(
        "{count} endpoints, {MAX_ENDPOINTS} are possible; give narrower ranges, \
         with only the functions the VM has"
    )]
    TooManyEndpoints {
        /// The spec that exceeds the limit.
        index: usize,
        /// The number of endpoints up to and including that spec.
        count: u64,
    },
    /// The reserved regions of an endpoint are invalid together with the common ones.
    #[error("endpoint {range}: {source}")]
    Reserved {
        /// The spec.
        index: usize,
        /// Its functions.
        range: PciRange,
        /// The error in the regions.
        source: ReservedError,
    },
}

impl TopologyError {
    /// The index of the spec at fault, counted from 0.
    pub fn index(&self) -> usize {
        match *self {
            Self::Duplicate { index, .. }
            | Self::Overlap { index, .. }
            | Self::ContainsIommu { index, .. }
            | Self::TooManyEndpoints { index, .. }
            | Self::Reserved { index, .. } => index,
        }
    }
}

fn check_ranges(iommu: PciAddress, specs: &[EndpointSpec]) -> Result<(), TopologyError> {
    let mut count = 0u64;
    for (index, spec) in specs.iter().enumerate() {
        let range = spec.range;
        if range.contains(iommu) {
            return Err(TopologyError::ContainsIommu {
                index,
                range,
                iommu,
            });
        }
        count = count.saturating_add(range.count());
        if count > MAX_ENDPOINTS {
            return Err(TopologyError::TooManyEndpoints { index, count });
        }
    }

    let mut sorted: Vec<_> = specs
        .iter()
        .map(|spec| spec.range)
        .enumerate()
        .map(|(index, range)| (range, index))
        .collect();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        let [a, b] = *pair else { continue };
        if a.0.overlaps(b.0) {
            let ((other, _), (range, index)) = if a.1 < b.1 { (a, b) } else { (b, a) };
            return Err(if range == other {
                TopologyError::Duplicate { index, range }
            } else {
                TopologyError::Overlap {
                    index,
                    range,
                    other,
                }
            });
        }
    }
    Ok(())
}

/// Numbers group names in the order of their first use.
#[derive(Default)]
pub(crate) struct GroupNames {
    pub(crate) names: Vec<GroupName>,
    ids: HashMap<GroupName, GroupId>,
}

impl GroupNames {
    /// The ID of a name. The first use of a name gives it a new ID.
    pub(crate) fn id(&mut self, name: &GroupName) -> GroupId {
        if let Some(&id) = self.ids.get(name) {
            return id;
        }
        // Cannot overflow: there is at most one group per endpoint, and at most `MAX_ENDPOINTS`.
        let id = GroupId(u32::try_from(self.names.len()).unwrap_or(u32::MAX));
        self.names.push(name.clone());
        self.ids.insert(name.clone(), id);
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Iova, IovaRange};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn spec(range: &str, group: Option<&str>) -> EndpointSpec {
        EndpointSpec {
            range: range.parse().expect("a range"),
            group: group.map(|name| GroupName::new(name).expect("a name")),
            reserved: Vec::new(),
        }
    }

    fn topology(specs: &[EndpointSpec]) -> Result<Topology, TopologyError> {
        let iommu = "00:05.0".parse().expect("an address");
        Topology::new(iommu, ReservedRegions::default(), specs)
    }

    fn region(page: u64, kind: ReservedKind) -> ReservedRegion {
        ReservedRegion {
            range: IovaRange::from_len(Iova(page << 12), 1 << 12).expect("a page"),
            kind,
        }
    }

    #[test]
    fn groups_are_numbered_by_first_use() {
        let made = topology(&[
            spec("00:12.0", Some("b")),
            spec("00:10.0", Some("a")),
            spec("00:11.0-00:11.7", Some("b")),
            spec("00:13.0", None),
        ])
        .expect("disjoint");
        let group = |text: &str| {
            let address: PciAddress = text.parse().expect("an address");
            made.endpoint(address.endpoint_id())
                .expect("an endpoint")
                .group
        };
        assert_eq!(group("00:12.0"), Some(GroupId(0)));
        assert_eq!(group("00:11.3"), Some(GroupId(0)));
        assert_eq!(group("00:10.0"), Some(GroupId(1)));
        assert_eq!(group("00:13.0"), None);
        assert_eq!(made.group_count(), 2);
        assert_eq!(
            made.group_name(GroupId(1)).map(GroupName::as_str),
            Some("a")
        );
        assert_eq!(made.group_name(GroupId(2)), None);
    }

    #[test]
    fn an_endpoint_has_common_and_own_regions() {
        let common = ReservedRegions::new(vec![region(9, ReservedKind::Msi)]).expect("one region");
        let mut with_own = spec("00:10.0", None);
        with_own.reserved = vec![region(1, ReservedKind::Reserved)];
        let iommu = "00:05.0".parse().expect("an address");
        let made = Topology::new(iommu, common.clone(), &[with_own, spec("00:11.0", None)])
            .expect("disjoint");
        let reserved: Vec<_> = made.ranges().map(|entry| entry.info.reserved).collect();
        assert_eq!((reserved[0].len(), reserved[1]), (2, &common));
        assert_eq!(made.max_reserved_count(), 2);
        assert_eq!(made.common_reserved(), &common);
    }

    #[test]
    fn an_iommu_has_at_most_the_endpoints_of_a_segment() {
        let whole = spec("0001:00:00.0-0001:ff:1f.7", None);
        let made = topology(std::slice::from_ref(&whole)).expect("65536 endpoints");
        assert_eq!(made.endpoint_count(), MAX_ENDPOINTS);
        assert_eq!(
            topology(&[whole, spec("00:10.0", None)]),
            Err(TopologyError::TooManyEndpoints {
                index: 1,
                count: 65537
            })
        );
    }

    proptest! {
        #[test]
        fn lookups_agree_with_a_plain_map(
            ranges in proptest::collection::vec((0u32..120, 0u32..6, 0u8..4), 0..12),
            own in 0u64..4,
        ) {
            // IDs on both sides of a segment boundary, where neighbours must not be joined.
            let base = 0xffc0;
            let address = |n| PciAddress::from_endpoint_id(EndpointId(base + n));
            let iommu = address(64);
            let mut specs = Vec::new();
            let mut model: BTreeMap<u32, (usize, Option<String>)> = BTreeMap::new();
            let mut clash = false;
            for &(first, span, group) in &ranges {
                let Ok(range) = PciRange::new(address(first), address(first + span)) else {
                    prop_assert!(base + first < 1 << 16 && base + first + span >= 1 << 16);
                    continue;
                };
                let group = (group > 0).then(|| format!("g{group}"));
                for n in first..=first + span {
                    clash |= n == 64;
                    clash |= model.insert(base + n, (specs.len(), group.clone())).is_some();
                }
                specs.push(EndpointSpec {
                    range,
                    group: group.map(|name| GroupName::new(&name).expect("a name")),
                    reserved: (0..own * (specs.len() as u64 % 2))
                        .map(|page| region(page, ReservedKind::Reserved))
                        .collect(),
                });
            }
            let made = Topology::new(iommu, ReservedRegions::default(), &specs);
            prop_assert_eq!(made.is_err(), clash);
            let Ok(made) = made else { return Ok(()) };

            prop_assert_eq!(made.endpoint_count(), model.len() as u64);
            for id in (base - 2..base + 140).chain([0, u32::MAX]) {
                let found = made.endpoint(EndpointId(id));
                let expected = model.get(&id);
                prop_assert_eq!(found.is_some(), expected.is_some());
                if let (Some(found), Some((index, group))) = (found, expected) {
                    let name = found.group.and_then(|id| made.group_name(id));
                    prop_assert_eq!(name.map(GroupName::as_str), group.as_deref());
                    let regions: Vec<_> = found.reserved.iter().copied().collect();
                    prop_assert_eq!(&regions, &specs[*index].reserved);
                }
            }
            let sorted: Vec<_> = made.ranges().map(|entry| entry.range).collect();
            prop_assert!(sorted.windows(2).all(|pair| pair[0].last() < pair[1].first()));
        }
    }
}
