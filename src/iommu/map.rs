//! MAP and UNMAP: each is planned in the page table, applied in the backends, then committed.

use std::collections::{BTreeMap, VecDeque};

use super::Iommu;
use super::domain::{Domain, Offer, UnmapParts};
use super::error::RequestError;
use super::reachable::is_all_reachable;
use crate::address::{IovaRange, Mapping, PageMask};
use crate::backends::{BackendError, DmaBackend, UnmapPart};
use crate::ids::DomainId;
use crate::page_table::{MapRefusal, OutOfFrames, Unmapped};

/// A domain of up to this many page-table frames may grow into the arena's reserve, so that one
/// domain that exhausts the rest of the arena does not stop the others.
const SMALL_DOMAIN_FRAMES: u64 = 16;
/// The reserve is one frame in this many.
const RESERVE_DIVISOR: u64 = 16;

impl Iommu {
    /// Creates a mapping in a domain.
    ///
    /// # Errors
    /// See [`RequestError`]. No part of the mapping exists anywhere.
    pub fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), RequestError> {
        self.check_domain_id(domain)?;
        // MAP-4
        let entry = existing_domain(&mut self.domains, domain)?;
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
                MapRefusal::TargetsTables => RequestError::TargetsTables(*mapping),
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
        self.store.plan();
        let mut failed = None;
        for index in entry.backends.present() {
            if let Err(cause) = self.backends[index].map(domain, mapping) {
                failed = Some((index, cause));
                break;
            }
        }
        if let Some((index, cause)) = failed {
            // Include the backend that refused: it may have mapped a part.
            let undo: Vec<_> = entry
                .backends
                .present()
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

    /// Whether [`Self::map_all`] saves time in this domain.
    pub fn batches_maps(&self, domain: DomainId) -> bool {
        self.batches_maps
            && (self.domains.get(&domain))
                .is_some_and(|domain| !domain.backends.map_batchers().is_empty())
    }

    /// Creates each of `mappings` in turn, as [`Self::map`] does, but backends that wait for a peer do so once. Appends one
    /// outcome for each mapping to `outcomes`.
    ///
    /// Backends announce the mappings ahead. A mapping enters the page table only after that, one by one, so a refused
    /// one was never there, and the outcomes are those of single calls.
    pub fn map_all(
        &mut self,
        domain: DomainId,
        mappings: &[Mapping],
        outcomes: &mut VecDeque<Result<(), RequestError>>,
    ) {
        let first_entry = self.store.phases().current();
        let mut begun = self.begin_maps(domain, mappings).into_iter().peekable();
        for (at, mapping) in mappings.iter().enumerate() {
            let is_begun = begun.next_if_eq(&at).is_some();
            self.store.journal().start(first_entry + at);
            let outcome = self.map(domain, mapping);
            outcomes.push_back(match outcome {
                Err(refusal) if is_begun => Err(self.withdraw_map(domain, mapping, refusal)),
                outcome => outcome,
            });
        }
        self.store.journal().start(first_entry);
    }

    /// Announces the mappings to the backends that gain from it, except those that are sure to be refused or depend on the
    /// outcome of an earlier one. Returns the positions of the announced ones.
    fn begin_maps(&mut self, domain: DomainId, mappings: &[Mapping]) -> Vec<usize> {
        let Some(entry) = self.domains.get(&domain) else {
            return Vec::new();
        };
        let batchers = entry.backends.map_batchers();
        let Some(table) = entry.table.as_ref().filter(|_| !batchers.is_empty()) else {
            return Vec::new();
        };
        let mut earlier = Ranges::default();
        let mut positions = Vec::with_capacity(mappings.len());
        let mut begun = Vec::with_capacity(mappings.len());
        for (at, mapping) in mappings.iter().enumerate() {
            let (first, last) = (mapping.range.first().0, mapping.range.last().0);
            let ends = first | last.wrapping_add(1) | mapping.gpa.0;
            // Also those that are not announced: they may succeed.
            if !earlier.add(first, last)
                && self.input.covers(mapping.range)
                && self.page_sizes.is_aligned(ends)
                && entry.reserved_overlap(mapping.range).is_none()
                && table.plan_map(&self.arena, mapping).is_ok()
            {
                positions.push(at);
                begun.push(*mapping);
                self.store.phases().plan_ahead(at);
            }
        }
        for index in batchers {
            self.backends[index].begin_maps(domain, &begun);
        }
        positions
    }

    /// Takes an announced mapping that was refused back from the backends that have not seen its MAP.
    #[cold]
    fn withdraw_map(
        &mut self,
        domain: DomainId,
        mapping: &Mapping,
        refusal: RequestError,
    ) -> RequestError {
        let entry = self.domains.get(&domain);
        let batchers = entry.map_or_else(Vec::new, |entry| entry.backends.map_batchers());
        let mut outcome = refusal;
        for index in batchers {
            let Err(cause) = self.backends[index].unmap(domain, mapping.range, 0) else {
                continue;
            };
            let earlier = match &outcome {
                RequestError::Quarantined { count, .. } => *count,
                _ => 0,
            };
            let count = earlier + self.quarantine_members(domain, index, &cause);
            outcome = RequestError::Quarantined { cause, count };
        }
        outcome
    }

    /// Removes all mappings in `range`. The range may cover holes and reach beyond the input range.
    ///
    /// # Errors
    /// See [`RequestError`]. If a backend fails, the mappings are gone and the endpoints behind that
    /// backend are quarantined.
    pub fn unmap(&mut self, domain: DomainId, range: IovaRange) -> Result<Unmapped, RequestError> {
        self.check_domain_id(domain)?;
        // UNMAP-2
        let offer = self.offer();
        let entry = existing_domain(&mut self.domains, domain)?;
        let parts = UnmapParts {
            offer,
            arena: &mut self.arena,
            memory: &self.memory,
            backends: &mut self.backends,
            journal: self.store.phases(),
            ahead: 0,
        };
        let has_unconfirmed = !entry.unconfirmed.is_empty();
        let (unmapped, part) = entry.remove_mappings(domain, range, parts)?;
        if let Some(UnmapPart { range, least }) = part {
            let unmap = |backend: &mut dyn DmaBackend| backend.unmap(domain, range, least);
            let mut failures = Vec::new();
            for_each_backend(&mut self.backends, entry, unmap, &mut failures);
            self.finish_unmap(domain, &failures)?;
        }
        if has_unconfirmed {
            // Also if nothing was mapped: this may be the driver's second attempt.
            self.confirm_quarantines(domain)?;
        }
        Ok(unmapped)
    }

    /// Unmaps each of `ranges` in turn, as [`Self::unmap`] does, but with fewer calls of the backends.
    /// Appends an outcome for each range to `outcomes`, up to the first range that is refused: this one ends the run. If
    /// it is not the first range, it has no outcome yet, and the caller must begin the next run with it. If a backend
    /// fails, every range that had a mapping counts as failed.
    ///
    /// No range after the one that ends the run is taken from `ranges`: the caller may compute them as they are taken.
    pub fn unmap_all(
        &mut self,
        domain: DomainId,
        ranges: impl IntoIterator<Item = IovaRange>,
        outcomes: &mut VecDeque<Result<(), RequestError>>,
    ) {
        let ranges = ranges.into_iter();
        // UNMAP-2
        let known = self.check_domain_id(domain);
        let offer = self.offer();
        let entry = match known.and_then(|()| existing_domain(&mut self.domains, domain)) {
            Ok(entry) => entry,
            Err(refusal) => {
                outcomes.extend(ranges.map(|_| Err(refusal.clone())));
                return;
            }
        };
        let has_unconfirmed = !entry.unconfirmed.is_empty();
        let first = outcomes.len();
        let mut parts = Vec::new();
        let mut positions = Vec::new();
        for (at, range) in ranges.enumerate() {
            let all = UnmapParts {
                offer,
                arena: &mut self.arena,
                memory: &self.memory,
                backends: &mut self.backends,
                journal: self.store.phases(),
                ahead: at,
            };
            let removed = entry.remove_mappings(domain, range, all);
            if removed.is_err() && at > 0 {
                // Its refusal may depend on mappings that a later one removes. A process that goes on after the death of
                // this one must know the refusal before it completes the later one.
                break;
            }
            let is_refused = removed.is_err();
            let outcome = removed.map(|(_, part)| {
                if let Some(part) = part {
                    parts.push(part);
                    positions.push(outcomes.len());
                }
            });
            outcomes.push_back(outcome);
            if is_refused {
                break;
            }
        }
        let unmap = |backend: &mut dyn DmaBackend| backend.unmap_all(domain, &parts);
        let mut failures = Vec::new();
        for_each_backend(&mut self.backends, entry, unmap, &mut failures);
        if let Err(refusal) = self.finish_unmap(domain, &failures) {
            for position in positions {
                if let Some(outcome) = outcomes.get_mut(position) {
                    *outcome = Err(refusal.clone());
                }
            }
        }
        if has_unconfirmed && let Err(refusal) = self.confirm_quarantines(domain) {
            let done = outcomes.iter_mut().skip(first).filter(|o| o.is_ok());
            done.for_each(|outcome| *outcome = Err(refusal.clone()));
        }
    }

    fn offer(&self) -> Offer {
        Offer {
            input: self.input,
            granule: self.page_sizes.granule(),
        }
    }

    /// Ends an UNMAP after all backends, except those in `failures`, have removed the range.
    #[inline]
    fn finish_unmap(
        &mut self,
        domain: DomainId,
        failures: &[(usize, BackendError)],
    ) -> Result<(), RequestError> {
        let refusal = match failures {
            [] => None,
            [.., (_, cause)] => Some(RequestError::Quarantined {
                cause: cause.clone(),
                count: self.quarantine_failed(domain, failures),
            }),
        };
        // Not earlier: until the backends return, a reader may be inside the tables that became
        // empty.
        self.arena.reclaim();
        refusal.map_or(Ok(()), Err)
    }

    /// Quarantines the members of a domain that are behind the failed backends. Returns how many.
    #[cold]
    fn quarantine_failed(&mut self, domain: DomainId, failures: &[(usize, BackendError)]) -> usize {
        let counts = failures
            .iter()
            .map(|(index, cause)| self.quarantine_members(domain, *index, cause));
        counts.sum()
    }

    /// Undoes a MAP that one backend has refused: removes it from every backend that may have a
    /// part of it.
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
}

/// The addresses of several mappings: the last address of each range, by its first one. No two ranges overlap.
#[derive(Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a range. Returns whether it overlaps one that was added before.
    fn add(&mut self, mut first: u64, mut last: u64) -> bool {
        let mut overlaps = false;
        while let Some((&from, &to)) = self
            .0
            .range(..=last)
            .next_back()
            .filter(|(_, to)| **to >= first)
        {
            self.0.remove(&from);
            (first, last) = (first.min(from), last.max(to));
            overlaps = true;
        }
        self.0.insert(first, last);
        overlaps
    }
}

/// The domain, if it exists.
#[inline]
fn existing_domain(
    domains: &mut BTreeMap<DomainId, Domain>,
    id: DomainId,
) -> Result<&mut Domain, RequestError> {
    domains.get_mut(&id).ok_or(RequestError::NoSuchDomain(id))
}

/// Calls `act` for every backend that has `domain`, and adds the failures to `failures`.
///
/// The failures are not the return value: moving an empty vector out costs more than the rest of a
/// call without failures.
#[inline]
fn for_each_backend(
    backends: &mut [Box<dyn DmaBackend>],
    domain: &Domain,
    mut act: impl FnMut(&mut dyn DmaBackend) -> Result<(), BackendError>,
    failures: &mut Vec<(usize, BackendError)>,
) {
    for index in domain.backends.present() {
        if let Err(cause) = act(&mut *backends[index]) {
            failures.push((index, cause));
        }
    }
}
