//! The store of record of all IOMMU mappings: I/O page tables in a sealed memfd.
//!
//! ```text
//! Arena (memfd): | header | root | table | table | free ... |
//!                            |       ^       ^
//! Table: one root per domain +-------+-------+   4 or 5 levels, leaves of 4 KiB, 2 MiB, 1 GiB
//! ```
//!
//! One writer plans a change ([`Table::plan_map`], [`Table::plan_unmap`]), which decides every
//! refusal and alters nothing, and then commits it, which cannot fail. Any number of readers, in
//! this process or in others, follow the entries at the same time without a lock
//! ([`reader::walk`]). A frame that leaves the tree is *retired*: it is handed out again only
//! after [`Arena::reclaim`], which the owner calls once no reader can still be inside it. How it
//! learns that is [`epoch`]'s part; [`EndpointSlots`] tell readers where to start.
//!
//! The bytes are an interface of their own, written down in `docs/page-table.md`.

mod arena;
mod clear;
pub mod epoch;
mod error;
mod fill;
pub mod layout;
#[cfg(not(miri))]
mod read_only;
pub mod reader;
mod recent;
mod slots;
pub mod words;
mod writer;

pub use arena::Arena;
pub use error::{ArenaError, MapRefusal, OutOfFrames, WouldSplit};
pub use layout::{EndpointWord, Levels, TableOffset};
#[cfg(not(miri))]
pub use read_only::ReadOnlyArena;
pub use reader::{Mappings, Translation, View};
pub use slots::EndpointSlots;
pub use writer::{MapPlan, Table, UnmapPlan, Unmapped};

pub use crate::address::Mapping;
