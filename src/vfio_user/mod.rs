//! vfio-user: its messages, and what stands between a VMM and the process of an emulated device.
//!
//! ```text
//!            listens                                  connects
//! VMM  <------------->  interposer's thread  <--------------------->  device's server
//! (client)  client leg        |        ^           server leg
//!                             |        |  Link: orders, and their replies
//!            DmaTarget: reads |        |
//!            and writes       v        |
//!                        a DMA backend, told by the core what is mapped
//! ```
//!
//! `docs/interposer.md` tells what is forwarded, what is not, and why nobody waits for ever.

mod client_windows;
mod dma;
mod interposer;
mod irq_replay;
mod link;
pub mod message;
pub mod server;
pub mod socket;
pub mod version;

pub(crate) use self::client_windows::ClientWindows;
pub use self::dma::{AccessDenied, DmaTarget};
pub use self::interposer::{Interposer, InterposerSettings};
pub use self::link::{
    BatchTicket, DmaUpdate, DmaUpdateError, DmaUpdates, Ends, Link, MAX_PATIENCE, Window,
};
