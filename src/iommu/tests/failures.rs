//! Backends that fail: each call of a long script, and unmaps in particular.

use super::*;

/// Fails every backend call in turn. The core, the tables and the backends must agree afterwards, and
/// a request that was refused without quarantine must have changed nothing.
#[test]
fn core_and_backends_agree_after_any_failed_backend_call() {
    let script = [
        Op::Attach(A, D1, false),
        Op::Map(D1, page(1)),
        Op::Map(D1, page(2)),
        Op::Attach(B, D1, false),
        Op::Map(D1, page(3)),
        Op::Unmap(D1, range(0x1000, 0x1fff)),
        Op::Attach(A, D2, false),
        Op::Map(D2, page(1)),
        Op::Attach(G1, D2, false),
        Op::Attach(G2, D2, false),
        Op::Attach(G1, D1, false),
        Op::Attach(G2, D1, false),
        Op::Attach(RESERVED, DomainId(3), true),
        Op::Bypass(false),
        Op::Detach(B, D1),
        Op::Unmap(D2, IovaRange::ALL),
        Op::Detach(A, D2),
        Op::Reset,
    ];
    for count in 1..=2 {
        for victim in 0..count {
            let mut failed_calls = 0;
            for n in 1.. {
                let (mut iommu, recorders) = with_backends(count);
                let before = recorders[victim].state().calls;
                recorders[victim].state().fail_call = Some(before + n);
                let mut hit = false;
                for op in script {
                    let snap = snapshot(&iommu);
                    let result = run(&mut iommu, op);
                    if let Err(error) = &result
                        && !matches!(error, RequestError::Quarantined { .. })
                    {
                        assert_eq!(snapshot(&iommu), snap, "{op:?} failed with {error}");
                    }
                    hit |= recorders[victim].state().calls >= before + n;
                    check_agreement(&iommu, &recorders);
                }
                if !hit {
                    break;
                }
                failed_calls += 1;
                iommu.disconnect();
                iommu.connect();
                check_agreement(&iommu, &recorders);
                assert!(
                    iommu
                        .endpoints(usize::MAX, 10)
                        .all(|e| e.dma == Dma::Bypass),
                    "a new VM finds every endpoint usable"
                );
            }
            assert!(failed_calls >= 10, "only {failed_calls} calls could fail");
        }
    }
}

#[test]
fn a_failed_unmap_quarantines_endpoints_until_their_next_attach() {
    let (mut iommu, recorders) = with_backends(1);
    iommu.attach(A, D1, false).expect("attached");
    iommu.attach(B, D1, false).expect("attached");
    iommu.map(D1, &page(1)).expect("mapped");
    let calls = recorders[0].state().calls;
    recorders[0].state().fail_call = Some(calls + 1);
    assert!(matches!(
        iommu.unmap(D1, page(1).range),
        Err(RequestError::Quarantined { count: 2, .. })
    ));
    assert_eq!(recorders[0].state().quarantined, [A, B]);
    for endpoint in [A, B] {
        assert_eq!(dma(&iommu, endpoint), Dma::Blocked);
        assert_eq!(
            translated(&iommu, endpoint, 0x1000),
            Err(FaultReason::Unknown)
        );
    }
    iommu.attach(A, D2, false).expect("a fresh domain");
    assert_eq!(dma(&iommu, A), Dma::Translated);
    assert_eq!(dma(&iommu, B), Dma::Blocked);
    check_agreement(&iommu, &recorders);
}

#[test]
fn if_one_of_several_unmaps_fails_no_endpoint_reaches_any_range() {
    for fail in 1..=3 {
        let (mut iommu, recorders) = with_backends(2);
        iommu.attach(A, D1, false).expect("attached");
        iommu.attach(B, D1, false).expect("attached");
        for n in 0..6 {
            iommu.map(D1, &page(n)).expect("mapped");
        }
        let calls = recorders[0].state().calls;
        recorders[0].state().fail_call = Some(calls + fail);
        let ranges = [page(0).range, page(2).range, page(4).range];
        let mut outcomes = VecDeque::new();
        iommu.unmap_all(D1, ranges, &mut outcomes);
        for outcome in &outcomes {
            let refused = matches!(outcome, Err(RequestError::Quarantined { count: 1, .. }));
            assert!(refused, "{outcome:?}");
        }
        assert_eq!(dma(&iommu, A), Dma::Blocked);
        assert_eq!(dma(&iommu, B), Dma::Translated, "its backend did not fail");
        // The core destroyed the domain there, including the ranges it did not unmap any more.
        assert!(!recorders[0].state().domains.contains_key(&D1));
        assert_eq!(recorders[1].state().domains[&D1].len(), 3);
        iommu.detach(A, D1).expect("detached");
        iommu.attach(A, D1, false).expect("attached");
        check_agreement(&iommu, &recorders);
    }
}
