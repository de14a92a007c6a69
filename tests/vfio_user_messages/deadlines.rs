//! The deadlines of a server that the guest waits for: each answer begins the time anew, up to a total.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::{Deadlines, Isolation};
use vhost_device_iommu::ids::DomainId;

use crate::bed::{Bed, RAM, ScriptedServer, eventually};
use crate::connection::{Connection, DMA_MAP, DMA_UNMAP, RESET};

const IOVA: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
const SECOND: Duration = Duration::from_secs(1);

/// Maps so many windows. No two of them are adjacent.
pub fn map_many(bed: &Bed, count: u64) {
    for n in 0..count {
        let iova = IOVA + 2 * n * PAGE;
        bed.map(iova, n % 1024 * PAGE, PAGE, Access::READ)
            .expect("mapped");
    }
}

/// A server that takes so long for each reply to a DMA_MAP or a DMA_UNMAP while `is_slow`. It refuses guest RAM in bypass
/// mode.
fn slow_pair(
    bed: &Bed,
    is_slow: &Arc<AtomicBool>,
    pause: Duration,
) -> (Connection, ScriptedServer) {
    let is_slow = is_slow.clone();
    bed.pair(move |server, msg| {
        let is_update = matches!(msg.cmd, DMA_MAP | DMA_UNMAP);
        if is_update && is_slow.load(Ordering::Relaxed) {
            std::thread::sleep(pause);
        }
        let refused = msg.cmd == DMA_MAP && msg.u64_at(16) == RAM;
        if refused {
            server.refuse(msg, libc::ENOSPC.unsigned_abs());
        }
        refused
    })
}

/// A bed with 300 windows, and a server that takes 20 ms for each from now on: more than the deadline in all.
fn steady() -> (Bed, Connection, ScriptedServer) {
    let deadlines = Deadlines {
        total: SECOND * 60,
        ..Deadlines::with_answer(SECOND * 5)
    };
    let bed = Bed::with_deadlines(Isolation::ExactMessages, deadlines);
    bed.attach();
    map_many(&bed, 300);
    let is_slow = Arc::new(AtomicBool::new(false));
    let (mut client, scripted) = slow_pair(&bed, &is_slow, Duration::from_millis(20));
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    is_slow.store(true, Ordering::Relaxed);
    (bed, client, scripted)
}

/// Libraries that pause the device for each message take several milliseconds for it.
#[test]
fn an_unmap_of_many_windows_waits_for_a_server_that_answers_steadily() {
    let (bed, _client, scripted) = steady();
    let begun = Instant::now();
    bed.unmap(IOVA, 2 * 256 * PAGE).expect("unmapped");
    assert!(begun.elapsed() > SECOND * 5, "{:?}", begun.elapsed());
    assert_eq!(scripted.windows().len(), 300 - 256);
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

#[test]
fn an_attach_waits_for_a_server_that_answers_steadily() {
    let (bed, _client, _scripted) = steady();
    // The domain's windows leave and come back: the server refuses guest RAM.
    let begun = Instant::now();
    let refused = bed.iommu().attach(bed.endpoint(), DomainId(2), true);
    let refused = refused.expect_err("the server refuses RAM").to_string();
    assert!(refused.contains("cannot be switched"), "{refused}");
    assert!(begun.elapsed() > SECOND * 10, "{:?}", begun.elapsed());
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(!endpoint.quarantined);
}

#[test]
fn a_server_whose_replies_take_too_long_in_all_is_cut_off() {
    let deadlines = Deadlines {
        total: SECOND,
        ..Deadlines::with_answer(SECOND)
    };
    let bed = Bed::with_deadlines(Isolation::ExactMessages, deadlines);
    bed.attach();
    map_many(&bed, 100);
    let is_slow = Arc::new(AtomicBool::new(false));
    let (mut client, scripted) = slow_pair(&bed, &is_slow, Duration::from_millis(40));
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    is_slow.store(true, Ordering::Relaxed);
    let failed = bed.unmap(0, u64::MAX).expect_err("4 s in all").to_string();
    assert!(failed.contains("`total-deadline-ms`"), "{failed}");
    let ends = bed.watch.state().ends;
    assert_eq!((ends.cut_offs, ends.total_cut_offs), (1, 1));
    eventually("the end", || scripted.thread.is_finished());
}

#[test]
fn a_server_that_answers_nothing_is_cut_off_after_one_deadline() {
    let bed = Bed::with_deadline(Isolation::ExactMessages, SECOND / 2);
    bed.attach();
    map_many(&bed, 60);
    let (mut client, mut server) = bed.raw_pair();
    for _ in 0..60 {
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
    }
    // An UNMAP would not wait for a replay. When the client has this answer, the replay is over.
    client.ask(RESET, &[], &[]);
    let reset = server.recv().expect("forwarded");
    server.reply(&reset, &[], &[]);
    assert_eq!(client.recv().expect("an answer").errno(), 0);
    // So many windows have the total, but each answer has its deadline.
    let begun = Instant::now();
    let failed = bed.unmap(0, u64::MAX).expect_err("no answer");
    assert!(
        begun.elapsed() < Deadlines::DEFAULT_TOTAL - SECOND,
        "it waited for the total"
    );
    let failed = failed.to_string();
    assert!(failed.contains("raise `deadline-ms`"), "{failed}");
    let ends = bed.watch.state().ends;
    assert_eq!((ends.cut_offs, ends.answer_cut_offs), (1, 1));
}
