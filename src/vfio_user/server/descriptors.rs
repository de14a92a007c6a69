//! Has the client's descriptors kept for a later process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::device::ClientFiles;
use crate::process::keeper::Keeper;
use crate::process::peer_event::PeerEvent;
use crate::warn_limited;

/// Keeps descriptors, if there is somebody to keep them.
#[derive(Clone, Debug, Default)]
pub struct DescriptorKeeping(Option<Arc<Keeper>>);

impl DescriptorKeeping {
    /// Keeps them with `keeper`.
    pub fn new(keeper: Arc<Keeper>) -> Self {
        Self(Some(keeper))
    }

    /// Whether there is a keeper.
    pub fn is_present(&self) -> bool {
        self.0.is_some()
    }

    /// Keeps a descriptor. Returns its name, an empty one if the keeper does not take it; `None` without a keeper.
    pub fn keep(&self, file: BorrowedFd<'_>) -> Option<String> {
        let kept = self.0.as_ref()?.keep(file);
        Some(kept.unwrap_or_else(|cause| {
            warn_limited!("a descriptor of a vfio-user client is not kept: {cause}");
            String::new()
        }))
    }

    /// Releases a descriptor that no record names.
    pub fn release(&self, name: Option<&str>) {
        if let (Some(keeper), Some(name)) = (&self.0, name) {
            keeper.release(name);
        }
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
