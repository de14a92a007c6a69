//! A server that connects while the guest has mappings, and the guest's requests meanwhile: no request waits for the
//! server to be told all windows, and the server is told each of them once.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Gpa, Mapping};
use vhost_device_iommu::backends::vfio_user::{Deadlines, Isolation};
use vhost_device_iommu::ids::DomainId;

use crate::bed::{Bed, CLIENT_TEXT, RAM, accept, answer, eventually, range};
use crate::common::rng::Rng;
use crate::connection::{
    Connection, DMA_MAP, DMA_READ, DMA_UNMAP, Msg, RESET, VERSION, dma, version_body,
};
use crate::deadlines::map_many;

const IOVA: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
const SECOND: Duration = Duration::from_secs(1);
/// The most announced windows without a reply.
const IN_FLIGHT: u64 = 64;
/// The flag of DMA_UNMAP that removes all windows.
const UNMAP_ALL: u32 = 2;

fn window(n: u64) -> u64 {
    IOVA + 2 * n * PAGE
}

fn assert_not_quarantined(bed: &Bed) {
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(!endpoint.quarantined);
}

/// The next `count` windows that the server is told.
fn told(server: &mut Connection, count: u64) -> Vec<Msg> {
    let next = (0..count).map(|_| server.recv().expect("a window"));
    next.inspect(|m| assert_eq!(m.cmd, DMA_MAP)).collect()
}

