//! Host groups, with 0, 1 and 2 backends.

use super::*;

#[test]
fn a_group_stays_in_one_domain() {
    with_each_backend_count(|mut iommu, recorders| {
        iommu.attach(G1, D1, false).expect("attached");
        let elsewhere = Err(RequestError::GroupElsewhere {
            endpoint: G2,
            other: G1,
            other_domain: D1,
        });
        assert_eq!(iommu.attach(G2, D2, false), elsewhere);
        assert_eq!(iommu.attach(G2, D2, true), elsewhere);
        assert_eq!(iommu.domains().count(), 1, "D2 was not made");
        iommu.attach(G2, D1, false).expect("to its group");
        iommu.attach(A, D2, false).expect("A is in no group");
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn unattached_members_are_blocked_while_another_is_active() {
    with_each_backend_count(|mut iommu, recorders| {
        assert!(iommu.bypass());
        iommu.attach(G1, D1, false).expect("attached");
        for endpoint in [G2, G3] {
            assert_eq!(dma(&iommu, endpoint), Dma::Blocked);
            assert_eq!(
                translated(&iommu, endpoint, 0x1000),
                Err(FaultReason::Domain)
            );
        }
        assert_eq!(dma(&iommu, A), Dma::Bypass, "in no group");
        check_agreement(&iommu, recorders);

        iommu.attach(G2, D1, false).expect("to its group");
        iommu.detach(G2, D1).expect("detached");
        assert_eq!(dma(&iommu, G2), Dma::Blocked, "G1 is still active");
        check_agreement(&iommu, recorders);
        iommu.set_bypass(false);
        iommu.set_bypass(true);
        check_agreement(&iommu, recorders);

        iommu.detach(G1, D1).expect("detached");
        for endpoint in [G1, G2, G3] {
            assert_eq!(dma(&iommu, endpoint), Dma::Bypass);
        }
        check_agreement(&iommu, recorders);

        iommu.attach(G1, D1, false).expect("attached");
        iommu.reset();
        assert_eq!(dma(&iommu, G2), Dma::Bypass);
        check_agreement(&iommu, recorders);
    });
}

#[test]
fn a_group_moves_one_endpoint_at_a_time_and_the_others_stay_blocked() {
    with_each_backend_count(|mut iommu, recorders| {
        for endpoint in [G1, G2, G3] {
            iommu.attach(endpoint, D1, false).expect("attached");
        }
        iommu.map(D1, &page(1)).expect("mapped");

        iommu.attach(G1, D2, false).expect("the first to move");
        for endpoint in [G2, G3] {
            assert_eq!(dma(&iommu, endpoint), Dma::Blocked);
            assert_eq!(
                translated(&iommu, endpoint, 0x1000),
                Err(FaultReason::Unknown)
            );
            // They stay attached, so a DETACH is still possible.
            assert_eq!(
                iommu.endpoint(endpoint).expect("an endpoint").domain,
                Some(D1)
            );
        }
        check_agreement(&iommu, recorders);
        assert!(matches!(
            iommu.attach(G2, DomainId(3), false),
            Err(RequestError::GroupElsewhere { .. })
        ));
        iommu.attach(G2, D2, false).expect("follows");
        assert_eq!(dma(&iommu, G2), Dma::Translated);
        check_agreement(&iommu, recorders);

        // The driver moves back: the group is in D1 again.
        iommu.attach(G1, D1, false).expect("back");
        assert_eq!(dma(&iommu, G3), Dma::Translated);
        assert_eq!(dma(&iommu, G2), Dma::Blocked);
        assert_eq!(translated(&iommu, G3, 0x1000), Ok(0x4000_1000));
        check_agreement(&iommu, recorders);

        iommu.detach(G1, D1).expect("detached");
        iommu.detach(G3, D1).expect("detached");
        assert_eq!(dma(&iommu, G2), Dma::Translated, "alone in D2");
        check_agreement(&iommu, recorders);
    });
}
