//! Adding and removing endpoints, with and without backends.

use std::sync::Arc;

use super::*;
use crate::backends::testing::slot;
use crate::backends::{AttachError, BackendError, Contents};
use crate::locks::{Mutex, Rank};

const ROOM: usize = 21;

fn function(endpoint: EndpointId) -> PciRange {
    PciAddress::from_endpoint_id(endpoint).into()
}

fn new(endpoint: EndpointId, group: Option<&GroupName>) -> NewEndpoints<'_> {
    NewEndpoints {
        range: function(endpoint),
        group,
        reserved: ReservedRegions::default(),
        room: ROOM,
    }
}

fn boxed(recorder: &Recorder) -> Option<Box<dyn DmaBackend>> {
    Some(Box::new(recorder.clone()))
}

/// An IOMMU without endpoints, with a connected VMM.
fn empty() -> Iommu {
    let iommu = "00:05.0".parse().expect("an address");
    let topology = Topology::new(iommu, ReservedRegions::default(), &[]).expect("no endpoints");
    let mut iommu = Iommu::new(settings(), topology).expect("an arena");
    iommu.connect();
    iommu
}

#[test]
fn an_endpoint_is_added_to_a_running_guest_and_removed_with_its_mappings() {
    let mut iommu = empty();
    let recorder = Recorder::new();
    assert!(iommu.add_endpoints(new(A, None), boxed(&recorder)).is_ok());
    assert!(iommu.probe(A).is_ok());
    assert!(recorder.state().connected);
    assert_eq!(recorder.state().targets[&A], Target::Bypass);
    iommu.attach(A, D1, false).expect("attached");
    iommu.map(D1, &page(1)).expect("mapped");
    assert_eq!(recorder.state().domains[&D1].len(), 1);

    let unused = iommu.remove_endpoints(function(A)).expect("there");
    assert_eq!(unused.len(), 1);
    assert!(recorder.state().domains.is_empty());
    assert_eq!(recorder.state().targets[&A], Target::Blocked);
    assert_eq!(iommu.domains().count(), 0);
    assert_eq!(translated(&iommu, A, 0x1000), Err(FaultReason::Unknown));
    let absent = RequestError::NoSuchEndpoint(A);
    assert_eq!(iommu.attach(A, D1, false), Err(absent.clone()));
    assert_eq!(iommu.detach(A, D1), Err(absent.clone()));
    assert_eq!(iommu.probe(A).err(), Some(absent));
    assert!(iommu.remove_endpoints(function(A)).is_err());
}

#[test]
fn a_backend_added_late_gets_the_mappings_of_its_domain() {
    let mut iommu = empty();
    iommu.set_memory(vec![slot(0, 0x10000, 0)]);
    assert!(iommu.add_endpoints(new(A, None), None).is_ok());
    iommu.attach(A, D1, false).expect("attached");
    // One mapping in memory, one outside: the latter counts once there is a backend.
    let inside = mapping(0x1000, 0x1fff, 0x1000);
    iommu.map(D1, &inside).expect("mapped");
    iommu.map(D1, &page(2)).expect("mapped");

    let recorder = Recorder::new();
    assert!(iommu.add_endpoints(new(B, None), boxed(&recorder)).is_ok());
    assert_eq!(recorder.state().memory.len(), 1);
    iommu.attach(B, D1, false).expect("attached");
    assert_eq!(recorder.state().domains[&D1].len(), 2);
    // The recorder checks that `least` does not exceed what it has mapped.
    iommu.unmap(D1, page(2).range).expect("unmapped");
    iommu.unmap(D1, inside.range).expect("unmapped");
    assert!(recorder.state().domains[&D1].is_empty());
}

