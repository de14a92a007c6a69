//! ATTACH, DETACH, `bypass` and resets: they decide which endpoint is in which domain.

use std::collections::BTreeMap;

use super::domain::Domain;
use super::error::RequestError;
use super::groups::GroupChanges;
use super::target::target_of;
use super::{DriverState, EndpointRecord, Iommu};
use crate::backends::{AttachError, BackendErrorKind, Target};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{OutOfFrames, Table, TableRefusal};
use crate::topology::{GroupId, ReservedRegions};

impl Iommu {
    /// Attaches an endpoint to a domain, which is made if it does not exist. An endpoint that is
    /// attached to another domain moves.
    ///
    /// # Errors
    /// See [`RequestError`]. The endpoint stays where it was.
    pub fn attach(
        &mut self,
        endpoint: EndpointId,
        domain: DomainId,
        bypass: bool,
    ) -> Result<(), RequestError> {
        // ATTACH-3
        let (group, reserved) = self.group_and_reserved(endpoint)?;
        self.check_domain_id(domain)?;
        // The driver may believe that the domain has mappings, or that it has moved the endpoint's group.
        if self.driver == DriverState::Unknown {
            return Err(RequestError::UnknownDriver);
        }
        if self.is_withheld(endpoint) {
            return Err(RequestError::Misplaced(endpoint));
        }
        let existing = self.domains.get(&domain);
        // ATTACH-5
        if let Some(existing) = existing
            && existing.is_bypass() != bypass
        {
            return Err(RequestError::BypassMismatch {
                domain,
                is_bypass: existing.is_bypass(),
            });
        }
        let before = self.endpoints.get(&endpoint).copied().unwrap_or_default();
        if before.domain == Some(domain) && !before.suspended && !before.quarantined {
            return Ok(());
        }
        // ATTACH-4
        if let Some(group) = group
            && let Some((other, other_domain)) = self.groups.conflict(group, endpoint, domain)
        {
            return Err(RequestError::GroupElsewhere {
                endpoint,
                other,
                other_domain,
            });
        }
        // ATTACH-7
        if let Some(table) = existing.and_then(|d| d.table.as_ref()) {
            for region in reserved.iter() {
                if let Some(mapping) = table.mappings_in(&self.arena, region.range).next() {
                    return Err(RequestError::RegionClash {
                        endpoint,
                        mapping,
                        region: *region,
                    });
                }
            }
        }

        let is_new_domain = existing.is_none();
        let is_new_endpoint = !self.endpoints.contains_key(&endpoint);
        let root = u64::from(is_new_domain && !bypass);
        self.check_room_for_records(is_new_domain, is_new_endpoint, root)?;
        let new_domain = if !is_new_domain {
            None
        } else if bypass {
            Some(Domain::new(None))
        } else {
            let table =
                Table::new(&mut self.arena, self.levels).map_err(|refusal| match refusal {
                    TableRefusal::OutOfFrames(OutOfFrames { needed, free }) => {
                        RequestError::OutOfFrames { needed, free }
                    }
                    TableRefusal::TooDeep(levels) => RequestError::TableTooDeep(levels),
                })?;
            Some(Domain::new(Some(table)))
        };
        let backend = self.backend_of.get(&endpoint).copied();
        // Before this endpoint moves, block the endpoints that the hardware cannot isolate from it.
        let was_active = group.is_some_and(|g| self.groups.is_active(g));
        let changes = group.map_or_else(GroupChanges::default, |g| {
            self.groups.plan_join(g, endpoint, domain)
        });
        self.store.plan();
        self.suspend(&changes.suspended);
        if !was_active {
            self.retarget_unattached_mates(group, endpoint, Target::Blocked);
        }
        if let Some(index) = backend
            && let Err(refusal) = self.switch(
                index,
                endpoint,
                target_of(domain, bypass),
                new_domain.as_ref(),
            )
        {
            let stopped = self.quarantine_stopped(index, refusal.cause());
            self.resume(&changes.suspended);
            if !was_active {
                let target = self.bypass_target();
                self.retarget_unattached_mates(group, endpoint, target);
            }
            if let Some(table) = new_domain.and_then(|d| d.table) {
                table.destroy(&mut self.arena);
                self.arena.reclaim();
            }
            if let AttachError::Blocked(_) = refusal {
                // Its DMA may have begun in the new domain before it was blocked.
                self.note_unconfirmed(endpoint, domain);
            }
            return Err(self.attach_refused(endpoint, refusal, stopped));
        }

        // Nothing below can be refused: publish.
        if let Some(new_domain) = new_domain {
            self.record_domain(domain, &new_domain, self.levels);
            self.domains.insert(domain, new_domain);
        }
        self.endpoints.insert(
            endpoint,
            EndpointRecord {
                domain: Some(domain),
                suspended: false,
                quarantined: false,
            },
        );
        // After the record of the new domain, and before the old one goes: the endpoint's record always names a whole
        // domain.
        self.record_endpoint(endpoint);
        if before.domain != Some(domain) {
            let used = backend.map(|index| self.use_of(index));
            if let Some(entered) = self.domains.get_mut(&domain) {
                entered.enter(endpoint, used, &reserved);
            }
            if let Some(old) = before.domain {
                self.leave_domain(endpoint, old, backend, &reserved);
            }
        }
        if let Some(index) = backend
            && !bypass
        {
            self.note_present(domain, index);
        }
        if let Some(group) = group {
            self.groups.join(group, endpoint, domain);
            self.resume(&changes.resumed);
        }
        self.count_records();
        Ok(())
    }

