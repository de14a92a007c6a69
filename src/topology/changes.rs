//! Adding and removing endpoints while a VM runs.

use std::collections::HashSet;

use thiserror::Error;

use super::{EndpointSpec, TopologyError};
use super::{
    GroupId, GroupName, MAX_ENDPOINTS, PciRange, ReservedRegions, Topology, TopologyEntry,
};

/// The functions are not endpoints of one configured range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "{range} is not an endpoint, or is not within one configured range; \
     name one that `ctl SOCKET status` lists"
)]
pub struct NoSuchEndpoints {
    /// The functions.
    pub range: PciRange,
}

impl Topology {
    /// Also announces `ranges` to the guest: endpoints may be added there later.
    ///
    /// # Errors
    /// [`TopologyError::ContainsIommu`] with the index of a range that contains the IOMMU's own
    /// function.
    pub fn with_expected(mut self, ranges: Vec<PciRange>) -> Result<Self, TopologyError> {
        let iommu = self.iommu;
        if let Some(index) = ranges.iter().position(|range| range.contains(iommu)) {
            return Err(TopologyError::ContainsIommu {
                index,
                range: ranges[index],
                iommu,
            });
        }
        self.expected = ranges;
        Ok(self)
    }

    /// The ranges in which endpoints may be added later.
    pub fn expected(&self) -> &[PciRange] {
        &self.expected
    }

    /// Whether this range was announced to the guest in advance.
    pub fn is_expected(&self, range: PciRange) -> bool {
        let covers = |e: &PciRange| e.contains(range.first()) && e.contains(range.last());
        self.expected.iter().any(covers)
    }

    /// Adds the endpoints of `spec`, with the common reserved regions and their own.
    ///
    /// # Errors
    /// As [`Topology::new`], with index 0. Nothing has changed.
    pub fn add(&mut self, spec: &EndpointSpec) -> Result<(), TopologyError> {
        let reserved = self
            .common_reserved()
            .merged(&spec.reserved)
            .map_err(|source| TopologyError::Reserved {
                index: 0,
                range: spec.range,
                source,
            })?;
        self.add_with_regions(spec.range, spec.group.as_ref(), reserved)
    }

    /// Adds endpoints with exactly the reserved regions `reserved`.
    ///
    /// # Errors
    /// As [`Topology::add`].
    pub fn add_with_regions(
        &mut self,
        range: PciRange,
        group: Option<&GroupName>,
        reserved: ReservedRegions,
    ) -> Result<(), TopologyError> {
        let index = 0;
        if range.contains(self.iommu) {
            return Err(TopologyError::ContainsIommu {
                index,
                range,
                iommu: self.iommu,
            });
        }
        let count = self.endpoint_count().saturating_add(range.count());
        if count > MAX_ENDPOINTS {
            return Err(TopologyError::TooManyEndpoints { index, count });
        }
        let at = self.entries.partition_point(|e| e.range < range);
        let neighbours = self.entries[..at].last().into_iter();
        let mut neighbours = neighbours.chain(self.entries.get(at));
        if let Some(other) = neighbours.find(|e| e.range.overlaps(range)) {
            return Err(TopologyError::Overlap {
                index,
                range,
                other: other.range,
            });
        }
        let entry = TopologyEntry {
            range,
            group: group.map(|name| self.group_id(name)),
            reserved_set: self.reserved_set_index(reserved),
        };
        self.entries.insert(at, entry);
        Ok(())
    }

    /// Removes endpoints, all of one configured range.
    ///
    /// # Errors
    /// `range` is not within one configured range. Nothing has changed.
    pub fn remove(&mut self, range: PciRange) -> Result<(), NoSuchEndpoints> {
        let (at, entry) = self.find_entry(range)?;
        let rest = |range| TopologyEntry { range, ..entry };
        let kept = entry.range.without(range).map(rest);
        self.entries.splice(at..=at, kept);
        Ok(())
    }

    /// Checks that `range` is within one configured range.
    ///
    /// # Errors
    /// `range` is not within one configured range.
    pub fn check_within_one_range(&self, range: PciRange) -> Result<(), NoSuchEndpoints> {
        self.find_entry(range).map(drop)
    }

    /// The entry that contains the whole of `range`, and its index.
    fn find_entry(&self, range: PciRange) -> Result<(usize, TopologyEntry), NoSuchEndpoints> {
        let before = |e: &TopologyEntry| e.range.last() < range.first();
        let at = self.entries.partition_point(before);
        let entry = self.entries.get(at).copied();
        entry
            .filter(|e| e.range.contains(range.first()) && e.range.contains(range.last()))
            .map(|entry| (at, entry))
            .ok_or(NoSuchEndpoints { range })
    }

    /// The ID of a group. A new group gets an ID that no endpoint uses any more, if there is one.
    fn group_id(&mut self, name: &GroupName) -> GroupId {
        let used: HashSet<_> = self.entries.iter().filter_map(|e| e.group).collect();
        let id = |at: usize| GroupId(u32::try_from(at).unwrap_or(u32::MAX));
        let known = self.group_names.iter().position(|known| known == name);
        if let Some(at) = known {
            return id(at);
        }
        let free = (0..self.group_names.len()).find(|at| !used.contains(&id(*at)));
        match free {
            Some(at) => {
                self.group_names[at] = name.clone();
                id(at)
            }
            None => {
                self.group_names.push(name.clone());
                id(self.group_names.len() - 1)
            }
        }
    }

