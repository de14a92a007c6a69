//! The state of an emulated device, for readers other than the backend's owner.

use std::sync::Arc;

use super::windows::Space;
use crate::ids::EndpointId;
use crate::vfio_user::{Deadlines, Ends, Link, WindowLimits};

/// Observes an emulated device.
#[derive(Clone)]
pub struct Watch {
    endpoint: EndpointId,
    link: Arc<Link>,
    space: Arc<Space>,
}

/// The state of an emulated device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmulatedState {
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Whether its client and its server are connected.
    pub ends: Ends,
    /// The number of windows that its server is told while it is connected: mappings, or regions of 8 TiB.
    pub windows: usize,
    /// The windows that its server does not have.
    pub limits: WindowLimits,
    /// The number of refused accesses.
    pub refused: u64,
    /// The number of memory slots that were removed while a server that was cut off might still map them.
    pub kept_slots: u64,
    /// How long its server may take to answer.
    pub deadlines: Deadlines,
}

impl Watch {
    /// A handle to the device of `endpoint`.
    pub(super) fn new(endpoint: EndpointId, link: Arc<Link>, space: Arc<Space>) -> Self {
        Self {
            endpoint,
            link,
            space,
        }
    }

    /// The device's endpoint.
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// The device's state now. Waits at most for a copy in progress.
    pub fn state(&self) -> EmulatedState {
        let (mut windows, mut refused) = (0, 0);
        let limits = self.link.window_limits(|| {
            (windows, refused) = self.space.figures();
            windows
        });
        EmulatedState {
            endpoint: self.endpoint,
            ends: self.link.ends(),
            windows,
            limits,
            refused,
            kept_slots: self.space.kept_slots.get(),
            deadlines: self.link.deadlines(),
        }
    }
}
