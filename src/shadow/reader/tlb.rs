//! The last translation made with an epoch word, in the form in which `vm-memory` looks it up.

use vm_memory::{GuestAddress, Iotlb, Permissions};

use crate::address::Access;

/// The last address that an access can reach: `vm-memory` stores the address after a range in 64 bits.
pub(super) const LAST_REACHED: u64 = u64::MAX - 2;

/// The translation of one range. Each access still walks the page tables and compares the result with this
/// translation. If they match, `vm-memory`'s map need not be rebuilt.
#[derive(Debug)]
pub(super) struct Tlb {
    pub(super) iotlb: Iotlb,
    /// The addresses it translates, `first..=last`, if any.
    range: Option<(u64, u64)>,
    /// If the range is contiguous in guest memory: the guest-physical address of its first byte, and the rights.
    piece: Option<(u64, Access)>,
}

impl Tlb {
    pub(super) fn new() -> Self {
        let mut iotlb = Iotlb::new();
        // An entry above every address that is looked up. An empty map would free its memory, and each
        // translation would allocate it again.
        let kept = iotlb.set_mapping(
            GuestAddress(LAST_REACHED + 1),
            GuestAddress(0),
            1,
            Permissions::No,
        );
        debug_assert!(kept.is_ok());
        Self {
            iotlb,
            range: None,
            piece: None,
        }
    }

    /// Whether it translates `first..=last` to guest-physical addresses from `gpa` on, with the rights `access`.
    /// The caller has read these from the page tables just now.
    pub(super) fn matches(&self, first: u64, last: u64, gpa: u64, access: Access) -> bool {
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
            self.iotlb.invalidate_mapping(GuestAddress(first), length);
        }
    }

    /// Adds the translation of `first..=last`, which must follow the range translated so far.
    pub(super) fn add(&mut self, first: u64, last: u64, gpa: u64, access: Access) {
        let rights = match (access.read, access.write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        };
        let length = usize::try_from(last - first + 1).unwrap_or(usize::MAX);
        let (at, to) = (GuestAddress(first), GuestAddress(gpa));
        let set = self.iotlb.set_mapping(at, to, length, rights);
        debug_assert!(set.is_ok());
        self.piece = self.range.is_none().then_some((gpa, access));
        let from = self.range.map_or(first, |(from, _)| from);
        self.range = Some((from, last));
    }
}
