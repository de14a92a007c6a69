//! The fake obeys the rules that it says.

use std::sync::Arc;

use super::checks::check_entry;
use super::*;
use crate::address::{Access, Gpa, Iova, IovaRange};
use crate::vfio::fake::memfd;
use crate::vfio::nesting::{
    EventQueue, NestParent, NestedTable, SmmuEventKind, VirtualDevice, VirtualIommu, VtdRoot,
};
use crate::vfio::{AddressSpaces, Attach, DmaSource};
use std::os::fd::AsFd;

const DEVICE: BoundDevice = BoundDevice(7);

/// A kernel with an IOMMU, a bound device in a group of its own, and an address space.
fn kernel(iommu: FakeIommu) -> (FakeKernel, crate::vfio::fake::FakeDevice, u32) {
    let kernel = FakeKernel::default();
    kernel.state().nesting.iommu = iommu;
    kernel.state().bound.push(DEVICE.0);
    let device = kernel.device(DEVICE.0, 1);
    let ioas = kernel.alloc().expect("an address space");
    (kernel, device, ioas)
}

fn parent(kernel: &FakeKernel, ioas: u32) -> Arc<NestParent> {
    let parent = NestParent::new(Arc::new(kernel.clone()), DEVICE, ioas);
    Arc::new(parent.expect("a parent"))
}

fn map(kernel: &FakeKernel, ioas: u32, first: u64, access: Access) -> io::Result<()> {
    let file = memfd(0x1000);
    let range = IovaRange::from_len(Iova(first), 0x1000).expect("a range");
    kernel.map(ioas, range, access, DmaSource::File(file.as_fd(), 0))
}

fn errno<T: std::fmt::Debug>(done: Result<T, NestingError>) -> i32 {
    done.expect_err("refused").errno()
}

fn translated() -> StreamEntry {
    StreamEntry::translated(Gpa(0x1000)).expect("aligned")
}

#[test]
fn guards_destroy_from_below_and_leave_nothing() {
    let (kernel, device, ioas) = kernel(FakeIommu::smmu());
    let parent = parent(&kernel, ioas);
    let viommu = Arc::new(VirtualIommu::new(parent, DEVICE).expect("a vIOMMU"));
    let stream = VirtualDevice::new(viommu.clone(), DEVICE, 3).expect("a vDEVICE");
    let queue = EventQueue::new(viommu.clone(), 4).expect("a queue");
    let table = NestedTable::for_smmu(viommu, DEVICE, translated()).expect("a table");
    device.attach(table.id()).expect("attached");
    assert_eq!(kernel.state().nesting.count(), 5);
    let stage = kernel.state().nesting.nested(table.id());
    assert_eq!(stage, Some(FirstStage::Smmu(translated())));
    let busy = kernel.destroy_object(table.id()).expect_err("attached");
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    assert!(kernel.destroy(ioas).is_err(), "the parent uses it");
    device.detach().expect("detached");
    drop((stream, queue, table));
    assert_eq!(kernel.state().nesting.count(), 0);
    kernel.destroy(ioas).expect("unused");
}

#[test]
fn what_the_smmu_driver_refuses_is_refused() {
    let (plain, _, ioas) = kernel(FakeIommu::OneStage);
    assert_eq!(errno(plain.alloc_parent(DEVICE, ioas)), libc::EOPNOTSUPP);
    let FakeIommu::Smmu(hardware, _) = FakeIommu::smmu() else {
        unreachable!("an SMMU");
    };
    let (kernel, device, ioas) = kernel(FakeIommu::Smmu(hardware, false));
    let parent = parent(&kernel, ioas);
    let refused = kernel.alloc_viommu(DEVICE, parent.id());
    assert_eq!(errno(refused), libc::EOPNOTSUPP);
    kernel.state().nesting.iommu = FakeIommu::smmu();
    assert_eq!(errno(kernel.alloc_viommu(DEVICE, ioas)), libc::ENOENT);
    let stranger = BoundDevice(8);
    assert_eq!(
        errno(kernel.alloc_viommu(stranger, parent.id())),
        libc::ENOENT
    );
    let viommu = kernel.alloc_viommu(DEVICE, parent.id()).expect("a vIOMMU");

    // An SMMU nests below vIOMMUs only.
    let stage = FirstStage::Smmu(translated());
    let refused = kernel.alloc_nested(DEVICE, parent.id(), stage);
    assert_eq!(errno(refused), libc::EOPNOTSUPP);
    let table = kernel.alloc_nested(DEVICE, viommu, stage).expect("a table");
    let early = device.attach(table).expect_err("no vDEVICE");
    assert_eq!(early.raw_os_error(), Some(libc::ENOENT));
    kernel.alloc_vdevice(viommu, DEVICE, 3).expect("a vDEVICE");
    let second = kernel.alloc_vdevice(viommu, DEVICE, 4);
    assert_eq!(errno(second), libc::EEXIST);
    device.attach(table).expect("attached");
    for depth in [0, (1 << 19) + 1] {
        assert_eq!(errno(kernel.alloc_event_queue(viommu, depth)), libc::EINVAL);
    }
}

#[test]
fn reserved_bits_of_an_entry_are_refused() {
    for taken in [
        [0, u64::MAX],
        [0b0001, 0],
        [0b1001, 0],
        [0b1011 | 1 << 6, 0xd4],
    ] {
        check_entry(taken).expect("taken");
    }
    // S2 alone and nested, bits of the first word, STRW, EATS of the wrong kind.
    let refused = [
        [0b1101, 0],
        [0b1111, 0],
        [0b1011 | 1 << 52, 0],
        [0b1011, 1 << 30],
        [0b1011, 2 << 28],
        [0b1011, 1 << 8],
    ];
    for words in refused {
        let error = check_entry(words).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{words:x?}");
    }
}

