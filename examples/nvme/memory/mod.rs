//! Guest memory as the device reaches it, in one of three manners.

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

pub use self::mapped::{MAX_WINDOWS, Mapped};
pub use self::messages::{Messages, Outbound};
pub use self::shadow::Shadow;

/// The most bytes copied without giving whoever unmaps a chance.
pub const PIECE: usize = 64 << 10;

/// How guest memory is reached.
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
        /// Who this device is.
        endpoint: EndpointId,
    },
}

impl Manner {
    /// Guest memory in this manner, for the client that `messages` asks.
    pub fn memory(&self, messages: &Arc<Messages>) -> Arc<dyn Memory> {
        match self {
            Self::Mapped => Arc::new(Mapped::new(messages.clone())),
            Self::Messages => messages.clone(),
            Self::Shadow { path, endpoint } => Arc::new(Shadow::new(path.clone(), *endpoint)),
        }
    }
}

/// Bytes of guest memory that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The device's address of the first one.
    pub address: u64,
    /// How many; not 0.
    pub len: usize,
}

/// Why guest memory was not read or written. Some of it may have been.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DmaError {
    /// The device may not.
    #[error("refused: {0}")]
    Refused(String),
    /// The controller was reset, or the client is gone.
    #[error("the device was reset or has lost its client")]
    Closed,
}

/// Guest memory.
pub trait Memory: Send + Sync {
    /// Reads segments one after the other; together they are as long as `into`.
    ///
    /// # Errors
    /// Where some of it may not be read, or `gate` closes.
    fn read(&self, gate: &Gate, from: &[Segment], into: &mut [u8]) -> Result<(), DmaError>;

    /// Writes segments one after the other; together they are as long as `from`.
    ///
    /// # Errors
    /// Where some of it may not be written, or `gate` closes.
    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError>;

    /// The client tells of a window, and passes its descriptor if it has one.
    ///
    /// # Errors
    /// The errno to answer with.
    fn map(&self, window: &DmaMapBody, file: Option<OwnedFd>) -> Result<(), i32>;

    /// The client takes a window back. No access uses it any more when this returns.
    ///
    /// # Errors
    /// The errno to answer with.
    fn unmap(&self, window: &DmaUnmapBody) -> Result<(), i32>;
}

/// Open while the controller that it belongs to is enabled. An access passes it, or fails.
#[derive(Debug)]
pub struct Gate(RwLock<bool>);

impl Gate {
    /// One that is open.
    pub fn new() -> Self {
        Self(RwLock::new(true))
    }

    /// Keeps it open while memory is touched, or asked to be.
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

    /// Closes it for good, after those inside have left.
    pub fn close(&self) {
        *self.0.write() = false;
    }
}
