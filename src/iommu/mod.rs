//! The core: endpoints, domains, and the rules of the specification between them.
//!
//! Plain function calls drive it; it knows neither virtio nor sockets nor VFIO. Each check names
//! the statement of `docs/conformance.md` it carries out.
//!
//! An endpoint is in one of these states:
//!
//! ```text
//!               ATTACH                      failure in a backend
//! unattached ----------> attached(domain) ----------------------> quarantined
//!  bypass or <----------                  <----------------------
//!  blocked, as  DETACH, reset               ATTACH that succeeds
//!  `bypass` says
//! ```

mod domain;
mod error;
mod fault;
mod groups;
mod hotplug;
mod look;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use crate::address::{Access, Gpa, Iova, IovaRange, Mapping, PageMask};
use crate::backends::{
    AttachError, BackendError, BackendErrorKind, Contents, DmaBackend, MemorySlot, Target,
    UnmapPart,
};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{
    Arena, ArenaError, Levels, MapRefusal, OutOfFrames, Table, TableOffset, Translation, Unmapped,
};
use crate::topology::{GroupId, ReservedRegions, Topology};
use crate::{error_limited, warn_limited};

use self::domain::{Domain, present_in};
use self::groups::{Changes, Groups};
use self::memory::is_all_reachable;

pub use self::error::RequestError;
pub use self::fault::{Fault, FaultReason};
pub use self::hotplug::{AddError, NewEndpoints, RemoveError};
pub use self::look::{Next, Totals};

/// A domain of this many page-table frames may always grow within the arena's last part, so that
/// one domain that uses up the arena does not keep the others from working.
const SMALL_DOMAIN_FRAMES: u64 = 16;
/// The arena's last part: one frame in this many.
const RESERVE_DIVISOR: u64 = 16;

/// What the IOMMU offers before its backends narrow it.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width of I/O virtual addresses in bits.
    pub address_width: u8,
    /// Page sizes.
    pub page_sizes: PageMask,
    /// Highest domain ID, and with that the cap on live domains.
    pub last_domain: u32,
    /// Whether endpoints without a domain are in bypass mode in a new VM.
    pub bypass_at_boot: bool,
    /// Size of the page-table arena in bytes.
    pub arena_limit: u64,
}

/// What an endpoint's DMA meets right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dma {
    /// The mappings of its domain.
    Translated,
    /// Guest-physical addresses as they are.
    Bypass,
    /// Nothing.
    Blocked,
}

/// An endpoint as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointState {
    /// Its ID.
    pub id: EndpointId,
    /// The domain it is attached to.
    pub domain: Option<DomainId>,
    /// What its DMA meets.
    pub dma: Dma,
    /// Blocked because something failed.
    pub quarantined: bool,
}

/// A domain as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// Its ID.
    pub id: DomainId,
    /// A bypass domain, without mappings.
    pub bypass: bool,
    /// The endpoints attached to it.
    pub endpoints: Vec<EndpointId>,
    /// Live mappings.
    pub mappings: u64,
    /// Bytes they cover.
    pub mapped_bytes: u64,
}

/// An endpoint that is attached or quarantined; all others are unattached.
#[derive(Clone, Copy, Debug, Default)]
struct Endpoint {
    domain: Option<DomainId>,
    /// Its group has moved to another domain without it.
    suspended: bool,
    quarantined: bool,
}

/// The IOMMU of one VM.
pub struct Iommu {
    topology: Topology,
    /// By number; where one has gone, something that does nothing keeps its place.
    backends: Vec<Box<dyn DmaBackend>>,
    /// Such places.
    vacant: Vec<usize>,
    /// A VMM has spoken, and is there.
    vmm_present: bool,
    backend_of: BTreeMap<EndpointId, usize>,
    input: IovaRange,
    page_sizes: PageMask,
    levels: Levels,
    last_domain: u32,
    bypass_at_boot: bool,
    bypass: bool,
    arena: Arena,
    endpoints: BTreeMap<EndpointId, Endpoint>,
    domains: BTreeMap<DomainId, Domain>,
    groups: Groups,
    /// Guest RAM as the backends know it.
    memory: Vec<MemorySlot>,
}

