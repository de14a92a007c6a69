//! The commands, and how many descriptors each may have.

use super::limits::MAX_DESCRIPTORS;
use crate::ids::list_variants;

/// The command of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Negotiates a version and capabilities.
    Version = 1,
    /// Grants the device a window of memory.
    DmaMap = 2,
    /// Takes a window of memory back.
    DmaUnmap = 3,
    /// Describes the device.
    DeviceGetInfo = 4,
    /// Describes a region.
    DeviceGetRegionInfo = 5,
    /// Gets descriptors that a client can use in place of accesses to a region.
    DeviceGetRegionIoFds = 6,
    /// Describes a kind of interrupts.
    DeviceGetIrqInfo = 7,
    /// Sets how interrupts are signalled.
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
    /// Gets the pages that DMA wrote; superseded by features.
    DirtyPages = 14,
    /// Makes several small writes to regions.
    RegionWriteMulti = 15,
    /// Gets, sets or probes a feature.
    DeviceFeature = 16,
    /// Reads the device's state for migration.
    MigDataRead = 17,
    /// Writes the device's state for migration.
    MigDataWrite = 18,
}

list_variants!(
    Command:
    Version, DmaMap, DmaUnmap, DeviceGetInfo, DeviceGetRegionInfo, DeviceGetRegionIoFds,
    DeviceGetIrqInfo, DeviceSetIrqs, RegionRead, RegionWrite, DmaRead, DmaWrite, DeviceReset,
    DirtyPages, RegionWriteMulti, DeviceFeature, MigDataRead, MigDataWrite,
);

impl Command {
    /// The command with this number; `None` if there is none.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.number() == number)
    }

    /// The number of the command.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The maximum number of descriptors with the command.
    pub(super) fn command_descriptors(self) -> usize {
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

    /// The maximum number of descriptors with the reply.
    pub(in crate::vfio_user) fn reply_descriptors(self) -> usize {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_commands_are_those_of_the_protocol() {
        for (number, command) in (1..=18).zip(Command::ALL) {
            assert_eq!(command.number(), number);
            assert_eq!(Command::from_number(number), Some(command));
        }
        assert_eq!(Command::from_number(0), None);
        assert_eq!(Command::from_number(19), None);
    }
}
