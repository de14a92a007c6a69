//! Where cloud-hypervisor puts 32-bit BARs.
//!
//! Its allocator (`vm-allocator/src/address.rs`) gives each BAR the highest free addresses of the aperture, aligned to
//! the BAR's size. The aperture is 640 MiB from 0xc0000000 on; PCI segments share it in equal parts, and the last one
//! gets the rest.

/// The first address for 32-bit BARs.
const APERTURE_START: u64 = 0xc000_0000;
const APERTURE_LEN: u64 = 640 << 20;
/// The parts of the segments are multiples of it.
const PART_ALIGNMENT: u64 = 0x1000;

/// The 32-bit BARs of one PCI segment.
#[derive(Clone, Debug)]
pub struct Aperture {
    start: u64,
    end: u64,
    /// First address and size, in descending order.
    taken: Vec<(u64, u64)>,
}

impl Aperture {
    /// The aperture of `segment` in a VM with `segments` segments, without any BAR.
    pub fn new(segment: u16, segments: u16) -> Self {
        let segments = u64::from(segments.max(1));
        let part = APERTURE_LEN / (PART_ALIGNMENT * segments) * PART_ALIGNMENT;
        let segment = u64::from(segment);
        let start = APERTURE_START + segment * part;
        let end = if segment + 1 >= segments {
            APERTURE_START + APERTURE_LEN
        } else {
            start + part
        };
        Self {
            start,
            end,
            taken: Vec::new(),
        }
    }

    /// The address of the next BAR of `size` bytes, a power of two; `None` if there is no room.
    pub fn place(&mut self, size: u64) -> Option<u64> {
        let mut above = self.end;
        let lower = self.taken.iter().copied().chain([(self.start, 0)]);
        let mut found = None;
        for (index, (first, len)) in lower.enumerate() {
            let free_from = (first + len).next_multiple_of(size);
            if above
                .checked_sub(free_from)
                .is_some_and(|room| room >= size)
            {
                found = Some((index, (above - size) / size * size));
                break;
            }
            above = first;
        }
        let (index, address) = found?;
        self.taken.insert(index, (address, size));
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(segment: u16, segments: u16, sizes: &[u64]) -> Vec<Option<u64>> {
        let mut aperture = Aperture::new(segment, segments);
        sizes.iter().map(|&size| aperture.place(size)).collect()
    }

    #[test]
    fn bars_go_downwards_from_the_end() {
        // Seen in guests of cloud-hypervisor ae44c297.
        assert_eq!(places(0, 1, &[0x1000]), [Some(0xe7ff_f000)]);
        assert_eq!(places(0, 1, &[0x10_0000]), [Some(0xe7f0_0000)]);
        // By its rule: the second fits into the gap that the alignment of the first leaves.
        let disk = 0x8_0000;
        assert_eq!(
            places(0, 1, &[disk, disk, 0x1000]),
            [Some(0xe7f8_0000), Some(0xe7f0_0000), Some(0xe7ef_f000)]
        );
        assert_eq!(
            places(0, 1, &[0x1000, 0x10_0000, 0x1000, 0x2000]),
            [
                Some(0xe7ff_f000),
                Some(0xe7e0_0000),
                Some(0xe7ff_e000),
                Some(0xe7ff_c000)
            ]
        );
    }

    #[test]
    fn segments_share_the_aperture() {
        assert_eq!(places(0, 2, &[0x1000]), [Some(0xd3ff_f000)]);
        assert_eq!(places(1, 2, &[0x1000]), [Some(0xe7ff_f000)]);
        // 640 MiB do not divide by three: the last segment has the rest.
        assert_eq!(places(0, 3, &[0x1000]), [Some(0xcd55_4000)]);
        assert_eq!(places(2, 3, &[0x1000]), [Some(0xe7ff_f000)]);
    }

    #[test]
    fn a_full_aperture_has_no_place() {
        assert_eq!(
            places(0, 1, &[256 << 20, 256 << 20, 256 << 20]),
            [Some(0xd000_0000), Some(0xc000_0000), None]
        );
    }
}
