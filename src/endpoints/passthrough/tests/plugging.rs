//! Devices that are added and removed while the guest runs.

use std::collections::BTreeSet;

use super::*;
use crate::topology::PciRange;

/// A new device of a second kernel, its backend, and its address space if it has a container.
fn added_device(interface: Interface) -> (FakeKernel, Box<dyn crate::backends::DmaBackend>, u32) {
    let kernel = FakeKernel::default();
    match interface {
        Interface::Iommufd(pin) => {
            kernel.state().bound.push(C.0);
            let device = PassthroughDevice {
                endpoint: C,
                name: "a new device".into(),
                group: 1,
                shared: false,
                attach: Box::new(kernel.device(C.0, 1)),
                memory: no_memory(),
            };
            let calls = Arc::new(kernel.clone());
            let backend = Iommufd::new(calls, all_capabilities(), pin, vec![device]);
            (kernel, Box::new(backend.of_plugged(C)), 0)
        }
        Interface::Type1 => {
            let (container, space) = kernel.container();
            let device = GroupDevice {
                endpoint: C,
                name: "a new device".into(),
                device: Some(Box::new(kernel.device(C.0, 1))),
            };
            let backend = Type1Group::new(
                Box::new(container),
                all_capabilities(),
                vec![device],
                vec![],
            );
            (kernel, Box::new(backend.of_group(7, false)), space)
        }
    }
}

/// While the kernel pins guest RAM for the new device, the guest's requests are served and the VMM changes its memory.
/// The device then reaches the memory that the VM has at the end.
#[test]
fn hot_adding_a_device_keeps_no_request_waiting() {
    use std::sync::mpsc;
    use std::time::Duration;

    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        let (kernel, backend, container) = added_device(interface);
        let gate = Arc::new(crate::vfio::fake::MapGate::default());
        kernel.state().gate = Some(gate.clone());
        let iommu = Arc::new(Mutex::new(Rank::Core, bed.iommu));
        let adder = {
            let iommu = iommu.clone();
            std::thread::spawn(move || {
                let new = NewEndpoints {
                    range: PciAddress::from_endpoint_id(C).into(),
                    group: None,
                    reserved: ReservedRegions::default(),
                    room: 8,
                };
                Iommu::add_filled(&iommu, &new, backend).map_err(|(cause, _)| cause.to_string())
            })
        };
        assert!(gate.wait_for_call(), "{interface:?}: nothing is mapped");
        let memory = vec![bed.memory[0].clone(), slot(0x20_0000, 0x4000, 0)];
        let (done, served) = mpsc::channel();
        let guest = {
            let (iommu, memory) = (iommu.clone(), memory.clone());
            std::thread::spawn(move || {
                let request = iommu.lock().map(D1, &mapping(0x1000, 0x1000, 0));
                iommu.lock().set_memory(memory);
                done.send(request).expect("the test waits");
            })
        };
        // Only a hang takes as long.
        let request = served.recv_timeout(Duration::from_secs(30));
        gate.open();
        guest.join().expect("the guest's thread");
        assert_eq!(adder.join().expect("the operator's thread"), Ok(()));
        assert_eq!(request, Ok(Ok(())), "{interface:?}: the guest waited");

        assert!(iommu.lock().probe(C).is_ok());
        let state = kernel.state();
        let space = match interface {
            Interface::Iommufd(_) => state.groups[&1].0.expect("attached"),
            Interface::Type1 => container,
        };
        let mut reached: Vec<_> = state.spaces[&space].values().map(|a| a.file).collect();
        let mut expected: Vec<_> = memory.iter().map(|slot| slot.identity).collect();
        reached.sort_unstable();
        expected.sort_unstable();
        assert_eq!(reached, expected, "{interface:?}");
    }
}

