//! Backends: the one trait through which the core controls the DMA of endpoints, and its implementations.

mod group_target;
pub mod iommufd;
mod objects;
mod reach;
#[cfg(test)]
pub(crate) mod recorder;
#[cfg(not(miri))]
pub mod shadow;
#[cfg(test)]
pub(crate) mod testing;
pub mod type1;
pub mod vacant;
pub mod vfio_user;

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::MmapRegion;

use crate::address::{GpaRange, IovaRange, Mapping, PageMask};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{Levels, TableOffset, TableReader};

pub use self::objects::{ObjectRecord, ObjectRecords, RecordId};

/// The limits of a backend. The core offers the guest only page sizes and addresses that all backends support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendCapabilities {
    /// The page sizes. The smallest one bounds the granule that the guest sees.
    pub page_sizes: PageMask,
    /// The addresses that the backend can translate.
    pub aperture: IovaRange,
}

/// The destination of an endpoint's DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Through the mappings of a domain.
    Domain(DomainId),
    /// To the same guest-physical addresses, untranslated.
    Bypass,
    /// Nowhere: the DMA is blocked.
    Blocked,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Domain(domain) => write!(f, "domain {domain}"),
            Self::Bypass => f.write_str("bypass mode"),
            Self::Blocked => f.write_str("blocked mode"),
        }
    }
}

/// A memory slot of the VMM: a range of guest RAM.
///
/// Two slots are equal if they have the same bytes of the same file at the same guest-physical addresses. Where this
/// process has mapped them does not matter.
#[derive(Clone)]
pub struct MemorySlot {
    /// The guest-physical addresses: whole pages.
    pub range: GpaRange,
    /// The slot's bytes, mapped into this process; at least as long as `range`.
    pub memory: Arc<MmapRegion>,
    /// The file through which the VMM shares the slot.
    pub file: Arc<File>,
    /// The slot's first byte in that file.
    pub offset: u64,
    /// Bytes of a block of the file (`st_blksize`): a huge page, if the file has them. libvfio-user maps whole blocks.
    pub block_len: u64,
    /// Whether the file is shared memory or of huge pages, so that the kernel can pin its pages by file.
    pub is_shared_memory: bool,
    /// Device and inode of the file. The descriptor identifies nothing: each message of the VMM brings a new one.
    pub identity: (u64, u64),
}

impl PartialEq for MemorySlot {
    fn eq(&self, other: &Self) -> bool {
        self.range == other.range && self.offset == other.offset && self.identity == other.identity
    }
}

impl fmt::Debug for MemorySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x} of {:?}", self.range, self.offset, self.file)
    }
}

/// The mappings of all domains, from which a backend fills an address space.
pub trait Contents {
    /// The mappings of a domain, in ascending order; none if the domain does not exist.
    fn mappings(&self, domain: DomainId) -> Box<dyn Iterator<Item = Mapping> + '_>;

    /// The page table of a domain, for backends whose endpoints walk it themselves; `None` if the domain has none.
    fn table(&self, domain: DomainId) -> Option<(TableOffset, Levels)>;

    /// A reader of the page table of a domain, for backends that look mappings up there; `None` if the domain has none.
    /// The backend may use it as long as the endpoint is attached to the domain.
    fn reader(&self, domain: DomainId) -> Option<TableReader>;
}

/// The kind of a backend's failure, which becomes the status of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendErrorKind {
    /// The host is out of memory or of mapping entries, or a limit is reached.
    NoMem,
    /// The mapping leads to guest-physical addresses where the backend reaches no memory.
    Fault,
    /// The backend cannot translate the addresses.
    Range,
    /// The endpoint cannot have this target.
    Unsupp,
    /// The backend failed.
    DevErr,
}

/// What a backend takes over from that of an earlier process.
#[derive(Clone, Copy, Debug)]
pub struct Adoption<'a> {
    /// Every endpoint of the backend, with its target.
    pub endpoints: &'a [(EndpointId, Target)],
    /// Those of them that are quarantined, each with the target [`Target::Blocked`].
    pub quarantined: &'a [EndpointId],
    /// Those of them whose group was being moved: each member may reach its former target still, or its new one already.
    pub moving: &'a [EndpointId],
    /// Ranges whose mappings a request in progress was making or removing: the earlier process may have made or removed
    /// them in the backend, and the page tables do not have them. Whole pages; they may overlap.
    pub in_progress: &'a [(DomainId, IovaRange)],
    /// The backend's records of the kernel's objects, see [`DmaBackend::record_owner`].
    pub records: &'a [(RecordId, ObjectRecord)],
    /// Guest memory is where it was when the earlier process made its mappings, and that process was not changing it.
    pub is_memory_same: bool,
}

/// A backend's refusal.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct BackendError {
    /// The kind of failure.
    pub kind: BackendErrorKind,
    /// The failed step and its cause, for the log.
    pub message: String,
}

