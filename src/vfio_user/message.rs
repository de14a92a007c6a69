//! The messages of vfio-user: structures in the host's byte order, and what a well-formed one is.
//!
//! Nothing here acts. Sizes and counts are checked against the bytes that are there before anything
//! is subtracted or taken apart; what a command asks for is for others to judge.

use thiserror::Error;
use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// The most bytes of data in one transfer (`max_data_xfer_size`); also what a peer that names no
/// size means.
pub const MAX_DATA: u32 = 1 << 20;
/// The longest message accepted, header included: the largest transfer and room for what surrounds
/// it.
pub const MAX_MESSAGE: u32 = MAX_DATA + 4096;
/// The most descriptors that come with one message: what the system carries at once.
pub const MAX_DESCRIPTORS: usize = 253;

/// `flags` of [`DmaMapBody`]: the device may read.
pub const DMA_MAP_READ: u32 = 1 << 0;
/// `flags` of [`DmaMapBody`]: the device may write.
pub const DMA_MAP_WRITE: u32 = 1 << 1;
/// `flags` of [`DmaUnmapBody`]: report what was written to.
pub const DMA_UNMAP_DIRTY: u32 = 1 << 0;
/// `flags` of [`DmaUnmapBody`]: everything, with address and size 0.
pub const DMA_UNMAP_ALL: u32 = 1 << 1;
/// `flags` of [`IrqSetBody`]: no data.
pub const IRQ_DATA_NONE: u32 = 1 << 0;
/// `flags` of [`IrqSetBody`]: a byte for each interrupt.
pub const IRQ_DATA_BOOL: u32 = 1 << 1;
/// `flags` of [`IrqSetBody`]: a descriptor for each interrupt.
pub const IRQ_DATA_EVENTFD: u32 = 1 << 2;
/// `flags` of [`IrqSetBody`]: when the interrupt is to be raised.
pub const IRQ_ACTION_TRIGGER: u32 = 1 << 5;
/// `flags` of [`IrqSetBody`]: the bits that say what is to happen.
pub const IRQ_ACTIONS: u32 = 1 << 3 | 1 << 4 | IRQ_ACTION_TRIGGER;
/// `flags` of [`FeatureBody`]: the bits that number the feature.
pub const FEATURE_INDEX: u32 = 0xffff;
/// Features that start, stop and read a log of what DMA wrote.
pub const FEATURES_DMA_LOGGING: std::ops::RangeInclusive<u32> = 6..=8;

/// Bits of a header's flags that tell the type.
const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Agrees on a version and capabilities.
    Version = 1,
    /// Memory the device may reach.
    DmaMap = 2,
    /// Memory the device may reach no longer.
    DmaUnmap = 3,
    /// What the device is.
    DeviceGetInfo = 4,
    /// What a region is.
    DeviceGetRegionInfo = 5,
    /// Descriptors that stand for accesses to a region.
    DeviceGetRegionIoFds = 6,
    /// What a kind of interrupt is.
    DeviceGetIrqInfo = 7,
    /// How interrupts are signalled.
    DeviceSetIrqs = 8,
    /// Reads a region.
    RegionRead = 9,
    /// Writes a region.
    RegionWrite = 10,
    /// The device reads memory.
    DmaRead = 11,
    /// The device writes memory.
    DmaWrite = 12,
    /// Resets the device.
    DeviceReset = 13,
    /// What DMA wrote to, in the older way.
    DirtyPages = 14,
    /// Several small writes to regions.
    RegionWriteMulti = 15,
    /// Reads, sets or probes a feature.
    DeviceFeature = 16,
    /// Reads the device's state for migration.
    MigDataRead = 17,
    /// Writes the device's state for migration.
    MigDataWrite = 18,
}

impl Command {
    const ALL: [Self; 18] = [
        Self::Version,
        Self::DmaMap,
        Self::DmaUnmap,
        Self::DeviceGetInfo,
        Self::DeviceGetRegionInfo,
        Self::DeviceGetRegionIoFds,
        Self::DeviceGetIrqInfo,
        Self::DeviceSetIrqs,
        Self::RegionRead,
        Self::RegionWrite,
        Self::DmaRead,
        Self::DmaWrite,
        Self::DeviceReset,
        Self::DirtyPages,
        Self::RegionWriteMulti,
        Self::DeviceFeature,
        Self::MigDataRead,
        Self::MigDataWrite,
    ];

