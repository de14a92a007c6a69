//! What the next process uses as it is, makes anew, or blocks.

use super::*;

/// A process that has A and B in D1 with mappings, dies between two requests.
fn dead(interface: Interface) -> (Bed, Model) {
    dead_with(interface, memory())
}

/// As [`dead`], with this guest memory.
fn dead_with(interface: Interface, memory: Vec<MemorySlot>) -> (Bed, Model) {
    let before = [
        Req::Attach(A, D1, false),
        Req::Attach(B, D1, false),
        Req::Map(D1, 1, 1, 0x4_0001),
        Req::Map(D1, 4, 3, 0x4_0004),
        Req::Attach(G1, D2, false),
        Req::Map(D2, 9, 2, 7),
    ];
    let case = Case {
        name: "dead",
        before: before.iter().map(|r| Step::Batch(vec![*r])).collect(),
        step: Step::Bypass(true),
    };
    let (mut bed, model) = prepared_with(&case, interface, memory);
    bed.die();
    (bed, model)
}

#[test]
fn nothing_is_made_anew_without_a_reason() {
    for interface in INTERFACES {
        let (mut bed, mut model) = dead(interface);
        let kernel = bed.host.as_ref().expect("a host").kernel.clone();
        let spaces = |kernel: &FakeKernel| kernel.state().spaces.clone();
        let groups = kernel.state().groups.clone();
        let before = spaces(&kernel);
        assert!(bed.restore(NEVER).0);
        assert_eq!(spaces(&kernel), before, "{interface:?}");
        assert_eq!(kernel.state().groups, groups, "{interface:?}");
        bed.check(&mut model);
        go_on(&mut bed, &mut model);
    }
}

/// The process that refuses the state dies, too.
#[test]
fn the_devices_of_a_refused_state_are_blocked_and_its_address_spaces_are_destroyed() {
    let other = Settings {
        last_domain: 14,
        ..settings()
    };
    for interface in INTERFACES {
        for at in (0..).step_by(3) {
            let (mut bed, _) = dead(interface);
            let refuse = |bed: &Bed| {
                let (arena, store) = bed.left.last().expect("a life").clone();
                let host = bed.host.as_ref().expect("a host");
                let mut iommu = Iommu::successor(other, topology()).expect("memory");
                host.add_backends(&mut iommu, false);
                iommu.connect();
                let left = (
                    iommu.arena().memory().clone(),
                    iommu.store().memory().clone(),
                );
                let restore = move || {
                    let old = Predecessor {
                        arena: arena.words(),
                        store: store.words(),
                    };
                    (iommu.restore(old).is_err(), iommu)
                };
                (left, restore)
            };
            let (left, restore) = refuse(&bed);
            let (lived, _) = crash::run(at, restore);
            let has_lived = lived.is_some();
            let blocked = match lived {
                Some((is_refused, iommu)) => {
                    assert!(is_refused);
                    iommu
                }
                None => {
                    // The next process takes the new store over if that is complete, and refuses the old one otherwise.
                    bed.left.push(left);
                    let stores: Vec<_> = bed.left.iter().map(|(_, s)| s.words()).collect();
                    let newest = newest(&stores).expect("a complete one");
                    bed.left.truncate(newest + 1);
                    refuse(&bed).1().1
                }
            };
            assert!(blocked.is_driver_unknown());
            let host = bed.host.as_ref().expect("a host");
            for endpoint in ALL {
                let reached = host.reached(host.group_of(endpoint));
                assert_eq!(reached, [], "{interface:?}, {at}, {endpoint}");
            }
            let state = host.kernel.state();
            let own = state.spaces.iter();
            let own = own.filter(|(id, _)| !host.foreign.contains(id));
            let has_memory = |areas: &BTreeMap<u64, Area>| areas.values().any(|a| a.file != (0, 0));
            let filled = own.filter(|(_, areas)| has_memory(areas)).count();
            let for_bypass = matches!(
                interface,
                Interface::Owned(Pinning::All) | Interface::Shared(Pinning::All)
            );
            assert!(
                filled <= usize::from(for_bypass),
                "{interface:?}, {at}: {filled}"
            );
            drop(state);
            if has_lived {
                break;
            }
        }
    }
}

/// The kernel cannot pin the pages of a dead process's memory again. The process that makes the mappings anew dies, too.
#[test]
fn mappings_by_address_are_made_anew_as_a_whole() {
    let mut deaths = 0;
    for interface in INTERFACES {
        for at in 0.. {
            let mut slots = memory();
            for slot in &mut slots {
                slot.is_shared_memory = false;
            }
            let (mut bed, mut model) = dead_with(interface, slots);
            let kernel = bed.host.as_ref().expect("a host").kernel.clone();
            let before = kernel.state().groups.clone();
            let lived = bed.restore(at).0;
            if !lived {
                assert!(bed.restore(NEVER).0);
            }
            bed.check(&mut model);
            for endpoint in ALL {
                assert!(!bed.life_endpoint(endpoint).quarantined, "{interface:?}");
            }
            if lived && interface != Interface::Type1 {
                assert_ne!(kernel.state().groups[&1].0, before[&1].0);
            }
            deaths += bed.deaths;
            if lived {
                break;
            }
        }
    }
    assert!(deaths > 500, "only {deaths} deaths");
}

#[test]
fn memory_that_has_changed_is_mapped_anew() {
    for interface in INTERFACES {
        let (mut bed, mut model) = dead(interface);
        bed.host.as_mut().expect("a host").memory = memory();
        assert!(bed.restore(NEVER).0);
        bed.check(&mut model);
        go_on(&mut bed, &mut model);
    }
}

