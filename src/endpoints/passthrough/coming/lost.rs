//! The keeper has lost the file of a device that the VMM has brought, and still has the iommufd.

use std::sync::atomic::Ordering;

use super::{A, B, Bed, D1, bit};
use crate::backends::iommufd::Pinning;
use crate::ids::DomainId;

/// The device is in the domain's address space, and only the VMM can give its file again.
#[test]
fn a_device_whose_file_was_lost_leaves_its_domain_only_with_the_file() {
    for is_memory_same in [true, false] {
        let mut bed = Bed::new(Pinning::Mapped, true);
        bed.share_memory();
        bed.iommu.driver_has_started();
        bed.give(&[A, B]);
        bed.iommu.attach(A, D1, false).expect("it has come");
        bed.iommu.attach(B, D1, false).expect("it has come");
        bed.iommu.map(D1, &bed.page(0x1000)).expect("mapped");
        let space = bed.space_of(A).expect("attached");

        bed.files.has_device.store(bit(B), Ordering::Relaxed);
        bed.give(&[]);
        bed.die(is_memory_same);
        assert_eq!(bed.space_of(A), Some(space), "it cannot be taken out");
        let mapped = bed.files.kernel.state().spaces[&space].len();
        assert_eq!(mapped, 0, "it reaches nothing");
        assert_eq!(
            (bed.is_quarantined(A), bed.is_quarantined(B)),
            (true, false)
        );
        let other = bed.space_of(B).expect("attached");
        assert_ne!(other, space);
        assert_eq!(bed.files.kernel.state().spaces[&other].len(), 1);
        let refused = bed.iommu.attach(A, D1, false).expect_err("it stays there");
        assert!(refused.to_string().contains("was lost"), "{refused}");
        // Its file comes with a request that fails.
        bed.give(&[A]);
        {
            let mut state = bed.files.kernel.state();
            let next = state.calls + 1;
            state.fail.push((next, libc::ENOMEM));
        }
        bed.iommu
            .attach(A, DomainId(2), false)
            .expect_err("no memory");
        assert!(bed.is_quarantined(A));
        assert_eq!(bed.space_of(A), None, "it is blocked");
        bed.iommu.attach(A, D1, false).expect("its file has come");
        assert_eq!(bed.space_of(A), Some(other));
    }
}
