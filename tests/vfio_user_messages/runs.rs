//! Runs of MAPs: their windows go to the server together, and each MAP has its own outcome.

use std::collections::VecDeque;

use vhost_device_iommu::address::{Access, Gpa, GpaRange, Mapping};
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::faults::FaultReason;
use vhost_device_iommu::iommu::RequestError;

use crate::bed::{Bed, DOMAIN, RAM, eventually, range};
use crate::connection::{Connection, DMA_MAP, DMA_READ, DMA_UNMAP, dma};

const IOVA: u64 = 0x7000_0000;
const PAGE: u64 = 0x1000;

fn page(n: u64) -> Mapping {
    Mapping {
        range: range(IOVA + n * PAGE, PAGE),
        gpa: Gpa(RAM + n * PAGE),
        access: Access::READ_WRITE,
        mmio: false,
    }
}

fn map_all(bed: &Bed, run: &[Mapping]) -> Vec<Result<(), RequestError>> {
    let mut outcomes = VecDeque::new();
    bed.iommu().map_all(DOMAIN, run, &mut outcomes);
    outcomes.into()
}

/// Replaces guest RAM by two memory slots of one page each.
fn in_two_slots(bed: &Bed) {
    let mut parts = [bed.slot.clone(), bed.slot.clone()];
    for (part, at) in parts.iter_mut().zip([RAM, RAM + PAGE]) {
        part.range = GpaRange::from_len(Gpa(at), PAGE).expect("one page");
    }
    bed.iommu().set_memory(parts.to_vec());
}

fn read(server: &mut Connection, address: u64) -> i32 {
    server.call(DMA_READ, &dma(address, 4, &[]), &[]).errno()
}

/// The server answers no window before it has all of them, and reaches each window at once.
#[test]
fn the_windows_of_a_run_are_sent_together_and_waited_for_together() {
    const COUNT: u64 = 20;
    for isolation in [Isolation::ExactMessages, Isolation::Mappings] {
        let bed = Bed::new(isolation);
        bed.attach();
        let (_client, mut server) = bed.raw_pair();
        let run: Vec<_> = (0..COUNT).map(page).collect();
        std::thread::scope(|scope| {
            let mapped = scope.spawn(|| map_all(&bed, &run));
            let windows: Vec<_> = (0..COUNT)
                .map(|_| server.recv().expect("a window"))
                .collect();
            for window in &windows {
                assert_eq!(window.cmd, DMA_MAP);
                assert_eq!(read(&mut server, window.u64_at(16)), 0);
            }
            for window in &windows {
                server.reply(window, &[], &[]);
            }
            let outcomes = mapped.join().expect("no panic");
            assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        });
        assert_eq!(bed.watch.state().windows as u64, COUNT);
        assert_eq!(read(&mut server, IOVA + (COUNT - 1) * PAGE), 0);
        assert!(bed.faults.take().is_empty());
    }
}

#[test]
fn a_refused_mapping_of_a_run_leaves_nothing_and_the_others_stay() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let (_client, scripted) = bed.pair(|server, msg| {
        let refused = msg.cmd == DMA_MAP && msg.u64_at(16) == IOVA + 2 * PAGE;
        if refused {
            server.refuse(msg, libc::EIO.unsigned_abs());
        }
        refused
    });
    let wide = Mapping {
        range: range(IOVA + 3 * PAGE, 2 * PAGE),
        ..page(3)
    };
    // Overlaps the page that the server refuses.
    let overlapping = Mapping {
        range: range(IOVA + PAGE, 2 * PAGE),
        ..page(1)
    };
    let run = [page(0), page(2), overlapping, wide, page(4)];
    let outcomes = map_all(&bed, &run);
    let done: Vec<_> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(done, [true, false, true, true, false], "{outcomes:?}");
    assert!(matches!(outcomes[4], Err(RequestError::Overlap { .. })));
    let refused = outcomes[1].as_ref().expect_err("refused").to_string();
    assert!(refused.contains("refuses a window"), "{refused}");
    assert_eq!(bed.watch.state().windows, 3);
    bed.unmap(0, u64::MAX).expect("unmapped");
    let mut gone = scripted.each(DMA_UNMAP, |m| m.u64_at(8));
    gone.sort_unstable();
    assert_eq!(gone, [IOVA, IOVA + PAGE, IOVA + 3 * PAGE]);
    assert_eq!(bed.watch.state().windows, 0);
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(!endpoint.quarantined);
}