#[test]
fn a_device_that_the_host_cannot_isolate_stays() {
    let mut iommu = empty();
    let group = GroupName::new("host7").expect("a name");
    let recorder = Recorder::new();
    let first = iommu.add_endpoints(new(A, Some(&group)), boxed(&recorder));
    assert!(first.is_ok());
    assert!(iommu.add_endpoints(new(B, Some(&group)), None).is_ok());
    // As at start-up, when one backend has all devices of its host IOMMU.
    iommu.backend_of.insert(B, iommu.backend_of[&A]);
    iommu.attach(A, D1, false).expect("attached");
    let before = (iommu.topology().clone(), snapshot(&iommu));
    let refused = iommu.remove_endpoints(function(A)).err();
    let words = refused.map(|cause| cause.to_string()).unwrap_or_default();
    let mate = PciAddress::from_endpoint_id(B).to_string();
    assert!(words.contains(&mate), "{words}");
    assert_eq!((iommu.topology().clone(), snapshot(&iommu)), before);
}

#[test]
fn a_refused_addition_changes_nothing() {
    let mut iommu = empty();
    assert!(iommu.add_endpoints(new(A, None), None).is_ok());
    iommu.attach(A, D1, false).expect("attached");
    let before = (iommu.topology().clone(), snapshot(&iommu));
    let mut refused = |new: NewEndpoints<'_>, recorder: &Recorder, why: &str| {
        let (cause, backend) = iommu
            .add_endpoints(new, boxed(recorder))
            .expect_err("refused");
        assert!(cause.to_string().contains(why), "{cause}");
        assert!(backend.is_some(), "given back");
        assert_eq!((iommu.topology().clone(), snapshot(&iommu)), before);
        assert!(!iommu.has_backends());
    };
    refused(new(A, None), &Recorder::new(), "overlap");
    let iommu_itself = EndpointId(0x28);
    refused(new(iommu_itself, None), &Recorder::new(), "IOMMU's own");
    let fails = Recorder::new();
    fails.state().fail_call = Some(1);
    refused(new(B, None), &fails, "fails on demand");
    for (page_sizes, aperture) in [
        (PageMask::new(1 << 21).expect("a mask"), IovaRange::ALL),
        (PageMask::TABLE, IovaRange::of_width(39)),
    ] {
        let weak = Recorder::with(BackendCapabilities {
            page_sizes,
            aperture,
        });
        refused(new(B, None), &weak, "the guest was offered");
    }
    let regions = (0..=ROOM as u64).map(|n| ReservedRegion {
        range: range(n << 16, (n << 16) + KIB4 - 1),
        kind: ReservedKind::Reserved,
    });
    let many = NewEndpoints {
        reserved: ReservedRegions::new(regions.collect()).expect("few enough"),
        ..new(B, None)
    };
    refused(many, &Recorder::new(), "22 reserved regions");
}

/// Changes guest RAM whenever it has been filled, up to `changes` times.
struct Restless {
    iommu: Arc<Mutex<Iommu>>,
    memory: Vec<MemorySlot>,
    changes: u64,
}

impl DmaBackend for Restless {
    fn capabilities(&self) -> BackendCapabilities {
        BackendCapabilities {
            page_sizes: PageMask::TABLE,
            aperture: IovaRange::ALL,
        }
    }

    fn vmm_present(&mut self, _present: bool) {}

    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.memory.push(slot.clone());
        Ok(())
    }

    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError> {
        self.memory.retain(|s| s != slot);
        Ok(())
    }

    fn attach(
        &mut self,
        _endpoint: EndpointId,
        _target: Target,
        _contents: &dyn Contents,
    ) -> Result<(), AttachError> {
        let Some(left) = self.changes.checked_sub(1) else {
            let now = self.iommu.lock().memory.clone();
            assert_eq!(self.memory, now, "filled with the present memory");
            return Ok(());
        };
        self.changes = left;
        let other = slot(left << 20, 0x1000, 0);
        self.iommu.lock().set_memory(vec![other]);
        Ok(())
    }

    fn destroy_domain(&mut self, _domain: DomainId) {}

    fn quarantine(&mut self, _endpoint: EndpointId) {}

    fn map(&mut self, _domain: DomainId, _mapping: &Mapping) -> Result<(), BackendError> {
        Ok(())
    }

    fn unmap(
        &mut self,
        _domain: DomainId,
        _range: IovaRange,
        _least: u64,
    ) -> Result<(), BackendError> {
        Ok(())
    }
}