    /// The command of this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.number() == number)
    }

    /// Its number.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// How many descriptors a command may bring.
    fn command_descriptors(self) -> usize {
        match self {
            Self::DmaMap => 1,
            Self::DeviceSetIrqs => MAX_DESCRIPTORS,
            Self::Version
            | Self::DmaUnmap
            | Self::DeviceGetInfo
            | Self::DeviceGetRegionInfo
            | Self::DeviceGetRegionIoFds
            | Self::DeviceGetIrqInfo
            | Self::RegionRead
            | Self::RegionWrite
            | Self::DmaRead
            | Self::DmaWrite
            | Self::DeviceReset
            | Self::DirtyPages
            | Self::RegionWriteMulti
            | Self::DeviceFeature
            | Self::MigDataRead
            | Self::MigDataWrite => 0,
        }
    }

    /// How many descriptors a reply may bring.
    fn reply_descriptors(self) -> usize {
        match self {
            Self::Version | Self::DeviceGetRegionInfo | Self::DeviceGetRegionIoFds => {
                MAX_DESCRIPTORS
            }
            Self::DmaMap
            | Self::DmaUnmap
            | Self::DeviceGetInfo
            | Self::DeviceGetIrqInfo
            | Self::DeviceSetIrqs
            | Self::RegionRead
            | Self::RegionWrite
            | Self::DmaRead
            | Self::DmaWrite
            | Self::DeviceReset
            | Self::DirtyPages
            | Self::RegionWriteMulti
            | Self::DeviceFeature
            | Self::MigDataRead
            | Self::MigDataWrite => 0,
        }
    }
}

/// Whether a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It asks.
    Command {
        /// And wants no answer.
        no_reply: bool,
    },
    /// It answers.
    Reply,
    /// It refuses, with an errno, which may be 0.
    Refusal(u32),
}

/// The first 16 bytes of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender's number for a command, repeated in its reply.
    pub id: u16,
    /// The number of the command, which need not be one of [`Command`].
    pub command: u16,
    /// Whether it asks or answers.
    pub kind: Kind,
    /// Bytes that follow: `0..=MAX_MESSAGE - 16`.
    pub body_len: usize,
}

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The declared size is no message's.
    #[error("a message declares {0} bytes; {HEADER_BYTES} to {MAX_MESSAGE} are possible")]
    Size(u32),
    /// It neither asks nor answers.
    #[error("a message has the type {0}; 0 and 1 are defined")]
    Type(u32),
    /// A refusal has nothing to say besides its errno.
    #[error("a refusal comes with {0} bytes of data")]
    RefusalWithData(usize),
    /// There is less than the command needs.
    #[error("{command:?} has {have} bytes of data and needs {need}")]
    Short {
        /// The command, or that of the reply.
        command: Command,
        /// Bytes it needs at least.
        need: usize,
        /// Bytes it has.
        have: usize,
    },
    /// It counts what is not there.
    #[error("{command:?} counts {count} and has room for {room}")]
    Count {
        /// The command, or that of the reply.
        command: Command,
        /// What it says.
        count: u64,
        /// What its bytes could hold.
        room: u64,
    },
    /// Descriptors came where none belong.
    #[error("{command:?} comes with {have} descriptors and may have {may}")]
    Descriptors {
        /// The command, or that of the reply.
        command: Command,
        /// Those that came.
        have: usize,
        /// The most it can have.
        may: usize,
    },
}

impl Header {
    /// A command's header.
    pub fn command(id: u16, command: Command, body_len: usize) -> Self {
        Self {
            id,
            command: command.number(),
            kind: Kind::Command { no_reply: false },
            body_len,
        }
    }

    /// The header of the reply to a command.
    pub fn reply_to(&self, body_len: usize) -> Self {
        Self {
            kind: Kind::Reply,
            body_len,
            ..*self
        }
    }

    /// The header of a refusal of a command, with the errno `error`.
    pub fn refusal_of(&self, error: i32) -> Self {
        Self {
            kind: Kind::Refusal(error.unsigned_abs()),
            body_len: 0,
            ..*self
        }
    }