/// A process that dies while it follows changed memory leaves mappings of both.
#[test]
fn a_death_while_memory_changes_leaves_no_old_mapping() {
    let mut deaths = 0;
    for interface in INTERFACES {
        for at in 0.. {
            let (mut bed, mut model) = dead(interface);
            assert!(bed.restore(NEVER).0);
            let old = bed.host.as_ref().expect("a host").memory.clone();
            let new = vec![old[0].clone(), memory().remove(1)];
            let lived = bed.change_memory(&new, at);
            bed.host.as_mut().expect("a host").memory =
                if at % 2 == 0 && !lived { old } else { new };
            if !lived {
                assert!(bed.restore(NEVER).0);
                deaths += 1;
            }
            bed.check(&mut model);
            go_on(&mut bed, &mut model);
            if lived {
                break;
            }
        }
    }
    assert!(deaths > 30, "only {deaths} deaths");
}

/// Whichever call fails while the objects are taken over, no device reaches what it must not reach.
#[test]
fn a_failed_call_blocks_or_is_made_good() {
    let mut quarantined = 0;
    for interface in INTERFACES {
        for changed in [false, true] {
            for call in 1.. {
                let (mut bed, mut model) = dead(interface);
                let host = bed.host.as_mut().expect("a host");
                if changed {
                    host.memory = memory();
                }
                let kernel = host.kernel.clone();
                let at = kernel.state().calls + call;
                kernel.state().fail.push((at, libc::ENOMEM));
                assert!(bed.restore(NEVER).0);
                let was_made = kernel.state().calls >= at;
                bed.check(&mut model);
                let mut of = |e| bed.life_endpoint(e).quarantined;
                quarantined += ALL.into_iter().filter(|e| of(*e)).count();
                if !was_made {
                    break;
                }
            }
        }
    }
    assert!(quarantined > 10, "{quarantined} endpoints were quarantined");
}

/// The numbers in the records are those of other address spaces, or of none.
#[test]
fn another_iommufd_is_not_taken_for_the_one_before() {
    for interface in [INTERFACES[0], INTERFACES[2]] {
        let (mut bed, mut model) = dead(interface);
        let host = bed.host.as_mut().expect("a host");
        let mut other = Host::new(interface, false);
        other.memory = host.memory.clone();
        other.has_lost = true;
        // What another process has mapped there is not the guest's.
        for _ in 0..12 {
            let space = other.kernel.alloc().expect("an address space");
            let source = DmaSource::Host(&other.memory[0].memory, 0);
            let range = IovaRange::from_len(Iova(0), 1 << 20).expect("a range");
            AddressSpaces::map(&other.kernel, space, range, Access::READ, source).expect("mapped");
            other.foreign.insert(space);
        }
        if let Interface::Shared(_) = interface {
            for endpoint in ALL {
                let (_, space) = other
                    .kernel
                    .vmm_device(endpoint.0, other.group_of(endpoint));
                other.foreign.insert(space);
            }
            let all: BTreeSet<_> = other.kernel.state().spaces.keys().copied().collect();
            other.foreign.extend(all);
        }
        let foreign = other.foreign.clone();
        let kernel = other.kernel.clone();
        let before = kernel.state().spaces.clone();
        *host = other;
        assert!(bed.restore(NEVER).0);
        for space in foreign {
            assert_eq!(kernel.state().spaces[&space], before[&space]);
        }
        bed.check(&mut model);
        go_on(&mut bed, &mut model);
    }
}

#[test]
fn a_new_container_is_filled() {
    let (mut bed, mut model) = dead(Interface::Type1);
    let host = bed.host.as_mut().expect("a host");
    let mut other = Host::new(Interface::Type1, false);
    other.memory = host.memory.clone();
    other.has_lost = true;
    *host = other;
    assert!(bed.restore(NEVER).0);
    bed.check(&mut model);
    assert!(!bed.life_endpoint(A).quarantined);
    go_on(&mut bed, &mut model);
}

/// A container that has not what its record says: somebody else has used it, or the kernel has lost a mapping.
#[test]
fn a_container_with_other_mappings_is_filled_anew() {
    for extra in [false, true] {
        let (mut bed, mut model) = dead(Interface::Type1);
        let host = bed.host.as_ref().expect("a host");
        let (container, space) = &host.containers[&1];
        if extra {
            let range = IovaRange::from_len(Iova(0x77_0000), PAGE).expect("a page");
            let memory = &host.memory[0].memory;
            container
                .map(range, Access::READ, memory, 0)
                .expect("mapped");
        } else {
            host.kernel
                .state()
                .spaces
                .get_mut(space)
                .expect("it")
                .pop_last();
        }
        assert!(bed.restore(NEVER).0);
        bed.check(&mut model);
        go_on(&mut bed, &mut model);
    }
}

/// Linux before 6.2 removes only the mappings of the same process, and says nothing.
#[test]
fn a_kernel_that_keeps_mappings_of_the_dead_process_is_noticed() {
    let (mut bed, _) = dead(Interface::Type1);
    let host = bed.host.as_mut().expect("a host");
    host.memory = memory();
    let kernel = host.kernel.clone();
    kernel.state().keeps_mappings = true;
    assert!(bed.restore(NEVER).0);
    for endpoint in [A, B, G1] {
        assert!(bed.life_endpoint(endpoint).quarantined, "{endpoint}");
    }
    let stopped = kernel.state().stopped.clone();
    assert!(
        stopped.contains(&A.0) && stopped.contains(&B.0),
        "{stopped:?}"
    );
}
