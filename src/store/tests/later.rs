//! What a later life owes to those that the earlier one has not served yet: another VMM, another driver, nobody.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::bed::{
    A, ALL, B, Bed, D1, D2, FEATURES, G1, G2, OK, Req, Step, settings, topology, topology_of,
};
use super::kernel::KernelHandle;
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping};
use crate::backends::Target;
use crate::backends::recorder::{Hook, Recorder};
#[cfg(not(miri))]
use crate::backends::testing::slot;
use crate::ids::EndpointId;
use crate::iommu::{Iommu, Predecessor, RestoreError, Restored};
use crate::page_table::crash;
use crate::page_table::words::SharedWords;
use crate::store::StoreError;
use crate::store::layout::{
    COMPLETE, DOMAIN_RECORD, HEADER_OWNER, HEADER_VERSION, RING_BATCH, header_salt, seal,
};
use crate::topology::{PciAddress, PciRange};

const NEVER: u64 = u64::MAX;

/// Without a journal, nobody knows which requests the process has executed and not answered.
#[test]
fn a_store_without_a_journal_is_refused() {
    let kernel = KernelHandle::default();
    let mut old = Iommu::new(settings(), topology()).expect("memory");
    old.attach(A, D1, false).expect("attached");
    let left = Left {
        arena: old.arena().memory().clone(),
        store: old.store().memory().clone(),
    };
    let (core, refused) = successor(&kernel, &left, &ALL, true);
    assert!(matches!(
        refused,
        Err(RestoreError::Store(StoreError::NoJournal))
    ));
    let target = kernel.lock().state.targets.get(&A).copied();
    assert_eq!(target, Some(Target::Blocked));
    drop(core);
}

/// The memfds of a process.
struct Left {
    arena: Arc<SharedWords>,
    store: Arc<SharedWords>,
}

fn first_life(kernel: &KernelHandle) -> (Iommu, Left) {
    let mut iommu = Iommu::new(settings(), topology()).expect("memory");
    iommu.keep_journal();
    let backend = Box::new(kernel.backend(false));
    iommu.add_backend(backend, &ALL).expect("added");
    iommu.note_features(FEATURES);
    let left = Left {
        arena: iommu.arena().memory().clone(),
        store: iommu.store().memory().clone(),
    };
    (iommu, left)
}

fn successor(
    kernel: &KernelHandle,
    left: &Left,
    endpoints: &[EndpointId],
    has_vmm: bool,
) -> (Iommu, Result<Restored, RestoreError>) {
    let mut iommu = Iommu::successor(settings(), topology_of(endpoints)).expect("memory");
    let backend = Box::new(kernel.backend(false));
    iommu.add_backend(backend, endpoints).expect("added");
    if has_vmm {
        iommu.connect();
    }
    let outcome = iommu.restore(Predecessor {
        arena: left.arena.words(),
        store: left.store.words(),
    });
    (iommu, outcome)
}

/// The VMM has gone: its end is completed without it, so no endpoint is in bypass mode.
#[test]
fn the_end_of_a_vmm_leaves_no_endpoint_in_bypass_mode() {
    let mut deaths = 0;
    for at in 0.. {
        let kernel = KernelHandle::default();
        let (mut iommu, left) = first_life(&kernel);
        iommu.connect();
        iommu.attach(A, D1, false).expect("attached");
        let calls = kernel.lock().calls;
        kernel.lock().fail_call = Some(calls + 1);
        iommu.detach(A, D1).expect_err("quarantined");
        let (lived, _) = crash::run(at, || iommu.disconnect());
        if lived.is_some() {
            break;
        }
        deaths += 1;
        let (iommu, restored) = successor(&kernel, &left, &ALL, false);
        restored.expect("restored");
        assert!(iommu.bypass());
        let targets = kernel.lock().state.targets.clone();
        for endpoint in ALL {
            let target = targets.get(&endpoint).copied();
            assert_eq!(target, Some(Target::Blocked), "{endpoint}, died at {at}");
        }
    }
    assert!(deaths > 10, "{deaths}");
}

/// A process that had no VMM, or a VMM without a driver, knows nothing of the driver of the next VMM.
#[test]
fn a_driver_that_no_process_has_served_is_awaited() {
    for had_vmm in [false, true] {
        let kernel = KernelHandle::default();
        let (mut iommu, left) = first_life(&kernel);
        if had_vmm {
            iommu.connect();
            iommu.disconnect();
        }
        drop(iommu);
        let (mut iommu, restored) = successor(&kernel, &left, &ALL, false);
        restored.expect("restored");
        iommu.connect();
        iommu.await_driver();
        assert!(iommu.is_driver_awaited());
        let targets = kernel.lock().state.targets.clone();
        assert!(targets.values().all(|t| *t == Target::Blocked));
    }
}

