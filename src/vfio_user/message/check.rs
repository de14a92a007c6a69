//! Checks that a message is well formed.

use super::body::{
    DeviceInfoBody, DmaAccessBody, DmaMapBody, DmaUnmapBody, FeatureBody, IRQ_DATA_BOOL,
    IRQ_DATA_EVENTFD, IrqInfoBody, IrqSetBody, MigDataBody, RegionAccessBody, RegionInfoBody,
    RegionIoFdsBody, VersionBody, WriteMultiBody, WriteOneBody, take,
};
use super::command::Command;
use super::malformed::Malformed;

/// Checks that a command has enough bytes, counts no more elements than it has, and has no more
/// descriptors than allowed.
///
/// # Errors
/// Why the command is malformed.
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

/// Whether a command reads or writes 0 bytes of a region. libvfio-user replies to it without a body.
pub fn accesses_nothing(command: Command, body: &[u8]) -> bool {
    matches!(command, Command::RegionRead | Command::RegionWrite)
        && take::<RegionAccessBody>(command, body).is_ok_and(|(access, _)| access.count.get() == 0)
}

/// Checks a reply without a body to a command that [`accesses_nothing`].
///
/// # Errors
/// The reply has descriptors.
pub fn check_empty_reply(command: Command, descriptors: usize) -> Result<(), Malformed> {
    check_descriptors(command, descriptors, command.reply_descriptors())
}

/// Checks a reply other than a refusal as [`check_command`] checks a command.
///
/// # Errors
/// Why the reply is malformed.
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
        // Servers repeat different parts of these commands, and no code here reads the body of the reply.
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
    use zerocopy::IntoBytes;

    use super::*;
    use crate::vfio_user::message::IRQ_DATA_NONE;

    #[test]
    fn counts_are_checked_against_the_bytes_received() {
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
    fn descriptors_are_refused_where_none_belong() {
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

    #[test]
    fn only_accesses_of_no_bytes_have_empty_replies() {
        let access = |count: u32| RegionAccessBody {
            offset: 0.into(),
            region: 0.into(),
            count: count.into(),
        };
        for command in [Command::RegionRead, Command::RegionWrite] {
            assert!(accesses_nothing(command, access(0).as_bytes()));
            assert!(!accesses_nothing(command, access(1).as_bytes()));
            assert!(!accesses_nothing(command, &[0; 15]));
            assert!(check_reply(command, &[], 0).is_err());
            assert_eq!(check_empty_reply(command, 0), Ok(()));
            assert!(check_empty_reply(command, 1).is_err());
        }
        assert!(!accesses_nothing(Command::MigDataRead, &[0; 16]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_checked_without_panic(
            number in 0..20u16,
            body in proptest::collection::vec(any::<u8>(), 0..64),
            descriptors in 0..300usize,
        ) {
            if let Some(command) = Command::from_number(number) {
                let _ = check_command(command, &body, descriptors);
                let _ = check_reply(command, &body, descriptors);
            }
        }
    }
}