impl Iommu {
    /// An IOMMU whose endpoints are all unattached.
    ///
    /// # Errors
    /// Where the arena cannot be made.
    pub fn new(settings: Settings, topology: Topology) -> Result<Self, ArenaError> {
        Ok(Self {
            topology,
            backends: Vec::new(),
            vacant: Vec::new(),
            vmm_present: false,
            backend_of: BTreeMap::new(),
            input: IovaRange::of_width(settings.address_width),
            page_sizes: settings.page_sizes,
            levels: Levels::for_width(settings.address_width.into()).unwrap_or(Levels::Five),
            last_domain: settings.last_domain,
            bypass_at_boot: settings.bypass_at_boot,
            bypass: settings.bypass_at_boot,
            arena: Arena::new(settings.arena_limit)?,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            groups: Groups::default(),
            memory: Vec::new(),
        })
    }

    /// Puts endpoints behind a backend, before the guest runs. What the guest is offered shrinks
    /// to what the backend can do; endpoints it cannot take over are quarantined.
    ///
    /// # Errors
    /// Where the backend has no addresses or page sizes in common with what is offered already.
    pub fn add_backend(
        &mut self,
        backend: Box<dyn DmaBackend>,
        endpoints: &[EndpointId],
    ) -> Result<(), String> {
        let can = backend.capabilities();
        let input = self.input.intersection(can.aperture).ok_or_else(|| {
            format!(
                "a backend translates {} only, and {} is offered; narrow the address width",
                can.aperture, self.input
            )
        })?;
        let granule = self.page_sizes.granule().max(can.page_sizes.granule());
        let shared = self.page_sizes.bits() & can.page_sizes.bits() & !(granule - 1);
        self.page_sizes = PageMask::new(shared | granule).unwrap_or(self.page_sizes);
        self.input = input;
        let index = self.backends.len();
        self.backends.push(backend);
        for &endpoint in endpoints {
            self.backend_of.insert(endpoint, index);
            self.retarget(endpoint, self.bypass_target());
        }
        Ok(())
    }

    /// The addresses MAP accepts.
    pub fn input_range(&self) -> IovaRange {
        self.input
    }

    /// The page sizes the guest is told of.
    pub fn page_sizes(&self) -> PageMask {
        self.page_sizes
    }

    /// Highest domain ID.
    pub fn last_domain(&self) -> u32 {
        self.last_domain
    }

    /// Who is behind this IOMMU.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The page tables' memory.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Whether any endpoint is behind a backend.
    pub fn has_backends(&self) -> bool {
        self.backends.len() > self.vacant.len()
    }

    /// The page tables' memory, for backends that have endpoint slots there.
    pub fn arena_mut(&mut self) -> &mut Arena {
        &mut self.arena
    }

    /// Whether endpoints without a domain are in bypass mode.
    pub fn bypass(&self) -> bool {
        self.bypass
    }

