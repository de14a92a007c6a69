//! The commands.

use super::limits::MAX_DESCRIPTORS;
use crate::ids::list_variants;

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

list_variants!(
    Command:
    Version, DmaMap, DmaUnmap, DeviceGetInfo, DeviceGetRegionInfo, DeviceGetRegionIoFds,
    DeviceGetIrqInfo, DeviceSetIrqs, RegionRead, RegionWrite, DmaRead, DmaWrite, DeviceReset,
    DirtyPages, RegionWriteMulti, DeviceFeature, MigDataRead, MigDataWrite,
);

impl Command {
    /// The command of this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.number() == number)
    }

    /// Its number.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// How many descriptors a command may bring.
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

    /// How many descriptors a reply may bring.
    pub(super) fn reply_descriptors(self) -> usize {
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
