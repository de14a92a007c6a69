//! Addresses, closed ranges, access rights and page masks.
//!
//! Each address space has a type, without conversions between them: only the page table turns an
//! [`Iova`] into a [`Gpa`].

use std::fmt;

/// An I/O virtual address, which an endpoint puts on the bus. In bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Iova(pub u64);

/// A guest-physical address. In bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gpa(pub u64);

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Gpa {
    /// This address plus `offset` bytes; `None` past 2^64 - 1.
    pub fn checked_add(self, offset: u64) -> Option<Self> {
        self.0.checked_add(offset).map(Self)
    }
}

/// A closed, never empty range of I/O virtual addresses: `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IovaRange {
    first: u64,
    last: u64,
}

impl IovaRange {
    /// All addresses: `0..=2^64 - 1`.
    pub const ALL: Self = Self {
        first: 0,
        last: u64::MAX,
    };

    /// The range `first..=last`; `None` if `last < first`.
    pub fn new(first: Iova, last: Iova) -> Option<Self> {
        (first.0 <= last.0).then_some(Self {
            first: first.0,
            last: last.0,
        })
    }

    /// The range of `len` bytes from `first`; `None` if `len` is 0 or the range passes 2^64 - 1.
    pub fn from_len(first: Iova, len: u64) -> Option<Self> {
        let last = first.0.checked_add(len.checked_sub(1)?)?;
        Self::new(first, Iova(last))
    }

    /// All addresses of `bits` bits: `0..=2^bits - 1`; [`Self::ALL`] for 64 bits or more.
    pub fn of_width(bits: u8) -> Self {
        let size = 1u64.checked_shl(bits.into());
        Self {
            first: 0,
            last: size.map_or(u64::MAX, |size| size - 1),
        }
    }

    /// The first address.
    pub fn first(self) -> Iova {
        Iova(self.first)
    }

    /// The last address, which belongs to the range.
    pub fn last(self) -> Iova {
        Iova(self.last)
    }

    /// The distance from the first address to the last in bytes: the length less one, which always fits.
    pub fn span(self) -> u64 {
        self.last - self.first
    }

    /// The length in bytes; `None` for [`Self::ALL`], whose length is 2^64.
    pub fn len_bytes(self) -> Option<u64> {
        self.span().checked_add(1)
    }

    /// Whether `address` lies in the range.
    pub fn contains(self, address: Iova) -> bool {
        (self.first..=self.last).contains(&address.0)
    }

    /// Whether every address of `other` lies in this range.
    pub fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Whether the two ranges share an address.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The addresses the two ranges share, if any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(
            Iova(self.first.max(other.first)),
            Iova(self.last.min(other.last)),
        )
    }

    /// The whole pages of `granule` bytes in the range, if there is one. `granule` is a power of two.
    pub fn whole_pages(self, granule: u64) -> Option<Self> {
        let (first, last) = whole_pages(self.first, self.last, granule)?;
        Some(Self { first, last })
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.first, self.last)
    }
}

/// A closed range of guest-physical addresses, `first..=last`; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpaRange {
    first: u64,
    last: u64,
}

impl GpaRange {
    /// The range of `len` bytes from `first`; `None` if `len` is 0 or the range passes 2^64 - 1.
    pub fn from_len(first: Gpa, len: u64) -> Option<Self> {
        let last = first.0.checked_add(len.checked_sub(1)?)?;
        Some(Self {
            first: first.0,
            last,
        })
    }

    /// The first address.
    pub fn first(self) -> Gpa {
        Gpa(self.first)
    }

    /// The last address, which belongs to the range.
    pub fn last(self) -> Gpa {
        Gpa(self.last)
    }

    /// The distance from the first address to the last in bytes: the length less one, which always fits.
    pub fn span(self) -> u64 {
        self.last - self.first
    }

    /// The I/O virtual addresses with the same numbers, as in bypass mode.
    pub fn identity(self) -> IovaRange {
        IovaRange {
            first: self.first,
            last: self.last,
        }
    }

    /// Whether `address` lies in the range.
    pub fn contains(self, address: Gpa) -> bool {
        (self.first..=self.last).contains(&address.0)
    }

    /// The addresses the two ranges share, if any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last })
    }

    /// The whole pages of `granule` bytes in the range, if there is one. `granule` is a power of two.
    pub fn whole_pages(self, granule: u64) -> Option<Self> {
        let (first, last) = whole_pages(self.first, self.last, granule)?;
        Some(Self { first, last })
    }
}

/// Rounds a closed range inwards to multiples of `granule`, a power of two; `None` if nothing is left.
#[inline]
fn whole_pages(first: u64, last: u64, granule: u64) -> Option<(u64, u64)> {
    let mask = granule - 1;
    let first = first.checked_add(first.wrapping_neg() & mask)?;
    // The end of a range up to 2^64 - 1 wraps to 0, which is a multiple.
    let last = last.checked_sub(last.wrapping_add(1) & mask)?;
    (first <= last).then_some((first, last))
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.first, self.last)
    }
}

/// The kind of an access, or the accesses that a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// The endpoint reads memory.
    pub read: bool,
    /// The endpoint writes memory.
    pub write: bool,
}

impl Access {
    /// Neither read nor write.
    pub const NONE: Self = Self {
        read: false,
        write: false,
    };
    /// Read only.
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
    /// Write only.
    pub const WRITE: Self = Self {
        read: false,
        write: true,
    };
    /// Read and write.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
    };

    /// Whether these rights include every right of `wanted`.
    pub fn allows(self, wanted: Self) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.read, self.write) {
            (false, false) => "--",
            (true, false) => "r-",
            (false, true) => "-w",
            (true, true) => "rw",
        })
    }
}