    /// Attaches an endpoint to a domain, which is made if it does not exist; an endpoint attached
    /// elsewhere moves.
    ///
    /// # Errors
    /// See [`RequestError`]; the endpoint stays where it was.
    pub fn attach(
        &mut self,
        endpoint: EndpointId,
        domain: DomainId,
        bypass: bool,
    ) -> Result<(), RequestError> {
        // ATTACH-3
        let (group, reserved) = self.endpoint_facts(endpoint)?;
        self.check_domain_id(domain)?;
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

        let made = if existing.is_some() {
            None
        } else if bypass {
            Some(Domain::new(None))
        } else {
            let table = Table::new(&mut self.arena, self.levels).map_err(
                |OutOfFrames { needed, free }| RequestError::OutOfFrames { needed, free },
            )?;
            Some(Domain::new(Some(table)))
        };
        let backend = self.backend_of.get(&endpoint).copied();
        // Those that cannot be kept apart from it are blocked before it moves.
        let was_active = group.is_some_and(|g| self.groups.is_active(g));
        let changes = group.map_or_else(Changes::default, |g| {
            self.groups.plan_join(g, endpoint, domain)
        });
        self.suspend(&changes.suspended);
        if !was_active {
            self.retarget_unattached_mates(group, endpoint, Target::Blocked);
        }
        if let Some(index) = backend
            && let Err(refusal) =
                self.switch(index, endpoint, target_of(domain, bypass), made.as_ref())
        {
            self.resume(&changes.suspended);
            if !was_active {
                let target = self.bypass_target();
                self.retarget_unattached_mates(group, endpoint, target);
            }
            if let Some(table) = made.and_then(|d| d.table) {
                table.destroy(&mut self.arena);
                self.arena.reclaim();
            }
            return Err(self.attach_refused(endpoint, refusal));
        }

        // Nothing below is refused: publish.
        if let Some(made) = made {
            self.domains.insert(domain, made);
        }
        if before.domain != Some(domain) {
            if let Some(entered) = self.domains.get_mut(&domain) {
                entered.enter(endpoint, backend, &reserved);
            }
            if let Some(old) = before.domain {
                self.leave_domain(endpoint, old, backend, &reserved);
            }
        }
        if let Some(index) = backend
            && !bypass
            && let Some(used) = self
                .domains
                .get_mut(&domain)
                .and_then(|d| d.backends.get_mut(&index))
        {
            used.present = true;
        }
        self.endpoints.insert(
            endpoint,
            Endpoint {
                domain: Some(domain),
                suspended: false,
                quarantined: false,
            },
        );
        if let Some(group) = group {
            self.groups.join(group, endpoint, domain);
            self.resume(&changes.resumed);
        }
        Ok(())
    }

    /// Detaches an endpoint from the domain it is attached to.
    ///
    /// # Errors
    /// See [`RequestError`]. Where a backend fails the endpoint stays attached and is quarantined.
    pub fn detach(&mut self, endpoint: EndpointId, domain: DomainId) -> Result<(), RequestError> {
        // DETACH-2
        let (group, reserved) = self.endpoint_facts(endpoint)?;
        self.check_domain_id(domain)?;
        // DETACH-3
        if self.endpoints.get(&endpoint).and_then(|e| e.domain) != Some(domain) {
            return Err(RequestError::NotAttached { endpoint, domain });
        }
        let backend = self.backend_of.get(&endpoint).copied();
        if let Some(index) = backend {
            // A member of a group waits for what becomes of the others.
            let target = match group {
                Some(_) => Target::Blocked,
                None => self.bypass_target(),
            };
            if let Err(refusal) = self.switch(index, endpoint, target, None) {
                let cause = refusal.cause().clone();
                self.quarantine(endpoint, &cause);
                return Err(RequestError::Quarantined { cause, count: 1 });
            }
        }
        self.endpoints.remove(&endpoint);
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
        Ok(())
    }

