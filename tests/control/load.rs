//! `ctl mappings` while a driver works at its full rate.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::bed::Bed;
use crate::common::daemon::{EP, EP2, connect};
use crate::common::guest::{Guest, LOW_RAM, Layout};
use crate::common::rng::Rng;
use crate::common::wire::{self, OK, RW, TAIL};

const PAGE: u64 = 4096;
const DOMAINS: [(u32, u32); 2] = [(1, EP), (2, EP2)];
/// Pairs of adjacent pages; at least one page of each is mapped at any moment.
const PAIRS: u64 = 4096;
/// Only a daemon that hangs takes longer for ten listings.
const HANG: Duration = Duration::from_secs(120);
/// Requests in the ring at a time.
const BATCH: usize = 32;

/// Ends the driver's work on drop, even if the test panics.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

type PageTargets = BTreeMap<u64, u64>;

/// The target of a page depends on the domain, so a page of another domain is noticed.
fn gpa_of(domain: u32, page: u64) -> u64 {
    LOW_RAM + (u64::from(domain) * 1_000_000 + page) * PAGE
}

fn map_page(domain: u32, page: u64) -> Vec<u8> {
    let first = page * PAGE;
    wire::map(domain, first, first + PAGE - 1, gpa_of(domain, page), RW)
}

fn unmap_page(domain: u32, page: u64) -> Vec<u8> {
    wire::unmap(domain, page * PAGE, page * PAGE + PAGE - 1)
}

fn all_ok(guest: &mut Guest, requests: &[Vec<u8>]) {
    for request in requests {
        guest.submit(request, &Layout::plain(request.len(), TAIL));
    }
    guest.kick();
    for _ in requests {
        assert_eq!(guest.complete().1.status(), OK);
    }
}

/// Swaps the pages of pairs until `stop` is set: maps the other page, then unmaps the first.
/// Returns the mappings at the end, by domain, and the number of requests.
fn swap_pages(guest: &mut Guest, stop: &AtomicBool) -> (BTreeMap<u32, PageTargets>, u64) {
    let mut pages = BTreeMap::new();
    for (domain, _) in DOMAINS {
        let firsts: Vec<_> = (0..PAIRS).map(|pair| 2 * pair).collect();
        for some in firsts.chunks(BATCH) {
            let maps: Vec<_> = some.iter().map(|page| map_page(domain, *page)).collect();
            all_ok(guest, &maps);
        }
        pages.insert(domain, firsts);
    }
    let mut rng = Rng::new(5);
    let mut requests = 0;
    while !stop.load(Ordering::Relaxed) {
        let (domain, _) = DOMAINS[rng.below(2) as usize];
        let of_domain = pages.get_mut(&domain).expect("it has pages");
        let mut batch = Vec::new();
        for _ in 0..BATCH / 2 {
            let page = &mut of_domain[rng.below(PAIRS) as usize];
            let other = *page ^ 1;
            batch.extend([map_page(domain, other), unmap_page(domain, *page)]);
            *page = other;
        }
        all_ok(guest, &batch);
        requests += batch.len() as u64;
    }
    let expected = pages.into_iter().map(|(domain, pages)| {
        let mapped = pages.into_iter().map(|page| (page, gpa_of(domain, page)));
        (domain, mapped.collect())
    });
    (expected.collect(), requests)
}

/// The mappings of a domain as the daemon lists them: each one page, in order, none twice.
fn reported(bed: &Bed, domain: u32) -> PageTargets {
    let mut pages = PageTargets::new();
    let mut before = None;
    for (first, last, gpa, access, mmio) in bed.daemon.mappings(domain) {
        assert_eq!(
            (last - first, access.as_str(), mmio),
            (PAGE - 1, "rw", false)
        );
        assert!(before < Some(first), "{first:#x} comes after {before:x?}");
        before = Some(first);
        pages.insert(first / PAGE, gpa);
    }
    pages
}

