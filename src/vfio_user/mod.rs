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
mod irqs;
mod link;
pub mod message;
pub mod server;
pub mod socket;
pub mod version;

pub(crate) use self::client_windows::ClientWindows;
pub use self::interposer::{Interposer, Settings};
pub use self::link::{Ends, Link, MAX_PATIENCE, Order, OrderError, Orders, Ticket, Window};

use crate::address::IovaRange;

/// An access that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// Memory as a device sees it.
///
/// The interposer's thread calls this. It must not wait for whoever gives a [`Link`] orders, nor
/// for anything such a one may hold while it waits for a reply, the core above all.
pub trait DmaTarget: Send + Sync {
    /// Reads all of `range`, which is as long as `into`.
    ///
    /// # Errors
    /// Where some of it may not be read; what is in `into` then means nothing.
    fn read(&self, range: IovaRange, into: &mut [u8]) -> Result<(), Refused>;

    /// Writes all of `range`, which is as long as `from`.
    ///
    /// # Errors
    /// Where some of it may not be written; nothing is written then.
    fn write(&self, range: IovaRange, from: &[u8]) -> Result<(), Refused>;

    /// What a server that connects may reach; called with the [`Link`] locked.
    fn windows(&self) -> Vec<Window>;
}
