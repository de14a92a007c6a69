//! iommufd's nesting objects: an SMMUv3 walks a page table of the test as its first stage. The machine is that of
//! `qemu-scripts/l1.sh --arch arm64 --iommu smmuv3-nested`.

mod backend;
mod bed;

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vfio_bindings::bindings::vfio::{VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_MSI_IRQ_INDEX};
use vhost_device_iommu::address::{Gpa, Iova, IovaRange};
use vhost_device_iommu::vfio::nesting::{
    EventQueue, NestingKernel, SmmuCommand, SmmuEventClass, SmmuEventKind, StreamEntry,
    VirtualDevice,
};
use vhost_device_iommu::vfio::{Attach, DeviceAccess, IrqChange, IrqSelection};

use bed::{Leaf, NestingBed, PAGE, RAM, STREAM, TABLE};

/// The window in which the kernel maps the interrupt controller's doorbell (SW_MSI).
const DOORBELL: u64 = 0x800_0000;
/// Time limit for an event or interrupt of a device.
const EVENT: Duration = Duration::from_secs(30);
/// Time in which nothing must happen.
const NOTHING: Duration = Duration::from_millis(500);

/// The page of the guest's memory with this number.
fn page(number: u64) -> u64 {
    RAM + number * PAGE
}

fn is_readable(file: &impl AsFd, within: Duration) -> bool {
    let mut fds = [PollFd::new(file, PollFlags::IN)];
    let within = Timespec::try_from(within).expect("short");
    poll(&mut fds, Some(&within)).expect("polled") == 1
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn a_store_maps_and_an_invalidation_unmaps() {
    let bed = NestingBed::new();
    let tables = bed.tables(0, 1);
    let _attached = bed.attach(&tables);
    bed.fill(0, 1);
    bed.fill(1, 2);

    // Two stores, and no call of the kernel.
    tables.store(0x5000, Leaf::at(page(0)));
    tables.store(0x6000, Leaf::at(page(8)));
    bed.copy(0x5000, 0x6000);
    bed.expect(8, 1);

    // The SMMU does not keep that an address had no entry.
    bed.edu.write(0x7000);
    bed.expect_empty(9);
    tables.store(0x7000, Leaf::at(page(9)));
    bed.edu.write(0x7000);
    bed.expect(9, 1);

    // A changed entry is in use after the invalidation, and not before.
    tables.store(0x5000, Leaf::at(page(1)));
    bed.copy(0x5000, 0x6000);
    bed.expect(8, 1);
    bed.invalidate(1, 0x5000, 1);
    bed.copy(0x5000, 0x6000);
    bed.expect(8, 2);

    // So is a removed one.
    tables.store(0x6000, Leaf::NONE);
    bed.clear(8);
    bed.edu.write(0x6000);
    bed.expect(8, 2);
    bed.invalidate(1, 0x6000, 1);
    bed.clear(8);
    bed.edu.write(0x6000);
    bed.expect_empty(8);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn one_command_invalidates_a_range() {
    let bed = NestingBed::new();
    let tables = bed.tables(0, 1);
    let _attached = bed.attach(&tables);
    let range = IovaRange::from_len(Iova(0x2_0000), 32 * PAGE).expect("a range");
    let commands = SmmuCommand::invalidate_range(1, range, true, true);
    assert_eq!(commands.len(), 1);
    bed.fill(0, 1);
    bed.fill(1, 2);
    tables.store(0x6000, Leaf::at(page(8)));
    let fill = |target| {
        for number in 0..32 {
            tables.store(0x2_0000 + number * PAGE, Leaf::at(page(target)));
        }
    };
    fill(0);
    for number in [0, 17, 31] {
        bed.edu.read(0x2_0000 + number * PAGE);
    }
    fill(1);
    bed.copy(0x3_f000, 0x6000);
    bed.expect(8, 1);
    bed.viommu.invalidate(&commands).expect("invalidated");
    for number in [0, 17, 31] {
        bed.clear(8);
        bed.copy(0x2_0000 + number * PAGE, 0x6000);
        bed.expect(8, 2);
    }

    // By the ASID, and all.
    for (target, command) in [
        (0, SmmuCommand::invalidate_asid(1)),
        (1, SmmuCommand::INVALIDATE_ALL),
    ] {
        fill(target);
        bed.viommu.invalidate(&[command]).expect("invalidated");
        bed.copy(0x3_f000, 0x6000);
        bed.expect(8, 1 + target as u8);
    }
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn blocks_and_read_only_leaves_mean_what_they_say() {
    let bed = NestingBed::new();
    let tables = bed.tables(0, 1);
    let _attached = bed.attach(&tables);
    bed.fill(0, 1);
    bed.fill(1, 2);
    tables.store_block(0xa0_0000, Leaf::at(RAM));
    bed.copy(0xa0_0000, 0xa0_0000 + 8 * PAGE);
    bed.expect(8, 1);

    // Bits that the SMMU ignores, or that concern other accesses.
    tables.store(0x9000, Leaf::at(page(1)).marked());
    tables.store_block(0xc0_0000, Leaf::at(RAM).marked());
    bed.copy(0x9000, 0xc0_0000 + 9 * PAGE);
    bed.expect(9, 2);

    tables.store(0x8000, Leaf::at(page(1)).read_only());
    bed.copy(0x8000, 0xa0_0000 + 8 * PAGE);
    bed.expect(8, 2);
    bed.copy(0xa0_0000, 0x8000);
    bed.expect(1, 2);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn an_attach_replaces_the_table() {
    let bed = NestingBed::new();
    let first = bed.tables(0, 1);
    let second = bed.tables(1, 2);
    let first_table = bed.attach(&first);
    bed.fill(0, 1);
    bed.fill(1, 2);
    first.store(0x5000, Leaf::at(page(0)));
    first.store(0x6000, Leaf::at(page(8)));
    second.store(0x5000, Leaf::at(page(1)));
    second.store(0x6000, Leaf::at(page(9)));
    bed.copy(0x5000, 0x6000);
    bed.expect(8, 1);

    let second_table = bed.attach(&second);
    bed.copy(0x5000, 0x6000);
    bed.expect(9, 2);
    bed.expect(8, 1);
    // Back, without an invalidation: the ASIDs keep the cached translations apart.
    bed.device.attach(first_table.id()).expect("attached");
    bed.clear(8);
    bed.copy(0x5000, 0x6000);
    bed.expect(8, 1);
    drop(second_table);

    let identity = bed.table(StreamEntry::IDENTITY);
    bed.device.attach(identity.id()).expect("attached");
    bed.copy(page(1), page(10));
    bed.expect(10, 2);

    let abort = bed.table(StreamEntry::ABORT);
    bed.device.attach(abort.id()).expect("attached");
    bed.copy(page(0), page(11));
    bed.expect_empty(11);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn faults_are_events_of_the_virtual_stream() {
    let bed = NestingBed::new();
    let mut queue = EventQueue::new(bed.viommu.clone(), 4).expect("a queue");
    let tables = bed.tables(0, 1);
    let _attached = bed.attach(&tables);
    tables.store(0x8000, Leaf::at(page(1)).read_only());
    // An address that is wider than the SMMU's outputs.
    let wide = 1 << bed.smmu().output_bits;
    tables.store(0xa000, Leaf::at(wide));
    let (read, write) = (true, false);
    let accesses = [
        (read, 0x7000, SmmuEventKind::Translation),
        (write, 0x9000, SmmuEventKind::Translation),
        (write, 0x8000, SmmuEventKind::Permission),
        (read, 0xa000, SmmuEventKind::AddressSize),
    ];
    for (is_read, first, kind) in accesses {
        if is_read {
            bed.edu.read(first);
        } else {
            bed.edu.write(first);
        }
        assert!(is_readable(queue.file(), EVENT));
        // A page is many accesses, and the queue is short: some events are lost, and counted.
        let (mut events, mut lost) = (Vec::new(), 0);
        while is_readable(queue.file(), NOTHING) {
            let found = queue.read().expect("read");
            events.extend(found.events);
            lost += found.lost;
        }
        assert!(!events.is_empty() && lost > 0, "{events:?}, {lost} lost");
        for event in events {
            let found = (event.kind, event.stream, event.is_read);
            assert_eq!(found, (kind, STREAM, is_read), "{event:?}");
            assert_eq!(event.address.0 & !(PAGE - 1), first, "{event:?}");
            assert_eq!(event.class, SmmuEventClass::Input, "{event:?}");
            assert!(!event.is_stalled, "{event:?}");
        }
    }
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn a_device_cannot_write_to_the_table() {
    let bed = NestingBed::new();
    let tables = bed.tables(0, 1);
    let _attached = bed.attach(&tables);
    bed.fill(0, 1);
    tables.store(0x5000, Leaf::at(page(0)));
    // A leaf that leads into the table, which the second stage maps for reads.
    tables.store(0x9000, Leaf::at(tables.leaves()));
    let before = bed.table_bytes();
    bed.copy(0x5000, 0x9000);
    assert!(
        before == bed.table_bytes(),
        "the device has written to the table"
    );
    bed.edu.read(0x9000);
    tables.store(0x6000, Leaf::at(page(8)));
    bed.edu.write(0x6000);
    let leaf = bed.ram_word(8, 5);
    assert_eq!(leaf, Leaf::at(page(0)).0, "the device can read the table");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn interrupts_need_an_entry_for_the_doorbell() {
    let bed = NestingBed::new();
    let mut queue = EventQueue::new(bed.viommu.clone(), 16).expect("a queue");
    let tables = bed.tables(0, 1);
    let _attached = bed.attach(&tables);
    let line = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
    let change = |selection| IrqChange {
        action: VFIO_IRQ_SET_ACTION_TRIGGER,
        index: VFIO_PCI_MSI_IRQ_INDEX,
        start: 0,
        selection,
    };
    let events = [Some(line.as_fd())];
    let on = change(IrqSelection::Events(&events));
    bed.device.set_irqs(&on).expect("set up");

    bed.edu.interrupt();
    assert!(is_readable(queue.file(), EVENT));
    let found = queue.read().expect("read");
    let event = found.events.first().expect("an event");
    assert_eq!(event.kind, SmmuEventKind::Translation);
    assert_eq!(event.address.0 & !0xf_ffff, DOORBELL, "{event:?}");
    assert!(!is_readable(&line, NOTHING), "lost");

    tables.store_block(DOORBELL, Leaf::at(DOORBELL).device());
    bed.edu.interrupt();
    assert!(is_readable(&line, EVENT), "arrived");
    let off = change(IrqSelection::All(0));
    bed.device.set_irqs(&off).expect("switched off");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn the_kernel_refuses_what_the_documentation_says() {
    let mut bed = NestingBed::new();
    let errno = |error: std::io::Error| error.raw_os_error();
    let tables = bed.tables(0, 1);
    let entry = StreamEntry::translated(tables.descriptor()).expect("aligned");
    let table = bed.table(entry);

    // One stream ID for a device, one device for a stream ID, one queue for a vIOMMU.
    let second = VirtualDevice::new(bed.viommu.clone(), bed.bound, STREAM + 1);
    assert_eq!(second.expect_err("a second").errno(), libc::EEXIST);
    let _queue = EventQueue::new(bed.viommu.clone(), 1).expect("a queue");
    let second = EventQueue::new(bed.viommu.clone(), 1);
    assert_eq!(second.expect_err("a second").errno(), libc::EEXIST);

    // A stream that nobody has; commands after a refused one.
    let wrong = SmmuCommand::invalidate_context(STREAM + 1);
    let right = SmmuCommand::invalidate_context(STREAM);
    bed.viommu.invalidate(&[right]).expect("taken");
    bed.viommu.invalidate(&[]).expect("nothing to do");
    let error = bed.viommu.invalidate(&[right, wrong, right]);
    let error = error.expect_err("an unknown stream");
    assert_eq!(
        (error.done, error.wanted, errno(error.source)),
        (1, 3, Some(libc::EIO))
    );

    // Objects that others use.
    bed.device.attach(table.id()).expect("attached");
    for id in [table.id(), bed.parent.id()] {
        let destroyed = bed.iommufd.destroy_object(id);
        assert_eq!(errno(destroyed.expect_err("in use")), Some(libc::EBUSY));
    }

    // A translating entry without a vDEVICE.
    bed.device.detach().expect("detached");
    bed.forget_stream();
    let attached = bed.device.attach(table.id());
    assert_eq!(errno(attached.expect_err("no stream")), Some(libc::ENOENT));
    let identity = bed.table(StreamEntry::IDENTITY);
    bed.device.attach(identity.id()).expect("without a stream");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn the_hardware_is_what_qemu_emulates() {
    let bed = NestingBed::new();
    let smmu = bed.smmu();
    assert!(smmu.walks_aarch64 && smmu.walks_little_endian && smmu.granules.has_4k);
    assert!(smmu.invalidates_ranges && !smmu.repeats_invalidations);
    assert_eq!(
        (smmu.asid_bits, smmu.input_bits, smmu.output_bits),
        (16, 48, 44)
    );
    let info = bed.iommufd.hardware_info(bed.bound).expect("known");
    assert!(!info.may_use_ats);
    assert_eq!(Gpa(TABLE).0 >> smmu.output_bits, 0);
}
