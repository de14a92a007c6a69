//! The last translation of an access, in the form in which `vm-memory` looks it up.

use vm_memory::{GuestAddress, Iotlb, Permissions};

use crate::address::Access;

/// No access reaches up to here: ranges in `vm-memory` end before an address of 64 bits.
pub(super) const LAST_REACHED: u64 = u64::MAX - 2;

/// What `vm-memory` wants to see a translation in. It holds the last one only, and is checked
/// against the tables each time.
#[derive(Debug)]
pub(super) struct Tlb {
    pub(super) found: Iotlb,
    /// Addresses in it, where there are any.
    range: Option<(u64, u64)>,
    /// If it is one piece: the address it leads to, and the rights.
    piece: Option<(u64, Access)>,
}

impl Tlb {
    pub(super) fn new() -> Self {
        let mut found = Iotlb::new();
        // One entry that nothing is looked up in: with it, the map keeps its memory when the others
        // go, and what is translated takes none.
        let kept = found.set_mapping(
            GuestAddress(LAST_REACHED + 1),
            GuestAddress(0),
            1,
            Permissions::No,
        );
        debug_assert!(kept.is_ok());
        Self {
            found,
            range: None,
            piece: None,
        }
    }

    /// Whether it says of `first..=last` what the tables say.
    pub(super) fn has(&self, first: u64, last: u64, gpa: u64, access: Access) -> bool {
        let (Some((from, to)), Some((leads, rights))) = (self.range, self.piece) else {
            return false;
        };
        from <= first
            && last <= to
            && gpa.wrapping_sub(leads) == first.wrapping_sub(from)
            && rights == access
    }

    pub(super) fn clear(&mut self) {
        self.piece = None;
        if let Some((first, last)) = self.range.take() {
            let length = usize::try_from(last - first + 1).unwrap_or(usize::MAX);
            self.found.invalidate_mapping(GuestAddress(first), length);
        }
    }

    /// Adds a piece after the ones there are.
    pub(super) fn add(&mut self, first: u64, last: u64, gpa: u64, access: Access) {
        let rights = match (access.read, access.write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        };
        let length = usize::try_from(last - first + 1).unwrap_or(usize::MAX);
        let (at, to) = (GuestAddress(first), GuestAddress(gpa));
        let set = self.found.set_mapping(at, to, length, rights);
        debug_assert!(set.is_ok());
        self.piece = self.range.is_none().then_some((gpa, access));
        let from = self.range.map_or(first, |(from, _)| from);
        self.range = Some((from, last));
    }
}
