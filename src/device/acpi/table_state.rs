//! What became of the table that tells the guest its endpoints.

use std::fmt;

use super::{AcpiRefusal, Added};

/// Whether the guest has learnt its endpoints from the BAR with the root pointer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableState {
    /// The device has no such BAR.
    #[default]
    NoBar,
    /// The guest has not read the BAR since the VM started.
    NotRead,
    /// The guest has read the BAR only behind the root pointer.
    Elsewhere {
        /// The offset of the first such read.
        offset: u64,
    },
    /// The table is among the guest's tables.
    Added(Added),
    /// The table could not be added.
    Refused(AcpiRefusal),
}

impl TableState {
    /// A word for programs; `None` without a BAR.
    pub fn word(&self) -> Option<&'static str> {
        match self {
            Self::NoBar => None,
            Self::NotRead => Some("not read"),
            Self::Elsewhere { .. } => Some("read elsewhere"),
            Self::Added(_) => Some("written"),
            Self::Refused(_) => Some("refused"),
        }
    }
}

impl fmt::Display for TableState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBar => write!(f, "not announced by this device"),
            Self::NotRead => write!(
                f,
                "the guest has not read the root pointer in BAR 2 of this device; if it needs it, acpi_rsdp= on its \
                 kernel's command line is missing or is not that BAR's address"
            ),
            Self::Elsewhere { offset } => write!(
                f,
                "the guest has read BAR 2 of this device at offset {offset:#x} only, and the root pointer is at 0; \
                 acpi_rsdp= must be the BAR's address"
            ),
            Self::Added(Added::Written { at } | Added::Present { at }) => {
                write!(f, "the VIOT table is in guest RAM at {at:#x}")
            }
            Self::Refused(cause) => {
                write!(f, "the VIOT table was not added to the guest's: {cause}")
            }
        }
    }
}
