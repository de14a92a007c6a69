//! The bounds of keys: the smallest and largest values that a configuration may have.

/// The longest configuration file read, in bytes.
pub const MAX_FILE: u64 = 1 << 20;
/// The longest path of a socket: `sun_path` less its final zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// The fewest bits of an I/O virtual address.
pub const MIN_WIDTH: u8 = 32;
/// The most bits of an I/O virtual address: what five table levels reach.
pub const MAX_WIDTH: u8 = 57;
/// The most domains.
pub const MAX_DOMAINS: u32 = 65536;
/// The smallest arena in bytes.
pub const MIN_ARENA: u64 = 1 << 20;
/// The largest arena in bytes.
pub const MAX_ARENA: u64 = 1 << 40;
/// The most guest RAM in bytes: x86 has 52 bits of physical address.
pub const MAX_MEMORY: u64 = 1 << 52;
/// The longest time the worker may look at an empty request ring, in microseconds.
pub const MAX_POLL_US: u64 = 10_000;
/// The highest realtime priority of a thread (sched(7)).
pub const MAX_PRIORITY: u8 = 99;
/// The most requests that can be taken at a time: the longest ring.
pub const MAX_BATCH: usize = 1024;
/// The most faults of one endpoint that the guest can be told of in a second.
pub const MAX_FAULT_RATE: u32 = 10_000;
/// The shortest time a server can be given to answer, in milliseconds.
pub const MIN_DEADLINE_MS: u64 = 10;
/// The longest time a server can be given to answer, in milliseconds: the guest waits for it.
pub const MAX_DEADLINE_MS: u64 = 60_000;
/// The most processes that can be let in for one endpoint.
pub const MAX_READERS: usize = 256;
/// The most users that can be named.
pub const MAX_USERS: usize = 64;
/// The longest name of a VM in bytes.
pub const MAX_NAME: usize = 64;
/// The shortest time between two versions of a textfile, in seconds.
pub const MIN_INTERVAL_S: u64 = 1;
/// The longest time between two versions of a textfile, in seconds.
pub const MAX_INTERVAL_S: u64 = 3600;
/// The most problems listed in one error.
pub const MAX_PROBLEMS: usize = 20;
