//! Servers that take a limited number of windows.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_device_iommu::address::{Access, Gpa, Mapping};
use vhost_device_iommu::backends::BackendErrorKind;
use vhost_device_iommu::backends::vfio_user::{Isolation, WindowLimits};
use vhost_device_iommu::faults::FaultReason;
use vhost_device_iommu::iommu::RequestError;

use crate::bed::{Bed, DOMAIN, RAM, ScriptedServer, eventually, range};
use crate::connection::{Connection, DMA_MAP, DMA_UNMAP, RESET};

const IOVA: u64 = 0x7000_0000;
const PAGE: u64 = 0x1000;

fn page(n: u64) -> Mapping {
    Mapping {
        range: range(IOVA + n * PAGE, PAGE),
        gpa: Gpa(RAM),
        access: Access::READ,
        mmio: false,
    }
}

/// A server that has up to `limit` windows and refuses others with `errno`.
fn limited(bed: &Bed, limit: usize, errno: i32) -> (Connection, ScriptedServer) {
    let mut windows = 0;
    bed.pair(move |server, msg| {
        match msg.cmd {
            DMA_MAP if windows == limit => {
                server.refuse(msg, errno.unsigned_abs());
                return true;
            }
            DMA_MAP => windows += 1,
            DMA_UNMAP => windows -= 1,
            _ => {}
        }
        false
    })
}

fn kind(outcome: &Result<(), RequestError>) -> Option<BackendErrorKind> {
    match outcome {
        Ok(()) => None,
        Err(RequestError::Backend(cause)) => Some(cause.kind),
        Err(other) => panic!("{other}"),
    }
}

fn map_all(bed: &Bed, pages: std::ops::Range<u64>) -> Vec<Option<BackendErrorKind>> {
    let run: Vec<_> = pages.map(page).collect();
    let mut outcomes = VecDeque::new();
    bed.iommu().map_all(DOMAIN, &run, &mut outcomes);
    outcomes.iter().map(kind).collect()
}

/// One errno is that of libvfio-user, the others are those of other servers.
#[test]
fn at_its_limit_a_server_costs_the_guest_a_mapping_and_an_event() {
    let full = Some(BackendErrorKind::NoMem);
    let missing = |n: u64| (FaultReason::Mapping, IOVA + n * PAGE);
    for errno in [libc::EINVAL, libc::ENOSPC, libc::ENOMEM] {
        let bed = Bed::new(Isolation::ExactMessages);
        bed.attach();
        let (_client, scripted) = limited(&bed, 3, errno);
        assert_eq!(map_all(&bed, 0..5), [None, None, None, full, full]);
        assert_eq!(bed.faults.take(), [missing(3), missing(4)]);
        let single = bed.map(IOVA + 9 * PAGE, 0, PAGE, Access::WRITE);
        assert_eq!(kind(&single), full);
        assert_eq!(bed.faults.take(), [missing(9)]);
        let limits = |refused| WindowLimits {
            most: 3,
            missing: 0,
            refused,
        };
        assert_eq!(bed.watch.state().limits, limits(3));
        assert_eq!(bed.watch.state().windows, 3);
        bed.unmap(IOVA, PAGE).expect("unmapped");
        assert_eq!(map_all(&bed, 3..5), [None, full]);
        assert_eq!(bed.watch.state().limits, limits(4));
        bed.unmap(0, u64::MAX).expect("unmapped");
        assert!(scripted.each(DMA_UNMAP, |_| ()).len() == 4);
    }
}

#[test]
fn a_server_that_refuses_its_first_window_refuses_the_window() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    let (_client, _server) = limited(&bed, 0, libc::EINVAL);
    let failed = Some(BackendErrorKind::DevErr);
    assert_eq!(map_all(&bed, 0..3), [failed; 3]);
    assert!(bed.faults.take().is_empty());
    let limits = WindowLimits {
        most: 65535,
        missing: 0,
        refused: 3,
    };
    assert_eq!(bed.watch.state().limits, limits);
}

/// The guest has got OK for these mappings: there was no server then.
#[test]
fn windows_that_a_new_server_has_no_room_for_are_missing() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    assert_eq!(map_all(&bed, 0..5), [None; 5]);
    assert_eq!(bed.watch.state().limits.missing, 0, "there is no server");
    let (mut client, _server) = limited(&bed, 3, libc::EINVAL);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    eventually("two are missing", || {
        let limits = bed.watch.state().limits;
        (limits.most, limits.missing, limits.refused) == (3, 2, 2)
    });
    bed.unmap(0, u64::MAX).expect("unmapped");
    assert_eq!(bed.watch.state().limits.missing, 0);
}

/// The windows in flight when the server comes to its limit are refused, and stay mapped.
#[test]
fn a_refused_window_takes_the_place_of_one_that_the_server_gives_up() {
    for isolation in [Isolation::ExactMessages, Isolation::Mappings] {
        let bed = Bed::new(isolation);
        bed.attach();
        assert_eq!(map_all(&bed, 0..10), [None; 10]);
        let (mut client, scripted) = limited(&bed, 4, libc::EINVAL);
        let limits = || {
            let limits = bed.watch.state().limits;
            (limits.most, limits.missing)
        };
        eventually("six are missing", || limits() == (4, 6));
        bed.unmap(IOVA, 2 * PAGE).expect("unmapped");
        eventually("the next two", || limits() == (4, 4));
        // One that the server has been offered again, and one that it has refused.
        bed.unmap(IOVA + 4 * PAGE, PAGE).expect("unmapped");
        bed.unmap(IOVA + 7 * PAGE, PAGE).expect("unmapped");
        eventually("the sixth", || limits() == (4, 2));
        // No window is on its way, so that UNMAP waits.
        assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
        bed.unmap(0, u64::MAX).expect("unmapped");
        let removed = scripted.each(DMA_UNMAP, |m| (m.u64_at(8) - IOVA) / PAGE);
        assert_eq!(removed, [0, 1, 4, 2, 3, 5, 6], "{isolation:?}");
        assert_eq!(bed.watch.state().ends.cut_offs, 0);
    }
}

