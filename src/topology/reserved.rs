//! Ranges of I/O virtual addresses that the guest must leave alone.

use std::fmt;

use thiserror::Error;

use crate::address::IovaRange;

/// The most reserved regions one endpoint can have.
///
/// A PROBE answer carries all of an endpoint's regions, 24 bytes each, in a buffer that every
/// PROBE request must bring along (`probe_size` of `struct virtio_iommu_config`): the cap keeps it
/// well inside a page.
pub const MAX_RESERVED_REGIONS: usize = 64;

/// What a reserved region is there for (`subtype` of `struct virtio_iommu_probe_resv_mem`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReservedKind {
    /// Mappings there have no effect or do harm: the guest must not make any.
    Reserved,
    /// Writes there are message-signalled interrupts and pass untranslated.
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

/// One range an endpoint's driver may not map.
///
/// A region keeps the bytes it was given: whether a mapping meets it is decided by bytes, not by
/// pages, so that a granule larger than the region needs no rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReservedRegion {
    /// The addresses.
    pub range: IovaRange,
    /// What they are there for.
    pub kind: ReservedKind,
}

impl fmt::Display for ReservedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.range, self.kind)
    }
}

/// The reserved regions of one endpoint: sorted, disjoint, at most one of them for MSIs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ReservedRegions {
    sorted: Vec<ReservedRegion>,
}

impl ReservedRegions {
    /// The set of `regions`, in any order.
    ///
    /// # Errors
    ///
    /// Where two overlap, two are for MSIs, or there are more than [`MAX_RESERVED_REGIONS`].
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

    /// The set of regions that are sorted and disjoint already, with one MSI region at most, and no
    /// more than [`MAX_RESERVED_REGIONS`].
    pub(crate) fn from_disjoint(sorted: Vec<ReservedRegion>) -> Self {
        debug_assert!(Self::new(sorted.clone()).is_ok());
        Self { sorted }
    }

    /// These regions together with `more`.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), for the regions of both together.
    pub fn merged(&self, more: &[ReservedRegion]) -> Result<Self, ReservedError> {
        Self::new([&self.sorted, more].concat())
    }

    /// The first region that shares an address with `range`. O(log n).
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

    /// How many regions there are.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there is no region.
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

/// Reserved regions that do not go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ReservedError {
    /// Two regions share addresses.
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
    /// Two regions are for MSIs.
    #[error(
        "an endpoint has at most one MSI region, but {first} and {second} would both be; \
         leave one out, or keep MSI regions out of the list for all endpoints \
         and give each endpoint its own"
    )]
    TwoMsi {
        /// The region with the lower first address.
        first: ReservedRegion,
        /// The other region.
        second: ReservedRegion,
    },
    /// There are more than [`MAX_RESERVED_REGIONS`].
    #[error(
        "{count} reserved regions for one endpoint, {MAX_RESERVED_REGIONS} are possible; \
         join neighbouring regions"
    )]
    TooMany {
        /// How many there are.
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
    fn a_set_is_sorted_and_found_in() {
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