/// A failure to switch an endpoint to its new target.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AttachError {
    /// The endpoint keeps its former target.
    #[error("{0}")]
    Unchanged(BackendError),
    /// The endpoint could not get its former target back either: its DMA is blocked.
    #[error("{0}")]
    Blocked(BackendError),
}

impl AttachError {
    /// The first failure.
    pub fn cause(&self) -> &BackendError {
        match self {
            Self::Unchanged(cause) | Self::Blocked(cause) => cause,
        }
    }
}

/// Controls the DMA of endpoints. One backend may serve several endpoints and domains.
///
/// A backend gets a domain with the first `attach` of an endpoint to it, and fills it with the mappings that the domain
/// has then. `map` and `unmap` follow. After the last endpoint has left, `destroy_domain` destroys the domain.
pub trait DmaBackend: Send {
    /// The backend's limits, which never change.
    fn capabilities(&self) -> BackendCapabilities;

    /// The owner in the backend's records of the kernel's objects; `None` if it has none. No two backends have the same.
    fn record_owner(&self) -> Option<u64> {
        None
    }

    /// Has the backend record the kernel's objects from now on. The core calls this before anything else, and not at all if
    /// the objects end with this process. If the backend `adopts`, [`Self::adopt`] follows, and until then only
    /// `vmm_present`, `add_memory` and `remove_memory`, which must make no objects.
    fn keep_records(&mut self, _records: Arc<dyn ObjectRecords>, _adopts: bool) {}

    /// Removes the backend's records. The core calls this before it drops the backend, with which the kernel destroys the
    /// objects.
    fn forget_records(&mut self) {}

    /// A VMM has connected, or has gone. A VMM that connects has bound the devices that it shares with this process, and
    /// its memory slots follow. Without a VMM, an `attach` of an unbound shared device is deferred: an unbound device
    /// can do no DMA.
    fn vmm_present(&mut self, present: bool);

    /// Open files of devices have come from the VMM, at a moment when no request needs them. The backend moves these devices
    /// to their targets. Those that it cannot move are among [`Self::take_stopped`].
    fn files_came(&mut self) {}

    /// The number of address spaces that the host has refused to destroy, and that may keep memory pinned. It has a limit
    /// at which the backend makes no new ones.
    fn condemned_spaces(&self) -> usize {
        0
    }

    /// The VMM has added guest RAM.
    ///
    /// # Errors
    /// On error, endpoints in bypass mode cannot reach the slot, apart from those of [`Self::take_stopped`].
    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError>;

    /// The VMM removes guest RAM. The core has unmapped every mapping into the slot before.
    ///
    /// After `Ok`, endpoints in bypass mode must not be able to reach the slot.
    ///
    /// # Errors
    /// On error, an unknown part of the slot is still reachable: the core quarantines the endpoints in bypass mode.
    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError>;

    /// Switches an endpoint to a new target, whatever its former target. If the backend has no such domain, it makes
    /// the domain and fills it from `contents`.
    ///
    /// # Errors
    /// See [`AttachError`]. On error, the backend must have removed a domain that it made for this call.
    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError>;

    /// Blocks the endpoints that are [moving](Adoption::moving). The core calls this for all backends before the first
    /// [`Self::adopt`]: the hardware cannot isolate the members of a group from each other, and a group may have members
    /// behind several backends. Returns the endpoints that it failed to block, each with the cause: the core quarantines
    /// these.
    ///
    /// The default is for a backend whose objects are new: none of its endpoints reaches anything.
    fn prepare_adoption(&mut self, _adoption: &Adoption<'_>) -> Vec<(EndpointId, BackendError)> {
        Vec::new()
    }

    /// Takes endpoints over from an earlier process that has died. The core calls this once, before any `attach`, `map` or
    /// `unmap`. Returns the endpoints that it failed to take over, each with the cause: the core quarantines these.
    ///
    /// Afterwards every other endpoint has its target, and every domain that is a target has exactly the mappings of
    /// `contents`. A backend that keeps the kernel's objects of the earlier process must unmap the ranges in progress, and
    /// must destroy the domains that are no endpoint's target. An endpoint whose target has not changed must be able to
    /// use its mappings meanwhile.
    ///
    /// The backend must block every endpoint whose target changes before it switches the first of them: the hardware cannot
    /// isolate the members of a group from each other, so at no time may one member reach its former target while another
    /// reaches its new one. An endpoint that cannot be blocked must not be switched.
    ///
    /// The default is for a backend whose objects are new: it blocks every endpoint, and then fills every domain anew.
    fn adopt(
        &mut self,
        adoption: &Adoption<'_>,
        contents: &dyn Contents,
    ) -> Vec<(EndpointId, BackendError)> {
        let mut failed = Vec::new();
        let mut blocked = Vec::with_capacity(adoption.endpoints.len());
        for &(endpoint, target) in adoption.endpoints {
            match self.attach(endpoint, Target::Blocked, contents) {
                Ok(()) => blocked.push((endpoint, target)),
                Err(refusal) => failed.push((endpoint, refusal.cause().clone())),
            }
        }
        blocked.retain(|(_, target)| *target != Target::Blocked);
        for (endpoint, target) in blocked {
            if let Err(refusal) = self.attach(endpoint, target, contents) {
                failed.push((endpoint, refusal.cause().clone()));
            }
        }
        failed
    }