    /// Creates a mapping in a domain.
    ///
    /// # Errors
    /// See [`RequestError`]; no part of the mapping exists anywhere.
    pub fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), RequestError> {
        self.check_domain_id(domain)?;
        // MAP-4
        let entry = existing(&mut self.domains, domain)?;
        // OPS-4
        if !self.input.covers(mapping.range) {
            return Err(RequestError::OutsideInputRange {
                range: mapping.range,
                input: self.input,
            });
        }
        // MAP-1
        let ends = mapping.range.first().0 | mapping.range.last().0.wrapping_add(1);
        if !self.page_sizes.is_aligned(ends | mapping.gpa.0) {
            return Err(RequestError::Misaligned {
                mapping: *mapping,
                granule: self.page_sizes.granule(),
            });
        }
        // RESV-4
        if let Some(region) = entry.reserved_overlap(mapping.range) {
            return Err(RequestError::Reserved {
                range: mapping.range,
                region: *region,
            });
        }
        // MAP-5
        let Some(table) = entry.table.as_mut() else {
            return Err(RequestError::BypassDomain(domain));
        };
        // MAP-2
        let plan = table
            .plan_map(&self.arena, mapping)
            .map_err(|refusal| match refusal {
                MapRefusal::Overlap(existing) => RequestError::Overlap {
                    mapping: *mapping,
                    existing,
                },
                MapRefusal::OutOfFrames(OutOfFrames { needed, free }) => {
                    RequestError::OutOfFrames { needed, free }
                }
                MapRefusal::OutOfRange => RequestError::PhysOutOfRange(*mapping),
                MapRefusal::Misaligned => RequestError::Misaligned {
                    mapping: *mapping,
                    granule: PageMask::TABLE.granule(),
                },
            })?;
        let needed = plan.frames_needed();
        if needed > 0 && table.frames() + needed > SMALL_DOMAIN_FRAMES {
            let reserve = self.arena.frames_total() / RESERVE_DIVISOR;
            let free = self.arena.frames_free().saturating_sub(reserve);
            if needed > free {
                return Err(RequestError::OutOfFrames { needed, free });
            }
        }
        let mut failed = None;
        for index in present_in(&entry.backends) {
            if let Err(cause) = self.backends[index].map(domain, mapping) {
                failed = Some((index, cause));
                break;
            }
        }
        if let Some((index, cause)) = failed {
            // With the one that refused: it may have got half-way.
            let undo: Vec<_> = present_in(&entry.backends)
                .take_while(|i| *i <= index)
                .collect();
            return Err(self.undo_map(domain, mapping, &undo, cause));
        }
        table.commit_map(&mut self.arena, plan);
        if !self.backends.is_empty() && !is_all_reachable(&self.memory, mapping) {
            entry.unreachable += 1;
        }
        Ok(())
    }

    /// Removes all mappings in `range`, which may reach over holes and past the input range.
    ///
    /// # Errors
    /// See [`RequestError`]. Where a backend fails, the mappings are gone and the endpoints behind
    /// that backend are quarantined.
    pub fn unmap(&mut self, domain: DomainId, range: IovaRange) -> Result<Unmapped, RequestError> {
        self.check_domain_id(domain)?;
        // UNMAP-2
        let entry = existing(&mut self.domains, domain)?;
        let (unmapped, part) =
            entry.take_out(domain, range, self.input, &mut self.arena, &self.memory)?;
        let Some(UnmapPart { range, least }) = part else {
            return Ok(unmapped);
        };
        let give_up = |backend: &mut dyn DmaBackend| backend.unmap(domain, range, least);
        let mut failures = Vec::new();
        act_in_all(&mut self.backends, entry, give_up, &mut failures);
        self.end_unmap(domain, &failures)?;
        Ok(unmapped)
    }

    /// As if by [`Self::unmap`] of each of `ranges` in turn, with fewer calls of the backends.
    /// What each of them came to is appended to `outcomes`. Where a backend fails, all of them that
    /// it has to do with have failed.
    pub fn unmap_all(
        &mut self,
        domain: DomainId,
        ranges: &[IovaRange],
        outcomes: &mut VecDeque<Result<(), RequestError>>,
    ) {
        // UNMAP-2
        let known = self.check_domain_id(domain);
        let entry = match known.and_then(|()| existing(&mut self.domains, domain)) {
            Ok(entry) => entry,
            Err(refusal) => {
                outcomes.extend(ranges.iter().map(|_| Err(refusal.clone())));
                return;
            }
        };
        let mut parts = Vec::with_capacity(ranges.len());
        let mut places = Vec::with_capacity(ranges.len());
        for range in ranges {
            let taken = entry.take_out(domain, *range, self.input, &mut self.arena, &self.memory);
            let outcome = taken.map(|(_, part)| {
                if let Some(part) = part {
                    parts.push(part);
                    places.push(outcomes.len());
                }
            });
            outcomes.push_back(outcome);
        }
        let give_up = |backend: &mut dyn DmaBackend| backend.unmap_all(domain, &parts);
        let mut failures = Vec::new();
        act_in_all(&mut self.backends, entry, give_up, &mut failures);
        if let Err(refusal) = self.end_unmap(domain, &failures) {
            for place in places {
                if let Some(outcome) = outcomes.get_mut(place) {
                    *outcome = Err(refusal.clone());
                }
            }
        }
    }

    /// The backends have given up what was taken out of a table, but for these.
    #[inline]
    fn end_unmap(
        &mut self,
        domain: DomainId,
        failures: &[(usize, BackendError)],
    ) -> Result<(), RequestError> {
        let refusal = match failures {
            [] => None,
            [.., (_, cause)] => Some(RequestError::Quarantined {
                cause: cause.clone(),
                count: self.quarantine_after(domain, failures),
            }),
        };
        // Not before: until then somebody may be reading the tables that have become empty.
        self.arena.reclaim();
        refusal.map_or(Ok(()), Err)
    }

    /// Blocks the members of a domain behind the backends that failed it. Returns how many there are.
    #[cold]
    fn quarantine_after(&mut self, domain: DomainId, failures: &[(usize, BackendError)]) -> usize {
        let counts = failures
            .iter()
            .map(|(index, cause)| self.quarantine_members(domain, *index, cause));
        counts.sum()
    }

    /// The reserved regions of an endpoint, for PROBE.
    ///
    /// # Errors
    /// [`RequestError::NoSuchEndpoint`].
    pub fn probe(&self, endpoint: EndpointId) -> Result<&ReservedRegions, RequestError> {
        self.topology
            .endpoint(endpoint)
            .map(|info| info.reserved)
            .ok_or(RequestError::NoSuchEndpoint(endpoint))
    }

    /// Sets whether endpoints without a domain are in bypass mode.
    pub fn set_bypass(&mut self, bypass: bool) {
        if self.bypass == bypass {
            return;
        }
        self.bypass = bypass;
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

    /// Device reset: no endpoint is attached to a domain any more. `bypass` stays as it is.
    pub fn reset(&mut self) {
        self.detach_all(self.bypass_target());
    }

    /// Reset of the whole VM: as [`Self::reset`], and `bypass` is what it is at boot.
    pub fn reset_vm(&mut self) {
        self.bypass = self.bypass_at_boot;
        self.reset();
    }

    /// Where an access of `endpoint` at `iova` goes.
    ///
    /// # Errors
    /// The fault to report where it goes nowhere.
    pub fn translate(
        &self,
        endpoint: EndpointId,
        iova: Iova,
        access: Access,
    ) -> Result<Translation, Fault> {
        let fault = |reason| Fault {
            endpoint,
            reason,
            access,
            address: iova,
        };
        let Some(info) = self.topology.endpoint(endpoint) else {
            return Err(fault(FaultReason::Unknown));
        };
        let state = self.endpoints.get(&endpoint).copied().unwrap_or_default();
        let table = match (self.dma(endpoint, &state), state.domain) {
            (Dma::Translated, Some(domain)) => {
                self.domains.get(&domain).and_then(|d| d.table.as_ref())
            }
            (Dma::Bypass, _) => {
                return bypass_translation(info.reserved, iova).ok_or(fault(FaultReason::Mapping));
            }
            // OPS-5
            (Dma::Blocked, None) if !state.quarantined => return Err(fault(FaultReason::Domain)),
            (Dma::Blocked, _) | (Dma::Translated, None) => None,
        };
        let Some(table) = table else {
            return Err(fault(FaultReason::Unknown));
        };
        table
            .translate(&self.arena, iova)
            .filter(|t| t.access.allows(access))
            .ok_or(fault(FaultReason::Mapping))
    }

    /// One endpoint's state, or `None` where there is no such endpoint.
    pub fn endpoint(&self, id: EndpointId) -> Option<EndpointState> {
        self.topology.endpoint(id)?;
        let endpoint = self.endpoints.get(&id).copied().unwrap_or_default();
        Some(EndpointState {
            id,
            domain: endpoint.domain,
            dma: self.dma(id, &endpoint),
            quarantined: endpoint.quarantined,
        })
    }

    /// The first `touched` of the endpoints the guest has touched, and of the others the first
    /// `untouched` ones.
    pub fn endpoints(
        &self,
        touched: usize,
        untouched: usize,
    ) -> impl Iterator<Item = EndpointState> {
        let others = self
            .topology
            .ranges()
            .flat_map(|r| r.range.first().endpoint_id().0..=r.range.last().endpoint_id().0)
            .map(EndpointId)
            .filter(|id| !self.endpoints.contains_key(id))
            .take(untouched);
        let known = self.endpoints.keys().copied().take(touched);
        let mut ids: Vec<_> = known.chain(others).collect();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| self.endpoint(id))
    }

    /// The IDs of the domains, in their order.
    pub fn domain_ids(&self) -> impl Iterator<Item = DomainId> {
        self.domains.keys().copied()
    }

    /// The domains, in the order of their IDs.
    pub fn domains(&self) -> impl Iterator<Item = DomainState> {
        self.domains_from(DomainId(0))
    }

    /// The mappings of a domain from the one at or after `from` on, in the order of addresses.
    pub fn mappings(&self, domain: DomainId, from: Iova) -> impl Iterator<Item = Mapping> {
        self.domains
            .get(&domain)
            .and_then(|d| d.table.as_ref())
            .into_iter()
            .flat_map(move |table| table.mappings(&self.arena, from))
    }

    fn endpoint_facts(
        &self,
        endpoint: EndpointId,
    ) -> Result<(Option<GroupId>, ReservedRegions), RequestError> {
        self.topology
            .endpoint(endpoint)
            .map(|info| (info.group, info.reserved.clone()))
            .ok_or(RequestError::NoSuchEndpoint(endpoint))
    }

    fn check_domain_id(&self, id: DomainId) -> Result<(), RequestError> {
        // OPS-6
        if id.0 > self.last_domain {
            return Err(RequestError::DomainOutOfRange {
                id,
                last: self.last_domain,
            });
        }
        Ok(())
    }

    /// What the DMA of an endpoint in this state meets; in doubt, nothing.
    fn dma(&self, id: EndpointId, endpoint: &Endpoint) -> Dma {
        if endpoint.quarantined || endpoint.suspended {
            return Dma::Blocked;
        }
        match endpoint.domain {
            Some(domain) => match self.domains.get(&domain) {
                Some(domain) if domain.is_bypass() => Dma::Bypass,
                Some(_) => Dma::Translated,
                None => Dma::Blocked,
            },
            None => match self.unattached_target(id) {
                Target::Bypass => Dma::Bypass,
                Target::Blocked | Target::Domain(_) => Dma::Blocked,
            },
        }
    }

    /// Where an endpoint without a domain and without a group goes.
    fn bypass_target(&self) -> Target {
        if self.bypass {
            Target::Bypass
        } else {
            Target::Blocked
        }
    }

    /// Where an endpoint without a domain goes.
    fn unattached_target(&self, endpoint: EndpointId) -> Target {
        let group = self.topology.endpoint(endpoint).and_then(|i| i.group);
        match group {
            Some(group) if self.groups.is_active(group) => Target::Blocked,
            _ => self.bypass_target(),
        }
    }

    /// Switches the members of a group that are attached to nothing, but for one of them.
    fn retarget_unattached_mates(
        &mut self,
        group: Option<GroupId>,
        except: EndpointId,
        target: Target,
    ) {
        if group.is_none() {
            return;
        }
        let mates: Vec<_> = self
            .backend_of
            .keys()
            .copied()
            .filter(|e| *e != except)
            .filter(|e| self.endpoints.get(e).is_none_or(|s| s.domain.is_none()))
            .filter(|e| self.topology.endpoint(*e).and_then(|i| i.group) == group)
            .collect();
        for endpoint in mates {
            self.retarget(endpoint, target);
        }
    }

    /// Switches `endpoint` over in its backend, which finds in the page tables what it must fill
    /// in. Nothing here changes. `made` is the domain it goes to where that is not known yet.
    fn switch(
        &mut self,
        index: usize,
        endpoint: EndpointId,
        target: Target,
        made: Option<&Domain>,
    ) -> Result<(), AttachError> {
        let tables = Tables {
            domains: &self.domains,
            made,
            arena: &self.arena,
        };
        self.backends[index].attach(endpoint, target, &tables)
    }

    /// What ATTACH answers where the backend refused, with all else undone.
    fn attach_refused(&mut self, endpoint: EndpointId, refusal: AttachError) -> RequestError {
        match refusal {
            AttachError::Unchanged(mut cause) => {
                // A mapping that leads to no memory, or to addresses that only the host knows to be
                // reserved: this endpoint and that domain do not go together.
                if let BackendErrorKind::Fault | BackendErrorKind::Range = cause.kind {
                    cause.kind = BackendErrorKind::Unsupp;
                }
                RequestError::Backend(cause)
            }
            AttachError::Blocked(cause) => {
                self.quarantine(endpoint, &cause);
                RequestError::Quarantined { cause, count: 1 }
            }
        }
    }

    /// Takes every endpoint out of its domain and switches those behind backends to `target`.
    fn detach_all(&mut self, target: Target) {
        self.groups.clear();
        for endpoint in self.endpoints.values_mut() {
            endpoint.domain = None;
            endpoint.suspended = false;
        }
        // Those that were in no domain may be blocked for their group, or quarantined.
        let behind_backends: Vec<_> = self.backend_of.keys().copied().collect();
        for endpoint in behind_backends {
            self.retarget(endpoint, target);
        }
        self.endpoints.retain(|_, e| e.quarantined);
        for (id, domain) in std::mem::take(&mut self.domains) {
            for index in present_in(&domain.backends) {
                self.backends[index].destroy_domain(id);
            }
            if let Some(table) = domain.table {
                table.destroy(&mut self.arena);
                self.arena.reclaim();
            }
        }
    }

    fn leave_domain(
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
            && let Some(table) = gone.table
        {
            table.destroy(&mut self.arena);
            self.arena.reclaim();
        }
    }

    /// Takes a mapping that one backend refused out of all that may have some of it.
    fn undo_map(
        &mut self,
        domain: DomainId,
        mapping: &Mapping,
        backends: &[usize],
        refusal: BackendError,
    ) -> RequestError {
        let mut quarantined = 0;
        for &index in backends {
            if let Err(cause) = self.backends[index].unmap(domain, mapping.range, 0) {
                quarantined += self.quarantine_members(domain, index, &cause);
            }
        }
        if quarantined == 0 {
            RequestError::Backend(refusal)
        } else {
            RequestError::Quarantined {
                cause: refusal,
                count: quarantined,
            }
        }
    }

    /// Switches an endpoint in its backend, if it has one; on failure it is quarantined.
    fn retarget(&mut self, endpoint: EndpointId, target: Target) {
        let Some(&index) = self.backend_of.get(&endpoint) else {
            return;
        };
        match self.switch(index, endpoint, target, None) {
            Ok(()) => {
                if let Some(state) = self.endpoints.get_mut(&endpoint) {
                    state.quarantined = false;
                }
            }
            Err(refusal) => self.quarantine(endpoint, refusal.cause()),
        }
    }

    /// Blocks every member of a domain behind a backend that failed it. What that backend still
    /// has of the domain is not known, so it forgets all of it.
    fn quarantine_members(
        &mut self,
        domain: DomainId,
        index: usize,
        cause: &BackendError,
    ) -> usize {
        let members: Vec<_> = self
            .domains
            .get(&domain)
            .into_iter()
            .flat_map(|d| &d.members)
            .copied()
            .filter(|e| self.backend_of.get(e) == Some(&index))
            .collect();
        for &endpoint in &members {
            self.quarantine(endpoint, cause);
        }
        if let Some(used) = self
            .domains
            .get_mut(&domain)
            .and_then(|d| d.backends.get_mut(&index))
        {
            used.present = false;
            self.backends[index].destroy_domain(domain);
        }
        members.len()
    }

    fn quarantine(&mut self, endpoint: EndpointId, cause: &BackendError) {
        error_limited!("endpoint {endpoint} is quarantined, its DMA blocked: {cause}");
        if let Some(&index) = self.backend_of.get(&endpoint) {
            self.backends[index].quarantine(endpoint);
        }
        self.endpoints.entry(endpoint).or_default().quarantined = true;
    }

    fn suspend(&mut self, endpoints: &[EndpointId]) {
        if let [first, ..] = endpoints {
            warn_limited!(
                "{} endpoints from {first} on are blocked until they follow their group to \
                 another domain",
                endpoints.len()
            );
        }
        for &endpoint in endpoints {
            self.set_suspended(endpoint, true);
        }
    }

    fn resume(&mut self, endpoints: &[EndpointId]) {
        for &endpoint in endpoints {
            self.set_suspended(endpoint, false);
        }
    }

    fn set_suspended(&mut self, endpoint: EndpointId, suspended: bool) {
        let Some(state) = self.endpoints.get_mut(&endpoint) else {
            return;
        };
        state.suspended = suspended;
        if state.quarantined {
            return;
        }
        let target = match state.domain {
            _ if suspended => Target::Blocked,
            Some(d) => target_of(d, self.domains.get(&d).is_some_and(Domain::is_bypass)),
            None => self.unattached_target(endpoint),
        };
        self.retarget(endpoint, target);
    }
}

