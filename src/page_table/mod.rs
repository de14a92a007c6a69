//! The store of record of all IOMMU mappings: I/O page tables in a sealed memfd.
//!
//! ```text
//! Arena (memfd): | header | root | table | table | free ... |
//!                            |       ^       ^
//! Table: one root per domain +-------+-------+   4 or 5 levels, leaves of 4 KiB, 2 MiB, 1 GiB
//! ```
//!
//! One writer plans a change ([`Table::plan_map`], [`Table::plan_unmap`]) and then commits it. The
//! plan decides every refusal and changes nothing; the commit cannot fail. Any number of readers, in
//! this process or in others, follow the entries at the same time without a lock
//! ([`reader::walk`]).
//!
//! A frame that leaves the tree is *retired*. The arena hands it out again only after
//! [`Arena::reclaim`], which the owner calls once no reader can still be inside it; [`epoch`] tells
//! the owner when that is. [`EndpointSlots`] tell readers which root to start from.
//!
//! An arena's [`Encoding`] says which hardware can walk its tables, and where it finds them.
//!
//! `docs/page-table.md` specifies the bytes: they are an interface for readers in other processes.

mod arena;
mod clear;
#[cfg(all(test, feature = "daemon"))]
pub(crate) mod crash;
pub mod epoch;
mod error;
mod fill;
pub mod layout;
mod left;
#[cfg(not(miri))]
mod read_only;
pub mod reader;
mod recent;
mod slots;
mod table_reader;
pub mod words;
mod writer;

pub use arena::Arena;
pub use error::{ArenaError, MapRefusal, OutOfFrames, TableRefusal, WouldSplit};
pub use layout::{Encoding, EndpointWord, Format, Levels, TableOffset};
pub use left::{LeftArena, TornTable};
#[cfg(not(miri))]
pub use read_only::ReadOnlyArena;
pub use reader::{Mappings, Translation, View};
pub use slots::EndpointSlots;
pub use table_reader::TableReader;
pub use writer::{MapPlan, Table, UnmapPlan, Unmapped};

pub use crate::address::Mapping;
