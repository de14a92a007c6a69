//! The registers: features, status, queues, and what a driver finds in the configuration space.

use super::*;

/// Offset, length and `cfg_type` of each virtio capability, and the number of the first capability.
fn capabilities(bed: &mut Bed) -> (u64, Vec<(u64, u64, u64)>) {
    let mut at = bed.read_space(0x34, 1);
    let first = bed.read_space(at, 1);
    let mut found = Vec::new();
    while at != 0 {
        if bed.read_space(at, 1) == 9 {
            found.push((at, bed.read_space(at + 2, 1), bed.read_space(at + 3, 1)));
        }
        at = bed.read_space(at + 1, 1);
    }
    (first, found)
}

#[test]
fn the_header_is_that_of_a_modern_virtio_iommu() {
    let mut bed = Bed::new();
    assert_eq!(bed.read_space(0, 4), 0x1057_1af4);
    assert_eq!(bed.read_space(8, 4), 0x00ff_0001, "class and revision");
    assert!(bed.read_space(0x2e, 2) >= 0x40);
    assert_eq!(bed.read_space(0x3d, 1), 0, "no INTx");
    assert_eq!(bed.read_space(6, 2), 1 << 4);
    // A VMM finds the size of a BAR by writing ones.
    for (at, size) in [
        (0x10, 0xffff_8004),
        (0x14, 0xffff_ffff),
        (0x18, 0),
        (0x1c, 0),
    ] {
        bed.write_space(at, &[0xff; 4]);
        assert_eq!(bed.read_space(at, 4), size, "{at:#x}");
    }
    // Read-only.
    bed.write_space(0, &[0xff; 4]);
    bed.write_space(0x34, &[0xff; 4]);
    assert_eq!(bed.read_space(0, 4), 0x1057_1af4);
    assert_eq!(bed.read_space(0x34, 1), 0x40);
}

#[test]
fn capabilities_name_every_structure_and_msix_comes_first() {
    let mut bed = Bed::new();
    let (first, found) = capabilities(&mut bed);
    assert_eq!(first, 0x11);
    let kinds: Vec<_> = found.iter().map(|(_, _, kind)| *kind).collect();
    assert_eq!(kinds, [1, 3, 4, 2, 5]);
    let mut end = 0;
    for (at, len, kind) in found {
        let extra = if kind == 2 || kind == 5 { 4 } else { 0 };
        assert_eq!(len, 16 + extra, "{kind}");
        assert!(at >= end && at + len <= 256);
        end = at + len;
        let (bar, offset, length) = (
            bed.read_space(at + 4, 1),
            bed.read_space(at + 8, 4),
            bed.read_space(at + 12, 4),
        );
        if kind == 5 {
            continue;
        }
        assert_eq!((bar, offset % 4), (0, 0));
        assert!(offset + length <= REGISTERS_BYTES);
        if kind == 2 {
            let multiplier = bed.read_space(at + 16, 4);
            assert_eq!(multiplier, 4);
            for queue in 0..2u16 {
                bed.write(22, &queue.to_le_bytes());
                assert!(length >= bed.read(30, 2) * multiplier + 2);
            }
        }
    }
    // Three vectors, with table and pending bits on pages of their own.
    assert_eq!(bed.read_space(0x42, 2), 2);
    assert_eq!(bed.read_space(0x44, 4), 0x4000);
    assert_eq!(bed.read_space(0x48, 4), 0x5000);
}

#[test]
fn the_halves_of_an_address_are_written_alone() {
    let mut bed = Bed::new();
    bed.write(32, &[1, 2, 3, 4]);
    assert_eq!(bed.read(32, 8), 0x0403_0201);
    bed.write(36, &[5, 6, 7, 8]);
    assert_eq!(bed.read(32, 8), 0x0807_0605_0403_0201);
    assert_eq!(bed.read(36, 4), 0x0807_0605);
    bed.write(32, &[9; 4]);
    assert_eq!(bed.read(32, 8), 0x0807_0605_0909_0909);
    bed.write(40, &[7; 8]);
    assert_eq!(bed.read(40, 8), 0x0707_0707_0707_0707);
    // A part of a half is no write.
    bed.write(48, &[7; 3]);
    assert_eq!(bed.read(48, 8), 0);
}

#[test]
fn features_are_shown_in_windows() {
    let mut bed = Bed::new();
    let offered = Device::offered_features();
    for (select, word) in [
        (0u32, offered & 0xffff_ffff),
        (1, offered >> 32),
        (2, 0),
        (u32::MAX, 0),
    ] {
        bed.write(0, &select.to_le_bytes());
        assert_eq!(bed.read(4, 4), word);
        bed.write(8, &select.to_le_bytes());
        bed.write(12, &u32::try_from(word).expect("32 bits").to_le_bytes());
        assert_eq!(bed.read(12, 4), word);
    }
    bed.write(8, &0u32.to_le_bytes());
    assert_eq!(bed.read(12, 4), offered & 0xffff_ffff);
}

