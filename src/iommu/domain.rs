//! A domain: members, mappings, and what its members forbid.

use std::collections::{BTreeMap, BTreeSet};

use crate::address::IovaRange;
use crate::ids::EndpointId;
use crate::page_table::Table;
use crate::topology::reserved::{ReservedRegion, ReservedRegions};

/// An address space of the guest's. It exists while it has members.
#[derive(Debug)]
pub(super) struct Domain {
    /// The mappings; `None` in a bypass domain.
    pub table: Option<Table>,
    /// The endpoints attached to it.
    pub members: BTreeSet<EndpointId>,
    /// The backends its members are behind, with the number of members.
    pub backends: BTreeMap<usize, usize>,
    /// The distinct sets of reserved regions of its members, with the number of members.
    reserved: Vec<(ReservedRegions, usize)>,
}

impl Domain {
    /// A domain without members.
    pub(super) fn new(table: Option<Table>) -> Self {
        Self {
            table,
            members: BTreeSet::new(),
            backends: BTreeMap::new(),
            reserved: Vec::new(),
        }
    }

    /// Whether members reach guest-physical addresses as they are.
    pub(super) fn is_bypass(&self) -> bool {
        self.table.is_none()
    }

    /// Adds a member.
    pub(super) fn enter(
        &mut self,
        endpoint: EndpointId,
        backend: Option<usize>,
        reserved: &ReservedRegions,
    ) {
        self.members.insert(endpoint);
        if let Some(backend) = backend {
            *self.backends.entry(backend).or_default() += 1;
        }
        match self.reserved.iter_mut().find(|(set, _)| set == reserved) {
            Some((_, members)) => *members += 1,
            None => self.reserved.push((reserved.clone(), 1)),
        }
    }

    /// Takes a member out. Returns the backend that serves no other member, if that is so.
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
        let members = self.backends.get_mut(&backend)?;
        *members -= 1;
        if *members > 0 {
            return None;
        }
        self.backends.remove(&backend);
        Some(backend)
    }

    /// A reserved region of some member that shares an address with `range`.
    pub(super) fn reserved_overlap(&self, range: IovaRange) -> Option<&ReservedRegion> {
        self.reserved
            .iter()
            .find_map(|(set, _)| set.overlapping(range))
    }
}
