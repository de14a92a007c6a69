//! What remains after a call to the kernel has failed.

use super::*;

/// Fails each kernel call in turn, alone or with the next one or two calls.
#[test]
fn any_failed_kernel_call_leaves_a_consistent_state() {
    for interface in INTERFACES {
        // ENOENT is also the kernel's answer to some calls that had nothing to do.
        for (in_a_row, errno) in [
            (1, libc::ENOMEM),
            (2, libc::ENOMEM),
            (3, libc::ENOMEM),
            (1, libc::ENOENT),
            (2, libc::ENOENT),
        ] {
            let mut failed = 0;
            for n in 1.. {
                let mut bed = Bed::new(interface);
                for more in 0..in_a_row {
                    bed.fail_in(n + more, errno);
                }
                let last = bed.kernel.state().calls + n;
                for op in script() {
                    let before: Vec<_> = bed.iommu.endpoints(usize::MAX, 9).collect();
                    let result = run(&mut bed, &op);
                    match result {
                        Err(RequestError::Quarantined { .. }) | Ok(()) => {}
                        Err(_) => {
                            let after: Vec<_> = bed.iommu.endpoints(usize::MAX, 9).collect();
                            assert_eq!(after, before, "{interface:?} {n} {op:?}");
                            if in_a_row == 1 && bed.kernel.state().calls >= last {
                                // The next switch destroys address spaces whose destruction failed.
                                bed.iommu.retarget_unattached();
                                assert_eq!(bed.leaks(), 0, "{interface:?} {n} {op:?}");
                            }
                        }
                    }
                    // Not checked: after such a failure, bypass mode may lack a memory slot.
                    let hit = bed.kernel.state().calls >= last;
                    if hit && matches!(op, Op::Memory(_) | Op::Attach(_, DomainId(3), _)) {
                        break;
                    }
                    bed.check();
                }
                if bed.kernel.state().calls < last {
                    break;
                }
                failed += 1;
                // After a reconnection every endpoint is usable and no address space has leaked.
                bed.kernel.state().fail.clear();
                bed.kernel.state().stopped.clear();
                run(&mut bed, &Op::Reconnect).expect("a new VM");
                bed.check();
                for domain in [D1, D2] {
                    bed.iommu.attach(A, domain, false).expect("attached");
                }
                bed.iommu
                    .map(D2, &mapping(0, 0x1000, 0))
                    .expect("mapped again");
                bed.check();
                assert_eq!(bed.leaks(), 0, "{interface:?} {n}");
            }
            assert!(failed > 20, "{interface:?}: only {failed} calls could fail");
        }
    }
}

/// Linux's VT-d driver counts the devices of a page table twice down after a failed attach, and then sends no
/// invalidations for the devices that are in it.
#[test]
fn unmap_ends_the_use_of_a_range_after_a_failed_attach_of_another_device() {
    for pinning in [Pinning::All, Pinning::Mapped] {
        // Fails one call alone, or with one of the next calls, which undo the attach and attach the others anew.
        for (target, gap) in [D1, D2]
            .into_iter()
            .flat_map(|d| (0..9).map(move |gap| (d, gap)))
        {
            let mut failed = 0;
            for n in 1.. {
                let what = format!("{pinning:?} {target} {gap} {n}");
                let mut bed = Bed::new(Interface::Iommufd(pinning));
                for endpoint in [A, G1, G2] {
                    bed.iommu.attach(endpoint, D1, false).expect("attached");
                }
                bed.iommu.attach(B, D2, false).expect("attached");
                for domain in [D1, D2] {
                    let page = mapping(0x1000, 0x1000, 0x2000);
                    bed.iommu.map(domain, &page).expect("mapped");
                }
                for call in [n, n + gap] {
                    bed.fail_in(call, libc::ENOMEM);
                }
                let first = bed.kernel.state().calls + n;
                // To a domain with devices in it, or from such a domain.
                let mover = if target == D1 { B } else { A };
                let before: Vec<_> = bed.iommu.endpoints(usize::MAX, 9).collect();
                let moved = bed.iommu.attach(mover, target, false);
                if !matches!(moved, Ok(()) | Err(RequestError::Quarantined { .. })) {
                    let after: Vec<_> = bed.iommu.endpoints(usize::MAX, 9).collect();
                    assert_eq!(after, before, "{what}");
                }
                bed.check();
                if bed.kernel.state().calls < first {
                    moved.expect("nothing failed");
                    break;
                }
                failed += 1;
                bed.kernel.state().fail.clear();
                for domain in [D1, D2] {
                    if bed.iommu.domains().any(|d| d.id == domain) {
                        let done = bed.iommu.unmap(domain, IovaRange::ALL);
                        done.unwrap_or_else(|error| panic!("{what}: {error}"));
                        bed.check();
                    }
                }
            }
            assert!(failed > 0, "{pinning:?} {target}");
        }
    }
}

