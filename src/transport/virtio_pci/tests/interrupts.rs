//! Interrupts: vectors, masks, and the ISR status.

use super::*;

#[test]
fn events_are_mapped_to_vectors() {
    let mut bed = Bed::new();
    for field in [16, 26] {
        assert_eq!(bed.read(field, 2), u64::from(NO_VECTOR), "after a reset");
        for vector in 0..3u16 {
            bed.write(field, &vector.to_le_bytes());
            assert_eq!(bed.read(field, 2), u64::from(vector));
        }
        for vector in [3, 0x7ff, 0x800, NO_VECTOR] {
            bed.write(field, &0u16.to_le_bytes());
            bed.write(field, &vector.to_le_bytes());
            assert_eq!(bed.read(field, 2), u64::from(NO_VECTOR), "{vector:#x}");
        }
    }
}

#[test]
fn a_request_interrupts_through_its_vector() {
    let mut bed = Bed::new();
    bed.enable_msix();
    let event = bed.give_event(1);
    bed.start_and_attach();
    assert_eq!(count(&event), 0, "the queue has no vector");
    assert_eq!(bed.read(ISR, 1), 0);
    bed.map_vector(0, 1);
    assert_eq!(bed.request(&map(1, 0x1000)), 0);
    assert_eq!(count(&event), 1);
    assert_eq!(bed.read(ISR, 1), 0, "not used with MSI-X");
}

/// The client gives a vector the eventfd that it has: the record has it once, and says that it was kept twice.
#[test]
fn an_eventfd_that_replaces_itself_is_reported_twice() {
    let mut bed = Bed::new();
    let mut manager = Manager::new();
    let keeper = manager.keeper();
    bed.pci.kept_with(keeper.clone(), None);
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    for _ in 0..2 {
        let copy = PeerEvent::new(event.try_clone().expect("a duplicate")).expect("an eventfd");
        let events = IrqSetData::Eventfds(vec![Some(copy)]);
        bed.set_irqs(IrqAction::Trigger, 1, events).expect("set");
    }
    let record = bed.pci.take_record().expect("a change");
    assert_eq!(record.kept, ["file.0", "file.0"]);
    assert_eq!(
        record.names.iter().filter(|name| *name == "file.0").count(),
        1
    );
    // A refused window is in no record.
    bed.map(0, RAM_BYTES, Some(ram(RAM_BYTES)))
        .expect_err("overlaps");
    let short = bed.map(RAM_BYTES, RAM_BYTES, Some(ram(0x1000)));
    short.expect_err("behind the end of the file");
    let record = bed.pci.take_record().expect("a change");
    assert_eq!(record.kept, ["file.1"]);
    assert!(!record.names.contains(&"file.1".into()));
    assert_eq!(keeper.users("file.0"), 2);
}

#[test]
fn masked_interrupts_wait() {
    let mut bed = Bed::new();
    bed.start();
    bed.map_vector(0, 1);
    // The client gives the eventfd later.
    assert_eq!(bed.request(&attach(1)), 0);
    assert_eq!(bed.read(0x5000, 8), 1 << 1);
    let event = bed.give_event(1);
    assert_eq!(count(&event), 1);
    bed.set_irqs(IrqAction::Mask, 1, IrqSetData::All(1))
        .expect("masked");
    assert_eq!(bed.request(&map(1, 0x1000)), 0);
    assert_eq!((count(&event), bed.read(0x5000, 8)), (0, 1 << 1));
    bed.set_irqs(IrqAction::Unmask, 0, IrqSetData::Chosen(&[0, 1, 0]))
        .expect("unmasked");
    assert_eq!((count(&event), bed.read(0x5000, 8)), (1, 0));
    bed.set_irqs(IrqAction::Trigger, 0, IrqSetData::Disable)
        .expect("disabled");
    assert_eq!(bed.request(&map(1, 0x2000)), 0);
    assert_eq!(count(&event), 0);
}

#[test]
fn the_isr_status_tells_without_msix() {
    let mut bed = Bed::new();
    bed.start_and_attach();
    assert_eq!(bed.read_space(6, 1), 1 << 4 | 1 << 3);
    assert_eq!(bed.read(ISR, 1), 1);
    assert_eq!(bed.read(ISR, 1), 0, "cleared by the read");
    assert_eq!(bed.read_space(6, 1), 1 << 4);
    bed.break_ring();
    assert_eq!(bed.read(ISR, 1), 2);
}
