//! Where the registers are: BARs, the structures in BAR 0, and the capabilities that name them.

use std::ops::Range;

use crate::device::QUEUES;

/// BAR 0, 64 bits wide: all structures of virtio and MSI-X.
pub(super) const REGISTERS_BAR: u32 = 0;
/// Bytes of BAR 0.
pub(super) const REGISTERS_BYTES: u64 = 0x8000;
/// BAR 2, 32 bits wide: present only with a [`TrappedBar`](super::trapped_bar::TrappedBar). BAR 1 is the upper half
/// of BAR 0.
pub(super) const TRAPPED_BAR: u32 = 2;
/// Bytes of BAR 2.
pub(super) const TRAPPED_BYTES: u64 = 0x1000;

/// The number of MSI-X vectors: configuration changes, the request queue, the event queue.
pub(super) const VECTORS: u16 = 3;
/// `VIRTIO_MSI_NO_VECTOR`.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Offset of the common configuration in BAR 0. Each structure has a page of its own.
pub(super) const COMMON_AT: u32 = 0x0000;
/// Bytes of the common configuration, up to the fields of features that this device does not offer.
pub(super) const COMMON_BYTES: u32 = 56;
/// Offset of the ISR status.
pub(super) const ISR_AT: u32 = 0x1000;
/// Bytes of the ISR status.
pub(super) const ISR_BYTES: u32 = 1;
/// Offset of the device configuration.
pub(super) const DEVICE_AT: u32 = 0x2000;
/// Bytes of the device configuration.
pub(super) const DEVICE_BYTES: u32 = 40;
/// Offset of the notification structure.
pub(super) const NOTIFY_AT: u32 = 0x3000;
/// Bytes between the notification addresses of two queues.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// Bytes of the notification structure.
pub(super) const NOTIFY_BYTES: u32 = NOTIFY_MULTIPLIER * 2;
const _: () = assert!(QUEUES == 2);
/// Offset of the MSI-X table. Not in a page with anything else: cloud-hypervisor doubles the BAR otherwise, and a VMM
/// that maps BARs could not trap the table alone.
pub(super) const TABLE_AT: u32 = 0x4000;
/// Bytes of the MSI-X table.
pub(super) const TABLE_BYTES: u32 = 16 * VECTORS as u32;
/// Offset of the pending bits.
pub(super) const PENDING_AT: u32 = 0x5000;
/// Bytes of the pending bits.
pub(super) const PENDING_BYTES: u32 = 8;

/// A structure in BAR 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Structure {
    Common,
    Isr,
    Device,
    Notify,
    Table,
    Pending,
}

impl Structure {
    const ALL: [Self; 6] = [
        Self::Common,
        Self::Isr,
        Self::Device,
        Self::Notify,
        Self::Table,
        Self::Pending,
    ];

    fn bytes(self) -> Range<u64> {
        let (at, len) = match self {
            Self::Common => (COMMON_AT, COMMON_BYTES),
            Self::Isr => (ISR_AT, ISR_BYTES),
            Self::Device => (DEVICE_AT, DEVICE_BYTES),
            Self::Notify => (NOTIFY_AT, NOTIFY_BYTES),
            Self::Table => (TABLE_AT, TABLE_BYTES),
            Self::Pending => (PENDING_AT, PENDING_BYTES),
        };
        at.into()..u64::from(at) + u64::from(len)
    }

    /// The parts of `len` bytes from `offset` on that are in structures: the structure, the offset in it, and the
    /// bytes of the access.
    pub(super) fn parts(
        offset: u64,
        len: usize,
    ) -> impl Iterator<Item = (Self, usize, Range<usize>)> {
        let end = offset.saturating_add(len as u64);
        Self::ALL.into_iter().filter_map(move |structure| {
            let whole = structure.bytes();
            let (first, last) = (offset.max(whole.start), end.min(whole.end));
            if first >= last {
                return None;
            }
            let index = |address: u64, from: u64| usize::try_from(address - from).ok();
            let part = index(first, offset)?..index(last, offset)?;
            Some((structure, index(first, whole.start)?, part))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_do_not_share_pages() {
        for (n, one) in Structure::ALL.into_iter().enumerate() {
            assert!(one.bytes().end <= REGISTERS_BYTES);
            for other in Structure::ALL.into_iter().skip(n + 1) {
                assert!((one.bytes().end - 1) >> 12 < other.bytes().start >> 12);
            }
        }
    }

    #[test]
    fn an_access_is_split_at_the_structures() {
        let parts = |offset, len| Structure::parts(offset, len).collect::<Vec<_>>();
        assert_eq!(parts(0x14, 1), [(Structure::Common, 0x14, 0..1)]);
        assert_eq!(parts(0x36, 8), [(Structure::Common, 0x36, 0..2)]);
        assert_eq!(parts(0x38, 0xfc8), []);
        assert_eq!(
            parts(0x20, 0x1000),
            [
                (Structure::Common, 0x20, 0..0x18),
                (Structure::Isr, 0, 0xfe0..0xfe1)
            ]
        );
        assert_eq!(parts(0x5004, 0), []);
        assert_eq!(parts(0, 0x8000).len(), 6);
        assert_eq!(parts(u64::MAX, 5), []);
    }
}