#[test]
fn a_failed_attach_leaves_the_device_in_its_domain() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu.attach(B, D2, false).expect("attached");
        for n in 0..4 {
            let (here, there) = (mapping(n << 12, 0x1000, 0x1000), n << 13);
            bed.iommu.map(D1, &here).expect("mapped");
            bed.iommu
                .map(D2, &mapping(there, 0x1000, 0))
                .expect("mapped");
        }
        let before = bed.reached(1);
        bed.fail_in(1, libc::ENOMEM);
        let refused = bed.iommu.attach(A, D2, false);
        assert_eq!(kind(refused), BackendErrorKind::NoMem, "{interface:?}");
        assert_eq!(bed.reached(1), before, "{interface:?}");
        bed.check();
        // The third call fails. With type1 that is in the middle of the move; iommufd moves with one call.
        bed.fail_in(3, libc::ENOMEM);
        match (interface, bed.iommu.attach(A, D2, false)) {
            (Interface::Type1, refused) => {
                assert_eq!(kind(refused), BackendErrorKind::NoMem);
                assert_eq!(bed.reached(1), before);
            }
            (Interface::Iommufd(_), moved) => moved.expect("one call"),
        }
        bed.check();
    }
}

#[test]
fn mapping_absent_memory_is_refused_with_fault() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        for gpa in [0x9000_0000, BAR + 0x4000, 0x1_e000] {
            let refused = bed.iommu.map(D1, &mapping(0, 0x4000, gpa));
            assert_eq!(
                kind(refused),
                BackendErrorKind::Fault,
                "{interface:?} {gpa:#x}"
            );
            let none = Mapping {
                access: Access::NONE,
                ..mapping(0, 0x4000, gpa)
            };
            let refused = bed.iommu.map(D1, &none);
            assert_eq!(
                kind(refused),
                BackendErrorKind::Fault,
                "{interface:?} {gpa:#x}"
            );
            assert!(bed.reached(1).is_empty());
        }
        bed.iommu
            .map(D1, &mapping(0, 0x2000, BAR + 0x1000))
            .expect("memory of another device");
        bed.check();
    }
}

#[test]
fn errnos_of_the_host_become_statuses() {
    for interface in INTERFACES {
        for (errno, expected) in [
            (libc::ENOMEM, BackendErrorKind::NoMem),
            (libc::ENOSPC, BackendErrorKind::NoMem),
            (libc::EEXIST, BackendErrorKind::DevErr),
            (libc::EFAULT, BackendErrorKind::Fault),
            (libc::EIO, BackendErrorKind::DevErr),
        ] {
            let mut bed = Bed::new(interface);
            bed.iommu.attach(A, D1, false).expect("attached");
            bed.fail_in(1, errno);
            let refused = bed.iommu.map(D1, &mapping(0, 0x1000, 0));
            assert_eq!(kind(refused), expected, "{interface:?} {errno}");
            bed.check();
            bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
        }
    }
}

#[test]
fn type1_refuses_attach_to_a_domain_that_maps_a_removed_slot() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu
            .map(D1, &mapping(0, 0x4000, 0x1_0000))
            .expect("mapped");
        run(&mut bed, &Op::Memory(1)).expect("the slot goes");
        bed.check();
        assert!(bed.reached(1).is_empty());
        if let Interface::Type1 = interface {
            let refused = bed.iommu.attach(B, D1, false);
            assert_eq!(kind(refused), BackendErrorKind::Unsupp);
            bed.check();
        }
        run(&mut bed, &Op::Memory(1)).expect("another slot comes");
        assert_eq!(bed.reached(1).len(), 1);
        bed.check();
    }
}

#[test]
fn the_number_of_address_spaces_that_cannot_be_destroyed_is_limited() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    bed.kernel.state().keeps_spaces = true;
    let mut made = 0;
    let refusal = loop {
        if let Err(refusal) = bed.iommu.attach(A, D1, false) {
            break refusal;
        }
        bed.iommu.detach(A, D1).expect("detached");
        made += 1;
        assert!(made < 1000, "no limit");
        assert!(bed.iommu.condemned_spaces() >= made);
    };
    let is_no_mem =
        matches!(&refusal, RequestError::Backend(cause) if cause.kind == BackendErrorKind::NoMem);
    assert!(is_no_mem, "{refusal:?}");
    assert_eq!(bed.iommu.condemned_spaces(), 256);
    // The device can be detached again.
    bed.kernel.state().keeps_spaces = false;
    assert!(
        bed.iommu.attach(A, D1, false).is_err(),
        "destroys the old ones"
    );
    assert_eq!(bed.iommu.condemned_spaces(), 0);
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.check();
}

#[test]
fn an_unresponsive_device_is_stopped() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
    bed.kernel.state().asleep.push(A.0);
    let detached = bed.iommu.detach(A, D1);
    assert!(
        matches!(detached, Err(RequestError::Quarantined { .. })),
        "{detached:?}"
    );
    assert!(bed.kernel.state().stopped.contains(&A.0));
    // Once the device answers, the daemon can block it.
    bed.kernel.state().asleep.clear();
    bed.kernel.state().stopped.clear();
    bed.iommu.set_bypass(false);
    bed.iommu.reset();
    assert!(bed.reached(1).is_empty());
    bed.check();
}

#[test]
fn attach_is_unsupported_if_only_the_host_reserves_a_mapped_address() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
        bed.iommu.attach(B, D2, false).expect("attached");
        bed.fail_in(1, libc::EADDRINUSE);
        let refused = bed.iommu.attach(B, D1, false);
        assert_eq!(kind(refused), BackendErrorKind::Unsupp, "{interface:?}");
        bed.check();
    }
}
