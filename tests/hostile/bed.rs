//! A daemon with a stock guest, and helpers that write requests into guest memory by hand.

use crate::common::daemon::{Daemon, EP, EP3};
use crate::common::guest::{Guest, LOW_LEN, POISON};
use crate::common::ring::{Desc, WRITE};
use crate::common::wire::{self, IOERR, OK};

/// Guest-physical address of a request written by hand.
pub const REQUEST: u64 = 0x1_0000;
/// Guest-physical address of its tail.
pub const TAIL_AT: u64 = 0x2_0000;
/// Guest-physical address of an indirect table written by hand.
pub const TABLE: u64 = 0x3_0000;
/// The guest has no memory from here to the slot of the rings.
pub const HOLE: u64 = LOW_LEN;

pub fn boot() -> (Daemon, Guest) {
    let daemon = Daemon::start();
    let guest = Guest::boot(&daemon);
    (daemon, guest)
}

/// Asserts that the daemon is alive and answers a full round of legal requests correctly.
pub fn assert_serves(daemon: &Daemon, guest: &mut Guest) {
    daemon.assert_alive();
    let domain = 0x77;
    assert_eq!(guest.attach(domain, EP3), OK);
    assert_eq!(guest.map_page(domain, 0x5000, 0x9000), OK);
    assert_eq!(daemon.gpa_of(EP3, 0x5123), Some(0x9123));
    assert_eq!(guest.unmap(domain, 0x5000, 0x5fff), OK);
    assert_eq!(guest.detach(domain, EP3), OK);
}

/// Writes an ATTACH at [`REQUEST`] and poison at [`TAIL_AT`].
pub fn put_attach(guest: &Guest) {
    guest.memory.write(REQUEST, &wire::attach(1, EP, 0));
    guest.memory.write(TAIL_AT, &[POISON; 64]);
}

/// A readable descriptor over the request at [`REQUEST`].
pub fn request_desc(flags: u16, next: u16) -> Desc {
    Desc::new(REQUEST, 20, flags, next)
}

/// A writable descriptor over the tail at [`TAIL_AT`].
pub fn tail_desc(flags: u16, next: u16) -> Desc {
    Desc::new(TAIL_AT, 4, WRITE | flags, next)
}

/// Asserts that the device returns the chain with length 0, writes no byte and makes no domain.
pub fn assert_dropped(daemon: &Daemon, guest: &mut Guest, name: &str, descs: &[(u16, Desc)]) {
    put_attach(guest);
    assert_eq!(guest.raw_chain(0, descs), 0, "{name}");
    assert_eq!(guest.memory.read(TAIL_AT, 64), [POISON; 64], "{name}");
    assert!(daemon.domains().is_empty(), "{name}");
}

/// Asserts that the device returns the chain with IOERR in the tail at [`TAIL_AT`] and makes no
/// domain.
pub fn assert_io_error(daemon: &Daemon, guest: &mut Guest, name: &str, descs: &[(u16, Desc)]) {
    put_attach(guest);
    assert_eq!(guest.raw_chain(0, descs), 4, "{name}");
    assert_eq!(guest.memory.read(TAIL_AT, 4), [IOERR, 0, 0, 0], "{name}");
    assert!(daemon.domains().is_empty(), "{name}");
}

/// Processor time of the daemon, in ticks of 10 ms.
pub fn cpu_ticks(daemon: &Daemon) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
