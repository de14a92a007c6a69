//! Going on with the server of an earlier process that was told each mapping.
//!
//! The server must have exactly the windows of the restored page table. The record says whether it had those of its target
//! when the process died. If a request in progress concerns the domain, nobody knows the windows of that request's mappings.

use super::exact::Exact;
use super::view::{DeviceView, Gate};
use crate::backends::{Adoption, AttachError, BackendError, Contents, DmaBackend, Target};
use crate::ids::EndpointId;

/// The windows of a target, as a word of the record, which is not 0.
fn windows_of_target(target: Target) -> u64 {
    match target {
        Target::Blocked => 1,
        Target::Bypass => 2,
        Target::Domain(domain) => 3 + u64::from(domain.0),
    }
}

impl Exact {
    /// Takes the endpoints over. Returns those that it failed to take over.
    pub(super) fn take_over_all(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        let mut failed = Vec::new();
        for &(endpoint, target) in adoption.endpoints {
            if let Err(cause) = self.take_over(endpoint, target, adoption, contents) {
                failed.push((endpoint, cause));
            }
        }
        self.device.link.go_on();
        failed
    }

    /// Records that the windows are those of a target, for a later process.
    pub(super) fn note_windows_of(&self, target: Target) {
        self.device
            .link
            .lock()
            .note_windows_of(Some(windows_of_target(target)));
    }

    /// Goes on with the server of an earlier process if it has exactly the windows of `target`. Without such a server, or if
    /// it may have others, the device gets the target as from any other.
    fn take_over(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Result<(), BackendError> {
        let refused = |refusal: AttachError| refusal.cause().clone();
        let is_quarantined = adoption.quarantined.contains(&endpoint);
        let mut in_progress = adoption.in_progress.iter();
        let is_changing = in_progress.any(|(domain, _)| target == Target::Domain(*domain));
        let link = self.device.link.clone();
        if is_quarantined {
            link.give_up("its endpoint is quarantined");
        } else if is_changing || !adoption.is_memory_same {
            link.give_up("the daemon died while it changed the server's windows");
        } else if !link.has_windows(windows_of_target(target)) {
            link.give_up("the server does not have exactly the windows that it should have");
        } else {
            let view = self.device.view_of(endpoint, target, contents);
            let view = view.map_err(refused)?.counted();
            link.adopt_windows(view.count);
            return self.device.go_on(target, view);
        }
        let closed = DeviceView::closed(Gate::Blocked, self.device.reserved.clone());
        self.device.go_on(Target::Blocked, closed)?;
        self.attach(endpoint, target, contents).map_err(refused)
    }
}