    /// Whether it is a command nobody is to answer.
    pub fn wants_no_reply(&self) -> bool {
        self.kind == Kind::Command { no_reply: true }
    }

    /// Reads a header.
    ///
    /// # Errors
    /// Where its size or its type is impossible. Bits that have no meaning yet are ignored.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let wire = WireHeader::read_from_bytes(bytes).map_err(|_| Malformed::Size(0))?;
        let size = wire.size.get();
        let body_len = usize::try_from(size)
            .ok()
            .filter(|_| size <= MAX_MESSAGE)
            .and_then(|size| size.checked_sub(HEADER_BYTES))
            .ok_or(Malformed::Size(size))?;
        let flags = wire.flags.get();
        let kind = match flags & TYPE_MASK {
            0 => Kind::Command {
                no_reply: flags & FLAG_NO_REPLY != 0,
            },
            TYPE_REPLY if flags & FLAG_ERROR != 0 => Kind::Refusal(wire.error.get()),
            TYPE_REPLY => Kind::Reply,
            other => return Err(Malformed::Type(other)),
        };
        if matches!(kind, Kind::Refusal(_)) && body_len > 0 {
            return Err(Malformed::RefusalWithData(body_len));
        }
        Ok(Self {
            id: wire.id.get(),
            command: wire.command.get(),
            kind,
            body_len,
        })
    }

    /// The bytes of the header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (flags, error) = match self.kind {
            Kind::Command { no_reply: false } => (0, 0),
            Kind::Command { no_reply: true } => (FLAG_NO_REPLY, 0),
            Kind::Reply => (TYPE_REPLY, 0),
            Kind::Refusal(error) => (TYPE_REPLY | FLAG_ERROR, error),
        };
        let size = u32::try_from(self.body_len.saturating_add(HEADER_BYTES)).unwrap_or(u32::MAX);
        zerocopy::transmute!(WireHeader {
            id: self.id.into(),
            command: self.command.into(),
            size: size.into(),
            flags: flags.into(),
            error: error.into(),
        })
    }

    /// The bytes of a whole message with `body`, whose length counts whatever `body_len` says.
    pub fn with_body(&self, body: &[u8]) -> Vec<u8> {
        let header = Self {
            body_len: body.len(),
            ..*self
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(body);
        bytes
    }
}