/// A mapping, as a MAP request creates it: `range` translates to the addresses from `gpa` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The I/O virtual addresses.
    pub range: IovaRange,
    /// The guest-physical address that the first byte of `range` translates to.
    pub gpa: Gpa,
    /// The accesses that endpoints may make.
    pub access: Access,
    /// The target is device memory (`VIRTIO_IOMMU_MAP_F_MMIO`).
    pub mmio: bool,
}

impl Mapping {
    /// The guest-physical addresses that `range` translates to; `None` if they pass 2^64 - 1.
    pub fn target(&self) -> Option<GpaRange> {
        let last = self.gpa.checked_add(self.range.span())?;
        Some(GpaRange {
            first: self.gpa.0,
            last: last.0,
        })
    }

    /// The part of the mapping that begins with the byte that translates to `gpa`; `None` if no
    /// byte does.
    pub fn part_from(&self, gpa: Gpa) -> Option<Self> {
        let skipped = gpa.0.checked_sub(self.gpa.0)?;
        let first = Iova(self.range.first.checked_add(skipped)?);
        Some(Self {
            range: IovaRange::new(first, self.range.last())?,
            gpa,
            ..*self
        })
    }

    /// The part of the mapping that translates to addresses in `target`; `None` if no part does.
    pub fn part_in(&self, target: GpaRange) -> Option<Self> {
        let shared = self.target()?.intersection(target)?;
        let first = self.range.first + (shared.first - self.gpa.0);
        Some(Self {
            range: IovaRange {
                first,
                last: first + shared.span(),
            },
            gpa: shared.first(),
            ..*self
        })
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mmio = if self.mmio { " mmio" } else { "" };
        write!(f, "{} -> {} {}{mmio}", self.range, self.gpa, self.access)
    }
}

/// A set of page sizes, one bit each: bit `n` stands for `2^n` bytes
/// (`page_size_mask` of `struct virtio_iommu_config`). Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageMask(u64);

impl PageMask {
    /// The sizes the page table stores as one entry: 4 KiB, 2 MiB and 1 GiB.
    pub const TABLE: Self = Self(1 << 12 | 1 << 21 | 1 << 30);

    /// The mask; `None` if no bit is set.
    pub fn new(bits: u64) -> Option<Self> {
        (bits != 0).then_some(Self(bits))
    }

    /// The bits, as in the configuration space.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// The smallest page size in bytes: the granularity of mappings.
    pub fn granule(self) -> u64 {
        1 << self.0.trailing_zeros()
    }

    /// Whether `address` is a multiple of the granule.
    pub fn is_aligned(self, address: u64) -> bool {
        address & (self.granule() - 1) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).expect("first <= last")
    }

    #[test]
    fn ranges_are_closed_and_reach_the_last_address() {
        assert!(IovaRange::new(Iova(1), Iova(0)).is_none());
        assert!(IovaRange::from_len(Iova(0), 0).is_none());
        assert!(IovaRange::from_len(Iova(u64::MAX), 2).is_none());
        let top = IovaRange::from_len(Iova(u64::MAX), 1).expect("one byte");
        assert_eq!(top.last(), Iova(u64::MAX));
        assert_eq!(IovaRange::ALL.len_bytes(), None);
        assert_eq!(range(0, 0xfff).len_bytes(), Some(0x1000));
        assert!(range(0, 9).overlaps(range(9, 10)));
        assert!(!range(0, 9).overlaps(range(10, 10)));
        assert_eq!(range(0, 9).intersection(range(5, 20)), Some(range(5, 9)));
        assert_eq!(range(0, 4).intersection(range(5, 20)), None);
        assert!(range(0, 9).covers(range(0, 9)) && !range(0, 9).covers(range(0, 10)));
    }

    #[test]
    fn ranges_are_rounded_inwards_to_whole_pages() {
        let pages = |first, last| range(first, last).whole_pages(0x1000);
        assert_eq!(pages(0x1000, 0x2fff), Some(range(0x1000, 0x2fff)));
        assert_eq!(pages(0xfff, 0x3000), Some(range(0x1000, 0x2fff)));
        assert_eq!(pages(0x1001, 0x2ffe), None);
        assert_eq!(pages(0x1001, 0x2fff), Some(range(0x2000, 0x2fff)));
        assert_eq!(pages(0, 0xffe), None);
        assert_eq!(pages(0, u64::MAX), Some(IovaRange::ALL));
        assert_eq!(
            pages(1, u64::MAX - 1),
            Some(range(0x1000, u64::MAX - 0x1000))
        );
        assert_eq!(pages(u64::MAX, u64::MAX), None);
    }

    #[test]
    fn a_width_gives_its_last_address() {
        assert_eq!(IovaRange::of_width(39), range(0, (1 << 39) - 1));
        assert_eq!(IovaRange::of_width(64), IovaRange::ALL);
    }

    #[test]
    fn the_granule_is_the_lowest_bit() {
        let mask = PageMask::new(1 << 16 | 1 << 21).expect("not empty");
        assert_eq!(mask.granule(), 0x1_0000);
        assert!(mask.is_aligned(0x2_0000) && !mask.is_aligned(0x1000));
        assert!(PageMask::new(0).is_none());
    }

    #[test]
    fn access_rights_compare_bit_by_bit() {
        assert!(Access::READ_WRITE.allows(Access::WRITE));
        assert!(!Access::WRITE.allows(Access::READ));
        assert!(Access::NONE.allows(Access::NONE));
    }
}