#[test]
fn a_new_device_is_filled_until_guest_memory_stays_as_it_is() {
    for (changes, settles) in [(0, true), (1, true), (5, true), (1000, false)] {
        let iommu = Arc::new(Mutex::new(Rank::Core, empty()));
        let backend = Box::new(Restless {
            iommu: iommu.clone(),
            memory: Vec::new(),
            changes,
        });
        let added = Iommu::add_filled(&iommu, &new(A, None), backend);
        assert_eq!(added.is_ok(), settles, "{changes} changes");
        assert_eq!(iommu.lock().probe(A).is_ok(), settles, "{changes} changes");
        if let Err((cause, _)) = added {
            assert!(matches!(cause, AddError::Unsettled), "{cause}");
        }
    }
}

#[test]
fn a_new_device_at_a_withheld_address_is_blocked() {
    let mut core = empty();
    core.withhold(vec![function(A)]);
    let iommu = Mutex::new(Rank::Core, core);
    for (endpoint, target) in [(A, Target::Blocked), (B, Target::Bypass)] {
        let recorder = Recorder::new();
        let added = Iommu::add_filled(&iommu, &new(endpoint, None), Box::new(recorder.clone()));
        assert!(added.is_ok());
        assert_eq!(recorder.state().targets[&endpoint], target);
    }
    iommu.lock().withhold(Vec::new());
    assert_eq!(dma(&iommu.lock(), A), Dma::Bypass);
}

#[test]
fn a_backend_that_fails_on_removal_is_quarantined() {
    let mut iommu = empty();
    let recorder = Recorder::new();
    assert!(iommu.add_endpoints(new(A, None), boxed(&recorder)).is_ok());
    iommu.attach(A, D1, false).expect("attached");
    let calls = recorder.state().calls;
    recorder.state().fail_call = Some(calls + 1);
    iommu.remove_endpoints(function(A)).expect("removed");
    assert_eq!(recorder.state().quarantined, [A]);
    assert_eq!(iommu.domains().count(), 0);
    assert!(iommu.probe(A).is_err());
}

