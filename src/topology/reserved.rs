//! Reserved regions: ranges of I/O virtual addresses that the guest must not map.

use std::fmt;

use thiserror::Error;

use crate::address::IovaRange;

/// The maximum number of reserved regions of one endpoint.
///
/// A PROBE answer carries all regions of an endpoint, 24 bytes each, and every PROBE request must
/// bring a buffer for the largest answer (`probe_size` of `struct virtio_iommu_config`). The cap
/// keeps that buffer well below a page.
pub const MAX_RESERVED_REGIONS: usize = 64;

/// The kind of a reserved region (`subtype` of `struct virtio_iommu_probe_resv_mem`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReservedKind {
    /// The guest must not map it: mappings there have no effect or do harm.
    Reserved,
    /// Writes to it are message-signalled interrupts and pass untranslated.
    Msi,
}

impl fmt::Display for ReservedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reserved => "reserved",
            Self::Msi => "msi",
        })
    }
}

/// One range that an endpoint's driver must not map.
///
/// A region keeps its exact bytes. Overlaps are checked by bytes and not by pages, so a granule
/// larger than the region needs no rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReservedRegion {
    /// The addresses.
    pub range: IovaRange,
    /// The kind of the region.
    pub kind: ReservedKind,
}

impl fmt::Display for ReservedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.range, self.kind)
    }
}

/// The reserved regions of one endpoint: sorted, disjoint, with at most one MSI region.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ReservedRegions {
    sorted: Vec<ReservedRegion>,
}

impl ReservedRegions {
    /// The set of `regions`, which may be in any order.
    ///
    /// # Errors
    ///
    /// Two regions overlap, two are MSI regions, or there are more than [`MAX_RESERVED_REGIONS`].
    pub fn new(mut regions: Vec<ReservedRegion>) -> Result<Self, ReservedError> {
        if regions.len() > MAX_RESERVED_REGIONS {
            return Err(ReservedError::TooMany {
                count: regions.len(),
            });
        }
        regions.sort_by_key(|region| region.range);
        for pair in regions.windows(2) {
            if let [first, second] = *pair
                && first.range.overlaps(second.range)
            {
                return Err(ReservedError::Overlap { first, second });
            }
        }
        let mut msi = regions
            .iter()
            .filter(|region| region.kind == ReservedKind::Msi);
        if let (Some(&first), Some(&second)) = (msi.next(), msi.next()) {
            return Err(ReservedError::TwoMsi { first, second });
        }
        Ok(Self { sorted: regions })
    }

    /// The set of regions that are already valid: sorted, disjoint, with at most one MSI region, and at
    /// most [`MAX_RESERVED_REGIONS`].
    pub(crate) fn from_disjoint(sorted: Vec<ReservedRegion>) -> Self {
        debug_assert!(Self::new(sorted.clone()).is_ok());
        Self { sorted }
    }

    /// The union of these regions and `more`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), for the union.
    pub fn merged(&self, more: &[ReservedRegion]) -> Result<Self, ReservedError> {
        Self::new([&self.sorted, more].concat())
    }

    /// The first region that overlaps `range`. O(log n).
    pub fn overlapping(&self, range: IovaRange) -> Option<&ReservedRegion> {
        let at = self
            .sorted
            .partition_point(|region| region.range.last() < range.first());
        self.sorted
            .get(at)
            .filter(|region| region.range.overlaps(range))
    }

    /// The regions in ascending order.
    pub fn iter(&self) -> std::slice::Iter<'_, ReservedRegion> {
        self.sorted.iter()
    }

    /// The number of regions.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there are no regions.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }
}

