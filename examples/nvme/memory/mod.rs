//! Guest memory, which the device reaches in one of three manners.

mod mapped;
mod messages;
mod shadow;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{RwLock, RwLockReadGuard};
use thiserror::Error;
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::vfio_user::message::{DmaMapBody, DmaUnmapBody};

#[cfg(test)]
pub(crate) use self::mapped::widen;
pub use self::mapped::{MAX_WINDOWS, Mapped};
pub use self::messages::{Messages, Outbound};
pub use self::shadow::Shadow;

/// The maximum number of bytes that are copied at once. An unmap waits for a copy in progress.
pub const PIECE: usize = 64 << 10;

/// How the device reaches guest memory.
#[derive(Clone, Debug)]
pub enum Manner {
    /// Through mappings of the descriptors that come with DMA_MAP.
    Mapped,
    /// By DMA_READ and DMA_WRITE.
    Messages,
    /// Through the daemon's page tables.
    Shadow {
        /// The daemon's socket.
        path: PathBuf,
        /// The endpoint of this device.
        endpoint: EndpointId,
    },
}

impl Manner {
    /// The guest memory of a client. `messages` sends requests to that client.
    pub fn memory(&self, messages: &Arc<Messages>) -> Arc<dyn Memory> {
        match self {
            Self::Mapped => Arc::new(Mapped::new(messages.clone())),
            Self::Messages => messages.clone(),
            Self::Shadow { path, endpoint } => Arc::new(Shadow::new(path.clone(), *endpoint)),
        }
    }
}

/// Contiguous bytes of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The device's address of the first byte.
    pub address: u64,
    /// The number of bytes, not 0.
    pub len: usize,
}

/// Why an access to guest memory failed. A part of the access may have succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DmaError {
    /// The device has no right to the access, or the client refuses it.
    #[error("refused: {0}")]
    Refused(String),
    /// The controller was disabled or reset, or the client is gone.
    #[error("the device was reset or has lost its client")]
    Closed,
}

/// Guest memory.
pub trait Memory: Send + Sync {
    /// Reads segments one after the other; together they are as long as `into`.
    ///
    /// # Errors
    /// The device may not read all of them, or `gate` closes.
    fn read(&self, gate: &Gate, from: &[Segment], into: &mut [u8]) -> Result<(), DmaError>;

    /// Writes segments one after the other; together they are as long as `from`.
    ///
    /// # Errors
    /// The device may not write all of them, or `gate` closes.
    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError>;

    /// Adds a window of the client, with its descriptor if the client passed one.
    ///
    /// # Errors
    /// The errno of the refusal.
    fn map(&self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32>;

    /// Removes a window. On success, no access uses it after this method returns.
    ///
    /// # Errors
    /// The errno of the refusal.
    fn unmap(&self, window: &DmaUnmapBody) -> Result<(), i32>;
}

/// A gate that every access passes. It is open until the controller is disabled or reset.
#[derive(Debug)]
pub struct Gate(RwLock<bool>);

impl Gate {
    /// An open gate.
    pub fn new() -> Self {
        Self(RwLock::new(true))
    }

    /// Passes the gate. It stays open until the guard is dropped, so the caller must drop the guard right
    /// after it has accessed memory or sent its request.
    ///
    /// # Errors
    /// [`DmaError::Closed`].
    pub fn enter(&self) -> Result<RwLockReadGuard<'_, bool>, DmaError> {
        let open = self.0.read();
        if *open {
            Ok(open)
        } else {
            Err(DmaError::Closed)
        }
    }

    /// Closes the gate for good, after all guards are dropped.
    pub fn close(&self) {
        *self.0.write() = false;
    }
}