#[test]
fn mappings_under_load_match_those_of_the_guest() {
    let bed = Bed::new("", "");
    let mut guest = Guest::boot(&bed.daemon);
    for (domain, endpoint) in DOMAINS {
        assert_eq!(guest.attach(domain, endpoint), OK);
    }
    let stop = AtomicBool::new(false);
    let (expected, requests, listings) = std::thread::scope(|scope| {
        let worker = scope.spawn(|| swap_pages(&mut guest, &stop));
        let ending = StopOnDrop(&stop);
        let mapped = || {
            let stats = bed.daemon.control("stats");
            stats["mappings"].as_u64().expect("a number")
        };
        bed.daemon
            .wait_for("the first mappings", || mapped() >= 2 * PAIRS);
        let (until, hangs_at) = (
            Instant::now() + Duration::from_secs(3),
            Instant::now() + HANG,
        );
        let (mut listings, mut missing) = (0, 0);
        while Instant::now() < until || listings < 10 {
            assert!(Instant::now() < hangs_at, "{listings} listings");
            for (domain, _) in DOMAINS {
                let reported = reported(&bed, domain);
                for (&page, &gpa) in &reported {
                    assert!(page < 2 * PAIRS);
                    assert_eq!(
                        gpa,
                        gpa_of(domain, page),
                        "page {page:#x} of domain {domain}"
                    );
                }
                let has = |page| reported.contains_key(&page);
                missing += (0..PAIRS)
                    .filter(|p| !has(2 * p) && !has(2 * p + 1))
                    .count() as u64;
                listings += 1;
            }
        }
        drop(ending);
        // Each part of the answer shows one moment. A pair may span two parts and be missing in
        // both; a part has a few hundred pairs.
        let most = listings * PAIRS / 100;
        assert!(
            missing <= most,
            "{missing} pairs of {} are missing",
            listings * PAIRS
        );
        let (expected, requests) = worker.join().expect("the driver");
        (expected, requests, listings)
    });
    println!("{listings} listings of a domain during {requests} requests");
    for (domain, _) in DOMAINS {
        assert_eq!(reported(&bed, domain), expected[&domain], "domain {domain}");
        let stats = bed.json(&["domains"]);
        let listed = stats["domains"].as_array().expect("domains");
        let listed = listed.iter().find(|d| d["id"] == domain).expect("listed");
        assert_eq!(listed["mappings"], PAIRS);
    }
}

/// Reads the rest of an answer, which must be complete.
fn rest_of(mut stream: UnixStream, first: u8) -> serde_json::Value {
    let mut bytes = vec![first];
    stream.read_to_end(&mut bytes).expect("an answer");
    serde_json::from_slice(&bytes).expect("a complete answer")
}

/// The client stops reading within the answer. The guest's requests must be served nevertheless: the daemon holds
/// the core's lock for a part of the answer at a time, and not while it writes. A mapping that the guest makes
/// meanwhile, beyond the part that the daemon has written, is in the rest of the answer.
#[test]
fn a_long_answer_does_not_delay_the_guest() {
    let bed = Bed::new("memory = '16G'", "");
    let mut guest = Guest::boot(&bed.daemon);
    assert_eq!(guest.attach(1, EP), OK);
    // Many small mappings, and a few of very many pages, which take long to list.
    for some in (0..50_000).collect::<Vec<u64>>().chunks(BATCH) {
        let maps: Vec<_> = some.iter().map(|n| map_page(1, 2 * n)).collect();
        all_ok(&mut guest, &maps);
    }
    for n in 1..=16_u64 {
        let first = (n << 40) + 0x1000;
        assert_eq!(guest.map(1, first, first + (128 << 20) - 1, 0, RW), OK);
    }
    let memory = bed.daemon.rss_kib();
    for round in 1..=4 {
        let mut stream = connect(&bed.daemon.control_socket());
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).expect("time limit");
        writeln!(stream, "mappings 1").expect("asked");
        let mut first = [0];
        stream.read_exact(&mut first).expect("an answer");
        for _ in 0..10 {
            assert_eq!(guest.map_page(1, PAGE, LOW_RAM), OK);
            assert_eq!(guest.unmap(1, PAGE, 2 * PAGE - 1), OK);
        }
        assert_eq!(guest.map_page(1, (20 + round) << 40, LOW_RAM), OK);
        let answer = rest_of(stream, first[0]);
        let listed = answer["domains"][0]["mappings"].as_array();
        let listed = listed.expect("mappings");
        assert_eq!(listed.len() as u64, 50_016 + round);
        let last = format!("{:#x}", (20 + round) << 40);
        assert_eq!(listed[listed.len() - 1]["first"], last);
    }
    let grown = bed.daemon.rss_kib().saturating_sub(memory);
    println!("memory grew by {grown} KiB");
    // The answer has 5 MB.
    assert!(grown < 1024, "{grown} KiB");
}