impl<'a> IntoIterator for &'a ReservedRegions {
    type Item = &'a ReservedRegion;
    type IntoIter = std::slice::Iter<'a, ReservedRegion>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The reserved regions are invalid together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ReservedError {
    /// Two regions overlap.
    #[error(
        "reserved regions {first} and {second} overlap; \
         make one region of them or move their bounds apart"
    )]
    Overlap {
        /// The region with the lower first address.
        first: ReservedRegion,
        /// The other region.
        second: ReservedRegion,
    },
    /// Two regions are MSI regions.
    #[error(
        "an endpoint has at most one MSI region, but {first} and {second} would both be MSI regions; \
         leave one out, or keep MSI regions out of the list for all endpoints \
         and give each endpoint its own"
    )]
    TwoMsi {
        /// The region with the lower first address.
        first: ReservedRegion,
        /// The other region.
        second: ReservedRegion,
    },
    /// There are more than [`MAX_RESERVED_REGIONS`] regions.
    #[error(
        "{count} reserved regions for one endpoint, {MAX_RESERVED_REGIONS} are possible; \
         join adjacent regions"
    )]
    TooMany {
        /// The number of regions.
        count: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Iova;
    use proptest::prelude::*;

    fn region(first: u64, last: u64, kind: ReservedKind) -> ReservedRegion {
        ReservedRegion {
            range: IovaRange::new(Iova(first), Iova(last)).expect("first <= last"),
            kind,
        }
    }

    #[test]
    fn a_set_is_sorted_and_searchable() {
        let set = ReservedRegions::new(vec![
            region(0x3000, 0x3fff, ReservedKind::Msi),
            region(0x1000, 0x1fff, ReservedKind::Reserved),
        ])
        .expect("disjoint");
        assert_eq!(set.len(), 2);
        let probe = |first, last| {
            set.overlapping(IovaRange::new(Iova(first), Iova(last)).expect("range"))
                .map(|found| found.range.first().0)
        };
        assert_eq!(probe(0, 0xfff), None);
        assert_eq!(probe(0, 0x1000), Some(0x1000));
        assert_eq!(probe(0x1fff, 0x3000), Some(0x1000));
        assert_eq!(probe(0x2000, 0x2fff), None);
        assert_eq!(probe(0x3fff, u64::MAX), Some(0x3000));
        assert_eq!(probe(0x4000, u64::MAX), None);
    }

    #[test]
    fn overlaps_and_second_msi_regions_are_refused_by_name() {
        let low = region(0, 0x1fff, ReservedKind::Reserved);
        let high = region(0x1000, 0x2fff, ReservedKind::Reserved);
        let base = ReservedRegions::new(vec![high]).expect("one");
        let error = base.merged(&[low]).expect_err("they overlap");
        assert_eq!(
            error,
            ReservedError::Overlap {
                first: low,
                second: high
            }
        );
        assert!(error.to_string().contains("0x0..=0x1fff:reserved"));
        assert!(error.to_string().contains("0x1000..=0x2fff:reserved"));

        let one = region(0x10_0000, 0x1f_ffff, ReservedKind::Msi);
        let two = region(0x30_0000, 0x3f_ffff, ReservedKind::Msi);
        let base = ReservedRegions::new(vec![two]).expect("one");
        assert_eq!(
            base.merged(&[one]),
            Err(ReservedError::TwoMsi {
                first: one,
                second: two
            })
        );
    }

    #[test]
    fn the_number_of_regions_is_bounded() {
        let many = |count: u64| {
            (0..count)
                .map(|n| region(n << 12, (n << 12) + 0xfff, ReservedKind::Reserved))
                .collect::<Vec<_>>()
        };
        let full = ReservedRegions::new(many(64)).expect("as many as fit");
        assert_eq!(
            full.merged(&[region(1 << 40, 1 << 41, ReservedKind::Reserved)]),
            Err(ReservedError::TooMany { count: 65 })
        );
        assert_eq!(
            ReservedRegions::new(many(65)),
            Err(ReservedError::TooMany { count: 65 })
        );
    }

    proptest! {
        #[test]
        fn lookups_agree_with_a_linear_search(
            pairs in proptest::collection::vec((0u64..64, 0u64..4), 0..12),
            first in 0u64..80,
            span in 0u64..16,
        ) {
            let regions: Vec<_> = pairs
                .into_iter()
                .map(|(first, span)| region(first, first + span, ReservedKind::Reserved))
                .collect();
            let clash = regions.iter().enumerate().any(|(n, a)| {
                regions[..n].iter().any(|b| a.range.overlaps(b.range))
            });
            let set = ReservedRegions::new(regions.clone());
            prop_assert_eq!(set.is_err(), clash);
            if let Ok(set) = set {
                let wanted = IovaRange::new(Iova(first), Iova(first + span)).expect("range");
                let expected = regions
                    .iter()
                    .filter(|r| r.range.overlaps(wanted))
                    .min_by_key(|r| r.range);
                prop_assert_eq!(set.overlapping(wanted), expected);
            }
        }
    }
}