/// A ring that starts anew ends the state in which everything is blocked.
#[test]
fn a_driver_starts_anew_after_a_refused_store() {
    let kernel = KernelHandle::default();
    let (iommu, left) = first_life(&kernel);
    drop(iommu);
    SharedWords::set(&left.store.words()[HEADER_VERSION], 77);
    let (mut iommu, outcome) = successor(&kernel, &left, &ALL, true);
    outcome.expect_err("another version");
    iommu.attach(A, D1, false).expect_err("an unknown driver");
    // What the device does when a ring starts at index 0.
    iommu.await_driver();
    iommu.driver_has_started();
    iommu.retarget_unattached();
    iommu.attach(A, D1, false).expect("a new driver");
}

/// The tables of a domain whose members are not configured any more take no memory.
#[test]
fn a_domain_without_configured_members_takes_no_memory() {
    let kernel = KernelHandle::default();
    let (mut iommu, left) = first_life(&kernel);
    iommu.connect();
    iommu.attach(A, D1, false).expect("attached");
    let mapping = Mapping {
        range: IovaRange::from_len(Iova(0x1000), 0x1000).expect("a range"),
        gpa: Gpa(0),
        access: Access::READ_WRITE,
        mmio: false,
    };
    iommu.map(D1, &mapping).expect("mapped");
    drop(iommu);
    let (iommu, restored) = successor(&KernelHandle::default(), &left, &[B], true);
    assert_eq!(restored.expect("restored").domains, 0);
    assert_eq!(iommu.arena().frames_used(), 1);
}

/// A process that ends before the ring runs has not executed anything.
#[test]
fn a_request_is_not_blamed_for_deaths_before_its_execution() {
    let mut deaths = 0;
    for at in 0.. {
        let mut bed = Bed::new(1, 0);
        assert!(
            bed.step(&Step::Batch(vec![Req::Attach(A, D1, false)]), NEVER)
                .0
        );
        bed.answers.clear();
        if bed.step(&Step::Batch(vec![Req::Map(D1, 1, 1, 7)]), at).0 {
            break;
        }
        deaths += 1;
        for _ in 0..3 {
            bed.die_before_the_ring_runs();
        }
        assert!(bed.restore(NEVER).0);
        let answers = bed.answers.clone();
        assert_eq!(answers, [(Req::Map(D1, 1, 1, 7), Some(OK))], "died at {at}");
        let endpoint = bed.iommu().endpoint(A).expect("an endpoint");
        assert!(!endpoint.quarantined, "died at {at}");
    }
    assert!(deaths > 10, "{deaths}");
}

/// The first request of a new driver has the place of the first request of the old one. It must not get its answer.
#[test]
fn a_new_driver_gets_no_answer_of_the_old_one() {
    let mut deaths = 0;
    for at in 0.. {
        let mut bed = Bed::new(1, 0);
        if bed
            .step(&Step::Batch(vec![Req::Attach(A, D1, false)]), at)
            .0
        {
            break;
        }
        deaths += 1;
        if !bed.answers.is_empty() {
            continue;
        }
        bed.replace_driver();
        bed.put(Req::Attach(B, D2, false));
        let batch = bed.left[0].1.words()[RING_BATCH].load(Ordering::Relaxed);
        if batch == seal(0, header_salt(RING_BATCH)) {
            continue;
        }
        bed.finish_changed_ring();
        let answered = !bed.answers.is_empty();
        let domain = bed.iommu().endpoint(B).expect("an endpoint").domain;
        assert!(
            !answered || domain == Some(D2),
            "died at {at}: {:?}",
            bed.answers
        );
    }
    assert!(deaths > 10, "{deaths}");
}

/// The entry by which a ring that pauses at index 0 is known.
#[test]
fn the_last_used_entry_survives() {
    let mut bed = Bed::new(0, 0);
    assert!(bed.step(&Step::Batch(vec![Req::Probe(A)]), NEVER).0);
    let last = bed.last_used();
    assert!(last.is_some());
    assert!(bed.restore(NEVER).0);
    assert_eq!(bed.last_used(), last);
}

/// An endpoint whose domain has no record stays blocked when the VMM and a driver come: its driver believes that it is
/// attached.
#[test]
fn an_endpoint_without_the_record_of_its_domain_stays_blocked() {
    let kernel = KernelHandle::default();
    let (mut iommu, left) = first_life(&kernel);
    iommu.connect();
    iommu.attach(A, D1, false).expect("attached");
    drop(iommu);
    let mut words = left.store.words().iter();
    let record = words.find(|word| word.load(Ordering::Relaxed) == DOMAIN_RECORD);
    SharedWords::set(record.expect("a record"), 0);
    let (mut iommu, restored) = successor(&kernel, &left, &ALL, false);
    assert_eq!(restored.expect("restored").quarantined, 1);
    iommu.connect();
    iommu.retarget_unattached();
    let target = kernel.lock().state.targets.get(&A).copied();
    assert_eq!(target, Some(Target::Blocked));
    iommu.detach(A, D1).expect("attached");
}

