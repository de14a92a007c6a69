//! vfio-user: its messages, a server for devices of this process, and the interposer between a VMM
//! and the process of an emulated device.
//!
//! ```text
//!             listens                                 connects
//! VMM  <------------->  interposer's thread  <--------------------->  device's server
//! (client)  client leg        |        ^           server leg
//!                             |        |  Link: DMA updates, and their replies
//!            DmaTarget: reads |        |
//!            and writes       v        |
//!                        a DMA backend, which applies the core's mappings
//! ```
//!
//! `docs/interposer.md` lists the messages that are forwarded and those that are not, and explains why
//! no wait is unbounded.

mod client_windows;
mod dma;
mod interposer;
mod irq_replay;
mod kept;
mod link;
pub mod message;
pub mod server;
pub mod socket;
pub mod version;

pub(crate) use self::client_windows::ClientWindows;
pub use self::dma::{AccessDenied, DmaTarget, Window};
pub use self::interposer::{Interposer, InterposerSettings};
#[cfg(test)]
pub(crate) use self::kept::testing;
pub use self::kept::{KeptDevice, RECORD_VERSION};
pub use self::link::{
    Announced, BatchTicket, Deadlines, DmaUpdate, DmaUpdateError, DmaUpdates, Ends, Link,
    WindowLimits, WindowRefusal,
};
