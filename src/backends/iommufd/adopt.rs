//! Taking over the address spaces of an earlier process, whose devices use them meanwhile.
//!
//! An address space is used as it is if its record says that it is whole, if guest memory is where it was, and if none of
//! its mappings lead to addresses of the dead process. Instead of any other, a new one is made, filled, and put into its
//! place by an attach, which the kernel makes in one step: a device misses no mapping of its domain for a moment.

use std::collections::{BTreeMap, BTreeSet};

use super::Iommufd;
use super::group::Attachment;
use super::noted::SpaceRole;
use crate::backends::reach::refused;
use crate::backends::{Adoption, BackendError, Contents, Target};
use crate::ids::{DomainId, EndpointId};
use crate::warn_limited;

impl Iommufd {
    /// See [`DmaBackend::prepare_adoption`](crate::backends::DmaBackend::prepare_adoption). It is unknown which address
    /// space a moving device is in, so all of them are taken out.
    pub(super) fn block_moving(
        &mut self,
        adoption: &Adoption<'_>,
    ) -> Vec<(EndpointId, BackendError)> {
        let moving = adoption.moving.iter();
        let indexes: BTreeSet<_> = moving.filter_map(|e| self.group_of.get(e)).collect();
        let mut failed = Vec::new();
        for &index in indexes {
            let group = &mut self.groups[index];
            if group.attachment() != Attachment::Unbound
                && let Err(cause) = group.move_to(Attachment::Detached)
            {
                group.block();
                failed.extend(group.endpoints().map(|endpoint| (endpoint, cause.clone())));
            }
        }
        failed
    }

    /// See [`DmaBackend::adopt`](crate::backends::DmaBackend::adopt).
    pub(super) fn take_over(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        self.awaits_take_over = false;
        self.spaces.adopting = self.lacks_iommufd();
        self.spaces.copy_nothing();
        let kernel = self.spaces.kernel.clone();
        let notes = self.spaces.notes.get_mut();
        if self.spaces.adopting {
            notes.forget_left(adoption.records);
        } else {
            notes.take_over(adoption.records, &*kernel);
        }
        for group in &mut self.groups {
            if notes.has_group(group.number()) {
                group.set_verified();
                if self.vmm_files.is_some() {
                    group.await_members(notes.members_of(group.number()));
                }
            }
        }
        self.note_verified_groups();
        let wanted = wanted_domains(adoption.endpoints);
        self.adopt_spaces(adoption, &wanted);
        self.end_requests_in_progress(adoption);
        if !self.spaces.adopting {
            self.spaces.make_bypass_if_pinned();
        }

        let mut lost: BTreeMap<DomainId, BackendError> = BTreeMap::new();
        for domain in wanted {
            if !self.domains.contains_key(&domain) {
                match self.spaces.make_domain(domain, contents) {
                    Ok(ioas) => drop(self.domains.insert(domain, ioas)),
                    Err(cause) => drop(lost.insert(domain, cause)),
                }
            }
        }
        let mut failed = Vec::new();
        for &(endpoint, target) in adoption.endpoints {
            self.set_adopted_target(endpoint, target, &lost, &mut failed);
        }
        for endpoint in adoption.quarantined {
            if let Some(&index) = self.group_of.get(endpoint) {
                self.groups[index].set_quarantined(*endpoint);
            }
        }
        for index in 0..self.groups.len() {
            let attached = if self.has_lost_files(index) {
                Err(self.lost_files(index))
            } else {
                self.attach_adopted(index)
            };
            if let Err(cause) = attached {
                self.groups[index].block();
                let endpoints = self.groups[index].endpoints();
                failed.extend(endpoints.map(|endpoint| (endpoint, cause.clone())));
            }
            self.renew_refusing(index);
        }
        self.spaces.trust_again();
        self.spaces.sweep();
        self.moved();
        failed
    }

    /// Uses the address spaces that can be used as they are, and condemns the others. Devices may be in these still.
    ///
    /// If the file of a device was lost, it is unknown which address space the device is in, and it cannot be taken out, nor
    /// can the other devices of its group. So none is used: all of them get emptied, and these devices reach nothing.
    fn adopt_spaces(&mut self, adoption: &Adoption<'_>, wanted: &BTreeSet<DomainId>) {
        let has_lost = (0..self.groups.len()).any(|index| self.has_lost_files(index));
        let left = self.spaces.notes.get_mut().spaces();
        let count = |role| left.iter().filter(|(_, state)| state.role == role).count();
        for &(ioas, state) in &left {
            let is_usable = !has_lost
                && state.is_whole
                && !state.by_address
                && adoption.is_memory_same
                && count(state.role) == 1;
            match state.role {
                SpaceRole::Domain(domain) if is_usable && wanted.contains(&domain) => {
                    self.domains.insert(domain, ioas);
                }
                SpaceRole::Bypass if is_usable => self.spaces.adopt_bypass(ioas),
                SpaceRole::Spare | SpaceRole::Bypass | SpaceRole::Domain(_) => {
                    self.spaces.condemn(ioas, Vec::new());
                }
            }
        }
    }

    /// Unmaps what requests in progress were mapping or unmapping.
    fn end_requests_in_progress(&mut self, adoption: &Adoption<'_>) {
        for &(domain, range) in adoption.in_progress {
            let Some(&ioas) = self.domains.get(&domain) else {
                continue;
            };
            match self.spaces.kernel.unmap(ioas, range) {
                Ok(_) => {}
                // The request had not mapped anything yet, or had unmapped everything.
                Err(cause) if cause.raw_os_error() == Some(libc::ENOENT) => {}
                Err(cause) => {
                    warn_limited!(
                        "domain {domain} gets a new address space: {}",
                        refused(format_args!("{range} stays mapped"), &cause)
                    );
                    self.domains.remove(&domain);
                    self.spaces.condemn(ioas, Vec::new());
                }
            }
        }
    }

    fn set_adopted_target(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        lost: &BTreeMap<DomainId, BackendError>,
        failed: &mut Vec<(EndpointId, BackendError)>,
    ) {
        let Some(&index) = self.group_of.get(&endpoint) else {
            failed.push((endpoint, super::unknown(endpoint)));
            return;
        };
        let cause = match target {
            Target::Domain(domain) => lost.get(&domain),
            Target::Bypass | Target::Blocked => None,
        };
        match cause {
            None => drop(self.groups[index].set_wanted(endpoint, target)),
            Some(cause) => failed.push((endpoint, cause.clone())),
        }
    }

    /// Attaches the devices of a group to the address space of their target. For a device that is there already, the
    /// kernel does nothing.
    fn attach_adopted(&mut self, index: usize) -> Result<(), BackendError> {
        let group = &mut self.groups[index];
        if group.attachment() == Attachment::Unbound {
            // The VMM has not bound the devices, so they can do no DMA. The first attach after it has done so moves them.
            return Ok(());
        }
        let attachment = self.attachment_for(index)?;
        let switched = self.switch(index, attachment);
        switched.map_err(|refusal| refusal.cause().clone())
    }
}

/// The domains that are targets.
fn wanted_domains(endpoints: &[(EndpointId, Target)]) -> BTreeSet<DomainId> {
    let domains = endpoints.iter().filter_map(|(_, target)| match target {
        Target::Domain(domain) => Some(*domain),
        Target::Bypass | Target::Blocked => None,
    });
    domains.collect()
}
