//! The problems of a configuration: the place, the kind and the cure of each. The file is long because it is one list
//! of messages, which belong side by side.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use thiserror::Error;

use super::Machine;
use super::bounds::{
    MAX_ARENA, MAX_BATCH, MAX_DEADLINE_MS, MAX_DOMAINS, MAX_FAULT_RATE, MAX_FILE, MAX_INTERVAL_S,
    MAX_MEMORY, MAX_NAME, MAX_POLL_US, MAX_PRIORITY, MAX_READERS, MAX_RESERVED_BUSES,
    MAX_SOCKET_PATH, MAX_USERS, MAX_WIDTH, MAX_WINDOWS, MIN_ARENA, MIN_DEADLINE_MS, MIN_INTERVAL_S,
    MIN_WIDTH,
};
use crate::topology::groups::GroupNameError;
use crate::topology::pci::{HostAddressError, PciAddressError, PciRangeError};
use crate::topology::ports::{PlaceError, PortPathError};
use crate::topology::{HostAddress, PciAddress, PciRange, PortError, ReservedError, TopologyError};

/// A configuration that cannot be used, with every problem found.
#[derive(Debug, Error)]
pub struct ConfigError {
    /// The problems, at least one and at most [`MAX_PROBLEMS`](super::MAX_PROBLEMS).
    pub problems: Vec<Problem>,
    /// How many more problems were found and not kept.
    pub omitted: usize,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        if self.omitted > 0 {
            write!(f, "\nand {} more problems", self.omitted)?;
        }
        Ok(())
    }
}

/// One problem and its place.
#[derive(Debug, Error)]
#[error("{location}: {kind}")]
pub struct Problem {
    /// The place.
    pub location: Location,
    /// The kind, with the cure.
    #[source]
    pub kind: ProblemKind,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1, if the problem is in one line.
        line: Option<usize>,
        /// The key, such as `endpoint[0].range`; empty if the problem is the file as a whole.
        key: String,
    },
    /// An option on the command line.
    Flag(&'static str),
    /// A key of an endpoint that is added to a running VM; empty if the problem is the whole text.
    Addition(String),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => f.write_str(name),
            Self::Addition(key) if key.is_empty() => f.write_str("the endpoint"),
            Self::Addition(key) => write!(f, "the endpoint's {key}"),
            Self::File { path, line, key } => {
                write!(f, "{}", path.display())?;
                if let Some(line) = line {
                    write!(f, ":{line}")?;
                }
                if !key.is_empty() {
                    write!(f, ": {key}")?;
                }
                Ok(())
            }
        }
    }
}

