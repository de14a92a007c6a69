//! The keeper has lost the file of a device that the VMM has brought, and still has the iommufd.

use std::sync::atomic::Ordering;

use super::{A, B, Bed, D1, bit};
use crate::backends::iommufd::Pinning;
use crate::ids::{DomainId, EndpointId};
use crate::vfio::fake::KernelState;

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

/// Linux takes a group out of its address space with the last of its devices, so the others cannot be taken out either.
#[test]
fn a_group_that_lacks_a_file_leaves_its_domain_only_with_all_of_them() {
    for (lost, other) in [(A, B), (B, A)] {
        let mut bed = Bed::of_pair(Pinning::Mapped);
        bed.share_memory();
        bed.iommu.driver_has_started();
        bed.give(&[A, B]);
        bed.iommu.attach(A, D1, false).expect("it has come");
        bed.iommu.attach(B, D1, false).expect("its group is there");
        bed.iommu.map(D1, &bed.page(0x1000)).expect("mapped");
        let space = bed.space_of(A).expect("attached");

        bed.files.has_device.store(bit(other), Ordering::Relaxed);
        bed.give(&[]);
        // The process after the next one knows it, too.
        for _ in 0..2 {
            bed.die(true);
            assert_eq!(bed.space_of(A), Some(space), "it cannot be taken out");
            let mapped = bed.files.kernel.state().spaces[&space].len();
            assert_eq!(mapped, 0, "it reaches nothing");
            assert!(bed.is_quarantined(A) && bed.is_quarantined(B));
            for endpoint in [other, lost] {
                let refused = bed.iommu.attach(endpoint, DomainId(2), false);
                let refused = refused.expect_err("it stays there").to_string();
                let name = format!("the file of device {lost} was lost");
                assert!(refused.contains(&name), "{refused}");
                let refused = bed.iommu.detach(endpoint, D1).expect_err("it stays there");
                assert!(refused.to_string().contains("was lost"), "{refused}");
            }
            let mapped = bed.files.kernel.state().spaces[&space].len();
            assert_eq!(mapped, 0, "it reaches nothing still");
        }
        bed.give(&[lost]);
        bed.iommu.attach(other, D1, false).expect("all are there");
        bed.iommu.attach(lost, D1, false).expect("all are there");
        let now = bed.space_of(A).expect("attached");
        assert_ne!(now, space);
        assert_eq!(bed.files.kernel.state().spaces[&now].len(), 1);
        bed.iommu.detach(A, D1).expect("detached");
        bed.iommu.detach(B, D1).expect("detached");
        assert_ne!(bed.space_of(A), Some(now), "it has left the domain");
    }
}

/// The configuration names a device that the VMM has not bound. It may come later.
#[test]
fn a_group_goes_on_without_a_device_that_has_never_come() {
    let mut bed = Bed::of_pair(Pinning::Mapped);
    let unbind = |state: &mut KernelState, endpoint: EndpointId| {
        state.bound.retain(|bound| *bound != endpoint.0);
        let (_, devices) = state.groups.get_mut(&A.0).expect("the group");
        devices.retain(|device| *device != endpoint.0);
    };
    unbind(&mut bed.files.kernel.state(), B);
    bed.share_memory();
    bed.iommu.driver_has_started();
    bed.give(&[A]);
    bed.iommu.attach(A, D1, false).expect("it has come");
    let space = bed.space_of(A).expect("attached");
    bed.die(true);
    assert!(!bed.is_quarantined(A));
    assert_eq!(bed.space_of(A), Some(space));
    // It comes, and the next process lacks it.
    bed.files.kernel.state().bound.push(B.0);
    bed.give(&[A, B]);
    bed.iommu.attach(B, D1, false).expect("it has come");
    bed.files.has_device.store(bit(A), Ordering::Relaxed);
    bed.give(&[]);
    bed.die(true);
    assert!(bed.is_quarantined(A) && bed.is_quarantined(B));
}
