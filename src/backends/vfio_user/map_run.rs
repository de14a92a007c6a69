//! A run of MAPs whose windows the server is told together.
//!
//! [`DmaBackend::begin_maps`](crate::backends::DmaBackend::begin_maps) sends the windows of all mappings. The first MAP of
//! the run then waits for all replies, and takes the windows of refused mappings back from the server in one step. The
//! others only look their outcome up.
//!
//! Several servers of one domain work at the same time: each gets its windows before the core waits for the first one.

use std::collections::BTreeMap;

use super::dma_window::windows_of;
use super::interposed::Interposed;
use crate::address::{Iova, IovaRange, Mapping};
use crate::vfio_user::{BatchTicket, DmaUpdateError, Window};

/// A run has no further mapping after this many windows. This bounds its memory: a mapping can have a window in each
/// memory slot.
const MAX_WINDOWS: usize = 1024;

/// The mappings of a run whose MAP has not come yet.
pub(super) struct MapRun {
    /// By their first address.
    begun: BTreeMap<Iova, Begun>,
    /// What to wait for, until somebody has done so.
    sent: Option<BatchTicket>,
    /// Why the windows of refused mappings could not be taken back from the server.
    kept: Option<DmaUpdateError>,
}

struct Begun {
    mapping: Mapping,
    windows: Vec<Window>,
    outcome: Result<(), DmaUpdateError>,
}

impl MapRun {
    /// Adds mappings to the view, and sends their windows. Returns `None` if the server has no window to get.
    pub(super) fn send(device: &Interposed, mappings: &[Mapping]) -> Option<Self> {
        let mut begun = BTreeMap::new();
        let mut all = Vec::new();
        for mapping in mappings {
            if all.len() >= MAX_WINDOWS {
                break;
            }
            let windows = device.wire(windows_of(*mapping, &device.slots));
            all.extend_from_slice(&windows);
            let entry = Begun {
                mapping: *mapping,
                windows,
                outcome: Ok(()),
            };
            begun.insert(mapping.range.first(), entry);
        }
        if all.is_empty() {
            return None;
        }
        let sent = device.send_maps(&all, || {
            let mut view = device.space.change();
            view.settle();
            for entry in begun.values() {
                view.add(&entry.mapping);
            }
            view.count += all.len();
        });
        Some(Self {
            begun,
            sent: Some(sent),
            kept: None,
        })
    }

    /// The outcome of the mapping of exactly `range`, which leaves the run; `None` if the run does not have it. The first
    /// call waits for the server.
    pub(super) fn take(
        &mut self,
        device: &Interposed,
        range: IovaRange,
    ) -> Option<Result<(), DmaUpdateError>> {
        let first = range.first();
        let begun = self.begun.get(&first);
        begun.filter(|entry| entry.mapping.range == range)?;
        self.finish(device);
        self.begun.remove(&first).map(|entry| entry.outcome)
    }

    /// Why the server may still have windows of refused mappings, once.
    pub(super) fn take_kept(&mut self) -> Option<DmaUpdateError> {
        self.kept.take()
    }

    /// Whether the MAPs of all mappings have come.
    pub(super) fn is_complete(&self) -> bool {
        self.begun.is_empty()
    }

    /// Waits for the server, and removes the mappings that it refuses from the view and from the server.
    pub(super) fn finish(&mut self, device: &Interposed) {
        let Some(ticket) = self.sent.take() else {
            return;
        };
        let mut back = Vec::new();
        let mut refused = Vec::new();
        match device.link.wait_for_each(ticket) {
            Ok(refusals) => {
                for refusal in refusals {
                    let owner = self.begun.range_mut(..=refusal.first).next_back();
                    let Some((_, entry)) = owner.filter(|(_, entry)| entry.outcome.is_ok()) else {
                        continue;
                    };
                    entry.outcome = Err(DmaUpdateError::Refused(refusal));
                    back.append(&mut entry.windows);
                    refused.push(entry.mapping.range);
                }
            }
            Err(cause) => {
                for entry in self.begun.values_mut() {
                    entry.outcome = Err(cause.clone());
                    back.append(&mut entry.windows);
                    refused.push(entry.mapping.range);
                }
            }
        }
        if refused.is_empty() {
            return;
        }
        let windows = back.len();
        let taken = device.take_back(&back, || {
            let mut view = device.space.change();
            for range in &refused {
                view.withdraw(*range);
            }
            view.discount(windows);
        });
        self.kept = taken.err();
    }
}