/// A backend of the new process has failed before the restore: the restore must not forget it.
#[cfg(not(miri))]
#[test]
fn a_quarantine_before_the_restore_stays() {
    let kernel = KernelHandle::default();
    let (mut iommu, left) = first_life(&kernel);
    iommu.connect();
    iommu.attach(A, D1, false).expect("attached");
    drop(iommu);
    for is_damaged in [false, true] {
        let (arena, store) = (left.arena.words(), left.store.words());
        let mut iommu = Iommu::successor(settings(), topology()).expect("memory");
        let backend = Recorder::new();
        iommu
            .add_backend(Box::new(backend.clone()), &ALL)
            .expect("added");
        iommu.connect();
        iommu.set_memory(vec![slot(0, 0x1000, 0)]);
        let calls = backend.state().calls;
        backend.state().fail_call = Some(calls + 1);
        // An unknown part of the slot is still reachable.
        iommu.set_memory(Vec::new());
        let outcome = iommu.restore(Predecessor {
            arena: if is_damaged { &[] } else { arena },
            store,
        });
        assert_eq!(outcome.is_err(), is_damaged);
        let endpoint = iommu.endpoint(A).expect("an endpoint");
        assert!(endpoint.quarantined || is_damaged, "{endpoint:?}");
        let target = backend.state().targets.get(&A).copied();
        assert_eq!(target, Some(Target::Blocked));
        // The store of the first process is obsolete now.
        SharedWords::set(&store[HEADER_OWNER], COMPLETE);
    }
}

/// The default of a backend: nobody is switched before all are blocked.
#[test]
fn a_backend_with_new_objects_blocks_all_endpoints_first() {
    let kernel = KernelHandle::default();
    let (mut iommu, left) = first_life(&kernel);
    iommu.connect();
    for (endpoint, domain) in [(G1, D1), (G2, D1), (A, D2)] {
        iommu.attach(endpoint, domain, false).expect("attached");
    }
    drop(iommu);
    let mut iommu = Iommu::successor(settings(), topology()).expect("memory");
    let backend = Recorder::new();
    iommu
        .add_backend(Box::new(backend.clone()), &ALL)
        .expect("added");
    iommu.connect();
    let (seen, state) = (Arc::new(Mutex::new(Vec::new())), backend.clone());
    let calls = seen.clone();
    let note = move || {
        let targets: Vec<_> = state.state().targets.values().copied().collect();
        calls.lock().expect("not poisoned").push(targets);
    };
    backend.state().at_attach = Some(Hook(Arc::new(note)));
    let restored = iommu.restore(Predecessor {
        arena: left.arena.words(),
        store: left.store.words(),
    });
    restored.expect("restored");
    for targets in seen.lock().expect("not poisoned").iter() {
        let is_open = targets.iter().any(|target| *target != Target::Blocked);
        assert!(!is_open || targets.len() == ALL.len(), "{targets:?}");
    }
    assert_eq!(backend.state().targets[&G2], Target::Domain(D1));
}

/// A restore gives no endpoint memory whose place is wrong, or was not known to be right.
#[test]
fn withheld_endpoints_are_adopted_as_blocked() {
    let at = |endpoint| PciRange::from(PciAddress::from_endpoint_id(endpoint));
    // Whether the VMM has answered before the restore: it finds A misplaced.
    for has_answered in [false, true] {
        let kernel = KernelHandle::default();
        let (mut iommu, left) = first_life(&kernel);
        iommu.connect();
        iommu.attach(A, D1, false).expect("attached");
        drop(iommu);
        let mut iommu = Iommu::successor(settings(), topology()).expect("memory");
        let backend = Recorder::new();
        iommu
            .add_backend(Box::new(backend.clone()), &ALL)
            .expect("added");
        let (first, last) = (at(A).first(), at(B).last());
        iommu.withhold_unattached(vec![PciRange::new(first, last).expect("in order")]);
        iommu.connect();
        if has_answered {
            iommu.withhold(vec![at(A)]);
        }
        let restored = iommu.restore(Predecessor {
            arena: left.arena.words(),
            store: left.store.words(),
        });
        restored.expect("restored");
        let target = |endpoint| backend.state().targets[&endpoint];
        let expected = if has_answered {
            (Target::Blocked, Target::Bypass)
        } else {
            (Target::Domain(D1), Target::Blocked)
        };
        assert_eq!((target(A), target(B)), expected);
        assert_eq!(iommu.attach(B, D2, false).is_ok(), has_answered);
        iommu.withhold(Vec::new());
        assert_eq!(target(A), Target::Domain(D1));
        assert_ne!(target(B), Target::Blocked);
    }
}
