//! Taking over the container of an earlier process, whose devices use it meanwhile.

use super::{FILLED, ROOM, Type1Group, identity, stale, target_of_bits, unknown};
use crate::address::{Access, Mapping};
use crate::backends::objects::Noted;
use crate::backends::reach::refused;
use crate::backends::{Adoption, BackendError, Contents, Target};
use crate::ids::EndpointId;
use crate::warn_limited;

impl Type1Group {
    /// Takes the records of an earlier process over, and what they say about the container.
    pub(super) fn adopt_records(&mut self, adoption: &Adoption<'_>) {
        for &(id, record) in adoption.records {
            let noted = self.ledger.left(id, record);
            match record.object {
                FILLED if self.is_left => self.noted_filled = Some(noted),
                ROOM if self.is_left => self.noted_room = Some(noted),
                _ => self.ledger.forget(&noted),
            }
        }
        let room = self.noted_room.as_ref().map(Noted::state);
        self.room = room.and_then(|room| u32::try_from(room).ok());
        let filled = self.noted_filled.as_ref().map(Noted::state);
        self.filled_for = filled
            .and_then(target_of_bits)
            .filter(|_| adoption.is_memory_same);
    }

    /// Takes the targets of the members over. Returns the endpoints that are no members.
    pub(super) fn adopt_targets(
        &mut self,
        adoption: &Adoption<'_>,
    ) -> Vec<(EndpointId, BackendError)> {
        let mut failed = Vec::new();
        for &(endpoint, target) in adoption.endpoints {
            match self.members.get_mut(&endpoint) {
                Some(member) => {
                    member.wanted = target;
                    member.quarantined = adoption.quarantined.contains(&endpoint);
                }
                None => failed.push((endpoint, unknown(endpoint))),
            }
        }
        failed
    }

    /// Empties the container if a member is moving, and if the record says that it has not the mappings of its target.
    pub(super) fn block_moving(
        &mut self,
        adoption: &Adoption<'_>,
    ) -> Vec<(EndpointId, BackendError)> {
        let mut moving = adoption.moving.iter();
        if !moving.any(|endpoint| self.members.contains_key(endpoint)) {
            return Vec::new();
        }
        // The call that adopts the endpoints reports those that are no members.
        self.adopt_targets(adoption);
        if self.filled_for == Some(self.target()) {
            return Vec::new();
        }
        self.set_filled(None);
        match self.empty() {
            Ok(()) => {
                self.set_filled(Some(Target::Blocked));
                Vec::new()
            }
            Err(cause) => {
                self.block();
                let members = self.members.keys();
                members.map(|&endpoint| (endpoint, cause.clone())).collect()
            }
        }
    }

    /// Makes the container hold the mappings of `target`. If it holds them, no access of a device faults.
    pub(super) fn take_over(
        &mut self,
        target: Target,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Result<(), BackendError> {
        if self.noted_filled.is_some() && self.room.is_none() {
            return Err(stale(
                "the kernel does not say how many mappings a container has, so it is unknown whether it removes those of \
                 the daemon before; this needs Linux 5.10 or later",
            ));
        }
        if let Some(Target::Domain(domain)) = self.filled_for {
            let in_progress = adoption.in_progress.iter();
            for (_, range) in in_progress.filter(|(of, _)| *of == domain) {
                if let Err(cause) = self.kernel.unmap(*range) {
                    warn_limited!("{}", refused(format_args!("{range} stays mapped"), &cause));
                    self.set_filled(None);
                    break;
                }
            }
        }
        if self.filled_for == Some(target) && !self.has_all(target, contents)? {
            warn_limited!(
                "a type1 container has other mappings than the daemon before has recorded: it is filled anew, and its \
                 devices' DMA may have faulted for a moment"
            );
            self.set_filled(None);
        }
        let switched = self.switch(target, contents);
        switched.map_err(|refusal| refusal.cause().clone())
    }

    /// Whether the container has as many mappings as `target`.
    fn has_all(&self, target: Target, contents: &dyn Contents) -> Result<bool, BackendError> {
        let failed = |cause| refused("a type1 container cannot be asked for its mappings", &cause);
        let (Some(room), Some(left)) = (self.room, self.kernel.available().map_err(failed)?) else {
            return Ok(false);
        };
        let mut expected: u32 = 0;
        let mut count = |mapping: &Mapping| {
            self.reach.for_each_piece(mapping, |piece| {
                let is_mapped = piece.part.access != Access::NONE;
                expected = expected.saturating_add(u32::from(is_mapped));
                Ok(())
            })
        };
        let counted = match target {
            Target::Blocked => Ok(()),
            Target::Bypass => {
                let mut slots = self.reach.slots().iter();
                slots.try_for_each(|slot| count(&identity(slot)))
            }
            Target::Domain(domain) => contents.mappings(domain).try_for_each(|m| count(&m)),
        };
        // A mapping may lead to a device's memory that has moved since: then they cannot be counted.
        Ok(counted.is_err() || room.saturating_sub(left) == expected)
    }
}
