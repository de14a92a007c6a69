//! The memory of the records of domains and of attached endpoints. It counts against the arena's limit, so that one limit
//! bounds all memory that a guest's requests take.

use super::Iommu;
use super::error::RequestError;

/// The heap bytes of a domain's record, rounded up: the record, its place in the map, and its lists of members, of
/// backends and of reserved regions.
const DOMAIN_BYTES: u64 = 1024;
/// The most domains that the records of `arena_limit` bytes have room for.
pub(super) fn most_domains(last_domain: u32, arena_limit: u64) -> u64 {
    (u64::from(last_domain) + 1).min(arena_limit / DOMAIN_BYTES)
}

/// The heap bytes of an attached endpoint, rounded up: its record, and its places in its domain and in its group.
const ENDPOINT_BYTES: u64 = 256;

impl Iommu {
    /// Checks that there is memory for the records of one more domain and endpoint, each if there is a new one, and for
    /// `frames` frames.
    pub(super) fn check_room_for_records(
        &self,
        is_new_domain: bool,
        is_new_endpoint: bool,
        frames: u64,
    ) -> Result<(), RequestError> {
        let more = [
            (is_new_domain, DOMAIN_BYTES),
            (is_new_endpoint, ENDPOINT_BYTES),
        ];
        let more = more.iter().filter(|(is_new, _)| *is_new);
        let bytes = more.fold(self.record_bytes(), |sum, (_, bytes)| sum + bytes);
        let needed = self.arena.frames_for_records(bytes) + frames;
        let free = self.arena.frames_free();
        if needed > free {
            return Err(RequestError::OutOfFrames { needed, free });
        }
        Ok(())
    }

    /// Counts the records again, after their number has changed.
    pub(super) fn count_records(&mut self) {
        let bytes = self.record_bytes();
        self.arena.set_record_bytes(bytes);
    }

    fn record_bytes(&self) -> u64 {
        self.domains.len() as u64 * DOMAIN_BYTES + self.endpoints.len() as u64 * ENDPOINT_BYTES
    }
}
