//! Devices that the VMM binds, moves, or has not bound yet.

use super::*;

/// A VM with the device A, which no VMM has bound yet, and without bypass mode at boot.
fn with_unbound_device(kernel: &FakeKernel) -> Iommu {
    let device = PassthroughDevice {
        endpoint: A,
        name: "0000:65:00.0".into(),
        group: 1,
        shared: true,
        attach: Box::new(kernel.device(A.0, 1)),
        memory: no_memory(),
    };
    let mut iommu = Iommu::new(settings(false), topology()).expect("an arena");
    let calls = Arc::new(kernel.clone());
    let backend = Iommufd::new(calls, all_capabilities(), Pinning::All, vec![device]);
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    iommu
}

#[test]
fn an_unbound_device_is_quarantined_until_the_vmm_binds_it() {
    let kernel = FakeKernel::default();
    let mut iommu = with_unbound_device(&kernel);
    assert!(!iommu.endpoint(A).expect("an endpoint").quarantined);
    iommu.connect();
    let refused = iommu.attach(A, D1, false).expect_err("not bound");
    assert!(
        refused.to_string().contains("before the vhost-user device"),
        "{refused}"
    );
    assert!(iommu.endpoint(A).expect("an endpoint").quarantined);

    // The VMM has bound the device by now, and its own address space applies until the daemon attaches one.
    let (device, space) = kernel.vmm_device(A.0, 1);
    assert!(device.is_bound());
    assert_eq!(kernel.state().groups[&1].0, Some(space));
    iommu.retarget_unattached();
    assert_eq!(kernel.state().groups[&1].0, None, "blocked");
    assert!(!iommu.endpoint(A).expect("an endpoint").quarantined);
    iommu.attach(A, D1, false).expect("attached");
    assert!(kernel.state().groups[&1].0.is_some_and(|id| id != space));
}

#[test]
fn a_vmm_may_connect_before_it_binds_its_devices() {
    for announces in [true, false] {
        let kernel = FakeKernel::default();
        let iommu = Arc::new(Mutex::new(Rank::Core, with_unbound_device(&kernel)));
        let worker = crate::device::WorkerSettings {
            longest_poll: std::time::Duration::ZERO,
            max_batch: 64,
            realtime: None,
        };
        let device = Device::new(iommu.clone(), Arc::default(), worker).expect("event descriptors");
        let quarantined = || iommu.lock().endpoint(A).expect("an endpoint").quarantined;
        device.connect();
        assert!(!quarantined(), "nothing was tried yet");
        if announces {
            let (_, space) = kernel.vmm_device(A.0, 1);
            assert_eq!(kernel.state().groups[&1].0, Some(space));
            device.announce_vmm();
            assert_eq!(kernel.state().groups[&1].0, None, "blocked");
        }
        assert!(!quarantined());
        device.disconnect();
        assert!(!quarantined());
    }
}

#[test]
fn the_vmms_address_space_applies_until_the_first_attach() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    let own = bed.spaces[&1];
    let at = |bed: &Bed| bed.kernel.state().groups[&1].0;
    assert_eq!(at(&bed), Some(own));
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.detach(A, D1).expect("detached");
    assert_ne!(
        at(&bed),
        Some(own),
        "the daemon's own bypass mode from now on"
    );
    bed.check();
    bed.iommu.disconnect();
    assert_eq!(at(&bed), None, "the VMM is gone");
}

