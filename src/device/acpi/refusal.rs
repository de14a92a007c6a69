//! Why the VIOT table cannot be added to the guest's ACPI tables.

use thiserror::Error;

/// The most tables that a root table may name. VMMs have about ten.
pub(super) const MAX_TABLES: usize = 256;
/// The greatest length of all tables together. The largest is the DSDT, with some 100 KiB for hundreds of processors.
pub(super) const MAX_TOTAL_LEN: u64 = 8 << 20;

/// The tables in guest RAM do not add up, or have no room. Addresses are guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AcpiRefusal {
    /// The guest has no RSDP where a VMM or its firmware puts it.
    #[error(
        "guest memory has no valid RSDP at 0xa0000 or from 0xe0000 to 0xfffff; share all of it with the device, \
         as a memfd or as files on a tmpfs or hugetlbfs; under a UEFI firmware load the table with GRUB's command acpi"
    )]
    NoRsdp,
    /// The RSDP names neither an XSDT nor an RSDT.
    #[error("the RSDP at {at:#x} names no root table")]
    NoRootTable {
        /// The RSDP.
        at: u64,
    },
    /// One table is broken.
    #[error("the ACPI table at {at:#x} {problem}")]
    Table {
        /// The table.
        at: u64,
        /// What is wrong with it.
        problem: TableProblem,
    },
    /// The root table has too many entries.
    #[error("the root table at {at:#x} names {count} tables, more than {MAX_TABLES}")]
    TooManyTables {
        /// The root table.
        at: u64,
        /// Its entries.
        count: usize,
    },
    /// The tables are too long together.
    #[error("the ACPI tables are longer than {MAX_TOTAL_LEN:#x} bytes together")]
    TooLong,
    /// Two tables share bytes.
    #[error("the ACPI tables at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// The lower table.
        first: u64,
        /// The other one.
        second: u64,
    },
    /// The guest's tables have a VIOT already, with other contents.
    #[error(
        "the guest has another VIOT table at {at:#x}: leave out the VMM's own IOMMU, \
         or boot the guest anew if the configuration of this device has changed"
    )]
    OtherViot {
        /// The other table.
        at: u64,
    },
    /// The root table cannot grow.
    #[error("the root table has no room for one more entry: {at:#x} is in use")]
    NoEntryRoom {
        /// The first byte behind the root table, or the table that is there.
        at: u64,
    },
    /// No room is left behind the last table.
    #[error("no {bytes} free bytes follow the last ACPI table, which ends at {at:#x}")]
    NoRoom {
        /// The end of the last table.
        at: u64,
        /// Bytes of the VIOT table.
        bytes: u64,
    },
    /// The VMM has mapped the tables read-only.
    #[error(
        "the device must not write to the ACPI tables at {at:#x}: the VMM has shared them read-only"
    )]
    ReadOnly {
        /// The first byte.
        at: u64,
    },
}

/// A defect of one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TableProblem {
    /// Not all of it is guest RAM.
    #[error("is not in guest RAM")]
    NotRam,
    /// It is another table than the one that must be there.
    #[error("has the unexpected signature \"{}\"", .0.escape_ascii())]
    Signature([u8; 4]),
    /// Its length is impossible.
    #[error("has an impossible length of {0} bytes")]
    Length(u32),
    /// Its format is not known.
    #[error("has an unknown revision {0}")]
    Revision(u8),
    /// Its bytes do not add up to 0.
    #[error("has a wrong checksum")]
    Checksum,
}
