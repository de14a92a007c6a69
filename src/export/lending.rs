//! The device's own descriptor in the hands of clients, which map BARs through it.
//!
//! A client can give the descriptor to another process, so the end of its connection does not end the access. A device of a
//! group (type1) can be closed and opened again, which shows whether another process still has it. A device that is bound to
//! an iommufd cannot: its node would have to be opened by path.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::hot_reset::{RegisteredDevice, Takeback};

/// Who has the descriptor of one device.
#[derive(Debug, Default)]
pub(super) struct Lending {
    /// Clients may get it.
    is_allowed: bool,
    /// A client may have got it since this process alone had the device.
    is_lent: bool,
    /// The device takes no client while another process has it.
    is_refusing: bool,
    /// A process of a client that has gone has the descriptor, or may have it.
    held: Arc<AtomicBool>,
}

/// Why a client that has gone may still reach the device.
#[derive(Debug)]
pub(super) enum Retained {
    /// Another process has it open, or this one cannot find out.
    ByOther(io::Error),
    /// The device cannot be closed and opened again.
    Unknown,
}

impl fmt::Display for Retained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByOther(cause) => write!(
                f,
                "no other client gets the device while a process of the last one may have its descriptor: {cause}; end \
                 that process"
            ),
            Self::Unknown => f.write_str(
                "a process of the last client may still have the device's descriptor, because the daemon cannot close the \
                 device and open it again; make sure that the VMM's processes have ended, and end this daemon before \
                 another VM gets the device",
            ),
        }
    }
}

impl Lending {
    /// Whether clients may get the descriptor is up to `is_allowed`.
    pub(super) fn new(is_allowed: bool) -> Self {
        Self {
            is_allowed,
            ..Self::default()
        }
    }

    /// Whether clients may get the descriptor.
    pub(super) fn is_allowed(&self) -> bool {
        self.is_allowed
    }

    /// Whether a client may have got it since this process alone had the device.
    pub(super) fn is_lent(&self) -> bool {
        self.is_lent
    }

    /// A client gets the descriptor. Returns whether none had it before.
    pub(super) fn lend(&mut self) -> bool {
        !std::mem::replace(&mut self.is_lent, true)
    }

    /// A client of an earlier process goes on, or has gone. `was_lent`: that process has recorded that the client had the
    /// descriptor. Its last record may be older than its last answer.
    pub(super) fn resume(&mut self, was_lent: bool) {
        self.is_lent |= was_lent || self.is_allowed;
    }

    /// Whether the device takes no client, because another process had it when that was tried last.
    pub(super) fn is_refusing(&self) -> bool {
        self.is_refusing
    }

    /// Whether a process of a client that has gone has the descriptor, or may have it. The flag follows the device.
    pub(super) fn held(&self) -> Arc<AtomicBool> {
        self.held.clone()
    }

    /// The client that had the descriptor has gone: tries to find out whether this process alone has the device again. Returns
    /// why it may have not.
    pub(super) fn take_back(&mut self, registered: Option<&RegisteredDevice>) -> Option<Retained> {
        let takeback = registered.map_or(Takeback::Impossible, RegisteredDevice::take_back);
        let held = match takeback {
            Takeback::Done => None,
            Takeback::Failed(cause) => Some(Retained::ByOther(cause)),
            Takeback::Impossible => Some(Retained::Unknown),
        };
        self.is_lent = held.is_some();
        self.is_refusing = matches!(held, Some(Retained::ByOther(_)));
        self.held.store(held.is_some(), Ordering::Relaxed);
        held
    }
}
