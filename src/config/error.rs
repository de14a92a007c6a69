//! What can be wrong with a configuration, where, and how to put it right.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use thiserror::Error;

use super::bounds::{
    MAX_ARENA, MAX_BATCH, MAX_DEADLINE_MS, MAX_DOMAINS, MAX_FAULT_RATE, MAX_FILE, MAX_INTERVAL_S,
    MAX_MEMORY, MAX_NAME, MAX_POLL_US, MAX_PRIORITY, MAX_READERS, MAX_SOCKET_PATH, MAX_USERS,
    MAX_WIDTH, MIN_ARENA, MIN_DEADLINE_MS, MIN_INTERVAL_S, MIN_WIDTH,
};
use crate::topology::groups::GroupNameError;
use crate::topology::pci::{PciAddressError, PciRangeError};
use crate::topology::{PciAddress, PciRange, ReservedError, TopologyError};

/// A configuration that cannot be used, with every reason found.
#[derive(Debug, Error)]
pub struct ConfigError {
    /// The reasons, at least one and at most [`MAX_PROBLEMS`](super::MAX_PROBLEMS).
    pub problems: Vec<Problem>,
    /// How many more were found and not kept.
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
            write!(f, "\nand {} more of such problems", self.omitted)?;
        }
        Ok(())
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, Error)]
#[error("{location}: {kind}")]
pub struct Problem {
    /// Where.
    pub location: Location,
    /// What, and the cure.
    #[source]
    pub kind: ProblemKind,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1, where one is to blame.
        line: Option<usize>,
        /// The key, such as `endpoint[0].range`; empty where the file as a whole is to blame.
        key: String,
    },
    /// An option on the command line.
    Flag(&'static str),
    /// A key of an endpoint that is added to a running VM; empty where the whole is to blame.
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

/// What is wrong with a value. Each text ends with the cure.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProblemKind {
    /// The file cannot be read.
    #[error("cannot be read: {0}; give the path of a readable TOML file")]
    Read(#[source] io::Error),
    /// The file is longer than [`MAX_FILE`].
    #[error(
        "is longer than {MAX_FILE} bytes; is it a configuration? \
         If so, give ranges instead of single endpoints"
    )]
    FileTooLong,
    /// The file is not text.
    #[error("is not UTF-8 text; save it as UTF-8")]
    NotUtf8,
    /// The file is not TOML, or has keys that do not belong.
    #[error("{0}")]
    Syntax(String),
    /// A value of the wrong type.
    #[error("must be {wanted}, not {found}")]
    WrongType {
        /// What was found.
        found: &'static str,
        /// What is wanted, with an example.
        wanted: &'static str,
    },
    /// Something that must be there is not.
    #[error("is missing; {0}")]
    Missing(&'static str),

    /// An endpoint that is added has a control character.
    #[error("contains a control character; write the keys in one line, with commas between them")]
    AdditionControl,
    /// Several endpoints, or none, where one is added.
    #[error("must be one endpoint; add each by a command of its own")]
    AdditionNotOne,

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
    /// The two sockets have one path.
    #[error("the control socket has the same path as the socket for the VMM; use another")]
    SamePath,

    /// The VMM's socket is the daemon's.
    #[error(
        "the daemon itself makes the socket at this path; give the path that the VMM's -qmp has"
    )]
    QmpPath,

    /// Not a PCI address.
    #[error("{value:?} is {source}")]
    Pci {
        /// The text.
        value: String,
        /// Why not.
        source: PciAddressError,
    },
    /// Not a range of PCI addresses.
    #[error("{value:?}: {source}")]
    PciRange {
        /// The text.
        value: String,
        /// Why not.
        source: PciRangeError,
    },
    /// An endpoint with both an address and a range.
    #[error("both `address` and `range` are given; keep one")]
    AddressAndRange,
    /// An endpoint with neither.
    #[error(
        "is not said which it is; give `address = \"00:10.0\"` or `range = \"00:10.0-00:1e.7\"`"
    )]
    NoAddress,
    /// Not the name of a host group.
    #[error("{value:?} is {source}")]
    Group {
        /// The text.
        value: String,
        /// Why not.
        source: GroupNameError,
    },

    /// A range of endpoints is said to be one device of the host.
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
         and `shadow` (they may have one path)"
    )]
    ShadowOnRange {
        /// The functions.
        range: PciRange,
    },
    /// An endpoint with two devices.
    #[error("an endpoint has one device; leave out `shadow`, or `vfio` and `vfio-user`")]
    ShadowWithVfio,
    /// A socket for two purposes.
    #[error("the socket at this path is for the VMM or for control; use another path")]
    ShadowPath,
    /// Two endpoints are said to be one device of the host.
    #[error(
        "the host's device {host} is endpoint {other} already; \
         remove one of the two, or give the address of another device"
    )]
    HostTwice {
        /// The address on the host.
        host: PciAddress,
        /// The endpoint that has it.
        other: PciAddress,
    },
    /// Something to export that the host has not got.
    #[error(
        "only a device of the host can be exported; give its address there with `vfio = \"...\"`, or \
         remove `export`"
    )]
    ExportWithoutVfio,
    /// A socket for two purposes.
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
    /// An endpoint is a device of the host and an emulated one.
    #[error(
        "the endpoint has `vfio` too; a device is the host's or emulated: remove one of the two \
         keys"
    )]
    EmulatedAndVfio,
    /// An emulated device without one of its sockets.
    #[error(
        "`{0}` is missing; say where the daemon listens for the VMM (`listen = \"...\"`) and where \
         the device's server listens (`connect = \"...\"`)"
    )]
    EmulatedMissing(&'static str),
    /// The daemon would connect to itself.
    #[error("`listen` and `connect` are the same; use two paths")]
    ListenIsConnect,
    /// Two sockets have one path.
    #[error(
        "{} listens there already; give each endpoint another path in `listen`",
        .other.map_or("the daemon".into(), |other| format!("the daemon for endpoint {other}"))
    )]
    ListenTwice {
        /// The endpoint it is for, if it is for one.
        other: Option<PciAddress>,
    },
    /// No way to keep a server from memory.
    #[error(
        "{0:?} is no isolation; use \"messages\" (the server never has guest RAM) or \"mappings\" \
         (fast, for servers that are trusted with all of it)"
    )]
    Isolation(String),
    /// A server has too little or too much time.
    #[error(
        "{} milliseconds are no time to answer in; use {MIN_DEADLINE_MS} to {MAX_DEADLINE_MS}",
        .0
    )]
    Deadline(i128),
    /// No user.
    #[error("{0} is no user's number; give what `id -u NAME` prints")]
    User(String),
    /// More users than there can be.
    #[error(
        "{0} users are named and at most {MAX_USERS} can be; let processes share a user, or run \
         them as the daemon's"
    )]
    TooManyUsers(usize),
    /// No readers, or too many.
    #[error("{0} processes for an endpoint cannot be; use 1 to {MAX_READERS}")]
    ReaderLimit(i128),
    /// No interface of the host IOMMU.
    #[error(
        "{0:?} is no way to program the host's IOMMU; use \"iommufd\" or, \
         where the host's kernel has no iommufd, \"type1\""
    )]
    HostIommu(String),
    /// No way to pin memory.
    #[error(
        "{0:?} is no way to pin memory; use \"all\" (fast) or \"mapped\" \
         (leaves memory that no device uses to the host)"
    )]
    Pin(String),

    /// Not a descriptor for an endpoint.
    #[error(
        "{0:?} is no descriptor of an endpoint; write ADDRESS=N with the endpoint's address in \
         the guest, such as 00:10.0=4"
    )]
    DescriptorText(String),
    /// A descriptor for what is no device of the host.
    #[error(
        "{endpoint} is no endpoint with `vfio`; give the endpoint's address in the guest, \
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
    /// A descriptor that is given for two things.
    #[error("descriptor {fd} is given by {other} already; give each thing its own descriptor")]
    DescriptorTwice {
        /// The descriptor.
        fd: RawFd,
        /// The option that gave it first.
        other: &'static str,
    },
    /// An iommufd that would not be used.
    #[error(
        "an iommufd is of no use with `host-iommu = \"type1\"`; \
         leave out the option, or set `host-iommu = \"iommufd\"`"
    )]
    IommufdWithType1,
    /// A container that would not be used.
    #[error(
        "a container is of no use with `host-iommu = \"iommufd\"`; \
         leave out the option, or set `host-iommu = \"type1\"`"
    )]
    ContainerWithIommufd,
    /// A device without the iommufd it is bound to.
    #[error(
        "a device can be used only through the iommufd it is bound to; \
         give that with --iommufd-fd, or leave out --vfio-fd to have the device opened by path"
    )]
    DeviceWithoutIommufd,
    /// A device without the container it is in.
    #[error(
        "the device of endpoint {endpoint} can be used only through the container it is in; \
         give that with --vfio-container-fd, or leave out --vfio-fd to have the device opened \
         by path"
    )]
    DeviceWithoutContainer {
        /// The endpoint.
        endpoint: PciAddress,
    },

    /// The address width is out of range.
    #[error(
        "{0} bits are not possible; give {MIN_WIDTH} to {MAX_WIDTH}: \
         48 suits most guests, more than 48 costs a fifth table level"
    )]
    Width(i128),
    /// The granule is none of those supported.
    #[error(
        "{0:?} is no granule; use \"4k\", \"16k\", \"64k\" or \"2m\" (4k suits every x86 guest)"
    )]
    Granule(String),
    /// Polling would take too long.
    #[error("{0} microseconds are too many; give 0 (never poll) to {MAX_POLL_US}")]
    Poll(i128),
    /// The realtime priority is out of range.
    #[error("{0} is no realtime priority; give 1 to {MAX_PRIORITY}, or leave it out")]
    Priority(i128),
    /// A pass takes too few or too many requests.
    #[error("{0} requests cannot be taken at a time; give 1 to {MAX_BATCH}")]
    Batch(i128),
    /// Too few or too many faults.
    #[error("{0} faults in a second cannot be; give 1 to {MAX_FAULT_RATE}")]
    FaultRate(i128),
    /// Not a name for a VM.
    #[error(
        "{0:?} is no name of a VM; use 1 to {MAX_NAME} printable ASCII characters without spaces, or leave \
         it out for the name of the file"
    )]
    Name(String),
    /// Not the rights of a file.
    #[error("{0:?} are no rights of a socket's file; write them in octal, such as \"0660\"")]
    SocketMode(String),
    /// No group.
    #[error("{0} is no group's number; give what `getent group NAME` prints third")]
    SocketGroup(String),
    /// Metrics without a place to go.
    #[error("nobody would get the metrics; give `socket`, `textfile` or both")]
    MetricsNowhere,
    /// A socket for two purposes.
    #[error("another socket has this path; use another path in `metrics.socket`")]
    MetricsPath,
    /// A file that node_exporter would not read.
    #[error(
        "{0:?} is no textfile; give a path of printable characters that ends with .prom, which is what \
         node_exporter reads"
    )]
    Textfile(String),
    /// Written too often or too seldom.
    #[error("{0} seconds cannot be; give {MIN_INTERVAL_S} to {MAX_INTERVAL_S}")]
    Interval(i128),
    /// The number of domains is out of range.
    #[error("{0} domains are not possible; give 1 to {MAX_DOMAINS}")]
    Domains(i128),
    /// Not a size.
    #[error(
        "{0:?} is no size; write bytes as a number, or a text with K, M, G or T, such as \"2G\""
    )]
    Size(String),
    /// The memory size is out of range or odd.
    #[error(
        "{0} bytes of guest RAM are not possible; give a multiple of 1M up to {limit}T",
        limit = MAX_MEMORY >> 40
    )]
    Memory(u64),
    /// The arena is too small to be of use.
    #[error(
        "{0} bytes are too few for page tables; give at least {least}M, \
         or leave it out for memory / 256 + 64M",
        least = MIN_ARENA >> 20
    )]
    ArenaTooSmall(u64),
    /// The arena is larger than any VM needs.
    #[error(
        "{0} bytes are more than page tables ever take; give at most {most}T, \
         or leave it out for memory / 256 + 64M",
        most = MAX_ARENA >> 40
    )]
    ArenaTooLarge(u64),

    /// Not an I/O virtual address.
    #[error(
        "{0:?} is no address; write a number up to 2^64 - 1, decimal or with 0x, \
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
         `last` belongs to the region: {whole_first:#x}..={whole_last:#x} has all it touches"
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
    /// No kind of reserved region.
    #[error("{0:?} is no kind of reserved region; use \"reserved\" or \"msi\"")]
    RegionKind(String),
    /// A reserved region that is not written as one.
    #[error(
        "{0:?} is no reserved region; write FIRST..=LAST:msi or FIRST..=LAST:reserved, \
         such as 0xfee00000..=0xfeefffff:msi"
    )]
    RegionText(String),
    /// The reserved regions of all endpoints do not go together.
    #[error(transparent)]
    Reserved(#[from] ReservedError),
    /// The endpoints do not go together.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// An endpoint's reserved regions do not go with the default one.
    #[error(
        "{0}; the MSI region 0xfee00000..=0xfeefffff is there by default: \
         `reserved = []` at the top of the file turns it off"
    )]
    BesideDefault(#[source] TopologyError),
}
