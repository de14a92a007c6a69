//! MAP and UNMAP: each is planned in the page table, applied in the backends, then committed.

use std::collections::{BTreeMap, VecDeque};

use super::Iommu;
use super::domain::{Domain, Offer};
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
        let (unmapped, part) = entry.remove_mappings(
            domain,
            range,
            offer,
            &mut self.arena,
            &self.memory,
            &mut self.backends,
        )?;
        let Some(UnmapPart { range, least }) = part else {
            return Ok(unmapped);
        };
        let unmap = |backend: &mut dyn DmaBackend| backend.unmap(domain, range, least);
        let mut failures = Vec::new();
        for_each_backend(&mut self.backends, entry, unmap, &mut failures);
        self.finish_unmap(domain, &failures)?;
        Ok(unmapped)
    }

    /// Unmaps each of `ranges` in turn, as [`Self::unmap`] does, but with fewer calls of the backends.
    /// Appends one outcome for each range to `outcomes`. If a backend fails, every range that had a
    /// mapping counts as failed.
    pub fn unmap_all(
        &mut self,
        domain: DomainId,
        ranges: &[IovaRange],
        outcomes: &mut VecDeque<Result<(), RequestError>>,
    ) {
        // UNMAP-2
        let known = self.check_domain_id(domain);
        let offer = self.offer();
        let entry = match known.and_then(|()| existing_domain(&mut self.domains, domain)) {
            Ok(entry) => entry,
            Err(refusal) => {
                outcomes.extend(ranges.iter().map(|_| Err(refusal.clone())));
                return;
            }
        };
        let mut parts = Vec::with_capacity(ranges.len());
        let mut positions = Vec::with_capacity(ranges.len());
        for range in ranges {
            let removed = entry.remove_mappings(
                domain,
                *range,
                offer,
                &mut self.arena,
                &self.memory,
                &mut self.backends,
            );
            let outcome = removed.map(|(_, part)| {
                if let Some(part) = part {
                    parts.push(part);
                    positions.push(outcomes.len());
                }
            });
            outcomes.push_back(outcome);
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