/// Derives what every structure on the wire has.
macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal, { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire!(
    /// A header as it is sent.
    WireHeader, 16, {
    /// See [`Header`].
    id: U16,
    /// Number of the command.
    command: U16,
    /// Bytes of the message, this header included.
    size: U32,
    /// Type, no reply, error.
    flags: U32,
    /// An errno, in a refusal.
    error: U32,
});
wire!(
    /// Before the text of VERSION.
    VersionBody, 4, {
    /// Must be the same on both sides.
    major: U16,
    /// The lower of the two sides' counts.
    minor: U16,
});
wire!(
    /// DMA_MAP. A descriptor comes with it where the memory can be mapped.
    DmaMapBody, 32, {
    /// Bytes of this structure.
    argsz: U32,
    /// `DMA_MAP_*`.
    flags: U32,
    /// Where in the descriptor's file the memory begins.
    offset: U64,
    /// The device's address for it.
    address: U64,
    /// Bytes.
    size: U64,
});
wire!(
    /// DMA_UNMAP and its reply.
    DmaUnmapBody, 24, {
    /// The most bytes of a reply.
    argsz: U32,
    /// `DMA_UNMAP_*`.
    flags: U32,
    /// The device's address.
    address: U64,
    /// Bytes.
    size: U64,
});
wire!(
    /// DEVICE_GET_INFO and its reply.
    DeviceInfoBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// What the device is and can.
    flags: U32,
    /// Regions.
    regions: U32,
    /// Kinds of interrupts.
    irqs: U32,
});
wire!(
    /// DEVICE_GET_REGION_INFO and its reply, which capabilities may follow.
    RegionInfoBody, 32, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// What can be done with the region.
    flags: U32,
    /// Which region.
    index: U32,
    /// Where the first capability is, from the start of this structure.
    cap_offset: U32,
    /// Bytes of the region.
    size: U64,
    /// Where in the descriptor's file the region begins.
    offset: U64,
});
wire!(
    /// DEVICE_GET_REGION_IO_FDS and its reply, which entries follow.
    RegionIoFdsBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// Zero.
    flags: U32,
    /// Which region.
    index: U32,
    /// Entries.
    count: U32,
});
wire!(
    /// DEVICE_GET_IRQ_INFO and its reply.
    IrqInfoBody, 16, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// What can be done with the interrupts.
    flags: U32,
    /// Which kind.
    index: U32,
    /// How many.
    count: U32,
});
wire!(
    /// DEVICE_SET_IRQS, which bytes may follow.
    IrqSetBody, 20, {
    /// Bytes of this structure and what follows.
    argsz: U32,
    /// `IRQ_*`.
    flags: U32,
    /// Which kind.
    index: U32,
    /// The first one.
    start: U32,
    /// How many.
    count: U32,
});
wire!(
    /// REGION_READ and REGION_WRITE and their replies, which data may follow.
    RegionAccessBody, 16, {
    /// Where in the region.
    offset: U64,
    /// Which region.
    region: U32,
    /// Bytes.
    count: U32,
});
wire!(
    /// Before the entries of REGION_WRITE_MULTI, and its reply.
    WriteMultiBody, 8, {
    /// Entries.
    count: U64,
});
wire!(
    /// An entry of REGION_WRITE_MULTI.
    WriteOneBody, 24, {
    /// Where in the region.
    offset: U64,
    /// Which region.
    region: U32,
    /// Bytes of `data` that count.
    count: U32,
    /// The data.
    data: [u8; 8],
});
wire!(
    /// DMA_READ and DMA_WRITE and their replies, which data may follow.
    DmaAccessBody, 16, {
    /// The device's address.
    address: U64,
    /// Bytes.
    count: U64,
});
wire!(
    /// Before the data of DEVICE_FEATURE and its reply.
    FeatureBody, 8, {
    /// Bytes of a whole reply.
    argsz: U32,
    /// The feature's number, and what to do with it.
    flags: U32,
});
wire!(
    /// MIG_DATA_READ and MIG_DATA_WRITE, which data may follow.
    MigDataBody, 8, {
    /// Bytes of this structure and what follows.
    argsz: U32,
    /// Bytes of data.
    size: U32,
});

/// Reads the structure a body begins with. Returns what follows it too.
///
/// # Errors
/// [`Malformed::Short`].
pub fn take<T: FromBytes + Immutable + KnownLayout + Unaligned>(
    command: Command,
    body: &[u8],
) -> Result<(T, &[u8]), Malformed> {
    T::read_from_prefix(body).map_err(|_| Malformed::Short {
        command,
        need: size_of::<T>(),
        have: body.len(),
    })
}

/// Whether a command is what it says it is: enough bytes, counts that fit them, descriptors only
/// where they belong.
///
/// # Errors
/// What is wrong.
pub fn check_command(command: Command, body: &[u8], descriptors: usize) -> Result<(), Malformed> {
    let counted = |count: u64, room: usize| {
        let room = room as u64;
        if count > room {
            return Err(Malformed::Count {
                command,
                count,
                room,
            });
        }
        Ok(())
    };
    let mut may = command.command_descriptors();
    match command {
        Command::Version => take::<VersionBody>(command, body).map(drop)?,
        Command::DmaMap => take::<DmaMapBody>(command, body).map(drop)?,
        Command::DmaUnmap => take::<DmaUnmapBody>(command, body).map(drop)?,
        Command::DeviceGetInfo => take::<DeviceInfoBody>(command, body).map(drop)?,
        Command::DeviceGetRegionInfo => take::<RegionInfoBody>(command, body).map(drop)?,
        Command::DeviceGetRegionIoFds => take::<RegionIoFdsBody>(command, body).map(drop)?,
        Command::DeviceGetIrqInfo => take::<IrqInfoBody>(command, body).map(drop)?,
        Command::DeviceSetIrqs => {
            let (set, data) = take::<IrqSetBody>(command, body)?;
            let flags = set.flags.get();
            if flags & IRQ_DATA_BOOL != 0 {
                counted(set.count.get().into(), data.len())?;
            }
            let count = usize::try_from(set.count.get()).unwrap_or(usize::MAX);
            may = if flags & IRQ_DATA_EVENTFD != 0 {
                may.min(count)
            } else {
                0
            };
        }
        Command::RegionRead => take::<RegionAccessBody>(command, body).map(drop)?,
        Command::RegionWrite => {
            let (access, data) = take::<RegionAccessBody>(command, body)?;
            counted(access.count.get().into(), data.len())?;
        }
        Command::DmaRead => take::<DmaAccessBody>(command, body).map(drop)?,
        Command::DmaWrite => {
            let (access, data) = take::<DmaAccessBody>(command, body)?;
            counted(access.count.get(), data.len())?;
        }
        Command::DeviceReset => {}
        Command::RegionWriteMulti => {
            let (multi, entries) = take::<WriteMultiBody>(command, body)?;
            counted(multi.count.get(), entries.len() / size_of::<WriteOneBody>())?;
        }
        Command::DirtyPages | Command::DeviceFeature => {
            take::<FeatureBody>(command, body).map(drop)?;
        }
        Command::MigDataRead => take::<MigDataBody>(command, body).map(drop)?,
        Command::MigDataWrite => {
            let (head, data) = take::<MigDataBody>(command, body)?;
            counted(head.size.get().into(), data.len())?;
        }
    }
    check_descriptors(command, descriptors, may)
}

