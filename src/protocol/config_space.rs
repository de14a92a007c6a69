//! The device configuration space. The driver may write one byte of it: `bypass`.

use zerocopy::IntoBytes;

use super::wire::ConfigLayout;
use crate::address::{IovaRange, PageMask};

/// Size of the configuration space in bytes.
pub const CONFIG_LEN: usize = size_of::<ConfigLayout>();

/// Offset of `bypass` in the configuration space.
pub const BYPASS_OFFSET: usize = 36;

/// The constant fields of the configuration space: all but `bypass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    /// Page sizes.
    pub page_sizes: PageMask,
    /// The addresses that the IOMMU translates.
    pub input_range: IovaRange,
    /// Highest domain ID; the lowest is 0.
    pub last_domain: u32,
    /// Size of PROBE's property list in bytes.
    pub probe_size: u32,
}

impl ConfigSpace {
    /// Exactly `len` bytes from `offset` on. Bytes past the end of the space are zero.
    pub fn read(&self, bypass: bool, offset: u32, len: u32) -> Vec<u8> {
        let layout = ConfigLayout {
            page_size_mask: self.page_sizes.bits().into(),
            input_start: self.input_range.first().0.into(),
            input_end: self.input_range.last().0.into(),
            domain_start: 0.into(),
            domain_end: self.last_domain.into(),
            probe_size: self.probe_size.into(),
            bypass: bypass.into(),
            reserved: [0; 3],
        };
        let mut out = vec![0; len as usize];
        let bytes = layout.as_bytes().get(offset as usize..).unwrap_or(&[]);
        let shared = bytes.len().min(out.len());
        out[..shared].copy_from_slice(&bytes[..shared]);
        out
    }

    /// The value that a write of `bytes` at `offset` gives to `bypass`. `None` if the write does not
    /// cover that byte, or gives it a value other than 0 and 1. All other fields are read-only.
    pub fn written_bypass(offset: u32, bytes: &[u8]) -> Option<bool> {
        let at = BYPASS_OFFSET.checked_sub(offset as usize)?;
        match bytes.get(at)? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Iova;

    fn space() -> ConfigSpace {
        ConfigSpace {
            page_sizes: PageMask::TABLE,
            input_range: IovaRange::new(Iova(0), Iova((1 << 48) - 1)).expect("a range"),
            last_domain: 0xffff,
            probe_size: 512,
        }
    }

    #[test]
    fn reads_of_any_offset_and_length_return_all_bytes() {
        let whole = space().read(true, 0, 40);
        assert_eq!(whole[..8], 0x4020_1000u64.to_le_bytes());
        assert_eq!(whole[16..24], 0xffff_ffff_ffffu64.to_le_bytes());
        assert_eq!(whole[28..36], [0xff, 0xff, 0, 0, 0, 2, 0, 0]);
        assert_eq!(whole[36..], [1, 0, 0, 0]);
        for offset in 0..50u32 {
            for len in 0..50u32 {
                let mut expected = whole.clone();
                expected.resize(100, 0);
                let (from, to) = (offset as usize, (offset + len) as usize);
                assert_eq!(space().read(true, offset, len), expected[from..to]);
            }
        }
        assert_eq!(space().read(true, u32::MAX, 4), [0; 4]);
    }

    #[test]
    fn only_bypass_can_be_written_and_only_with_0_or_1() {
        assert_eq!(ConfigSpace::written_bypass(36, &[1]), Some(true));
        assert_eq!(ConfigSpace::written_bypass(36, &[0]), Some(false));
        assert_eq!(ConfigSpace::written_bypass(36, &[2]), None);
        assert_eq!(ConfigSpace::written_bypass(36, &[0x81]), None);
        assert_eq!(ConfigSpace::written_bypass(37, &[1]), None);
        assert_eq!(ConfigSpace::written_bypass(35, &[1]), None);
        assert_eq!(ConfigSpace::written_bypass(32, &[0xff; 4]), None);
        assert_eq!(ConfigSpace::written_bypass(u32::MAX, &[1]), None);
        let mut whole = [0xff; 40];
        whole[36] = 1;
        assert_eq!(ConfigSpace::written_bypass(0, &whole), Some(true));
    }
}