/// A domain there is.
#[inline]
fn existing(
    domains: &mut BTreeMap<DomainId, Domain>,
    id: DomainId,
) -> Result<&mut Domain, RequestError> {
    domains.get_mut(&id).ok_or(RequestError::NoSuchDomain(id))
}

/// Has every backend that has a domain do something, and adds those that failed to `failures`, which
/// are not returned because moving them costs more than the rest where there are none.
#[inline]
fn act_in_all(
    backends: &mut [Box<dyn DmaBackend>],
    domain: &Domain,
    mut act: impl FnMut(&mut dyn DmaBackend) -> Result<(), BackendError>,
    failures: &mut Vec<(usize, BackendError)>,
) {
    for index in present_in(&domain.backends) {
        if let Err(cause) = act(&mut *backends[index]) {
            failures.push((index, cause));
        }
    }
}

/// Where an endpoint that is attached to a domain goes.
fn target_of(domain: DomainId, bypass: bool) -> Target {
    if bypass {
        Target::Bypass
    } else {
        Target::Domain(domain)
    }
}

/// The mappings of the domains, while backends are at work.
struct Tables<'a> {
    domains: &'a BTreeMap<DomainId, Domain>,
    /// A domain that is about to be one of them.
    made: Option<&'a Domain>,
    arena: &'a Arena,
}

impl Contents for Tables<'_> {
    fn mappings(&self, domain: DomainId) -> Box<dyn Iterator<Item = Mapping> + '_> {
        let table = self.domains.get(&domain).and_then(|d| d.table.as_ref());
        let mappings = table.map(|t| t.mappings(self.arena, Iova(0)));
        Box::new(mappings.into_iter().flatten())
    }

    fn table(&self, domain: DomainId) -> Option<(TableOffset, Levels)> {
        let domain = self.domains.get(&domain).or(self.made)?;
        let table = domain.table.as_ref()?;
        Some((table.root(), table.levels()))
    }
}

/// Identity, except in the endpoint's reserved regions (RESV-5).
fn bypass_translation(reserved: &ReservedRegions, iova: Iova) -> Option<Translation> {
    let rest = IovaRange::new(iova, Iova(u64::MAX))?;
    let last = match reserved.overlapping(rest) {
        Some(region) if region.range.contains(iova) => return None,
        Some(region) => Iova(region.range.first().0 - 1),
        None => Iova(u64::MAX),
    };
    Some(Translation {
        gpa: Gpa(iova.0),
        contiguous_last: last,
        access: Access::READ_WRITE,
        mmio: false,
    })
}