/// A server may refuse a window for a reason of its own. It is asked again when it gives a window up, and not all the time.
#[test]
fn a_refused_window_is_offered_once_for_each_that_the_server_gives_up() {
    const COUNT: u64 = 8;
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    assert!(map_all(&bed, 0..COUNT).iter().all(Option::is_none));
    let refuses = Arc::new(AtomicBool::new(true));
    let refusing = refuses.clone();
    let (mut client, scripted) = bed.pair(move |server, msg| {
        let odd = msg.cmd == DMA_MAP && msg.u64_at(16) == IOVA + 2 * PAGE;
        let refused = odd && refusing.load(Ordering::Relaxed);
        if refused {
            server.refuse(msg, libc::EBUSY.unsigned_abs());
        }
        refused
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    eventually("one is missing", || bed.watch.state().limits.missing == 1);
    let offers = || {
        let told = scripted.each(DMA_MAP, |m| m.u64_at(16));
        told.iter().filter(|at| **at == IOVA + 2 * PAGE).count()
    };
    for n in 3..7 {
        bed.unmap(IOVA + n * PAGE, PAGE).expect("unmapped");
        eventually("another offer", || offers() == n as usize - 1);
        assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
        assert_eq!(offers(), n as usize - 1);
    }
    refuses.store(false, Ordering::Relaxed);
    bed.unmap(IOVA, PAGE).expect("unmapped");
    eventually("none is missing", || bed.watch.state().limits.missing == 0);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    bed.unmap(0, u64::MAX).expect("unmapped");
    let removed = scripted.each(DMA_UNMAP, |m| (m.u64_at(8) - IOVA) / PAGE);
    assert_eq!(removed, [3, 4, 5, 6, 0, 1, 2, 7]);
}

/// A library pauses its device for each window that it is told, also for those that it refuses.
#[test]
fn a_server_that_connects_is_told_few_windows_beyond_its_limit() {
    const COUNT: u64 = 1000;
    const LIMIT: u64 = 16;
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    assert!(map_all(&bed, 0..COUNT).iter().all(Option::is_none));
    let (mut client, scripted) = limited(&bed, LIMIT as usize, libc::EINVAL);
    let limits = || {
        let limits = bed.watch.state().limits;
        (limits.most, limits.missing)
    };
    eventually("the limit", || limits() == (LIMIT, COUNT - LIMIT));
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let told = || scripted.each(DMA_MAP, |m| m.u64_at(16)).len();
    let before = told();
    assert!((80..=144).contains(&before), "{before}");
    // The next one takes the place of one that the guest unmaps.
    bed.unmap(IOVA + 3 * PAGE, PAGE).expect("unmapped");
    eventually("another one", || limits() == (LIMIT, COUNT - 1 - LIMIT));
    eventually("it has come", || told() == before + 1);
    // The announcement has not reached this one.
    let full = Some(BackendErrorKind::NoMem);
    assert_eq!(map_all(&bed, COUNT..COUNT + 1), [full]);
    assert_eq!(told(), before + 1);
    bed.unmap(0, u64::MAX).expect("unmapped");
    assert_eq!(
        map_all(&bed, 0..LIMIT + 1)[LIMIT as usize - 1..],
        [None, full]
    );
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// A server may refuse some windows for reasons of their own, with the same errno.
#[test]
fn some_refused_windows_are_no_limit() {
    const COUNT: u64 = 300;
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    assert!(map_all(&bed, 0..COUNT).iter().all(Option::is_none));
    let (_client, _server) = bed.pair(|server, msg| {
        let odd = IOVA + 5 * PAGE..IOVA + 65 * PAGE;
        let refused = msg.cmd == DMA_MAP && odd.contains(&msg.u64_at(16));
        if refused {
            server.refuse(msg, libc::EINVAL.unsigned_abs());
        }
        refused
    });
    eventually("all others", || {
        let limits = bed.watch.state().limits;
        (limits.missing, limits.refused) == (60, 60)
    });
}

#[test]
fn a_server_is_told_no_more_windows_than_configured() {
    let bed = Bed::with_max_windows(Isolation::ExactMessages, 2);
    bed.attach();
    assert_eq!(map_all(&bed, 0..3), [None; 3]);
    let (mut client, scripted) = bed.pair(|_, _| false);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(scripted.windows(), [IOVA, IOVA + PAGE]);
    let limits = bed.watch.state().limits;
    assert_eq!((limits.most, limits.missing), (2, 1));
    let full = Some(BackendErrorKind::NoMem);
    assert_eq!(map_all(&bed, 3..5), [full; 2]);
    assert_eq!(bed.watch.state().limits.refused, 2);
    bed.unmap(IOVA, PAGE).expect("unmapped");
    eventually("the third window", || {
        scripted.windows() == [IOVA + PAGE, IOVA + 2 * PAGE]
    });
    assert_eq!(bed.watch.state().limits.missing, 0);
}

#[test]
fn a_server_that_takes_no_further_region_costs_the_guest_an_event() {
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    let (_client, _server) = limited(&bed, 1, libc::EINVAL);
    bed.map(IOVA, 0, PAGE, Access::READ).expect("mapped");
    let far = 1 << 44;
    let refused = bed.map(far, 0, PAGE, Access::READ);
    assert_eq!(kind(&refused), Some(BackendErrorKind::NoMem));
    assert_eq!(bed.faults.take(), [(FaultReason::Mapping, far)]);
}
