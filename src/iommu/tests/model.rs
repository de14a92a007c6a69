//! Random sequences of requests against a model.

use std::collections::BTreeSet;

use super::*;

/// A second implementation of the rules, as simple as possible.
#[derive(Default)]
struct Model {
    bypass: bool,
    attached: BTreeMap<EndpointId, DomainId>,
    domains: BTreeMap<DomainId, (bool, BTreeMap<u64, Mapping>)>,
}

impl Model {
    fn members(&self, domain: DomainId) -> BTreeSet<EndpointId> {
        self.attached
            .iter()
            .filter(|(_, d)| **d == domain)
            .map(|(e, _)| *e)
            .collect()
    }

    fn leave(&mut self, endpoint: EndpointId) {
        if let Some(domain) = self.attached.remove(&endpoint)
            && self.members(domain).is_empty()
        {
            self.domains.remove(&domain);
        }
    }

    fn reserved(&self, domain: DomainId, wanted: IovaRange) -> bool {
        wanted.overlaps(range(MSI.0, MSI.1))
            || (self.attached.get(&RESERVED) == Some(&domain)
                && wanted.overlaps(range(OWN_RESERVED.0, OWN_RESERVED.1)))
    }

    /// Applies a request. Returns whether it must succeed. Ignores groups.
    fn apply(&mut self, op: Op) -> bool {
        match op {
            Op::Attach(endpoint, domain, bypass) => {
                if self.attached.get(&endpoint) == Some(&domain) {
                    return self.domains[&domain].0 == bypass;
                }
                if let Some((is_bypass, mappings)) = self.domains.get(&domain) {
                    let own = range(OWN_RESERVED.0, OWN_RESERVED.1);
                    if *is_bypass != bypass
                        || (endpoint == RESERVED
                            && mappings.values().any(|m| m.range.overlaps(own)))
                    {
                        return false;
                    }
                }
                self.domains.entry(domain).or_default().0 = bypass;
                self.leave(endpoint);
                self.attached.insert(endpoint, domain);
                true
            }
            Op::Detach(endpoint, domain) => {
                let attached = self.attached.get(&endpoint) == Some(&domain);
                if attached {
                    self.leave(endpoint);
                }
                attached
            }
            Op::Map(domain, mapping) => {
                let reserved = self.reserved(domain, mapping.range);
                match self.domains.get_mut(&domain) {
                    Some((false, mappings))
                        if !reserved
                            && !mappings.values().any(|m| m.range.overlaps(mapping.range)) =>
                    {
                        mappings.insert(mapping.range.first().0, mapping);
                        true
                    }
                    _ => false,
                }
            }
            Op::Unmap(domain, wanted) => match self.domains.get_mut(&domain) {
                Some((false, mappings))
                    if mappings
                        .values()
                        .all(|m| wanted.covers(m.range) || !wanted.overlaps(m.range)) =>
                {
                    mappings.retain(|_, m| !wanted.covers(m.range));
                    true
                }
                _ => false,
            },
            Op::Bypass(bypass) => {
                self.bypass = bypass;
                true
            }
            Op::Reset => {
                self.attached.clear();
                self.domains.clear();
                true
            }
        }
    }

    fn check(&self, iommu: &Iommu) {
        for endpoint in [A, B, RESERVED] {
            let seen = iommu.endpoint(endpoint).expect("an endpoint");
            assert_eq!(seen.domain, self.attached.get(&endpoint).copied());
            let expected = match seen.domain.map(|d| self.domains[&d].0) {
                Some(true) => Dma::Bypass,
                Some(false) => Dma::Translated,
                None if self.bypass => Dma::Bypass,
                None => Dma::Blocked,
            };
            assert_eq!(seen.dma, expected);
        }
        assert_eq!(iommu.domains().count(), self.domains.len());
        for (&id, (_, mappings)) in &self.domains {
            assert_eq!(
                all_mappings(iommu, id),
                mappings.values().copied().collect::<Vec<_>>()
            );
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let endpoint = prop::sample::select(vec![A, B, RESERVED]);
    let domain = (0u32..3).prop_map(DomainId);
    // Near the reserved region, so that many requests overlap it.
    let pages = (0xf8u64..0x118, 1u64..6);
    prop_oneof![
        3 => (endpoint.clone(), domain.clone(), prop::bool::weighted(0.2))
            .prop_map(|(e, d, b)| Op::Attach(e, d, b)),
        1 => (endpoint, domain.clone()).prop_map(|(e, d)| Op::Detach(e, d)),
        6 => (domain.clone(), pages.clone(), 0u64..64).prop_map(|(d, (at, len), gpa)| {
            Op::Map(d, mapping(at * KIB4, (at + len) * KIB4 - 1, gpa * KIB4))
        }),
        4 => (domain, pages).prop_map(|(d, (at, len))| {
            Op::Unmap(d, range(at * KIB4, (at + len) * KIB4 - 1))
        }),
        1 => any::<bool>().prop_map(Op::Bypass),
        1 => Just(Op::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_sequence_of_requests_follows_the_rules(
        backends in 0usize..3,
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let (mut iommu, recorders) = with_backends(backends);
        let mut model = Model { bypass: true, ..Model::default() };
        for op in ops {
            let before = snapshot(&iommu);
            let result = run(&mut iommu, op);
            let expected = model.apply(op);
            prop_assert_eq!(result.is_ok(), expected, "{:?}: {:?}", op, result);
            if !expected {
                prop_assert_eq!(snapshot(&iommu), before);
            }
            model.check(&iommu);
            check_agreement(&iommu, &recorders);
        }
    }

    #[test]
    fn batched_unmaps_have_the_outcomes_of_single_ones(
        backends in 0usize..3,
        maps in prop::collection::vec((0u64..40, 1u64..4), 0..20),
        unmaps in prop::collection::vec((0u64..40, 1u64..6), 1..12),
    ) {
        let (mut together, recorders) = with_backends(backends);
        let (mut one_by_one, _) = with_backends(backends);
        for iommu in [&mut together, &mut one_by_one] {
            for endpoint in [A, B] {
                iommu.attach(endpoint, D1, false).expect("attached");
            }
            for &(at, len) in &maps {
                let _ = iommu.map(D1, &mapping(at * KIB4, (at + len) * KIB4 - 1, at * KIB4));
            }
        }
        let ranges: Vec<_> = unmaps
            .iter()
            .map(|&(at, len)| range(at * KIB4, (at + len) * KIB4 - 1))
            .collect();
        let mut outcomes = VecDeque::new();
        while outcomes.len() < ranges.len() {
            let rest = ranges[outcomes.len()..].iter().copied();
            together.unmap_all(D1, rest, &mut outcomes);
        }
        let expected: Vec<_> = ranges
            .iter()
            .map(|range| one_by_one.unmap(D1, *range).map(drop))
            .collect();
        prop_assert_eq!(outcomes, expected);
        prop_assert_eq!(all_mappings(&together, D1), all_mappings(&one_by_one, D1));
        check_agreement(&together, &recorders);
    }
}