#[test]
fn map_waits_for_no_replay_and_unmap_for_the_windows_in_flight() {
    const COUNT: u64 = 100;
    // Only a failure takes as long.
    let deadlines = Deadlines {
        connect: SECOND * 600,
        ..Deadlines::with_answer(SECOND * 600)
    };
    let bed = Bed::with_deadlines(Isolation::Mappings, deadlines);
    bed.attach();
    map_many(&bed, COUNT);
    let (_client, mut server) = bed.raw_pair();
    let first = told(&mut server, IN_FLIGHT);
    assert_eq!(first[63].u64_at(16), window(63));
    // The server answers nothing, and none of these waits: before, between and after the told windows.
    for iova in [IOVA - PAGE, window(3) + PAGE, window(80) + PAGE] {
        bed.map(iova, 0, PAGE, Access::READ).expect("mapped");
    }
    bed.unmap(window(90), PAGE).expect("it was not told");
    std::thread::scope(|scope| {
        let unmap = scope.spawn(|| bed.unmap(window(1), PAGE));
        // The two windows below the announcement follow at once, and no others.
        let late: Vec<_> = told(&mut server, 2).iter().map(|m| m.u64_at(16)).collect();
        assert_eq!(late, [IOVA - PAGE, window(3) + PAGE]);
        server.reply(&first[0], &[], &[]);
        server.reply(&first[1], &[], &[]);
        let next = server.recv().expect("DMA_UNMAP");
        assert_eq!((next.cmd, next.u64_at(8)), (DMA_UNMAP, window(1)));
        assert!(
            !unmap.is_finished(),
            "the server may still reach the window"
        );
        server.reply(&next, &[], &[]);
        unmap.join().expect("no panic").expect("unmapped");
    });
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// Each access of such a server is a message, which the interposer refuses as soon as the guest has asked for it.
#[test]
fn unmap_waits_for_no_replay_to_a_server_without_memory() {
    const COUNT: u64 = 20;
    let window = |n: u64| RAM + 2 * n * PAGE;
    let deadlines = Deadlines {
        connect: SECOND * 600,
        ..Deadlines::with_answer(SECOND * 5)
    };
    let bed = Bed::with_deadlines(Isolation::ExactMessages, deadlines);
    bed.attach();
    for n in 0..COUNT {
        bed.map(window(n), 0, PAGE, Access::READ).expect("mapped");
    }
    let (_client, mut server) = bed.raw_pair();
    let replay = told(&mut server, COUNT);
    let read = |server: &mut Connection, n: u64| {
        let read = server.call(DMA_READ, &dma(window(n), 4, &[]), &[]);
        read.errno()
    };
    // The server answers no window, and none of these requests waits.
    bed.unmap(window(1), 2 * 3 * PAGE).expect("unmapped");
    assert_eq!(read(&mut server, 2), libc::EFAULT);
    bed.map(window(2), PAGE, PAGE, Access::READ)
        .expect("mapped");
    assert_eq!(read(&mut server, 2), 0);
    // Guest RAM is one window now, at the addresses of all others.
    let attached = bed.iommu().attach(bed.endpoint(), DomainId(2), true);
    attached.expect("attached");
    for window in &replay {
        server.reply(window, &[], &[]);
    }
    let mut present: BTreeSet<_> = replay.iter().map(|m| m.u64_at(16)).collect();
    let mut removed = 0;
    loop {
        let next = server.recv().expect("an update");
        answer(&mut server, &next);
        match next.cmd {
            DMA_UNMAP => {
                removed += 1;
                assert!(present.remove(&next.u64_at(8)), "it was removed before");
            }
            DMA_MAP if next.u64_at(24) == PAGE => {
                assert!(present.insert(next.u64_at(16)), "it was not removed");
            }
            _ => {
                assert_eq!((next.cmd, next.u64_at(16)), (DMA_MAP, RAM));
                break;
            }
        }
    }
    assert_eq!((present.len(), removed), (0, 3 + COUNT - 2));
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}

/// The last window that the server was told has two pages. The guest unmaps it and maps the second page again: the
/// announcement has not reached that address, but libvfio-user refuses a window that overlaps another one.
#[test]
fn the_replay_does_not_overtake_the_removal_of_a_window_in_its_way() {
    let bed = Bed::with_deadline(Isolation::ExactMessages, SECOND * 600);
    bed.attach();
    let last = IN_FLIGHT - 1;
    map_many(&bed, last);
    bed.map(window(last), 0, 2 * PAGE, Access::READ)
        .expect("mapped");
    for n in IN_FLIGHT..IN_FLIGHT + 20 {
        bed.map(window(n), 0, PAGE, Access::READ).expect("mapped");
    }
    let (_client, mut server) = bed.raw_pair();
    let replay = told(&mut server, IN_FLIGHT);
    assert_eq!(replay[63].u64_at(24), 2 * PAGE);
    bed.unmap(window(last), 2 * PAGE).expect("unmapped");
    bed.map(window(last) + PAGE, 0, PAGE, Access::READ)
        .expect("mapped");
    for window in &replay {
        server.reply(window, &[], &[]);
    }
    let next = [(); 2].map(|()| server.recv().expect("an update"));
    let next = [(&next[0], 8), (&next[1], 16)].map(|(m, at)| (m.cmd, m.u64_at(at)));
    let [removed, added] = [window(last), window(last) + PAGE];
    assert_eq!(next, [(DMA_UNMAP, removed), (DMA_MAP, added)]);
}

/// The updates that nobody waits for are limited.
#[test]
fn unmap_of_many_told_windows_waits_also_without_memory() {
    let bed = Bed::with_deadline(Isolation::ExactMessages, SECOND * 600);
    bed.attach();
    map_many(&bed, IN_FLIGHT);
    let (_client, mut server) = bed.raw_pair();
    let replay = told(&mut server, IN_FLIGHT);
    // One of the 64.
    bed.map(IOVA - PAGE, 0, PAGE, Access::READ).expect("mapped");
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(IOVA, 2 * IN_FLIGHT * PAGE));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!unmapped.is_finished(), "the 65th waits");
        for window in &replay {
            server.reply(window, &[], &[]);
        }
        for _ in 0..=IN_FLIGHT {
            let next = server.recv().expect("an update");
            answer(&mut server, &next);
        }
        unmapped.join().expect("no panic").expect("unmapped");
    });
}

