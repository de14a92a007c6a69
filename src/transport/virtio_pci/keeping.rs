//! Has the client's descriptors kept for a later process.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::process::keeper::Keeper;
use crate::warn_limited;

/// Keeps descriptors, if there is somebody to keep them.
#[derive(Clone, Debug, Default)]
pub(super) struct DescriptorKeeping(Option<Arc<Keeper>>);

impl DescriptorKeeping {
    pub(super) fn new(keeper: Arc<Keeper>) -> Self {
        Self(Some(keeper))
    }

    /// Whether there is a keeper.
    pub(super) fn is_present(&self) -> bool {
        self.0.is_some()
    }

    /// Keeps a descriptor. Returns its name, an empty one if the keeper does not take it; `None` without a keeper.
    pub(super) fn keep(&self, file: BorrowedFd<'_>) -> Option<String> {
        let kept = self.0.as_ref()?.keep(file);
        Some(kept.unwrap_or_else(|cause| {
            warn_limited!("a descriptor of the VMM is not kept: {cause}");
            String::new()
        }))
    }

    /// Releases a descriptor that no record names.
    pub(super) fn release(&self, name: Option<&str>) {
        if let (Some(keeper), Some(name)) = (&self.0, name) {
            keeper.release(name);
        }
    }
}