/// Otherwise a later process would find an object twice, and refuse the whole state.
#[test]
fn a_device_that_comes_and_goes_leaves_no_records() {
    for interface in INTERFACES {
        let mut bed = Bed::new(interface);
        bed.iommu.keep_journal();
        let iommu = Mutex::new(Rank::Core, bed.iommu);
        let objects = || {
            let core = iommu.lock();
            let loaded = crate::store::Loaded::read(core.store().memory().words());
            loaded.expect("no object twice").objects.len()
        };
        let before = objects();
        let range = PciRange::from(PciAddress::from_endpoint_id(C));
        for refuse in [false, true, false] {
            let (kernel, backend, _) = added_device(interface);
            if refuse {
                let mut state = kernel.state();
                let calls = state.calls + 4..state.calls + 16;
                state.fail.extend(calls.map(|call| (call, libc::ENOMEM)));
            }
            let new = NewEndpoints {
                range,
                group: None,
                reserved: ReservedRegions::default(),
                room: 8,
            };
            let added = Iommu::add_filled(&iommu, &new, backend);
            assert_eq!(added.is_err(), refuse, "{interface:?}");
            if !refuse {
                assert!(objects() > before, "{interface:?}");
                let unused = Iommu::remove_emptied(&iommu, range, &BTreeSet::from([C]));
                assert_eq!(unused.expect("removed").len(), 1);
            }
            assert_eq!(objects(), before, "{interface:?}");
        }
    }
}

/// While the kernel unpins guest RAM of a removed device, the guest's requests are served, also in the domain in which
/// the device was. The device then reaches nothing.
#[test]
fn removing_a_device_keeps_no_request_waiting() {
    use std::sync::mpsc;
    use std::time::Duration;

    for (interface, is_attached) in INTERFACES.into_iter().zip([true, false, true]) {
        let mut bed = Bed::new(interface);
        bed.iommu.attach(A, D1, false).expect("attached");
        let (kernel, backend, container) = added_device(interface);
        let iommu = Arc::new(Mutex::new(Rank::Core, bed.iommu));
        let range = PciAddress::from_endpoint_id(C).into();
        let new = NewEndpoints {
            range,
            group: None,
            reserved: ReservedRegions::default(),
            room: 8,
        };
        let added = Iommu::add_filled(&iommu, &new, backend);
        added.map_err(|(cause, _)| cause).expect("added");
        if is_attached {
            iommu.lock().attach(C, D1, false).expect("attached");
        }
        let gate = Arc::new(crate::vfio::fake::MapGate::default());
        kernel.state().gate = Some(gate.clone());
        let remover = {
            let iommu = iommu.clone();
            std::thread::spawn(move || {
                let silent = BTreeSet::from([C]);
                let removed = Iommu::remove_emptied(&iommu, range, &silent);
                removed.map(|backends| backends.len())
            })
        };
        assert!(gate.wait_for_call(), "{interface:?}: nothing is unmapped");
        let (done, served) = mpsc::channel();
        let guest = {
            let iommu = iommu.clone();
            std::thread::spawn(move || {
                let mut core = iommu.lock();
                let mapped = core.map(D1, &mapping(0x1000, 0x1000, 0));
                let unmapped = core.unmap(D1, mapping(0x1000, 0x1000, 0).range).map(drop);
                done.send((mapped, unmapped)).expect("the test waits");
            })
        };
        // Only a hang takes as long.
        let requests = served.recv_timeout(Duration::from_secs(30));
        gate.open();
        guest.join().expect("the guest's thread");
        let removed = remover.join().expect("the operator's thread");
        assert_eq!(removed.expect("removed"), 1);
        assert_eq!(
            requests,
            Ok((Ok(()), Ok(()))),
            "{interface:?}: the guest waited"
        );

        assert!(iommu.lock().probe(C).is_err());
        assert_eq!(iommu.lock().domains().next().expect("D1").endpoints, [A]);
        let state = kernel.state();
        match interface {
            Interface::Iommufd(_) => assert_eq!(state.groups[&1].0, None),
            Interface::Type1 => assert!(state.spaces[&container].is_empty()),
        }
    }
}
