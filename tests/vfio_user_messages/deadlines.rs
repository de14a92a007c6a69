//! The deadlines of a server that the guest waits for, and which of them ends the wait. That each answer begins the time
//! anew is in `library/slow.rs`.

use std::time::{Duration, Instant};

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::{Deadlines, Isolation};

use crate::bed::{Bed, eventually};
use crate::connection::{DMA_UNMAP, RESET};

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

#[test]
fn a_server_whose_replies_take_too_long_in_all_is_cut_off() {
    let deadlines = Deadlines {
        total: SECOND,
        ..Deadlines::with_answer(SECOND)
    };
    let bed = Bed::with_deadlines(Isolation::ExactMessages, deadlines);
    bed.attach();
    map_many(&bed, 100);
    let (mut client, scripted) = bed.pair(|_, msg| {
        if msg.cmd == DMA_UNMAP {
            std::thread::sleep(Duration::from_millis(40));
        }
        false
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
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