#[test]
fn commands_before_a_refused_one_are_counted_and_not_all_issued() {
    let (kernel, _device, ioas) = kernel(FakeIommu::smmu());
    let viommu = Arc::new(VirtualIommu::new(parent(&kernel, ioas), DEVICE).expect("made"));
    let right = SmmuCommand::invalidate_asid(1);
    let wrong = SmmuCommand::invalidate_context(3);
    let mut commands = vec![right; 70];
    commands.push(wrong);
    let error = viommu.invalidate(&commands).expect_err("an unknown stream");
    assert_eq!((error.done, error.wanted), (70, 71));
    assert_eq!(kernel.state().nesting.commands, vec![right; 63]);
    viommu.invalidate(&commands[..70]).expect("done");
    assert_eq!(kernel.state().nesting.commands.len(), 63 + 70);
    let _stream = VirtualDevice::new(viommu.clone(), DEVICE, 3).expect("a vDEVICE");
    viommu.invalidate(&[wrong]).expect("known now");
}

#[test]
fn commands_need_what_the_smmu_has() {
    let (kernel, _device, ioas) = kernel(FakeIommu::smmu());
    let FakeIommu::Smmu(mut hardware, _) = FakeIommu::smmu() else {
        unreachable!("an SMMU");
    };
    let viommu = VirtualIommu::new(parent(&kernel, ioas), DEVICE).expect("a vIOMMU");
    let range = IovaRange::from_len(Iova(0x1000), 0x2_1000).expect("a range");
    let ranged = SmmuCommand::invalidate_range(0x100, range, false, true);
    let single = SmmuCommand::invalidate_range(0x100, range, false, false);
    viommu.invalidate(&ranged).expect("taken");
    viommu.invalidate(&single).expect("taken");
    hardware.invalidates_ranges = false;
    kernel.state().nesting.iommu = FakeIommu::Smmu(hardware, true);
    assert!(viommu.invalidate(&ranged).is_err());
    viommu.invalidate(&single).expect("taken");
    hardware.asid_bits = 8;
    kernel.state().nesting.iommu = FakeIommu::Smmu(hardware, true);
    assert!(viommu.invalidate(&single).is_err(), "the ASID has 9 bits");
}

#[test]
fn a_vtd_parent_takes_no_read_only_mapping() {
    let (kernel, device, ioas) = kernel(FakeIommu::vtd());
    map(&kernel, ioas, 0x1000, Access::READ).expect("mapped");
    assert_eq!(errno(kernel.alloc_parent(DEVICE, ioas)), libc::EINVAL);
    let range = IovaRange::from_len(Iova(0x1000), 0x1000).expect("a range");
    kernel.unmap(ioas, range).expect("unmapped");
    map(&kernel, ioas, 0x1000, Access::READ_WRITE).expect("mapped");
    let parent = parent(&kernel, ioas);
    let refused = map(&kernel, ioas, 0x2000, Access::READ).expect_err("read-only");
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    map(&kernel, ioas, 0x3000, Access::READ_WRITE).expect("mapped");
    let no_viommu = kernel.alloc_viommu(DEVICE, parent.id());
    assert_eq!(errno(no_viommu), libc::EOPNOTSUPP);

    let root = |input_bits| VtdRoot {
        table: Gpa(0x3000),
        input_bits,
    };
    let four = NestedTable::for_vtd(parent.clone(), DEVICE, root(48)).expect("a table");
    let five = NestedTable::for_vtd(parent, DEVICE, root(57)).expect("a table");
    let refused = device.attach(five.id()).expect_err("four levels only");
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    device.attach(four.id()).expect("attached");

    let pages = |first, pages| VtdInvalidation {
        first: Iova(first),
        pages,
        only_leaves: true,
    };
    let ranges = [pages(0x1000, 2), pages(0x1800, 1), pages(0x4000, 1)];
    let error = four.invalidate_vtd(&ranges).expect_err("misaligned");
    assert_eq!((error.done, error.wanted), (1, 3));
    assert_eq!(kernel.state().nesting.ranges, [(four.id(), ranges[0])]);
    four.invalidate_vtd(&[VtdInvalidation::ALL]).expect("taken");
    assert!(four.invalidate_vtd(&[pages(0x1000, u64::MAX)]).is_err());
    device.detach().expect("detached");
}

#[test]
fn events_carry_the_virtual_stream_and_the_losses() {
    let (kernel, _device, ioas) = kernel(FakeIommu::smmu());
    let viommu = Arc::new(VirtualIommu::new(parent(&kernel, ioas), DEVICE).expect("made"));
    let mut queue = EventQueue::new(viommu.clone(), 2).expect("a queue");
    let fault = [0x10, 2 << 40, 0x5000, 0];
    // Nobody hears of a device without a vDEVICE.
    kernel.report(DEVICE.0, fault);
    assert!(queue.read().expect("read").events.is_empty());
    let _stream = VirtualDevice::new(viommu, DEVICE, 0x42).expect("a vDEVICE");
    for _ in 0..4 {
        kernel.report(DEVICE.0, fault);
    }
    let found = queue.read().expect("read");
    assert_eq!((found.events.len(), found.lost), (2, 0));
    let event = found.events[0];
    assert_eq!(
        (event.kind, event.stream),
        (SmmuEventKind::Translation, 0x42)
    );
    kernel.report(DEVICE.0, fault);
    let found = queue.read().expect("read");
    assert_eq!((found.events.len(), found.lost), (1, 2));
}