    /// Detaches an endpoint from the domain it is attached to.
    ///
    /// # Errors
    /// See [`RequestError`]. If a backend fails, the endpoint stays attached and is quarantined.
    pub fn detach(&mut self, endpoint: EndpointId, domain: DomainId) -> Result<(), RequestError> {
        // DETACH-2
        let (group, reserved) = self.group_and_reserved(endpoint)?;
        self.check_domain_id(domain)?;
        // DETACH-3
        if self.endpoints.get(&endpoint).and_then(|e| e.domain) != Some(domain) {
            return Err(RequestError::NotAttached { endpoint, domain });
        }
        let backend = self.backend_of.get(&endpoint).copied();
        self.store.plan();
        if let Some(index) = backend {
            // Block a member of a group for now: its target depends on the other members, and is
            // set below.
            let target = match group {
                Some(_) => Target::Blocked,
                None => self.bypass_target(),
            };
            if let Err(refusal) = self.switch(index, endpoint, target, None) {
                let cause = refusal.cause().clone();
                let stopped = self.quarantine_stopped(index, &cause);
                self.quarantine(endpoint, &cause);
                return Err(RequestError::Quarantined {
                    cause,
                    count: stopped + 1,
                });
            }
        }
        self.endpoints.remove(&endpoint);
        self.record_endpoint(endpoint);
        self.leave_domain(endpoint, domain, backend, &reserved);
        if let Some(id) = group {
            let resumed = self.groups.leave(id, endpoint);
            self.resume(&resumed);
            let target = self.unattached_target(endpoint);
            self.retarget(endpoint, target);
            if !self.groups.is_active(id) {
                self.retarget_unattached_mates(group, endpoint, target);
            }
        }
        self.count_records();
        Ok(())
    }

    /// Sets whether endpoints without a domain are in bypass mode.
    pub fn set_bypass(&mut self, bypass: bool) {
        if self.bypass == bypass {
            return;
        }
        self.bypass = bypass;
        self.record_state();
        let unattached: Vec<_> = self
            .backend_of
            .keys()
            .copied()
            .filter(|e| {
                let state = self.endpoints.get(e);
                state.is_none_or(|s| s.domain.is_none() && !s.quarantined)
            })
            .collect();
        for endpoint in unattached {
            self.retarget(endpoint, self.unattached_target(endpoint));
        }
    }

    /// A VMM is about to share memory whose driver may have attached endpoints at another daemon. Blocks every endpoint
    /// until [`Self::driver_has_started`], a reset, or the VMM's end.
    ///
    /// Not only if the driver turns out to be unknown: between the VMM's memory and the start of its ring, a device
    /// could reach guest-physical addresses with the numbers of those that the driver has mapped.
    pub fn await_driver(&mut self) {
        // If an earlier process has served the driver, its domains are those of the restored core.
        if self.driver == DriverState::Known && !self.is_interrupted() {
            self.begin_reset(self.bypass, DriverState::Awaited);
            self.driver = DriverState::Awaited;
            self.detach_all(Target::Blocked);
            self.store.end_reset();
        }
    }

    /// The first driver since the VMM's connection, or since the state of an earlier process was refused, has started, and
    /// has no domains. The caller must call [`Self::retarget_unattached`].
    pub fn driver_has_started(&mut self) {
        if self.driver != DriverState::Known {
            self.driver = DriverState::Known;
            self.record_state();
        }
    }

    /// Whether all endpoints are blocked because no driver has started since the VMM shared memory.
    pub fn is_driver_awaited(&self) -> bool {
        self.driver == DriverState::Awaited
    }

    /// A driver runs whose domains the core does not have. Detaches and blocks every endpoint, and refuses ATTACH,
    /// until a reset or until the VMM disconnects. Without a domain, the driver can map nothing.
    ///
    /// Not bypass mode: an address that the driver has mapped would reach the guest-physical address of that number.
    pub fn block_unknown_driver(&mut self) {
        self.begin_reset(self.bypass, DriverState::Unknown);
        self.driver = DriverState::Unknown;
        self.detach_all(Target::Blocked);
        self.store.end_reset();
    }

    /// The request ring that starts next has a driver whose domains the core does not have, whatever the ring's index: that of
    /// a process whose state was refused. Until a reset, the VMM's end, or [`Self::next_driver_has_started`]; a later
    /// process knows it, too.
    pub fn distrust_next_driver(&mut self) {
        self.store.set_next_foreign(true);
    }

