//! A request from the driver's ring in this process through a whole daemon.

use std::time::Instant;

use crate::Interface;
use crate::common::guest::{Guest, HIGH_LEN, HIGH_RAM, Layout};
use crate::common::wire::{self, OK, RW, TAIL};
use crate::numbers::median;
use crate::vm_bed::{self, Bed, endpoint};

/// Requests in the ring at a time.
const BATCH: u64 = 64;
/// Number of batches of each kind.
const BATCHES: usize = 80;
const PAGE: u64 = 4096;

/// Microseconds of one MAP and one UNMAP.
pub fn measure(interface: Interface, function: &str) -> [f64; 2] {
    let backend = match interface {
        Interface::Type1 => vm_bed::Backend::Type1,
        Interface::Map => vm_bed::Backend::SharedMapped,
        Interface::Copy => vm_bed::Backend::SharedAll,
    };
    let mut bed = Bed::new(backend, &[function]);
    let guest = &mut bed.guest;
    assert_eq!(guest.attach(1, endpoint(0)), OK);
    let first = |n: u64| 0x10_0000_0000 + 2 * n * PAGE;
    let gpa = |n: u64| HIGH_RAM + n * PAGE % HIGH_LEN;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..BATCHES {
        let maps = (0..BATCH).map(|n| wire::map(1, first(n), first(n) + PAGE - 1, gpa(n), RW));
        times[0].push(batch(guest, maps.collect()));
        let unmaps = (0..BATCH).map(|n| wire::unmap(1, first(n), first(n) + PAGE - 1));
        times[1].push(batch(guest, unmaps.collect()));
    }
    times.map(|mut t| median(&mut t))
}

fn batch(guest: &mut Guest, requests: Vec<Vec<u8>>) -> f64 {
    for request in &requests {
        guest.submit(request, &Layout::plain(request.len(), TAIL));
    }
    let start = Instant::now();
    guest.kick();
    for _ in &requests {
        let (_, reply) = guest.complete();
        assert_eq!(reply.status(), OK);
    }
    crate::each(start.elapsed(), requests.len())
}