#[test]
fn a_container_that_is_handed_over_is_emptied() {
    let kernel = FakeKernel::default();
    let (container, space) = kernel.container();
    let ram = slot(0, 0x1000, 0);
    container
        .map(range(0x5000, 0x5fff), Access::READ_WRITE, &ram.memory, 0)
        .expect("mapped by somebody else");
    let devices = vec![GroupDevice {
        endpoint: A,
        name: "a device".into(),
        device: None,
    }];
    let backend = Type1Group::new(Box::new(container), all_capabilities(), devices, Vec::new());
    let mut iommu = Iommu::new(settings(false), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    assert!(kernel.state().spaces[&space].is_empty());
}

#[test]
fn devices_moved_by_the_vmm_are_moved_back() {
    let mut bed = Bed::new(Interface::Iommufd(Pinning::All));
    bed.iommu.set_bypass(false);
    assert!(bed.reached(1).is_empty());
    let vmm = bed.spaces[&1];
    bed.kernel.state().groups.insert(1, (Some(vmm), vec![A.0]));
    bed.iommu.retarget_unattached();
    assert!(bed.reached(1).is_empty(), "blocked");
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.kernel.state().groups.insert(1, (Some(vmm), vec![A.0]));
    bed.iommu.reset();
    assert!(bed.reached(1).is_empty(), "blocked");
}

/// As cloud-hypervisor does at each reboot of its guest: after the connection has ended, and before the next one.
#[test]
fn a_vmm_that_attaches_its_devices_again_does_not_keep_them() {
    for bypass in [false, true] {
        let mut bed = Bed::booted(Interface::Iommufd(Pinning::All), bypass);
        let memory = bed.memory.clone();
        for reboot in 0..3 {
            bed.iommu.attach(A, D1, false).expect("attached");
            bed.iommu.map(D1, &mapping(0, 0x1000, 0)).expect("mapped");
            bed.check();
            assert!(bed.kernel.state().stopped.is_empty(), "in use");
            // The VMM may take the devices before the daemon has noticed the end of the connection.
            if reboot == 1 {
                bed.reattach_by_vmm();
            }
            bed.iommu.disconnect();
            for endpoint in ALL {
                let stopped = &bed.kernel.state().stopped;
                assert!(stopped.contains(&endpoint.0), "{endpoint}, reboot {reboot}");
            }
            if reboot != 1 {
                bed.reattach_by_vmm();
            }
            bed.iommu.connect();
            bed.set_memory(memory.clone());
            // The next driver has set the bus-master bits.
            bed.kernel.state().stopped.clear();
            bed.check();
            assert_eq!(bed.reached(1).is_empty(), !bypass, "reboot {reboot}");
        }
    }
}

#[test]
fn only_devices_that_the_vmm_has_bound_are_stopped() {
    let kernel = FakeKernel::default();
    let mut iommu = with_unbound_device(&kernel);
    iommu.connect();
    iommu.disconnect();
    assert!(kernel.state().stopped.is_empty());
}

#[test]
fn a_device_bound_to_another_iommufd_is_refused() {
    let ours = FakeKernel::default();
    let theirs = FakeKernel::default();
    let devices = vec![PassthroughDevice {
        endpoint: A,
        name: "0000:65:00.0".into(),
        group: 1,
        shared: true,
        attach: Box::new(theirs.device(A.0, 1)),
        memory: no_memory(),
    }];
    let calls = Arc::new(ours.clone());
    let backend = Iommufd::new(calls, all_capabilities(), Pinning::All, devices);
    let mut iommu = Iommu::new(settings(true), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    let (_, space) = theirs.vmm_device(A.0, 1);
    iommu.connect();
    iommu.set_memory(vec![slot(0, 0x1000, 0)]);
    // The other iommufd then has address spaces with the same IDs as ours.
    for _ in 0..8 {
        theirs.alloc().expect("an address space");
    }
    let refused = iommu.attach(A, D1, false).expect_err("not ours");
    assert!(refused.to_string().contains("another iommufd"), "{refused}");
    assert!(iommu.endpoint(A).expect("an endpoint").quarantined);
    assert_eq!(
        theirs.state().groups[&1].0,
        None,
        "detached, even from the VMM's address space {space}"
    );
    assert!(
        iommu.map(D1, &mapping(0, 0x1000, 0)).is_err(),
        "no such domain"
    );
}

#[test]
fn a_device_left_attached_by_a_former_daemon_is_moved() {
    let kernel = FakeKernel::default();
    let (device, old) = kernel.vmm_device(A.0, 1);
    let devices = vec![PassthroughDevice {
        endpoint: A,
        name: "0000:65:00.0".into(),
        group: 1,
        shared: true,
        attach: Box::new(device),
        memory: no_memory(),
    }];
    let calls = Arc::new(kernel.clone());
    let backend = Iommufd::new(calls, all_capabilities(), Pinning::All, devices);
    let mut iommu = Iommu::new(settings(true), topology()).expect("an arena");
    iommu.add_backend(Box::new(backend), &[A]).expect("added");
    iommu.connect();
    iommu.set_memory(vec![slot(0, 0x1000, 0)]);
    let at = kernel.state().groups[&1].0.expect("bypass mode");
    assert_ne!(at, old, "whatever a former daemon left there");
    assert_eq!(kernel.state().spaces[&at].len(), 1, "all of RAM");
}