    /// Whether [`Self::distrust_next_driver`] holds.
    pub fn is_next_driver_foreign(&self) -> bool {
        self.store.is_next_foreign()
    }

    /// The request ring has started. The caller has treated its driver as [`Self::is_next_driver_foreign`] says.
    pub fn next_driver_has_started(&mut self) {
        self.store.set_next_foreign(false);
    }

    /// Whether all endpoints are blocked because the state of the guest's driver is unknown.
    pub fn is_driver_unknown(&self) -> bool {
        self.driver == DriverState::Unknown
    }

    /// Resets the device: detaches every endpoint. `bypass` keeps its value.
    pub fn reset(&mut self) {
        self.begin_reset(self.bypass, DriverState::Known);
        self.driver = DriverState::Known;
        self.detach_all(self.bypass_target());
        self.store.end_reset();
    }

    /// Resets the device together with its VM: as [`Self::reset`], and `bypass` returns to its
    /// value at boot.
    pub fn reset_vm(&mut self) {
        // One store: a process that dies in between must not leave the old value of one of them.
        self.begin_reset(self.bypass_at_boot, DriverState::Known);
        self.bypass = self.bypass_at_boot;
        self.reset();
    }

    /// The error for an ATTACH that the backend refused. The caller must have undone everything
    /// else, and quarantined the `stopped` endpoints that the backend has blocked beside this one.
    fn attach_refused(
        &mut self,
        endpoint: EndpointId,
        refusal: AttachError,
        stopped: usize,
    ) -> RequestError {
        match refusal {
            AttachError::Unchanged(cause) if stopped > 0 => RequestError::Quarantined {
                cause,
                count: stopped,
            },
            AttachError::Unchanged(mut cause) => {
                // The domain has mappings that lead to no memory, or mappings of addresses that only
                // the host knows to be reserved. The endpoint does not fit into it: UNSUPP.
                if let BackendErrorKind::Fault | BackendErrorKind::Range = cause.kind {
                    cause.kind = BackendErrorKind::Unsupp;
                }
                RequestError::Backend(cause)
            }
            AttachError::Blocked(cause) => {
                self.quarantine(endpoint, &cause);
                RequestError::Quarantined {
                    cause,
                    count: stopped + 1,
                }
            }
        }
    }

    /// The endpoints behind backends whose groups have several of them.
    fn grouped_endpoints(&self) -> Vec<EndpointId> {
        let mut groups: BTreeMap<GroupId, Vec<EndpointId>> = BTreeMap::new();
        for &endpoint in self.backend_of.keys() {
            if let Some(group) = self.topology.endpoint(endpoint).and_then(|i| i.group) {
                groups.entry(group).or_default().push(endpoint);
            }
        }
        let several = groups.into_values().filter(|members| members.len() > 1);
        several.flatten().collect()
    }

    /// Detaches every endpoint, and switches those behind backends to `target`.
    pub(super) fn detach_all(&mut self, target: Target) {
        self.groups.clear();
        let recorded: Vec<_> = self.endpoints.keys().copied().collect();
        for endpoint in self.endpoints.values_mut() {
            endpoint.domain = None;
            endpoint.suspended = false;
        }
        // Include endpoints without a domain: they may be blocked for their group, or quarantined.
        let behind_backends: Vec<_> = self.backend_of.keys().copied().collect();
        if target != Target::Blocked {
            // No member of a group may reach its former target while another reaches its new one: a group of the guest may
            // have members that the host can move one by one only.
            for endpoint in self.grouped_endpoints() {
                self.retarget(endpoint, Target::Blocked);
            }
        }
        for endpoint in behind_backends {
            self.retarget(endpoint, target);
        }
        self.endpoints.retain(|_, e| e.quarantined);
        for endpoint in recorded {
            self.record_endpoint(endpoint);
        }
        for (id, domain) in std::mem::take(&mut self.domains) {
            self.store.remove_domain(id);
            for index in domain.backends.present() {
                self.backends[index].destroy_domain(id);
            }
            if let Some(table) = domain.table {
                table.destroy(&mut self.arena);
                self.arena.reclaim();
            }
        }
        self.count_records();
    }

    /// Takes an endpoint out of a domain. Destroys the domain if the endpoint was its last member.
    pub(super) fn leave_domain(
        &mut self,
        endpoint: EndpointId,
        domain: DomainId,
        backend: Option<usize>,
        reserved: &ReservedRegions,
    ) {
        let Some(entry) = self.domains.get_mut(&domain) else {
            return;
        };
        let unused = entry.leave(endpoint, backend, reserved);
        if let Some(index) = unused {
            self.backends[index].destroy_domain(domain);
        }
        if entry.members.is_empty()
            && let Some(gone) = self.domains.remove(&domain)
        {
            self.store.remove_domain(domain);
            if let Some(table) = gone.table {
                table.destroy(&mut self.arena);
                self.arena.reclaim();
            }
        }
    }
}
