//! MAP and UNMAP.

use std::collections::{BTreeMap, VecDeque};

use super::Iommu;
use super::domain::{Domain, present_in};
use super::error::RequestError;
use super::reachable::is_all_reachable;
use crate::address::{IovaRange, Mapping, PageMask};
use crate::backends::{BackendError, DmaBackend, UnmapPart};
use crate::ids::DomainId;
use crate::page_table::{MapRefusal, OutOfFrames, Unmapped};

/// A domain of this many page-table frames may always grow within the arena's last part, so that
/// one domain that uses up the arena does not keep the others from working.
const SMALL_DOMAIN_FRAMES: u64 = 16;
/// The arena's last part: one frame in this many.
const RESERVE_DIVISOR: u64 = 16;

impl Iommu {
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