/// The kind of a problem. Each message ends with the cure.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProblemKind {
    /// The file cannot be read.
    #[error("cannot be read: {0}; give the path of a readable TOML file")]
    Read(#[source] io::Error),
    /// The file is longer than [`MAX_FILE`].
    #[error(
        "is longer than {MAX_FILE} bytes; give a configuration file, with ranges instead of single \
         endpoints"
    )]
    FileTooLong,
    /// The file is not text.
    #[error("is not UTF-8 text; save it as UTF-8")]
    NotUtf8,
    /// The file is not TOML, or has unknown keys.
    #[error("{0}")]
    Syntax(String),
    /// A value of the wrong type.
    #[error("must be {wanted}, not {found}")]
    WrongType {
        /// The type that was found.
        found: &'static str,
        /// The wanted type, with an example.
        wanted: &'static str,
    },
    /// A required key is missing.
    #[error("is missing; {0}")]
    Missing(&'static str),

    /// The text of an added endpoint has a control character.
    #[error("contains a control character; write the keys in one line, with commas between them")]
    AdditionControl,
    /// The text of an added endpoint describes no endpoint or several.
    #[error("must be one endpoint; add each endpoint with a command of its own")]
    AdditionNotOne,

    /// The guest does not find an added endpoint, or its place is taken.
    #[error("{0}")]
    Slot(String),

    /// A socket's path is empty.
    #[error("is empty; give the path the socket is to have, such as /run/vm0/iommu.sock")]
    PathEmpty,
    /// A socket's path does not fit a socket address.
    #[error(
        "the path has {0} bytes, a socket's path has at most {MAX_SOCKET_PATH}; \
         use a shorter one, such as /run/vm0/iommu.sock"
    )]
    PathTooLong(usize),
    /// A socket's path has a control character.
    #[error("the path contains a control character; use printable characters only")]
    PathControl,
    /// The VMM's socket is given twice, for two protocols.
    #[error(
        "the VMM's socket is given for vhost-user, too, by `socket` or --socket-path, and the daemon serves one \
         protocol; leave one of them out"
    )]
    TwoTransports,
    /// The control socket and the VMM's socket have one path.
    #[error("the control socket has the same path as the socket for the VMM; use another")]
    SamePath,

    /// The QMP socket has the path of a socket of the daemon.
    #[error(
        "the daemon itself makes the socket at this path; give the path of the VMM's -qmp option"
    )]
    QmpPath,

    /// Not a PCI address.
    #[error("{value:?} is {source}")]
    Pci {
        /// The text.
        value: String,
        /// Why it is refused.
        source: PciAddressError,
    },
    /// Not a PCI address of the host.
    #[error("{value:?} is {source}")]
    Host {
        /// The text.
        value: String,
        /// The reason.
        source: HostAddressError,
    },
    /// Not a range of PCI addresses.
    #[error("{value:?}: {source}")]
    PciRange {
        /// The text.
        value: String,
        /// Why it is refused.
        source: PciRangeError,
    },
    /// An endpoint with both an address and a range.
    #[error("both `address` and `range` are given; keep one")]
    AddressAndRange,
    /// An endpoint with neither an address nor a range.
    #[error(
        "has neither `address` nor `range`; give `address = \"00:10.0\"` or `range = \"00:10.0-00:1e.7\"`"
    )]
    NoAddress,
    /// An endpoint with a device, and neither an address nor a range.
    #[error(
        "the endpoint of the device {0:?} has no `address`, which the guest's table needs before QEMU starts; give \
         `address = \"00:10.0\"`, or let `vhost-device-iommu resolve FILE --write` ask a QEMU that has the device"
    )]
    DeviceWithoutAddress(String),
    /// Not the name of a host group.
    #[error("{value:?} is {source}")]
    Group {
        /// The text.
        value: String,
        /// Why it is refused.
        source: GroupNameError,
    },

    /// A range of endpoints with one device of the host.
    #[error(
        "{range} is more than one function, and a device of the host is one; \
         give each function its own [[endpoint]] with `address` and `vfio`"
    )]
    VfioOnRange {
        /// The functions.
        range: PciRange,
    },
    /// A shadow endpoint with several functions.
    #[error(
        "{range} is more than one function; give each function its own [[endpoint]] with `address` \
         and `shadow` (all of them may share one path)"
    )]
    ShadowOnRange {
        /// The functions.
        range: PciRange,
    },
    /// An endpoint with two devices.
    #[error("the endpoint has two devices; remove `shadow`, or `vfio` and `vfio-user`")]
    ShadowWithVfio,
    /// A reader's socket has the path of the VMM's or the control socket.
    #[error("the socket at this path is for the VMM or for control; use another path")]
    ShadowPath,
    /// Two endpoints with one device of the host.
    #[error(
        "the host's device {host} is endpoint {other} already; \
         remove one of the two, or give the address of another device"
    )]
    HostTwice {
        /// The address on the host.
        host: HostAddress,
        /// The endpoint that has it.
        other: PciAddress,
    },
    /// An export without a passthrough device.
    #[error(
        "only a device of the host can be exported; give its address on the host with `vfio = \"...\"`, or \
         remove `export`"
    )]
    ExportWithoutVfio,
    /// `vf-token` is no UUID. The value is not shown, because it may be a mistyped secret.
    #[error(
        "the value is no UUID; write one of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx, such as `uuidgen` makes"
    )]
    VfToken,
    /// `vf-token` of an endpoint that is added to a running VM.
    #[error(
        "a VF token is a secret, and the keys of an added endpoint are shown to everybody who may ask for the status; write \
         the endpoint into the file before the VM starts"
    )]
    VfTokenInAddition,
    /// `vf-token` on an endpoint that is not exported.
    #[error(
        "a VF token is for exported devices only, because a VMM that binds the device to an iommufd gives VFIO none; \
         add `export`, or remove `vf-token`"
    )]
    VfTokenWithoutExport,
    /// `allow-no-snoop` on an endpoint that is not exported.
    #[error(
        "the key is for exported devices only, because the VMM tells KVM of the others; remove \
         `allow-no-snoop`"
    )]
    NoSnoopWithoutExport,
    /// Not a way to reach registers.
    #[error(
        "{0:?} is not a way to reach registers; use \"trapped\" (each access is a message) or \"mapped\" (fast, for a VMM \
         that may have the device's own descriptor)"
    )]
    Registers(String),
    /// `registers` on an endpoint that is not exported.
    #[error(
        "the key is for exported devices only, because the VMM opens the others itself; remove `registers`"
    )]
    RegistersWithoutExport,
    /// An export's socket has the path of another socket.
    #[error("another socket has this path; use another path in `export`")]
    ExportPath,
    /// An emulated device on several functions.
    #[error(
        "{range} is more than one function, and an emulated device is one; \
         give each function its own [[endpoint]] with `address` and `vfio-user`"
    )]
    EmulatedOnRange {
        /// The functions.
        range: PciRange,
    },
    /// An endpoint with a passthrough device and an emulated one.
    #[error(
        "the endpoint has both `vfio` and `vfio-user`, and can have one device; remove one of the two \
         keys"
    )]
    EmulatedAndVfio,
    /// An emulated device without one of its sockets.
    #[error(
        "`{0}` is missing; give the path where the daemon listens for the VMM (`listen = \"...\"`) and the \
         path where the device's server listens (`connect = \"...\"`)"
    )]
    EmulatedMissing(&'static str),
    /// Both sockets of an emulated device have one path.
    #[error("`listen` and `connect` are the same; use two paths")]
    ListenIsConnect,
    /// An emulated device's socket has the path of another socket.
    #[error(
        "{} listens there already; give each endpoint another path in `listen`",
        .other.map_or("the daemon".into(), |other| format!("the daemon for endpoint {other}"))
    )]
    ListenTwice {
        /// The endpoint of the other socket, if it has one.
        other: Option<PciAddress>,
    },
    /// Not an isolation.
    #[error(
        "{0:?} is not an isolation; use \"messages\" (the server never maps guest RAM) or \"mappings\" \
         (fast, for servers that are trusted with all guest RAM)"
    )]
    Isolation(String),
    /// Not a way to announce memory.
    #[error(
        "{0:?} is not a way to announce memory; use \"coarse\" (the server is told large regions) or \"exact\" (it is \
         told each mapping)"
    )]
    Announce(String),
    /// A number of windows out of range.
    #[error("{0} windows is out of range; use 1 to {MAX_WINDOWS}")]
    MaxWindows(i128),
    /// A server with mappings that is told large regions.
    #[error(
        "a server with `isolation = \"mappings\"` is told each mapping; remove `announce`, or use \
         `isolation = \"messages\"`"
    )]
    CoarseMappings,
    /// A deadline out of range.
    #[error(
        "deadline of {} ms is out of range; use {MIN_DEADLINE_MS} to {MAX_DEADLINE_MS}",
        .0
    )]
    Deadline(i128),
    /// A request has less time than a single answer.
    #[error(
        "total deadline of {total} ms is shorter than `deadline-ms`; use {answer} or more, or lower `deadline-ms`"
    )]
    TotalDeadline {
        /// The time for all answers to a request, in milliseconds.
        total: u128,
        /// The time for one answer, in milliseconds.
        answer: u128,
    },
    /// Not a user ID.
    #[error("{0} is not a user ID; give the number that `id -u NAME` prints")]
    User(String),
    /// Too many users.
    #[error(
        "{0} users are listed, and at most {MAX_USERS} are allowed; let processes share a user, or \
         run them as the daemon's user"
    )]
    TooManyUsers(usize),
    /// A limit of readers out of range.
    #[error("limit of {0} readers is out of range; use 1 to {MAX_READERS}")]
    ReaderLimit(i128),
    /// Not an interface of the host's IOMMU.
    #[error(
        "{0:?} is not an interface of the host's IOMMU; use \"iommufd\" or, \
         if the host's kernel has no iommufd, \"type1\""
    )]
    HostIommu(String),
    /// Not a machine type.
    #[error("{0:?} is not a machine; use \"q35\" for an x86 guest, or \"virt\" for an Arm guest")]
    Machine(String),
    /// The VMM emulates another machine.
    #[error(
        "the VMM's machine is {}, not {}; leave the key out, or write `machine = \"{}\"`",
        .of_vmm.name(), .machine.name(), .of_vmm.name()
    )]
    OtherMachine {
        /// The VMM's machine.
        of_vmm: Machine,
        /// The machine of the file.
        machine: Machine,
    },
    /// Not a pinning mode.
    #[error(
        "{0:?} is not a pinning mode; use \"all\" (fast) or \"mapped\" \
         (memory that no device uses stays with the host)"
    )]
    Pin(String),

    /// Not a descriptor for an endpoint.
    #[error(
        "{0:?} is not a descriptor of an endpoint; write ADDRESS=N with the endpoint's address in \
         the guest, such as 00:10.0=4"
    )]
    DescriptorText(String),
    /// A descriptor for an endpoint without a passthrough device.
    #[error(
        "{endpoint} is not an endpoint with `vfio`; give the endpoint's address in the guest, \
         or `vfio` with the device's address on the host under its [[endpoint]]"
    )]
    NotPassthrough {
        /// The address.
        endpoint: PciAddress,
    },
    /// An endpoint with two descriptors.
    #[error("endpoint {endpoint} is given twice; remove one of the two")]
    EndpointTwice {
        /// The endpoint.
        endpoint: PciAddress,
    },
    /// One descriptor in two options.
    #[error("descriptor {fd} is given by {other} already; give each descriptor only once")]
    DescriptorTwice {
        /// The descriptor.
        fd: RawFd,
        /// The option that gave it first.
        other: &'static str,
    },
    /// Where the open files of devices come from is none of the known places.
    #[error(
        "{0} is no place from which open devices come; \
         write \"vmm\" to take them over from the VMM, or leave out the key to have them opened when the daemon starts"
    )]
    VfioFrom(String),
    /// Files of the VMM with type1.
    #[error(
        "the VMM's open devices cannot be used with `host-iommu = \"type1\"`; \
         leave out one of the two keys"
    )]
    VfioFromType1,
    /// Files of the VMM over vfio-user.
    #[error(
        "the VMM's open devices can be taken over only from a VMM that speaks vhost-user; \
         name the VMM's socket with `socket`, or leave out the key and start the VM with `launch`"
    )]
    VfioFromOverVfioUser,
    /// Files of the VMM beside exported devices.
    #[error(
        "the VMM's open devices cannot be used beside devices that are exported; \
         export all devices of the VM, or none"
    )]
    VfioFromWithExport,
    /// A helper for nothing.
    #[error(
        "no helper is asked without `vfio-from = \"vmm\"`; \
         give that key, too, or leave out this one"
    )]
    VfioHelperAlone,
    /// An iommufd that type1 does not use.
    #[error(
        "an iommufd is not used with `host-iommu = \"type1\"`; \
         leave out the option, or set `host-iommu = \"iommufd\"`"
    )]
    IommufdWithType1,
    /// A container that iommufd does not use.
    #[error(
        "a container is not used with `host-iommu = \"iommufd\"`; \
         leave out the option, or set `host-iommu = \"type1\"`"
    )]
    ContainerWithIommufd,
    /// A device without the iommufd it is bound to.
    #[error(
        "a device can be used only through the iommufd it is bound to; \
         give this iommufd with --iommufd-fd, or leave out --vfio-fd to have the device opened by path"
    )]
    DeviceWithoutIommufd,
    /// A device without the container it is in.
    #[error(
        "the device of endpoint {endpoint} can be used only through the container it is in; \
         give this container with --vfio-container-fd, or leave out --vfio-fd to have the device opened \
         by path"
    )]
    DeviceWithoutContainer {
        /// The endpoint.
        endpoint: PciAddress,
    },

    /// Not the way to a port.
    #[error("{value:?} is {source}")]
    PortPath {
        /// The text.
        value: String,
        /// The error in it.
        source: PortPathError,
    },
    /// Not a place behind a port.
    #[error("{value:?} is {source}")]
    Place {
        /// The text.
        value: String,
        /// The error in it.
        source: PlaceError,
    },
    /// Not a kind of port.
    #[error(
        "{0:?} is not a kind of port; use \"root-port\", \"upstream-port\", \"downstream-port\" or \
         \"pcie-pci-bridge\", or leave it out"
    )]
    PortKind(String),
    /// The number of reserved buses is out of range.
    #[error(
        "{0} reserved bus numbers are out of range; give 1 to {MAX_RESERVED_BUSES}, or leave it out for none"
    )]
    ReserveBuses(i128),
    /// Nobody reserves bus numbers on an Arm machine.
    #[error(
        "the machine virt starts its guest without firmware, and Linux reserves no bus numbers; leave the key out"
    )]
    ReserveOnVirt,
    /// Not a speed of a link.
    #[error("{0:?} is not the speed of a link in GT/s; use \"2.5\", 5, 8, 16, 32 or 64")]
    LinkSpeed(String),
    /// Not a width of a link.
    #[error("{0} is not a number of lanes; use 1, 2, 4, 8, 12, 16 or 32")]
    LinkWidth(i128),
    /// An added endpoint names a port.
    #[error(
        "a device that is added gets the address on the bus behind its port, which `check` prints; leave `port` out, \
         and give the address, such as 01:00.0"
    )]
    PortInAddition,
    /// Not the ID of a device.
    #[error(
        "{0:?} is not the ID of a device in QEMU; give one that begins with a letter, has letters, digits, `-`, `.` and \
         `_` only, and does not begin with viommu-"
    )]
    DeviceId(String),
    /// A device for several functions.
    #[error(
        "a device is one function, and {range} are several; give each function an [[endpoint]] with its device"
    )]
    DeviceOnRange {
        /// The functions.
        range: PciRange,
    },
    /// Nobody says where the device is.
    #[error("only QEMU knows where its devices are; give `qmp`, or leave `device` out")]
    DeviceWithoutQmp,
    /// Two endpoints name one device.
    #[error("the device of endpoint {other} has this ID; give each device one endpoint")]
    DeviceTwice {
        /// The other endpoint.
        other: PciAddress,
    },
    /// An added endpoint names a device.
    #[error("the place of a device that is added later is not compared; leave `device` out")]
    DeviceInAddition,
    /// The ports contradict each other, or the endpoints.
    #[error(transparent)]
    Port(#[from] PortError),

    /// The address width is out of range.
    #[error(
        "{0} bits are out of range; give {MIN_WIDTH} to {MAX_WIDTH}: \
         48 suits most guests, more than 48 costs a fifth table level"
    )]
    Width(i128),
    /// The granule is not supported.
    #[error(
        "{0:?} is not a granule; use \"4k\", \"16k\", \"64k\" or \"2m\" (4k suits every x86 guest)"
    )]
    Granule(String),
    /// The time to poll is out of range.
    #[error("{0} microseconds are out of range; give 0 (never poll) to {MAX_POLL_US}")]
    Poll(i128),
    /// The realtime priority is out of range.
    #[error("{0} is not a realtime priority; give 1 to {MAX_PRIORITY}, or leave it out")]
    Priority(i128),
    /// The batch size is out of range.
    #[error("batch of {0} requests is out of range; give 1 to {MAX_BATCH}")]
    Batch(i128),
    /// The rate of faults is out of range.
    #[error("rate of {0} faults a second is out of range; give 1 to {MAX_FAULT_RATE}")]
    FaultRate(i128),
    /// Not a name for a VM.
    #[error(
        "{0:?} is not a name for a VM; use 1 to {MAX_NAME} printable ASCII characters without spaces, or leave \
         it out for the name of the file"
    )]
    Name(String),
    /// Not a file mode.
    #[error("{0:?} is not a file mode; write it in octal, such as \"0660\"")]
    SocketMode(String),
    /// Not a group ID.
    #[error("{0} is not a group ID; give the number in the third field of `getent group NAME`")]
    SocketGroup(String),
    /// A table `metrics` without a destination.
    #[error("the table names no destination for metrics; give `socket`, `textfile` or both")]
    MetricsNowhere,
    /// The metrics socket has the path of another socket.
    #[error("another socket has this path; use another path in `metrics.socket`")]
    MetricsPath,
    /// A textfile that node_exporter does not read.
    #[error(
        "{0:?} is not a textfile; give a path of printable characters that ends with .prom, since \
         node_exporter reads no other file"
    )]
    Textfile(String),
    /// The interval is out of range.
    #[error("interval of {0} seconds is out of range; give {MIN_INTERVAL_S} to {MAX_INTERVAL_S}")]
    Interval(i128),
    /// The number of domains is out of range.
    #[error("{0} domains are out of range; give 1 to {MAX_DOMAINS}")]
    Domains(i128),
    /// Not a size.
    #[error(
        "{0:?} is not a size; write bytes as a number, or a text with K, M, G or T, such as \"2G\""
    )]
    Size(String),
    /// The memory size is out of range or not a multiple of 1 MiB.
    #[error(
        "{0} bytes are not a size of guest RAM; give a multiple of 1M up to {limit}T",
        limit = MAX_MEMORY >> 40
    )]
    Memory(u64),
    /// The arena is too small.
    #[error(
        "{0} bytes are too few for page tables; give at least {least}M, \
         or leave it out for memory / 256 + 64M",
        least = MIN_ARENA >> 20
    )]
    ArenaTooSmall(u64),
    /// The arena is too large.
    #[error(
        "{0} bytes are more than page tables ever take; give at most {most}T, \
         or leave it out for memory / 256 + 64M",
        most = MAX_ARENA >> 40
    )]
    ArenaTooLarge(u64),

    /// Not an I/O virtual address.
    #[error(
        "{0:?} is not an address; write a number up to 2^64 - 1, decimal or with 0x, \
         as a number or as a text"
    )]
    Iova(String),
    /// A reserved region that ends before it starts.
    #[error(
        "the region ends at {last:#x}, before its start {first:#x}; \
         put the lower address into `first`"
    )]
    RegionBackwards {
        /// The first address.
        first: u64,
        /// The last address.
        last: u64,
    },
    /// A reserved region that does not consist of pages.
    #[error(
        "the region {first:#x}..={last:#x} does not consist of 4 KiB pages; \
         `last` is part of the region, so give whole pages: {whole_first:#x}..={whole_last:#x}"
    )]
    RegionUnaligned {
        /// The first address.
        first: u64,
        /// The last address.
        last: u64,
        /// The first address of the first page.
        whole_first: u64,
        /// The last address of the last page.
        whole_last: u64,
    },
    /// Not a kind of reserved region.
    #[error("{0:?} is not a kind of reserved region; use \"reserved\" or \"msi\"")]
    RegionKind(String),
    /// A reserved region that cannot be parsed.
    #[error(
        "{0:?} is not a reserved region; write FIRST..=LAST:msi or FIRST..=LAST:reserved, \
         such as 0xfee00000..=0xfeefffff:msi"
    )]
    RegionText(String),
    /// The reserved regions of all endpoints contradict each other.
    #[error(transparent)]
    Reserved(#[from] ReservedError),
    /// The endpoints contradict each other.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// An endpoint's reserved regions contradict the default one.
    #[error(
        "{source}; the MSI region of the machine {} is there by default: `reserved` at the top of the file replaces \
         it",
        .machine.name()
    )]
    BesideDefault {
        /// The conflict.
        source: TopologyError,
        /// The machine.
        machine: Machine,
    },
}