/// Whether a reply that is no refusal is what it says it is.
///
/// # Errors
/// What is wrong.
pub fn check_reply(command: Command, body: &[u8], descriptors: usize) -> Result<(), Malformed> {
    match command {
        Command::Version => take::<VersionBody>(command, body).map(drop)?,
        Command::DeviceGetInfo => take::<DeviceInfoBody>(command, body).map(drop)?,
        Command::DeviceGetRegionInfo => take::<RegionInfoBody>(command, body).map(drop)?,
        Command::DeviceGetRegionIoFds => take::<RegionIoFdsBody>(command, body).map(drop)?,
        Command::DeviceGetIrqInfo => take::<IrqInfoBody>(command, body).map(drop)?,
        Command::RegionRead => {
            let (access, data) = take::<RegionAccessBody>(command, body)?;
            let (count, room) = (u64::from(access.count.get()), data.len() as u64);
            if count > room {
                return Err(Malformed::Count {
                    command,
                    count,
                    room,
                });
            }
        }
        Command::RegionWrite => take::<RegionAccessBody>(command, body).map(drop)?,
        Command::RegionWriteMulti => take::<WriteMultiBody>(command, body).map(drop)?,
        Command::DeviceFeature => take::<FeatureBody>(command, body).map(drop)?,
        Command::MigDataRead => {
            let (head, data) = take::<MigDataBody>(command, body)?;
            let (count, room) = (u64::from(head.size.get()), data.len() as u64);
            if count > room {
                return Err(Malformed::Count {
                    command,
                    count,
                    room,
                });
            }
        }
        // Servers differ in what they repeat of these, and nobody reads it.
        Command::DmaMap
        | Command::DmaUnmap
        | Command::DeviceSetIrqs
        | Command::DmaRead
        | Command::DmaWrite
        | Command::DeviceReset
        | Command::DirtyPages
        | Command::MigDataWrite => {}
    }
    check_descriptors(command, descriptors, command.reply_descriptors())
}

