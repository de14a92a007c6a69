//! A domain: its members, its mappings, and its members' reserved regions.

use std::collections::BTreeSet;

use crate::address::IovaRange;
use crate::backends::{DmaBackend, MemorySlot, UnmapPart};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{Arena, Table, Unmapped, WouldSplit};
use crate::store::Journal;
use crate::topology::reserved::{ReservedRegion, ReservedRegions};

use super::error::RequestError;
use super::reachable::{is_all_reachable, reachable_bytes};

/// An address space of the guest. It exists as long as it has members.
#[derive(Debug)]
pub(super) struct Domain {
    /// The mappings; `None` in a bypass domain.
    pub table: Option<Table>,
    /// The endpoints attached to it.
    pub members: BTreeSet<EndpointId>,
    /// The backends of its members.
    pub backends: BackendUses,
    /// Quarantined endpoints that may still use mappings of this domain, see [`DmaBackend::confirm_quarantine`]. UNMAP
    /// fails as long as there are any.
    pub unconfirmed: BTreeSet<EndpointId>,
    /// The number of mappings that backends do not have in full: mappings without access rights,
    /// and mappings that do not lie wholly within one memory slot. Kept only while there are
    /// backends.
    pub unreachable: u64,
    /// The distinct sets of reserved regions of its members, each with the number of members that
    /// have it.
    reserved: Vec<(ReservedRegions, usize)>,
}

/// The part of the offer to the guest that bounds every mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    /// The addresses that MAP accepts.
    pub input: IovaRange,
    /// Every mapping is a multiple of this many bytes.
    pub granule: u64,
}

/// The parts of the core that an UNMAP needs beside the domain.
pub(super) struct UnmapParts<'a> {
    pub offer: Offer,
    pub arena: &'a mut Arena,
    pub memory: &'a [MemorySlot],
    pub backends: &'a mut [Box<dyn DmaBackend>],
    pub journal: &'a Journal,
    /// The distance of the request's entry in the journal from that of the request in progress.
    pub ahead: usize,
}

/// How the backends use a domain, by the backend's index. A sorted vector and not a map: there are
/// few backends, and every MAP and UNMAP iterates over them.
#[derive(Debug, Default)]
pub(super) struct BackendUses {
    sorted: Vec<(usize, BackendUse)>,
    /// How many of them look mappings up in the page table.
    page_table_readers: usize,
    /// How many of them gain from [`DmaBackend::begin_maps`].
    map_batchers: usize,
}

impl BackendUses {
    /// The backends that have the domain.
    #[inline]
    pub fn present(&self) -> impl Iterator<Item = usize> {
        let present = self.sorted.iter().filter(|(_, used)| used.present);
        present.map(|&(index, _)| index)
    }

    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The backends that have the domain and gain from [`DmaBackend::begin_maps`].
    pub fn map_batchers(&self) -> Vec<usize> {
        if self.map_batchers == 0 {
            return Vec::new();
        }
        let batchers = self.sorted.iter();
        let batchers = batchers.filter(|(_, used)| used.present && used.batches_maps);
        batchers.map(|&(index, _)| index).collect()
    }

    pub fn get_mut(&mut self, index: &usize) -> Option<&mut BackendUse> {
        let at = self.position(*index).ok()?;
        Some(&mut self.sorted[at].1)
    }

    fn add_member(&mut self, backend: BackendOf) {
        let at = self.position(backend.index).unwrap_or_else(|at| {
            self.page_table_readers += usize::from(backend.reads_page_table);
            self.map_batchers += usize::from(backend.batches_maps);
            let unused = BackendUse {
                reads_page_table: backend.reads_page_table,
                batches_maps: backend.batches_maps,
                ..BackendUse::default()
            };
            self.sorted.insert(at, (backend.index, unused));
            at
        });
        self.sorted[at].1.members += 1;
    }

    fn remove(&mut self, index: usize) -> Option<BackendUse> {
        let at = self.position(index).ok()?;
        let (_, removed) = self.sorted.remove(at);
        self.page_table_readers -= usize::from(removed.reads_page_table);
        self.map_batchers -= usize::from(removed.batches_maps);
        Some(removed)
    }

    fn position(&self, index: usize) -> Result<usize, usize> {
        self.sorted.binary_search_by_key(&index, |(i, _)| *i)
    }
}

/// The backend of an endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct BackendOf {
    pub index: usize,
    /// See [`DmaBackend::reads_page_table`].
    pub reads_page_table: bool,
    /// See [`DmaBackend::batches_maps`].
    pub batches_maps: bool,
}

