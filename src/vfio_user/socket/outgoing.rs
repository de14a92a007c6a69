//! A descriptor to send.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A descriptor to send with a message.
#[derive(Debug)]
pub enum OutgoingFd {
    /// It is closed when it is sent.
    Owned(OwnedFd),
    /// It has other users.
    Shared(Arc<File>),
}

impl AsFd for OutgoingFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Owned(fd) => fd.as_fd(),
            Self::Shared(file) => file.as_fd(),
        }
    }
}
