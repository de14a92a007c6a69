//! The order of the locks of this process.

/// The rank of a lock. A thread that holds a lock takes only locks of higher ranks, so that no two
/// threads can wait for each other.
///
/// The variants stand in the order in which the locks may be taken. Leaf locks, whose holders take no other
/// lock, stand near the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Rank {
    /// A shadow reader's lane, which reserves an epoch word. First, because a device may take any lock during an access.
    /// No thread ever waits for this lock: the reader only tries it.
    ReaderCache,
    /// The configuration with the changes that `ctl` has made: held while an endpoint is added or removed.
    HotplugConfig,
    /// The state of the QMP monitor: held while the device carries out a reset that QEMU has reported.
    Qmp,
    /// The worker's polling state: held while the worker serves the request ring after an event.
    Polling,
    /// The request queue between passes.
    RequestQueue,
    /// The event queue's ring.
    EventQueue,
    /// The core, `iommu::Iommu`.
    Core,
    /// The opened parts of endpoints.
    HotplugParts,
    /// One link to a vfio-user server.
    Link,
    /// The windows of one emulated endpoint.
    Windows,
    /// The readers of the page tables.
    Readers,
    /// The rate limit for the faults of each emulated endpoint.
    FaultBudgets,
    /// A queue of faults on their way to the guest.
    FaultQueue,
    /// The log of the latest faults.
    FaultLog,
    /// Guest memory as the device checked it.
    GuestMemory,
    /// What became of the table that tells the guest its endpoints.
    TableState,
    /// The outcome of the last comparison of places in the guest.
    PlaceReport,
    /// One ring of the virtio-pci transport, or of a device without a transport. The rings of vhost-user have the lock
    /// of its crate, without a rank.
    Ring,
    /// The exported devices that hot resets concern: held while the kernel makes one.
    HotResets,
    /// The interrupts of the virtio-pci device.
    PciInterrupts,
    /// The descriptors of one ring of a VMM.
    RingDescriptors,
    /// The files of devices that the VMM brings: held while files come or go.
    VmmDevices,
    /// The open file of an iommufd or a device of a VMM, which comes and goes.
    VmmFiles,
    /// The mapped regions of one device of the host.
    DeviceRegions,
    /// Descriptors that the vhost-user crate has leaked.
    ExitConsumers,
    /// The connection to a VMM, which its rings may end.
    Connection,
    /// The request to stop the vhost-user server, and the connection to close then.
    Stop,
    /// The socket files that the daemon removes when it ends.
    SocketFiles,
    /// The client that the control socket serves.
    ControlClient,
    /// The unsent messages to a client of a served device.
    ClientOutbox,
    /// A shadow reader's registration.
    ReaderState,
    /// A shadow reader's view of guest memory.
    ReaderMemory,
    /// The places of the records in the store that outlives this process.
    StoreRecords,
    /// What this process has taken over from the one before it.
    Life,
    /// The descriptors that outlive this process.
    KeptFiles,
    /// The file rules of the sandbox, which each thread applies to itself.
    SandboxFiles,
    /// The file rules of the control socket's thread.
    SandboxControlFiles,
    /// The file rules of the thread that writes the file with metrics.
    SandboxMetricsFiles,
    /// The rate limit of one kind of log message.
    LogLimit,
    /// The logger. A thread that holds any lock above may log.
    Logger,
    /// The bytes that may be logged: the logger takes this lock for each message.
    LogBudgets,
    /// The lock of a test.
    Test,
}