    /// The index of a set of regions. A new set takes the place of a set that no entry uses any
    /// more, if there is one.
    fn reserved_set_index(&mut self, reserved: ReservedRegions) -> usize {
        if let Some(at) = self.reserved_sets.iter().position(|set| *set == reserved) {
            return at;
        }
        let used: HashSet<_> = self.entries.iter().map(|e| e.reserved_set).collect();
        // Set 0 always stays: it is the common set of all endpoints.
        match (1..self.reserved_sets.len()).find(|at| !used.contains(at)) {
            Some(at) => {
                self.reserved_sets[at] = reserved;
                at
            }
            None => {
                self.reserved_sets.push(reserved);
                self.reserved_sets.len() - 1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::address::{Iova, IovaRange};
    use crate::ids::EndpointId;
    use crate::topology::{PciAddress, ReservedKind, ReservedRegion};

    const IOMMU: u32 = 64;

    fn range(first: u32, last: u32) -> PciRange {
        let at = |n| PciAddress::from_endpoint_id(EndpointId(n));
        PciRange::new(at(first), at(last)).expect("a range")
    }

    fn spec(range: PciRange, group: u8, regions: u64) -> EndpointSpec {
        let region = |page: u64| ReservedRegion {
            range: IovaRange::from_len(Iova(page << 12), 1 << 12).expect("a page"),
            kind: ReservedKind::Reserved,
        };
        EndpointSpec {
            range,
            group: (group > 0).then(|| GroupName::new(&format!("g{group}")).expect("a name")),
            reserved: (0..regions).map(region).collect(),
        }
    }

    fn empty() -> Topology {
        let iommu = PciAddress::from_endpoint_id(EndpointId(IOMMU));
        Topology::new(iommu, ReservedRegions::default(), &[]).expect("no endpoints")
    }

    #[test]
    fn unused_group_ids_and_region_sets_are_reused() {
        let mut made = empty();
        made.add(&spec(range(0, 0), 1, 1)).expect("room");
        for n in 2..100 {
            made.add(&spec(range(8, 9), n, n.into())).map_or_else(
                |refused| assert!(n > 64, "{refused}"),
                |()| made.remove(range(8, 9)).expect("there"),
            );
        }
        assert_eq!((made.group_count(), made.reserved_sets.len()), (2, 3));
        let kept = made.endpoint(EndpointId(0)).expect("there");
        assert_eq!((kept.group, kept.reserved.len()), (Some(GroupId(0)), 1));
    }

    #[test]
    fn too_many_endpoints_are_refused() {
        let mut made = empty();
        made.add(&spec(range(0x1_0000, 0x1_ffff), 0, 0))
            .expect("a segment");
        let refused = made.add(&spec(range(0, 0), 0, 0));
        let count = MAX_ENDPOINTS + 1;
        assert_eq!(
            refused,
            Err(TopologyError::TooManyEndpoints { index: 0, count })
        );
    }

    proptest! {
        #[test]
        fn changes_agree_with_a_plain_map(
            steps in prop::collection::vec((any::<bool>(), 0u32..80, 0u32..6, 0u8..3, 0u64..3), 0..60),
        ) {
            let mut made = empty();
            // By function: the step that added it, its group and its regions.
            let mut model: BTreeMap<u32, (u32, u8, u64)> = BTreeMap::new();
            for (number, (adds, first, span, group, regions)) in (0u32..).zip(steps) {
                let last = first + span;
                let range = range(first, last);
                let there: Vec<_> = (first..=last).filter_map(|n| model.get(&n)).collect();
                if adds {
                    let fits = there.is_empty() && !(first..=last).contains(&IOMMU);
                    let before = made.clone();
                    let added = made.add(&spec(range, group, regions));
                    prop_assert_eq!(added.is_ok(), fits);
                    if fits {
                        model.extend((first..=last).map(|n| (n, (number, group, regions))));
                    } else {
                        prop_assert_eq!(&made, &before);
                    }
                } else {
                    let whole = there.len() == last as usize - first as usize + 1
                        && there.iter().all(|of| of.0 == there[0].0);
                    prop_assert_eq!(made.remove(range).is_ok(), whole);
                    if whole {
                        model.retain(|n, _| !(first..=last).contains(n));
                    }
                }
                prop_assert_eq!(made.endpoint_count(), model.len() as u64);
                for n in 0..90 {
                    let found = made.endpoint(EndpointId(n));
                    let found = found.map(|info| {
                        let group = info.group.and_then(|id| made.group_name(id));
                        (group.map(GroupName::as_str), info.reserved.len() as u64)
                    });
                    let name = |group: u8| ["g1", "g2"].get(usize::from(group).wrapping_sub(1));
                    let expected = model.get(&n).map(|&(_, g, r)| (name(g).copied(), r));
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }
}