fn check_descriptors(command: Command, have: usize, may: usize) -> Result<(), Malformed> {
    if have > may {
        return Err(Malformed::Descriptors { command, have, may });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(size: u32, flags: u32, error: u32) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(WireHeader {
            id: 7.into(),
            command: 9.into(),
            size: size.into(),
            flags: flags.into(),
            error: error.into(),
        })
    }

    #[test]
    fn headers_with_impossible_sizes_and_types_are_refused() {
        let decode = |size, flags| Header::decode(&raw(size, flags, 0));
        for size in [0, 1, 15, MAX_MESSAGE + 1, u32::MAX] {
            assert_eq!(decode(size, 0), Err(Malformed::Size(size)));
        }
        assert_eq!(decode(16, 0).map(|h| h.body_len), Ok(0));
        assert_eq!(
            decode(MAX_MESSAGE, 0).map(|h| h.body_len),
            Ok(MAX_MESSAGE as usize - 16)
        );
        assert_eq!(decode(16, 2), Err(Malformed::Type(2)));
        assert_eq!(decode(17, 0x21), Err(Malformed::RefusalWithData(1)));
        let refusal = Header::decode(&raw(16, 0x21, 22)).expect("a refusal");
        assert_eq!(refusal.kind, Kind::Refusal(22));
        let posted = Header::decode(&raw(16, 0x10, 0)).expect("a command");
        assert!(posted.wants_no_reply());
    }

    #[test]
    fn numbers_of_commands_are_those_of_the_protocol() {
        for (number, command) in (1..=18).zip(Command::ALL) {
            assert_eq!(command.number(), number);
            assert_eq!(Command::from_number(number), Some(command));
        }
        assert_eq!(Command::from_number(0), None);
        assert_eq!(Command::from_number(19), None);
    }

    #[test]
    fn counts_are_held_against_the_bytes_there_are() {
        let write = |count: u64, data: &[u8]| {
            let head = DmaAccessBody {
                address: 0.into(),
                count: count.into(),
            };
            let body = [head.as_bytes(), data].concat();
            check_command(Command::DmaWrite, &body, 0)
        };
        assert_eq!(write(3, b"abc"), Ok(()));
        assert!(matches!(
            write(4, b"abc"),
            Err(Malformed::Count {
                count: 4,
                room: 3,
                ..
            })
        ));
        assert!(matches!(write(u64::MAX, b""), Err(Malformed::Count { .. })));
        assert!(matches!(
            check_command(Command::DmaWrite, &[0; 15], 0),
            Err(Malformed::Short {
                need: 16,
                have: 15,
                ..
            })
        ));
        let multi = WriteMultiBody {
            count: (u64::MAX / 24 + 1).into(),
        };
        assert!(check_command(Command::RegionWriteMulti, multi.as_bytes(), 0).is_err());
    }

    #[test]
    fn descriptors_come_only_where_they_belong() {
        let set = |flags: u32, count: u32, descriptors| {
            let body = IrqSetBody {
                argsz: 20.into(),
                flags: flags.into(),
                index: 2.into(),
                start: 0.into(),
                count: count.into(),
            };
            check_command(Command::DeviceSetIrqs, body.as_bytes(), descriptors)
        };
        assert_eq!(set(IRQ_DATA_EVENTFD, 2, 2), Ok(()));
        assert_eq!(set(IRQ_DATA_EVENTFD, 2, 0), Ok(()));
        assert!(set(IRQ_DATA_EVENTFD, 2, 3).is_err());
        assert!(set(IRQ_DATA_NONE, 2, 1).is_err());
        assert_eq!(check_command(Command::DmaMap, &[0; 32], 1), Ok(()));
        assert!(check_command(Command::DmaMap, &[0; 32], 2).is_err());
        assert!(check_command(Command::RegionRead, &[0; 16], 1).is_err());
        assert_eq!(
            check_reply(Command::DeviceGetRegionInfo, &[0; 32], 1),
            Ok(())
        );
        assert!(check_reply(Command::DmaUnmap, &[], 1).is_err());
    }

    proptest! {
        #[test]
        fn headers_survive_the_way_there_and_back(
            id: u16, command: u16, kind in 0..4u32, error: u32, len in 0..=MAX_MESSAGE as usize - 16
        ) {
            let kind = match kind {
                0 => Kind::Command { no_reply: false },
                1 => Kind::Command { no_reply: true },
                2 => Kind::Reply,
                _ => Kind::Refusal(error),
            };
            let body_len = if matches!(kind, Kind::Refusal(_)) { 0 } else { len };
            let header = Header { id, command, kind, body_len };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn any_bytes_are_judged_without_panic(
            header: [u8; HEADER_BYTES],
            number in 0..20u16,
            body in proptest::collection::vec(any::<u8>(), 0..64),
            descriptors in 0..300usize,
        ) {
            if let Ok(header) = Header::decode(&header) {
                prop_assert!(header.body_len + HEADER_BYTES <= MAX_MESSAGE as usize);
            }
            if let Some(command) = Command::from_number(number) {
                let _ = check_command(command, &body, descriptors);
                let _ = check_reply(command, &body, descriptors);
            }
        }
    }
}
