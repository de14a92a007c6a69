//! What was seen with slow servers of libvfio-user, each as a test: answers that take a while, many of them in a row, and a
//! restart.

use std::time::{Duration, Instant};

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::ids::DomainId;

use super::Version;
use super::rows::{IOVA, PAGE, assert_lives, assert_lives_after, map_many, start, window};
use crate::bed::{Bed, DOMAIN, neighbour};

const SECOND: Duration = Duration::from_secs(1);

/// A server that pauses for 5 ms for each window.
fn slow() -> Version {
    Version {
        pause: Duration::from_millis(5),
        ..Version::OF_2026
    }
}

/// All answers together take longer than the deadline, which begins anew with each of them.
#[test]
fn an_unmap_of_many_windows_waits_for_a_server_that_pauses_for_each() {
    let bed = Bed::with_deadline(Isolation::Mappings, SECOND);
    bed.attach();
    map_many(&bed, 1, 300);
    let (mut client, library) = start(&bed, slow());
    let begun = Instant::now();
    bed.unmap(IOVA, 2 * 256 * PAGE).expect("unmapped");
    assert!(begun.elapsed() > SECOND, "{:?}", begun.elapsed());
    assert_eq!(library.windows().len(), 300 - 256);
    assert_lives(&bed, &mut client, &library);
}

#[test]
fn an_attach_to_many_windows_waits_for_a_server_that_pauses_for_each() {
    let bed = Bed::with_deadline(Isolation::Mappings, SECOND);
    let attached = bed.iommu().attach(neighbour(), DOMAIN, false);
    attached.expect("attached");
    map_many(&bed, 1, 300);
    let (mut client, library) = start(&bed, slow());
    assert_eq!(library.windows(), []);
    let begun = Instant::now();
    bed.attach();
    assert!(begun.elapsed() > SECOND, "{:?}", begun.elapsed());
    assert_eq!(library.windows().len(), 300);
    assert_lives(&bed, &mut client, &library);
}

/// The device takes 900 ms to pause for its first window.
#[test]
fn the_first_attach_waits_as_long_as_configured() {
    let version = Version {
        pause: Duration::from_millis(900),
        ..Version::OF_2026
    };
    for deadline in [10 * SECOND, SECOND / 10] {
        let bed = Bed::with_deadline(Isolation::Mappings, deadline);
        let (mut client, library) = start(&bed, version);
        // In bypass mode, guest RAM is one window.
        let attached = bed.iommu().attach(bed.endpoint(), DomainId(2), true);
        if deadline > version.pause {
            attached.expect("attached");
            assert_eq!(library.windows().len(), 1);
            assert_lives(&bed, &mut client, &library);
        } else {
            let failed = attached.expect_err("late").to_string();
            assert!(failed.contains("raise `deadline-ms`"), "{failed}");
            let ends = bed.watch.state().ends;
            assert_eq!((ends.cut_offs, ends.answer_cut_offs), (1, 1));
        }
    }
}

#[test]
fn a_server_that_restarts_while_the_guest_maps_is_back_after_one_replay() {
    const COUNT: usize = 300;
    let bed = Bed::with_deadline(Isolation::Mappings, SECOND);
    bed.attach();
    map_many(&bed, 1, COUNT);
    let (mut client, library) = start(&bed, slow());
    library.restart();
    let between = |n: u64| window(n * 37 % COUNT as u64) + PAGE;
    let map_between = |n| bed.map(between(n), 0, PAGE, Access::READ);
    let successor = loop {
        let state = library.state();
        if state.connections == 2 && !state.regions.ranges().is_empty() {
            break state;
        }
        drop(state);
        std::thread::sleep(Duration::from_millis(1));
    };
    // It has a part of the windows, and answers nothing while it is locked. The guest maps between windows that were
    // announced, and between others.
    assert!(successor.regions.ranges().len() < COUNT);
    for n in 0..20 {
        map_between(n).expect("MAP waits for no replay");
    }
    drop(successor);
    for n in 0..20 {
        bed.unmap(between(n), PAGE).expect("unmapped");
    }
    // The guest goes on, until the server has all windows.
    let begun = Instant::now();
    for n in 0.. {
        map_between(n).expect("mapped");
        bed.unmap(between(n), PAGE).expect("unmapped");
        if library.windows().len() == COUNT {
            break;
        }
        assert!(begun.elapsed() < 60 * SECOND, "the replay does not end");
    }
    let all: Vec<_> = (0..COUNT as u64).map(|n| (window(n), PAGE)).collect();
    assert_eq!(library.windows(), all);
    assert_lives_after(1, &bed, &mut client, &library);
}