#[test]
fn a_range_can_be_removed_in_parts() {
    let mut iommu = empty();
    let whole = PciRange::new(
        PciAddress::from_endpoint_id(G1),
        PciAddress::from_endpoint_id(G3),
    );
    let all = NewEndpoints {
        range: whole.expect("a range"),
        ..new(G1, None)
    };
    assert!(iommu.add_endpoints(all, None).is_ok());
    for endpoint in [G1, G2, G3] {
        iommu.attach(endpoint, D1, false).expect("attached");
    }
    assert!(iommu.remove_endpoints(function(G2)).is_ok());
    assert!(iommu.probe(G2).is_err());
    let members = |iommu: &Iommu| iommu.domains().next().expect("one").endpoints;
    assert_eq!(members(&iommu), [G1, G3]);
    assert!(iommu.remove_endpoints(whole.expect("a range")).is_err());
    assert_eq!(members(&iommu), [G1, G3]);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Endpoint, whether it is in the group, whether it has a backend, and whether that fails.
    Add(usize, bool, bool, bool),
    Remove(usize),
    Attach(usize, u32),
    Detach(usize, u32),
    Map(u32, u64),
    Unmap(u32, u64),
    Bypass(bool),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let (id, domain, page) = (0..ALL.len(), 0u32..3, 0u64..4);
    prop_oneof![
        4 => (id.clone(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.1))
            .prop_map(|(id, g, b, f)| Step::Add(id, g, b, f)),
        2 => id.clone().prop_map(Step::Remove),
        4 => (id.clone(), domain.clone()).prop_map(|(e, d)| Step::Attach(e, d)),
        1 => (id, domain.clone()).prop_map(|(e, d)| Step::Detach(e, d)),
        3 => (domain.clone(), page.clone()).prop_map(|(d, p)| Step::Map(d, p)),
        1 => (domain, page).prop_map(|(d, p)| Step::Unmap(d, p)),
        1 => any::<bool>().prop_map(Step::Bypass),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn core_and_backends_agree_after_any_additions_and_removals(steps in prop::collection::vec(step(), 1..100)) {
        let mut iommu = empty();
        let group = GroupName::new("g").expect("a name");
        let mut there: BTreeMap<EndpointId, Option<Recorder>> = BTreeMap::new();
        let mut gone: Vec<Recorder> = Vec::new();
        for step in steps {
            match step {
                Step::Add(n, grouped, backed, fails) => {
                    let recorder = backed.then(Recorder::new);
                    if let Some(recorder) = &recorder && fails {
                        recorder.state().fail_call = Some(1);
                    }
                    let expected = !(there.contains_key(&ALL[n]) || backed && fails);
                    let new = new(ALL[n], grouped.then_some(&group));
                    let backend = recorder.as_ref().and_then(boxed);
                    prop_assert_eq!(iommu.add_endpoints(new, backend).is_ok(), expected);
                    if expected {
                        there.insert(ALL[n], recorder);
                    }
                }
                Step::Remove(n) => {
                    let removed = iommu.remove_endpoints(function(ALL[n]));
                    let known = there.remove(&ALL[n]);
                    prop_assert_eq!(removed.is_ok(), known.is_some());
                    let returned = removed.map_or(0, |unused| unused.len());
                    let recorder = known.flatten();
                    prop_assert_eq!(returned, usize::from(recorder.is_some()));
                    gone.extend(recorder);
                }
                Step::Attach(n, d) => {
                    let done = iommu.attach(ALL[n], DomainId(d), false);
                    let known = there.contains_key(&ALL[n]);
                    let noent = done == Err(RequestError::NoSuchEndpoint(ALL[n]));
                    prop_assert_eq!(noent, !known, "{:?}", done);
                }
                Step::Detach(n, d) => drop(iommu.detach(ALL[n], DomainId(d))),
                Step::Map(d, n) => drop(iommu.map(DomainId(d), &page(n))),
                Step::Unmap(d, n) => drop(iommu.unmap(DomainId(d), page(n).range)),
                Step::Bypass(bypass) => iommu.set_bypass(bypass),
                Step::Reset => iommu.reset(),
            }
            prop_assert_eq!(iommu.endpoints(usize::MAX, 100).count(), there.len());
            prop_assert!(iommu.endpoints(usize::MAX, 100).all(|e| there.contains_key(&e.id)));
            let backed = there.values().filter(|r| r.is_some()).count();
            prop_assert_eq!(iommu.has_backends(), backed > 0);
            for domain in iommu.domains() {
                prop_assert!(!domain.endpoints.is_empty());
                prop_assert!(domain.endpoints.iter().all(|e| there.contains_key(e)));
            }
            for (&endpoint, recorder) in &there {
                let Some(recorder) = recorder else { continue };
                let state = recorder.state();
                let seen = iommu.endpoint(endpoint).expect("there");
                let target = match (seen.dma, seen.domain) {
                    (Dma::Translated, Some(domain)) => Target::Domain(domain),
                    (Dma::Bypass, _) => Target::Bypass,
                    (Dma::Blocked | Dma::Translated, _) => Target::Blocked,
                };
                prop_assert_eq!(state.targets[&endpoint], target);
                for (&domain, held) in &state.domains {
                    prop_assert_eq!(Some(domain), seen.domain);
                    let held: Vec<_> = held.values().copied().collect();
                    prop_assert_eq!(held, all_mappings(&iommu, domain));
                }
            }
            for recorder in &gone {
                let state = recorder.state();
                prop_assert!(state.domains.is_empty());
                prop_assert!(state.targets.values().all(|t| *t == Target::Blocked));
            }
        }
    }
}