/// How one backend uses a domain.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackendUse {
    /// Members of the domain behind this backend.
    members: usize,
    reads_page_table: bool,
    batches_maps: bool,
    /// The backend has the domain and all its mappings. Never set for bypass domains. Cleared when
    /// the backend fails to unmap: all members behind it are quarantined then, and the next ATTACH
    /// makes the domain in the backend again.
    pub present: bool,
}

impl Domain {
    /// Makes a domain without members.
    pub(super) fn new(table: Option<Table>) -> Self {
        Self {
            table,
            members: BTreeSet::new(),
            backends: BackendUses::default(),
            unconfirmed: BTreeSet::new(),
            unreachable: 0,
            reserved: Vec::new(),
        }
    }

    /// Whether this is a bypass domain: its members use guest-physical addresses.
    pub(super) fn is_bypass(&self) -> bool {
        self.table.is_none()
    }

    /// Adds a member.
    pub(super) fn enter(
        &mut self,
        endpoint: EndpointId,
        backend: Option<BackendOf>,
        reserved: &ReservedRegions,
    ) {
        self.members.insert(endpoint);
        if let Some(backend) = backend {
            self.backends.add_member(backend);
        }
        match self.reserved.iter_mut().find(|(set, _)| set == reserved) {
            Some((_, members)) => *members += 1,
            None => self.reserved.push((reserved.clone(), 1)),
        }
    }

    /// Removes a member. Returns its backend if the backend has the domain and this was the last
    /// member behind that backend.
    pub(super) fn leave(
        &mut self,
        endpoint: EndpointId,
        backend: Option<usize>,
        reserved: &ReservedRegions,
    ) -> Option<usize> {
        self.members.remove(&endpoint);
        if let Some(at) = self.reserved.iter().position(|(set, _)| set == reserved) {
            self.reserved[at].1 -= 1;
            if self.reserved[at].1 == 0 {
                self.reserved.swap_remove(at);
            }
        }
        let backend = backend?;
        let used = self.backends.get_mut(&backend)?;
        used.members -= 1;
        if used.members > 0 {
            return None;
        }
        let used = self.backends.remove(backend)?;
        used.present.then_some(backend)
    }

    /// Removes the mappings in `range` from the table. Returns the removed mappings, and the part
    /// that the backends must unmap, if any. Backends that read the page table have begun to. The caller must not reclaim frames before the backends
    /// have unmapped that part.
    #[inline]
    pub(super) fn remove_mappings(
        &mut self,
        id: DomainId,
        range: IovaRange,
        parts: UnmapParts<'_>,
    ) -> Result<(Unmapped, Option<UnmapPart>), RequestError> {
        let UnmapParts {
            offer,
            arena,
            memory,
            backends,
            journal,
            ahead,
        } = parts;
        // UNMAP-3
        let Some(table) = self.table.as_mut() else {
            return Err(RequestError::BypassDomain(id));
        };
        // UNMAP-4
        let plan = table
            .plan_unmap(arena, range)
            .map_err(|WouldSplit(existing)| RequestError::WouldSplit { range, existing })?;
        journal.plan_ahead(ahead);
        let least = (self.unreachable > 0).then(|| {
            let mut least = 0;
            for mapping in table.mappings_in(arena, range) {
                if !is_all_reachable(memory, &mapping) {
                    self.unreachable -= 1;
                }
                least += reachable_bytes(memory, &mapping);
            }
            least
        });
        let counted = (cfg!(debug_assertions) && !self.backends.is_empty()).then(|| {
            let mappings = table.mappings_in(arena, range);
            mappings.map(|m| reachable_bytes(memory, &m)).sum()
        });
        if self.backends.page_table_readers > 0 {
            for index in self.backends.present() {
                backends[index].begin_unmap(id, range);
            }
        }
        // UNMAP-5
        let unmapped = table.commit_unmap(arena, plan);
        // Backends nearly always have every mapping in full.
        let least = least.unwrap_or(unmapped.bytes);
        debug_assert_eq!(least, counted.unwrap_or(least));
        if unmapped.mappings == 0 {
            return Ok((unmapped, None));
        }
        // Mappings are whole pages within the input range. The request's own range may end anywhere, and a backend
        // refuses a range that ends within a page.
        let range = range.intersection(offer.input).unwrap_or(offer.input);
        let range = range.whole_pages(offer.granule).unwrap_or(range);
        Ok((unmapped, Some(UnmapPart { range, least })))
    }

    /// A reserved region of a member that overlaps `range`.
    pub(super) fn reserved_overlap(&self, range: IovaRange) -> Option<&ReservedRegion> {
        self.reserved
            .iter()
            .find_map(|(set, _)| set.overlapping(range))
    }
}