#[test]
fn many_maps_below_the_announcement_wait_for_the_server() {
    let bed = Bed::with_deadline(Isolation::ExactMessages, SECOND * 600);
    bed.attach();
    map_many(&bed, 20);
    let (open, gate) = mpsc::channel::<()>();
    let (mut client, scripted) = bed.pair(move |_, msg| {
        if msg.cmd == DMA_MAP {
            let _ = gate.recv();
        }
        false
    });
    let mapped = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            for n in 1..100 {
                let mapped_now = bed.map(IOVA - 2 * n * PAGE, 0, PAGE, Access::READ);
                mapped_now.expect("mapped");
                mapped.fetch_add(1, Ordering::Relaxed);
            }
        });
        eventually("64 maps", || mapped.load(Ordering::Relaxed) == 64);
        std::thread::sleep(Duration::from_millis(100));
        assert!(!guest.is_finished(), "the 65th waits");
        drop(open);
        guest.join().expect("mapped");
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(scripted.windows().len(), 99 + 20);
}

#[test]
fn a_server_that_is_told_windows_and_answers_none_is_cut_off() {
    let deadlines = Deadlines {
        connect: SECOND * 2,
        ..Deadlines::with_answer(SECOND * 600)
    };
    let bed = Bed::with_deadlines(Isolation::ExactMessages, deadlines);
    bed.attach();
    map_many(&bed, 100);
    let (client, mut server) = bed.raw_pair();
    // One answer of these does not save it.
    let first = told(&mut server, IN_FLIGHT);
    server.reply(&first[0], &[], &[]);
    assert!(server.is_closed());
    let ends = bed.watch.state().ends;
    assert_eq!((ends.cut_offs, ends.connect_cut_offs), (1, 1));
    assert_not_quarantined(&bed);

    // VERSION has the same deadline.
    let listener = bed.listen();
    let mut server = accept(&listener);
    server.recv().expect("VERSION");
    assert!(server.is_closed());
    eventually("counted", || bed.watch.state().ends.connect_cut_offs >= 2);
    drop((client, listener));
    // Slow answers are no late ones: the windows take longer than the deadline together.
    let (mut client, scripted) = bed.pair(|_, msg| {
        if msg.cmd == DMA_MAP {
            std::thread::sleep(SECOND / 32);
        }
        false
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(scripted.windows().len(), 100);
    assert!(bed.watch.state().ends.server);
}

/// The windows of a server, by the messages that it got.
#[derive(Default)]
struct Told {
    present: BTreeSet<u64>,
    refused: HashSet<u64>,
    mistakes: Vec<String>,
    /// The window that the last message has removed.
    removed: Option<u64>,
    /// All windows were removed at once.
    has_removed_all: bool,
    /// After the first time, the interposer removes this many more to see whether they are gone.
    probes: usize,
}

impl Told {
    /// Takes a message. Returns the errno if the server refuses it.
    fn take(&mut self, msg: &Msg, refuses: bool) -> Option<i32> {
        let before = self.removed.take();
        match msg.cmd {
            VERSION => {
                let mistakes = std::mem::take(&mut self.mistakes);
                *self = Self {
                    mistakes,
                    ..Self::default()
                };
            }
            DMA_MAP if refuses => {
                self.refused.insert(msg.u64_at(16));
                return Some(libc::EBUSY);
            }
            DMA_MAP => {
                let first = msg.u64_at(16);
                self.refused.remove(&first);
                if !self.present.insert(first) {
                    self.mistakes.push(format!("{first:#x} is told twice"));
                }
            }
            DMA_UNMAP if msg.u32_at(4) == UNMAP_ALL => {
                self.present.clear();
                let is_first = !std::mem::replace(&mut self.has_removed_all, true);
                self.probes = if is_first { 2 } else { 0 };
            }
            DMA_UNMAP => {
                let first = msg.u64_at(8);
                if self.present.remove(&first) {
                    self.removed = Some(first);
                    return None;
                }
                if self.probes > 0 {
                    self.probes -= 1;
                } else if self.has_removed_all || before != Some(first) {
                    self.mistakes.push(format!("{first:#x} was not told"));
                }
                return Some(libc::ENOENT);
            }
            _ => {}
        }
        None
    }
}

/// Random requests while servers die, refuse windows and connect again, against a model of the windows.
#[test]
fn random_requests_and_restarts_tell_each_window_once() {
    for (seed, isolation) in [
        (1, Isolation::Mappings),
        (2, Isolation::ExactMessages),
        (3, Isolation::Mappings),
    ] {
        random_requests(seed, isolation);
    }
}

fn random_requests(seed: u64, isolation: Isolation) {
    // Many more than are in flight.
    const SLOTS: u64 = 1000;
    const ROUNDS: u64 = 3000;
    let bed = Bed::with_deadline(isolation, SECOND * 60);
    let told = Arc::new(Mutex::new(Told::default()));
    let calm = Arc::new(AtomicBool::new(false));
    let listener = bed.listen();
    let (log, is_calm) = (told.clone(), calm.clone());
    // Ends with the test's process.
    std::thread::spawn(move || {
        let mut rng = Rng::new(seed);
        loop {
            let mut server = accept(&listener);
            while let Some(msg) = server.recv() {
                let is_calm = is_calm.load(Ordering::Relaxed);
                if rng.below(8) == 0 {
                    std::thread::sleep(Duration::from_micros(rng.below(500)));
                }
                if !is_calm && rng.below(600) == 0 {
                    break;
                }
                let refuses = !is_calm && rng.below(16) == 0;
                let refusal = log.lock().unwrap().take(&msg, refuses);
                match refusal {
                    Some(errno) => server.refuse(&msg, errno.unsigned_abs()),
                    None => answer(&mut server, &msg),
                }
            }
        }
    });
    let mut client = bed.connect();
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    let mut rng = Rng::new(seed ^ 0x5a5a);
    let mut mapped = BTreeSet::new();
    let mut domain = DomainId(1);
    let attach = |domain| {
        let attached = bed.iommu().attach(bed.endpoint(), domain, false);
        attached.expect("attached");
    };
    attach(domain);
    for round in 0..ROUNDS {
        // Without a server, rounds are short: most of them must see one.
        let until = Instant::now() + SECOND * 60;
        while rng.below(2000) != 0 && !bed.watch.state().ends.server {
            assert!(Instant::now() < until, "no server connects");
            std::thread::yield_now();
        }
        let first = window(rng.below(SLOTS));
        match rng.below(400) {
            0 => {
                // The former domain ends with its last endpoint.
                domain = DomainId(3 - domain.0);
                attach(domain);
                mapped.clear();
            }
            1..200 if mapped.contains(&first) => {
                let unmapped = bed.iommu().unmap(domain, range(first, PAGE));
                unmapped.unwrap_or_else(|e| panic!("round {round}: {e}"));
                mapped.remove(&first);
            }
            1..4 => {
                let len = 2 * PAGE * rng.below(20);
                let covered = range(first, len + PAGE);
                let unmapped = bed.iommu().unmap(domain, covered);
                unmapped.unwrap_or_else(|e| panic!("round {round}: {e}"));
                mapped.retain(|w| !(first..first + len + PAGE).contains(w));
            }
            _ if !mapped.contains(&first) => {
                let mapping = Mapping {
                    range: range(first, PAGE),
                    gpa: Gpa(RAM),
                    access: Access::READ,
                    mmio: false,
                };
                match bed.iommu().map(domain, &mapping) {
                    Ok(()) => assert!(mapped.insert(first)),
                    Err(e) => assert!(e.to_string().contains("refuses a window"), "{e}"),
                }
            }
            _ => {}
        }
    }
    calm.store(true, Ordering::Relaxed);
    assert_eq!(client.recv().expect("an answer").cmd, VERSION);
    // A command reaches the server after all windows. Without a server, it is refused.
    eventually("a server", || client.call(RESET, &[], &[]).errno() == 0);
    let told = told.lock().unwrap();
    assert_eq!(told.mistakes, Vec::<String>::new(), "seed {seed}");
    let missing: Vec<_> = mapped.difference(&told.present).collect();
    assert!(
        missing.iter().all(|w| told.refused.contains(w)),
        "seed {seed}: {missing:x?}"
    );
    let extra: Vec<_> = told.present.difference(&mapped).collect();
    assert!(extra.is_empty(), "seed {seed}: {extra:x?}");
    assert_not_quarantined(&bed);
}
