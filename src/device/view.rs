//! Fast access to guest memory during one pass over a ring.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

/// Guest memory, and the region of the last access. The next access nearly always goes to the same region.
///
/// `vm-memory` makes all accesses. The view saves the search for the region, which takes most of the time of an access
/// of a few bytes.
pub struct GuestView<'a> {
    memory: &'a GuestMemoryMmap,
    last: Cell<Option<&'a GuestRegionMmap>>,
}

impl<'a> GuestView<'a> {
    /// A view of all of `memory`.
    pub fn new(memory: &'a GuestMemoryMmap) -> Self {
        Self {
            memory,
            last: Cell::new(None),
        }
    }

    /// Fills `into` from guest-physical `at`. Returns whether the whole range is guest memory.
    pub fn read(&self, at: u64, into: &mut [u8]) -> bool {
        match self.slice(at, into.len()) {
            Some(slice) => {
                slice.copy_to(into);
                true
            }
            None => self.memory.read_slice(into, GuestAddress(at)).is_ok(),
        }
    }

    /// Writes `bytes` at guest-physical `at`. Returns whether the whole range is guest memory.
    pub fn write(&self, at: u64, bytes: &[u8]) -> bool {
        let written = self.write_bytes(at, bytes);
        #[cfg(test)]
        crate::store::crash::point();
        written
    }

    #[inline(always)]
    fn write_bytes(&self, at: u64, bytes: &[u8]) -> bool {
        match self.slice(at, bytes.len()) {
            Some(slice) => {
                slice.copy_from(bytes);
                true
            }
            None => self.memory.write_slice(bytes, GuestAddress(at)).is_ok(),
        }
    }

    /// Reads a little-endian number of a ring, with acquire ordering. `None` if the address is odd or not in guest
    /// memory.
    pub fn load(&self, at: u64) -> Option<u16> {
        let value: u16 = self.slice(at, 2)?.load(0, Ordering::Acquire).ok()?;
        Some(u16::from_le(value))
    }

    /// Writes a little-endian number of a ring, with release ordering. Returns whether the address is even and in
    /// guest memory.
    pub fn store(&self, at: u64, value: u16) -> bool {
        let stored = self
            .slice(at, 2)
            .is_some_and(|slice| slice.store(value.to_le(), 0, Ordering::Release).is_ok());
        #[cfg(test)]
        crate::store::crash::point();
        stored
    }

    /// Whether all of `len` bytes from guest-physical `at` are guest memory.
    pub fn is_backed(&self, at: u64, len: usize) -> bool {
        self.slice(at, len).is_some()
            || GuestMemoryBackend::check_range(self.memory, GuestAddress(at), len)
    }

    /// Tells the processor to fetch the cache line at guest-physical `at`, because a read follows soon. Does nothing
    /// outside of guest memory.
    pub fn prefetch(&self, at: u64) {
        if let Some(slice) = self.slice(at, 1) {
            prefetch(slice.ptr_guard().as_ptr());
        }
    }

    /// `len` bytes from `at`, if they are in one region of guest memory.
    fn slice(&self, at: u64, len: usize) -> Option<VolatileSlice<'a>> {
        if let Some(region) = self.last.get()
            && let Some(slice) = slice_of(region, at, len)
        {
            return Some(slice);
        }
        let region = self.memory.find_region(GuestAddress(at))?;
        self.last.set(Some(region));
        slice_of(region, at, len)
    }
}

fn slice_of(region: &GuestRegionMmap, at: u64, len: usize) -> Option<VolatileSlice<'_>> {
    let offset = at.checked_sub(region.start_addr().0)?;
    region.get_slice(MemoryRegionAddress(offset), len).ok()
}

/// A hint to the processor. Does nothing on architectures for which the standard library has no such instruction.
#[cfg_attr(
    target_arch = "x86_64",
    expect(
        unsafe_code,
        reason = "the standard library has the instruction as an unsafe function"
    )
)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 is in every processor of this architecture, changes no memory and faults at no address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two adjacent regions, a hole, and a third region.
    fn memory() -> GuestMemoryMmap {
        let regions = [(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)];
        GuestMemoryMmap::from_ranges(&regions.map(|(at, len)| (GuestAddress(at), len)))
            .expect("memory")
    }

    #[test]
    fn accesses_cross_regions_but_not_holes() {
        let memory = memory();
        let view = GuestView::new(&memory);
        // Each access follows one to another region.
        for at in [0x1ffc, 0x8000, 0x1000, 0x2ff8] {
            assert!(view.write(at, &at.to_le_bytes()), "{at:#x}");
            let mut bytes = [0; 8];
            assert!(view.read(at, &mut bytes));
            assert_eq!(u64::from_le_bytes(bytes), at);
            assert!(view.is_backed(at, 8));
        }
        for at in [0xfff, 0x2ff9, 0x3000, 0x7fff, 0x8ff9, u64::MAX - 3] {
            assert!(!view.read(at, &mut [0; 8]), "{at:#x}");
            assert!(!view.write(at, &[0; 8]), "{at:#x}");
            assert!(!view.is_backed(at, 8), "{at:#x}");
        }
        assert!(view.store(0x2ffe, 0x1234));
        assert_eq!(view.load(0x2ffe), Some(0x1234));
        for at in [0x2fff, 0x3000, 0x1001, u64::MAX] {
            assert_eq!(view.load(at), None, "{at:#x}");
            assert!(!view.store(at, 1), "{at:#x}");
        }
    }
}