#[test]
fn features_ok_needs_a_valid_subset() {
    let offered = Device::offered_features();
    for (features, is_accepted) in [
        (VERSION_1, true),
        (offered, true),
        (offered & !VERSION_1, false),
        (VERSION_1 | 1 << 33, false),
        (VERSION_1 | 1 << 28, false),
        (0, false),
    ] {
        let mut bed = Bed::new();
        let status = bed.negotiate(features);
        assert_eq!(status & 8 != 0, is_accepted, "{features:#x}");
        // Accepted features stay.
        bed.write(8, &0u32.to_le_bytes());
        bed.write(12, &[0xff; 4]);
        assert_eq!(bed.read(12, 4) == 0xffff_ffff, !is_accepted);
    }
}

#[test]
fn the_generation_changes_with_the_configuration() {
    let mut bed = Bed::new();
    let before = bed.read(21, 1);
    assert_eq!(bed.read(21, 1), before);
    bed.flip_bypass();
    // The driver reads the other value in between.
    bed.flip_bypass();
    let after = bed.read(21, 1);
    assert_ne!(after, before);
    assert_eq!(bed.read(21, 1), after);
}

#[test]
fn sizes_of_queues_are_powers_of_two() {
    let mut bed = Bed::new();
    for size in [1u16, 2, 64, 512, 1024] {
        bed.write(24, &size.to_le_bytes());
        assert_eq!(bed.read(24, 2), u64::from(size));
    }
    for size in [0u16, 3, 1023, 2048, 0xffff] {
        bed.write(24, &size.to_le_bytes());
        assert_eq!(bed.read(24, 2), 1024, "{size} is refused");
    }
    for queue in [2u16, 3, 0xffff] {
        bed.write(22, &queue.to_le_bytes());
        bed.write(24, &64u16.to_le_bytes());
        bed.write(28, &1u16.to_le_bytes());
        assert_eq!((bed.read(24, 2), bed.read(28, 2)), (0, 0));
    }
    assert_eq!(bed.read(18, 2), 2, "queues");
}

#[test]
fn an_enabled_queue_keeps_its_place() {
    let mut bed = Bed::new();
    bed.enable(0, 16, RINGS[0]);
    bed.write(32, &[0; 8]);
    bed.write(24, &32u16.to_le_bytes());
    bed.write(28, &0u16.to_le_bytes());
    assert_eq!(bed.read(32, 8), RINGS[0]);
    assert_eq!((bed.read(24, 2), bed.read(28, 2)), (16, 1));
}

#[test]
fn a_driver_without_features_is_told_so() {
    let mut bed = Bed::new();
    bed.write(20, &[7]);
    assert_eq!(bed.status(), 7 | 64);
}

#[test]
fn the_window_reaches_the_registers() {
    let mut bed = Bed::new();
    let (_, found) = capabilities(&mut bed);
    let (at, _, _) = *found.last().expect("a window");
    let aim = |bed: &mut Bed, bar: u8, offset: u32, len: u32| {
        bed.write_space(at + 4, &[bar]);
        bed.write_space(at + 8, &offset.to_le_bytes());
        bed.write_space(at + 12, &len.to_le_bytes());
    };
    aim(&mut bed, 0, 20, 1);
    bed.write_space(at + 16, &[3, 0xff, 0xff, 0xff]);
    assert_eq!(bed.status(), 3);
    assert_eq!(bed.read_space(at + 16, 1), 3);
    aim(&mut bed, 0, 18, 2);
    assert_eq!(bed.read_space(at + 16, 2), 2);
    // Accesses that a driver must not make do nothing.
    for (bar, offset, len) in [
        (0, 20, 0),
        (0, 20, 3),
        (0, 21, 2),
        (1, 20, 1),
        (0, 0x8000, 4),
        (0, u32::MAX, 1),
    ] {
        aim(&mut bed, bar, offset, len);
        bed.write_space(at + 16, &[0xff; 4]);
        assert_eq!(bed.status(), 3);
    }
    // Reading the whole space, as a VMM does, clears nothing unless the window leads there.
    aim(&mut bed, 0, 0x1000, 0);
    bed.start_and_attach();
    for at in (0..256).step_by(4) {
        bed.read_space(at, 4);
    }
    assert_eq!(bed.read(ISR, 1), 1);
}

/// Answers with the number of restarts.
struct CountingBar(Arc<Mutex<u8>>);

impl TrappedBar for CountingBar {
    fn read(&mut self, offset: u64, into: &mut [u8], _: &ReadOnlyWindows) {
        into.fill(*self.0.lock().expect("no panic") + u8::try_from(offset).expect("small"));
    }

    fn restart(&mut self) {
        *self.0.lock().expect("no panic") += 1;
    }
}

#[test]
fn a_trapped_bar_is_a_32_bit_bar_of_a_page() {
    let restarts = Arc::new(Mutex::new(0));
    let mut bed = Bed::with(Some(Box::new(CountingBar(restarts.clone()))));
    bed.write_space(0x18, &[0xff; 4]);
    assert_eq!(bed.read_space(0x18, 4), 0xffff_f000);
    assert_eq!(bed.pci.region(2).map(|region| region.size), Some(0x1000));
    assert_eq!(*restarts.lock().expect("no panic"), 1);
    assert_eq!(bed.read_of(2, 8, 2), 0x0909);
    bed.pci.reset().expect("reset");
    bed.pci.release();
    assert_eq!(*restarts.lock().expect("no panic"), 3);
}
