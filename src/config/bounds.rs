//! The bounds of keys: the smallest and largest values that a configuration may have.

/// The longest configuration file, in bytes.
pub const MAX_FILE: u64 = 1 << 20;
/// The longest path of a socket: `sun_path` less its final zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// The smallest width of an I/O virtual address, in bits.
pub const MIN_WIDTH: u8 = 32;
/// The largest width of an I/O virtual address, in bits: five table levels reach no more.
pub const MAX_WIDTH: u8 = 57;
/// The largest number of domains.
pub const MAX_DOMAINS: u32 = 65536;
/// The smallest arena, in bytes.
pub const MIN_ARENA: u64 = 1 << 20;
/// The largest arena, in bytes.
pub const MAX_ARENA: u64 = 1 << 40;
/// The largest guest RAM, in bytes: x86 has 52 bits of physical address.
pub const MAX_MEMORY: u64 = 1 << 52;
/// The longest time that the worker may poll an empty request ring, in microseconds.
pub const MAX_POLL_US: u64 = 10_000;
/// The highest realtime priority of a thread (sched(7)).
pub const MAX_PRIORITY: u8 = 99;
/// The largest batch of requests: the length of the longest ring.
pub const MAX_BATCH: usize = 1024;
/// The highest rate of reported faults of one endpoint, in faults a second.
pub const MAX_FAULT_RATE: u32 = 10_000;
/// The shortest deadline of a server or a reader, in milliseconds.
pub const MIN_DEADLINE_MS: u64 = 10;
/// The longest deadline of a server or a reader, in milliseconds. The guest waits for it.
pub const MAX_DEADLINE_MS: u64 = 60_000;
/// The largest limit of the windows that a server is told. A server may state any limit.
pub const MAX_WINDOWS: u64 = 4_294_967_295;
/// The most readers of one endpoint.
pub const MAX_READERS: usize = 256;
/// The most users, besides the daemon's own, whose readers may register.
pub const MAX_USERS: usize = 64;
/// The longest name of a VM, in bytes.
pub const MAX_NAME: usize = 64;
/// The shortest interval between two versions of a textfile, in seconds.
pub const MIN_INTERVAL_S: u64 = 1;
/// The longest interval between two versions of a textfile, in seconds.
pub const MAX_INTERVAL_S: u64 = 3600;
/// The most problems that one error lists.
pub const MAX_PROBLEMS: usize = 20;
/// The most bus numbers that firmware can leave free behind a root port.
pub const MAX_RESERVED_BUSES: u8 = 254;