/// A mapping into two memory slots has two windows. The server refuses one of them.
#[test]
fn a_mapping_of_a_run_has_all_of_its_windows_or_none() {
    let bed = Bed::new(Isolation::Mappings);
    in_two_slots(&bed);
    bed.attach();
    let (_client, scripted) = bed.pair(|server, msg| {
        let refused = msg.cmd == DMA_MAP && msg.u64_at(16) == IOVA + PAGE;
        if refused {
            server.refuse(msg, libc::EIO.unsigned_abs());
        }
        refused
    });
    let both = Mapping {
        range: range(IOVA, 2 * PAGE),
        ..page(0)
    };
    let other = Mapping {
        range: range(IOVA + 8 * PAGE, PAGE),
        ..page(0)
    };
    let outcomes = map_all(&bed, &[both, other]);
    let done: Vec<_> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(done, [false, true], "{outcomes:?}");
    assert_eq!(scripted.each(DMA_UNMAP, |m| m.u64_at(8)), [IOVA]);
    assert_eq!(bed.watch.state().windows, 1);
}

/// Two mappings of the run have two windows each, of which the server refuses one. It answers no removal of the others
/// before it has all of them.
#[test]
fn the_windows_of_refused_mappings_are_taken_back_together_and_count_no_more() {
    const FIRST: u64 = IOVA;
    const SECOND: u64 = IOVA + 8 * PAGE;
    const KEPT: u64 = IOVA + 16 * PAGE;
    for isolation in [Isolation::ExactMessages, Isolation::Mappings] {
        let bed = Bed::new(isolation);
        in_two_slots(&bed);
        bed.attach();
        let (_client, mut server) = bed.raw_pair();
        let both = |first| Mapping {
            range: range(first, 2 * PAGE),
            ..page(0)
        };
        let kept = Mapping {
            range: range(KEPT, PAGE),
            ..page(0)
        };
        let run = [both(FIRST), both(SECOND), kept];
        std::thread::scope(|scope| {
            let mapped = scope.spawn(|| map_all(&bed, &run));
            let windows: Vec<_> = (0..5).map(|_| server.recv().expect("a window")).collect();
            for window in &windows {
                if [FIRST + PAGE, SECOND + PAGE].contains(&window.u64_at(16)) {
                    server.refuse(window, libc::EIO.unsigned_abs());
                } else {
                    server.reply(window, &[], &[]);
                }
            }
            let removals: Vec<_> = (0..2)
                .map(|_| server.recv().expect("the removal of a window"))
                .collect();
            for (removal, first) in removals.iter().zip([FIRST, SECOND]) {
                let removed = (removal.cmd, removal.u64_at(8), removal.u64_at(16));
                assert_eq!(removed, (DMA_UNMAP, first, PAGE));
                assert_eq!(read(&mut server, first), libc::EFAULT);
            }
            assert!(
                !mapped.is_finished(),
                "the server may still use the windows"
            );
            for removal in &removals {
                server.reply(removal, &removal.body, &[]);
            }
            let outcomes = mapped.join().expect("no panic");
            let done: Vec<_> = outcomes.iter().map(Result::is_ok).collect();
            assert_eq!(done, [false, false, true], "{outcomes:?}");
        });
        assert_eq!(bed.watch.state().windows, 1);
        assert_eq!(read(&mut server, KEPT), 0);
    }
}

#[test]
fn a_server_that_is_late_for_a_run_is_cut_off_and_has_nothing_of_it() {
    let deadline = std::time::Duration::from_millis(300);
    let bed = Bed::with_deadline(Isolation::ExactMessages, deadline);
    bed.attach();
    let (_client, mut server) = bed.raw_pair();
    let run: Vec<_> = (0..4).map(page).collect();
    let outcomes = map_all(&bed, &run);
    for outcome in &outcomes {
        let refused = outcome.as_ref().expect_err("late").to_string();
        assert!(refused.contains("cut off"), "{refused}");
    }
    while server.recv().is_some() {}
    assert_eq!(bed.watch.state().windows, 0);
    assert_eq!(bed.iommu().mappings(DOMAIN, range(0, 1).first()).count(), 0);
}

/// Without a server, and before one connects, a run costs nothing. The server gets all of it later.
#[test]
fn a_server_that_connects_later_gets_the_windows_of_a_run() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let run: Vec<_> = (0..4).map(page).collect();
    assert!(map_all(&bed, &run).iter().all(Result::is_ok));
    let (_client, scripted) = bed.pair(|_, _| false);
    eventually("all windows", || scripted.windows().len() == 4);
    let more: Vec<_> = (4..8).map(page).collect();
    assert!(map_all(&bed, &more).iter().all(Result::is_ok));
    // The server may still have been told the first ones: then no MAP waits.
    eventually("all windows", || scripted.windows().len() == 8);
    assert_eq!(bed.faults.take(), [] as [(FaultReason, u64); 0]);
}