    /// The endpoints that a failed [`Self::attach`] of another endpoint has blocked, those that may reach a slot after a
    /// failed [`Self::add_memory`], and those that [`Self::files_came`] could not move, each once. The core quarantines them.
    fn take_stopped(&mut self) -> Vec<EndpointId> {
        Vec::new()
    }

    /// Destroys a domain with all its mappings. No endpoint is attached to it.
    fn destroy_domain(&mut self, domain: DomainId);

    /// Ends all DMA of an endpoint by every means that the backend has. The backend logs the failure of its last means
    /// itself: the core can do nothing more.
    fn quarantine(&mut self, endpoint: EndpointId);

    /// Confirms that a quarantined endpoint can use no mapping any more. The core asks after [`Self::quarantine`], and then at
    /// each UNMAP of the endpoint's domain until the answer is `Ok`. Must not wait.
    ///
    /// # Errors
    /// The endpoint may still use mappings that it had: the core fails each UNMAP of its domain.
    fn confirm_quarantine(&mut self, _endpoint: EndpointId) -> Result<(), BackendError> {
        Ok(())
    }

    /// Makes a mapping, or the part of one that leads into a memory slot, reachable with exactly its access rights.
    ///
    /// # Errors
    /// On error, a part of the mapping may be reachable: the core unmaps its range.
    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError>;

    /// Whether [`Self::map`] waits for a peer, so that the waits for several mappings can be one.
    fn batches_maps(&self) -> bool {
        false
    }

    /// The core is about to call [`Self::map`] for each of `mappings` in their order. The backend may do what takes time
    /// for all of them, and `map` then returns the outcome of each. No two of them overlap, and none overlaps a mapping of
    /// the domain. If the core refuses one of them after this call, it calls [`Self::unmap`] for its range. No call that
    /// changes the domain or its endpoints comes in between, except quarantine.
    ///
    /// The core calls this only if [`Self::batches_maps`] returns true.
    fn begin_maps(&mut self, _domain: DomainId, _mappings: &[Mapping]) {}

    /// Whether the backend looks mappings up in the page table, instead of keeping what [`Self::map`] reports. For such a
    /// backend the core calls [`Self::begin_unmap`] before each removal of mappings. It calls neither `map` nor `unmap`
    /// for parts of mappings whose memory slots come and go: `add_memory` and `remove_memory` must do that work, and
    /// their failure concerns the endpoints in domains, too.
    fn reads_page_table(&self) -> bool {
        false
    }

    /// The core is about to remove every mapping in `range` from the page table; `unmap` or `unmap_all` follows when it
    /// has done so. Several calls may come before. `range` splits no mapping. A range without a mapping has no effect.
    fn begin_unmap(&mut self, _domain: DomainId, _range: IovaRange) {}

    /// Removes every mapping in `range`, which consists of whole pages and may have holes. `range` splits a mapping only
    /// at the border between two memory slots. If the backend has the domain, at least `least` bytes of `range` are mapped.
    ///
    /// After `Ok`, the domain's endpoints must not be able to use an address of `range`.
    ///
    /// # Errors
    /// On error, an unknown part of `range` is still reachable: the core quarantines the endpoints.
    fn unmap(&mut self, domain: DomainId, range: IovaRange, least: u64)
    -> Result<(), BackendError>;

    /// Calls [`Self::unmap`] for `parts` in their order; adjacent parts share a call. A part may cover an earlier part,
    /// whose addresses are unmapped already.
    ///
    /// # Errors
    /// On error, an unknown number of the parts is still reachable.
    fn unmap_all(&mut self, domain: DomainId, parts: &[UnmapPart]) -> Result<(), BackendError> {
        let mut rest = parts.iter();
        let Some(&(mut joined)) = rest.next() else {
            return Ok(());
        };
        for part in rest {
            match joined.with(part) {
                Some(more) => joined = more,
                None => {
                    self.unmap(domain, joined.range, joined.least)?;
                    joined = *part;
                }
            }
        }
        self.unmap(domain, joined.range, joined.least)
    }
}

/// One of several ranges to unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapPart {
    /// The addresses.
    pub range: IovaRange,
    /// At least this many bytes of it are mapped, if the backend has the domain.
    pub least: u64,
}

impl UnmapPart {
    /// Both parts as one, if they are adjacent.
    fn with(&self, other: &Self) -> Option<Self> {
        let follows = |a: IovaRange, b: IovaRange| a.last().0.checked_add(1) == Some(b.first().0);
        let range = if follows(self.range, other.range) {
            IovaRange::new(self.range.first(), other.range.last())
        } else if follows(other.range, self.range) {
            IovaRange::new(other.range.first(), self.range.last())
        } else {
            None
        };
        Some(Self {
            range: range?,
            least: self.least.saturating_add(other.least),
        })
    }
}
