//! Has the client's descriptors kept for a later process.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::device::ClientFiles;
use crate::process::keeper::Keeper;
use crate::process::peer_event::PeerEvent;
use crate::warn_limited;

/// Keeps descriptors, if there is somebody to keep them.
///
/// It notes the name of each descriptor that it keeps, for the device's next record. The server compares the notes with the
/// names in the records, and releases each name as often as it was kept more. Not the device: it would have to name what each
/// message replaces, and a descriptor that replaces itself is easily overlooked.
#[derive(Debug, Default)]
pub struct DescriptorKeeping {
    keeper: Option<Arc<Keeper>>,
    /// The names since the last [`Self::take_kept`].
    kept: RefCell<Vec<String>>,
}

impl DescriptorKeeping {
    /// Keeps them with `keeper`.
    pub fn new(keeper: Arc<Keeper>) -> Self {
        Self {
            keeper: Some(keeper),
            kept: RefCell::default(),
        }
    }

    /// Whether there is a keeper.
    pub fn is_present(&self) -> bool {
        self.keeper.is_some()
    }

    /// Keeps a descriptor. Returns its name, an empty one if the keeper does not take it; `None` without a keeper.
    pub fn keep(&self, file: BorrowedFd<'_>) -> Option<String> {
        Some(match self.keeper.as_ref()?.keep(file) {
            Ok(name) => {
                self.kept.borrow_mut().push(name.clone());
                name
            }
            Err(cause) => {
                warn_limited!("a descriptor of a vfio-user client is not kept: {cause}");
                String::new()
            }
        })
    }

    /// The names of the descriptors that were kept since the last call, each as often as it was kept: for
    /// [`DeviceRecord::kept`](super::device::DeviceRecord::kept).
    pub fn take_kept(&self) -> Vec<String> {
        self.kept.take()
    }
}

/// An eventfd of the client.
#[derive(Debug)]
pub struct ClientEvent {
    /// The eventfd.
    pub event: PeerEvent,
    /// Its name at the keeper, empty if it is not kept; `None` without a keeper.
    pub name: Option<String>,
}

impl ClientEvent {
    /// The eventfd, which is kept if there is a keeper.
    pub fn new(event: PeerEvent, keeping: &DescriptorKeeping) -> Self {
        Self {
            name: keeping.keep(event.as_fd()),
            event,
        }
    }

    /// The eventfd that an earlier process has kept under `name`.
    ///
    /// # Errors
    /// It is missing, or no eventfd.
    pub fn resumed(name: &str, files: &ClientFiles) -> io::Result<Self> {
        let file = files.get(name);
        let file = file.ok_or_else(|| io::Error::other("an eventfd is missing"))?;
        Ok(Self {
            event: PeerEvent::new(file.try_clone()?)?,
            name: Some(name.to_owned()),
        })
    }
}
