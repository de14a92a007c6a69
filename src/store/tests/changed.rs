//! A later process with other endpoints than its file alone says.

use super::bed::{A, B, Bed, D1, Req, Step, settings, topology_of};
use crate::address::{Iova, IovaRange, PageMask};
use crate::backends::recorder::Recorder;
use crate::backends::{BackendCapabilities, Target};
use crate::ids::EndpointId;
use crate::iommu::{AddError, EndpointState, Iommu, NewEndpoints, Predecessor, RestoreError};
use crate::topology::{PciAddress, PciRange, ReservedRegions};

fn function(endpoint: EndpointId) -> PciRange {
    PciAddress::from_endpoint_id(endpoint).into()
}

fn new(endpoint: EndpointId) -> NewEndpoints<'static> {
    NewEndpoints {
        range: function(endpoint),
        group: None,
        reserved: ReservedRegions::default(),
        room: 8,
    }
}

/// A process that has died between two batches: A is in D1, which has a mapping of three pages.
fn dead() -> Bed {
    let mut bed = Bed::new(0, 0);
    let batch = [Req::Attach(A, D1, false), Req::Map(D1, 1, 3, 7)];
    assert!(bed.step(&Step::Batch(batch.to_vec()), u64::MAX).0);
    bed
}

/// A core that waits for the state of that process, with B in its file.
fn successor() -> Iommu {
    Iommu::successor(settings(), topology_of(&[B])).expect("memory")
}

fn state_of(iommu: &Iommu, endpoint: EndpointId) -> EndpointState {
    let mut states = iommu.endpoints_from(endpoint);
    states.next().expect("there")
}

#[test]
fn an_endpoint_that_was_added_late_goes_on() {
    let (arena, store) = dead().left[0].clone();
    let recorder = Recorder::new();
    let mut iommu = successor();
    let added = iommu.add_late_endpoints(new(A), Some(Box::new(recorder.clone())));
    assert!(added.is_ok());
    assert!(
        recorder.state().targets.is_empty(),
        "it is not switched yet"
    );
    let left = Predecessor {
        arena: arena.words(),
        store: store.words(),
    };
    iommu.restore(left).expect("restored");
    assert_eq!(recorder.state().targets[&A], Target::Domain(D1));
    assert_eq!(recorder.state().domains[&D1].len(), 1);
    assert_eq!(state_of(&iommu, A).domain, Some(D1));
}

#[test]
fn a_suspect_is_blocked_although_its_record_names_a_domain() {
    let (arena, store) = dead().left[0].clone();
    let recorder = Recorder::new();
    let mut iommu = successor();
    iommu.connect();
    for endpoint in [A, B] {
        // B has no record: its backend makes it a suspect.
        let backend = Box::new(recorder.clone());
        if endpoint == A {
            let added = iommu.add_late_endpoints(new(A), Some(backend));
            assert!(added.is_ok());
        } else {
            iommu.add_backend(backend, &[B]).expect("added");
        }
        iommu.suspect(function(endpoint));
    }
    let left = Predecessor {
        arena: arena.words(),
        store: store.words(),
    };
    assert_eq!(iommu.restore(left).expect("restored").quarantined, 2);
    for endpoint in [A, B] {
        assert!(state_of(&iommu, endpoint).quarantined);
        assert_eq!(recorder.state().targets[&endpoint], Target::Blocked);
    }
    // Also for the process after this one.
    let mut third = successor();
    let added = third.add_late_endpoints(new(A), None);
    assert!(added.is_ok());
    let left = Predecessor {
        arena: iommu.arena().memory().words(),
        store: iommu.store().memory().words(),
    };
    assert_eq!(third.restore(left).expect("restored").quarantined, 2);
}

#[test]
fn a_state_that_is_refused_for_another_reason_blocks_everything() {
    let (arena, store) = dead().left[0].clone();
    let mut iommu = successor();
    iommu.refuse(Predecessor {
        arena: arena.words(),
        store: store.words(),
    });
    assert!(iommu.is_driver_unknown() && iommu.is_next_driver_foreign());
    assert!(!iommu.is_adopting());
    let mut third = successor();
    let again = third.restore(Predecessor {
        arena: iommu.arena().memory().words(),
        store: iommu.store().memory().words(),
    });
    again.expect("the state of a daemon that has refused one");
    assert!(third.is_driver_unknown());
}

/// The guest was offered what an endpoint supports that is removed by now.
#[test]
fn the_offer_stays_when_the_endpoint_that_has_narrowed_it_is_removed() {
    let weak = BackendCapabilities {
        page_sizes: PageMask::new(1 << 12 | 1 << 21).expect("sizes"),
        aperture: IovaRange::new(Iova(0), Iova((1 << 40) - 1)).expect("a range"),
    };
    let mut first = Iommu::new(settings(), topology_of(&[A, B])).expect("memory");
    first.keep_journal();
    let recorder = Box::new(Recorder::with(weak));
    first.add_backend(recorder, &[A]).expect("added");
    first.offer_probe_size(1024);
    let left = Predecessor {
        arena: first.arena().memory().words(),
        store: first.store().memory().words(),
    };
    let mut other = successor();
    other.offer_probe_size(512);
    let refused = other.restore(left).expect_err("another offer");
    assert!(matches!(refused, RestoreError::Offer), "{refused}");

    let mut first = Iommu::new(settings(), topology_of(&[A, B])).expect("memory");
    first.keep_journal();
    let recorder = Box::new(Recorder::with(weak));
    first.add_backend(recorder, &[A]).expect("added");
    first.offer_probe_size(1024);
    let mut same = successor();
    same.narrow_offer(&first.guest_offer());
    assert_eq!(same.offer_probe_size(512), 1024);
    assert_eq!(same.guest_offer(), first.guest_offer());
    let left = Predecessor {
        arena: first.arena().memory().words(),
        store: first.store().memory().words(),
    };
    same.restore(left).expect("the same offer");
    // What is offered less is not made more.
    let mut less = successor();
    let recorder = Box::new(Recorder::with(weak));
    less.add_backend(recorder, &[B]).expect("added");
    let narrow = less.guest_offer();
    less.narrow_offer(&successor().guest_offer());
    assert_eq!(less.guest_offer(), narrow);
}

/// Unlike an endpoint of the file, one that was added must not narrow the offer.
#[test]
fn an_endpoint_that_is_too_weak_now_is_not_added() {
    let weak = Recorder::with(BackendCapabilities {
        page_sizes: PageMask::TABLE,
        aperture: IovaRange::new(Iova(0), Iova(0xffff_ffff)).expect("a range"),
    });
    let mut iommu = successor();
    let before = iommu.guest_offer();
    let refused = iommu.add_late_endpoints(new(A), Some(Box::new(weak)));
    let (cause, backend) = refused.expect_err("too weak");
    assert!(matches!(cause, AddError::TooWeak { .. }), "{cause}");
    assert!(backend.is_some());
    assert_eq!(iommu.guest_offer(), before);
    assert!(iommu.probe(A).is_err());
}
