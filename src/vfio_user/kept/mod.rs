//! Connections of an emulated device that outlive the process: both peers go on with the next one, wherever this one dies.
//!
//! ```text
//! client --- socket ---> received bytes ---+--> send ring --- socket ---> server
//!                              |           |        |
//!        kernel: peek offset --+        record      +-- kernel: file position
//! ```
//!
//! The keeper has the sockets, the record with the received bytes, and the send rings. The kernel counts received and sent
//! bytes in the step that moves them. The record says in one store how far the messages were handled and what the peers must
//! get. So the next process knows of each message whether it was handled, and of each byte whether it was sent.

mod book;
mod connections;
mod crash;
mod input;
mod layout;
mod memory;
mod positions;
mod ring;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub(in crate::vfio_user) use self::book::{Book, Place, Recorded};
pub use self::connections::KeptDevice;
pub(in crate::vfio_user) use self::connections::{KeptConnections, LeftConnections, LeftSocket};
pub(in crate::vfio_user) use self::input::KeptInput;
pub(in crate::vfio_user) use self::layout::Leg;
pub use self::layout::VERSION as RECORD_VERSION;
pub(in crate::vfio_user) use self::positions::{
    BODY_BYTES, KeptCommand, KeptTerms, Peer, WindowsOf,
};
pub(in crate::vfio_user) use self::ring::SendRing;
