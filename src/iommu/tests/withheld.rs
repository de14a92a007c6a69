//! Endpoints whose places in the guest are wrong or not known.

use super::*;

fn function(endpoint: EndpointId) -> PciRange {
    PciAddress::from_endpoint_id(endpoint).into()
}

#[test]
fn a_withheld_endpoint_is_blocked_and_cannot_be_attached() {
    with_each_backend_count(|mut iommu, recorders| {
        let target = |endpoint: EndpointId| {
            let known = recorders
                .iter()
                .find_map(|r| r.state().targets.get(&endpoint).copied());
            known.unwrap_or(Target::Blocked)
        };
        let is_free = |wanted: Target, endpoint| recorders.is_empty() || target(endpoint) == wanted;
        iommu.attach(A, D1, false).expect("attached");
        iommu.map(D1, &page(1)).expect("mapped");
        iommu.attach(B, D1, false).expect("attached");

        iommu.withhold(vec![function(A), function(RESERVED)]);
        for endpoint in [A, RESERVED] {
            assert_eq!(target(endpoint), Target::Blocked);
            let state = iommu.endpoint(endpoint).expect("there");
            assert!(state.misplaced && state.dma == Dma::Blocked);
            let refused = Err(RequestError::Misplaced(endpoint));
            assert_eq!(iommu.attach(endpoint, D2, false), refused);
        }
        assert!(translated(&iommu, A, 0x1000).is_err());
        // The other member of the domain goes on, and the domain changes under both.
        assert!(translated(&iommu, B, 0x1000).is_ok());
        assert!(is_free(Target::Domain(D1), B));
        iommu.map(D1, &page(2)).expect("mapped");
        iommu.unmap(D1, page(1).range).expect("unmapped");
        // Neither a group nor `bypass` lets one go.
        iommu.set_bypass(false);
        iommu.set_bypass(true);
        assert_eq!(target(RESERVED), Target::Blocked);

        // A and RESERVED change places with B.
        iommu.withhold(vec![function(B)]);
        assert_eq!(target(B), Target::Blocked);
        assert!(is_free(Target::Domain(D1), A) && is_free(Target::Bypass, RESERVED));
        assert!(translated(&iommu, A, 0x2000).is_ok());
        assert!(translated(&iommu, A, 0x1000).is_err());
        iommu.detach(B, D1).expect("it is attached");
        assert_eq!(target(B), Target::Blocked);
        iommu.reset();
        assert_eq!(target(B), Target::Blocked);
        iommu.withhold(Vec::new());
        assert!(is_free(Target::Bypass, B));
        iommu.attach(B, D2, false).expect("attached");
    });
}
