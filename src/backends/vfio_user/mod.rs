//! An emulated device in a process of its own, behind an interposer. The server's messages reach memory through the
//! mappings of the endpoint's domain only.
//!
//! Each endpoint has a backend of its own, so that cutting off one server affects no other device. There are two kinds:
//!
//! - `coarse`: the server is told large regions, once, and gets no memory. Each access is a message and is checked with
//!   the page table, so MAP and UNMAP send the server nothing.
//! - `exact`: the server is told each mapping. A server that maps guest memory needs this.

mod coarse;
mod dma_window;
mod exact;
mod exact_take_over;
mod interposed;
mod map_run;
#[cfg(test)]
mod tests;
mod view;
mod watch;
mod windows;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use self::coarse::Coarse;
use self::exact::Exact;
use self::interposed::Interposed;
use self::windows::DmaRegion;
use super::{DmaBackend, MemorySlot};
use crate::address::{Iova, IovaRange};
use crate::faults::FaultSink;
use crate::ids::EndpointId;

pub use self::watch::{EmulatedState, Watch};
pub use self::windows::Isolation;
pub use crate::vfio_user::{Deadlines, KeptDevice, WindowLimits};

/// An emulated device.
#[derive(Clone, Debug)]
pub struct EmulatedDevice {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Its name, for the log.
    pub name: String,
    /// The socket at which its server listens.
    pub server: PathBuf,
    /// How its server is isolated from guest RAM.
    pub isolation: Isolation,
    /// The most windows that its server is told, if it supports so many.
    pub max_windows: u64,
    /// The addresses that bypass mode does not reach.
    pub reserved: Vec<IovaRange>,
    /// How long its server may take to answer.
    pub deadlines: Deadlines,
    /// See [`InterposerSettings::answers_all_accesses`](crate::vfio_user::InterposerSettings::answers_all_accesses).
    pub answers_all_accesses: bool,
}

/// Starts the interposer and the backend of one device. The VMM's clients connect to `listener`. The handle reads the
/// device's state without access to the backend, which the core owns.
///
/// # Errors
/// The system has no descriptor or thread left.
pub fn start(
    device: EmulatedDevice,
    listener: UnixListener,
    sink: Arc<dyn FaultSink>,
) -> io::Result<(Box<dyn DmaBackend>, Watch)> {
    start_kept(device, listener, sink, None)
}

/// As [`start`]. With `kept`, the connections go on in a later process, and those of an earlier one go on here.
///
/// # Errors
/// The system has no descriptor or thread left.
pub fn start_kept(
    device: EmulatedDevice,
    listener: UnixListener,
    sink: Arc<dyn FaultSink>,
    kept: Option<KeptDevice>,
) -> io::Result<(Box<dyn DmaBackend>, Watch)> {
    let isolation = device.isolation;
    let regions = kept.as_ref().map_or(&[][..], KeptDevice::left_regions);
    let regions = regions.iter().map(|first| DmaRegion::of(Iova(*first)));
    let regions = regions.collect();
    let device = Interposed::start(device, listener, sink, kept)?;
    let watch = device.watch();
    let backend: Box<dyn DmaBackend> = match isolation {
        Isolation::Messages => Box::new(Coarse::new(device, regions)),
        Isolation::ExactMessages | Isolation::Mappings => Box::new(Exact::new(device)),
    };
    Ok((backend, watch))
}
