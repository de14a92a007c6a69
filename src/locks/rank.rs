//! The order of the locks of this process.

/// The rank of a lock. A thread that holds a lock takes only locks of higher ranks, so that no two
/// threads can wait for each other.
///
/// The variants stand in the order in which they may be taken. Where a lock stands for its own sake
/// alone (nothing is taken while it is held), it stands near the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Rank {
    /// A shadow reader's cache of translations, which reserves an epoch word. First, because no thread ever waits
    /// for it (the reader only tries it), and a device may take any lock during an access.
    ReaderCache,
    /// The configuration as changed by `ctl`: held for one addition or removal of an endpoint.
    HotplugConfig,
    /// The monitor's state: held while a reset that QEMU reports is carried out.
    Qmp,
    /// The worker's polling state: held for one look at the request ring after a kick.
    Polling,
    /// The request queue between passes.
    RequestQueue,
    /// The event queue's ring.
    EventQueue,
    /// The core, `iommu::Iommu`.
    Core,
    /// The parts of endpoints that were opened.
    HotplugParts,
    /// One link to a vfio-user server.
    Link,
    /// The windows of one emulated endpoint.
    Windows,
    /// The readers of the page tables.
    Readers,
    /// How many refused accesses of each endpoint are passed on.
    FaultBudgets,
    /// The queue of refused accesses on their way to the guest.
    FaultQueue,
    /// The refused accesses of late.
    FaultLog,
    /// Guest memory as the device checked it.
    GuestMemory,
    /// One ring of a device without a transport. A transport's rings have the lock of its crate, without a rank.
    Ring,
    /// The mapped regions of one device of the host.
    DeviceRegions,
    /// Descriptors that the vhost-user crate has given up.
    ExitConsumers,
    /// What ends the daemon.
    Stop,
    /// The files of sockets that are removed at the end.
    SocketFiles,
    /// The client that the control socket serves.
    ControlClient,
    /// What a client of a served device has still to be sent.
    ClientOutbox,
    /// A shadow reader's view of guest memory.
    ReaderMemory,
    /// The file rules of the sandbox, until each thread has them.
    SandboxFiles,
    /// The file rules of the control socket's thread.
    SandboxControlFiles,
    /// One limited kind of log message.
    LogLimit,
    /// The logger. A thread that holds any lock above may log.
    Logger,
    /// The bytes that may be logged: the logger takes this lock for each message.
    LogBudgets,
    /// The lock of a test.
    Test,
}
