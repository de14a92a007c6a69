//! What makes an endpoint obey: the one trait through which the core drives DMA.

mod group_target;
pub mod iommufd;
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
use crate::page_table::{Levels, TableOffset};

/// What a backend can do. The core offers the guest no more than all backends can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendCapabilities {
    /// Page sizes; the smallest bounds the granularity the guest sees.
    pub page_sizes: PageMask,
    /// The addresses it can translate.
    pub aperture: IovaRange,
}

/// Where an endpoint's DMA goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Through the mappings of a domain.
    Domain(DomainId),
    /// To guest-physical addresses as they are.
    Bypass,
    /// Nowhere.
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

/// A piece of guest RAM: one memory slot of the VMM's.
///
/// Two slots are equal where they show the same bytes of the same file at the same addresses; where
/// this process has them mapped does not matter.
#[derive(Clone)]
pub struct MemorySlot {
    /// The guest-physical addresses.
    pub range: GpaRange,
    /// The same bytes in this process, as many as in `range`.
    pub memory: Arc<MmapRegion>,
    /// The file the VMM shares it from.
    pub file: Arc<File>,
    /// Where in that file it begins, in bytes.
    pub offset: u64,
    /// The file is shared memory or of huge pages: the kernel can keep hold of its pages by file.
    pub is_shared_memory: bool,
    /// Device and inode of the file: every message of the VMM's brings another descriptor.
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

/// What the domains hold: the store of record, for backends that fill an address space from it.
pub trait Contents {
    /// The mappings of a domain in the order of addresses; none where it does not exist.
    fn mappings(&self, domain: DomainId) -> Box<dyn Iterator<Item = Mapping> + '_>;

    /// The table of a domain, for backends whose endpoints follow it themselves; `None` where there
    /// is none.
    fn table(&self, domain: DomainId) -> Option<(TableOffset, Levels)>;
}

/// What kind of failure a backend met; it becomes the status of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendErrorKind {
    /// Out of memory, of mapping entries, or over a limit.
    NoMem,
    /// The guest-physical addresses are not memory this backend can reach.
    Fault,
    /// The addresses are out of the backend's range.
    Range,
    /// The endpoint cannot be put there.
    Unsupp,
    /// The backend failed.
    DevErr,
}

/// A backend's refusal.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct BackendError {
    /// What kind of failure it was.
    pub kind: BackendErrorKind,
    /// What failed, with the backend's own words.
    pub message: String,
}

/// Why an endpoint was not switched over.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AttachError {
    /// It is where it was.
    #[error("{0}")]
    Unchanged(BackendError),
    /// It could not be put back where it was either: its DMA goes nowhere.
    #[error("{0}")]
    Blocked(BackendError),
}

impl AttachError {
    /// What failed first.
    pub fn cause(&self) -> &BackendError {
        match self {
            Self::Unchanged(cause) | Self::Blocked(cause) => cause,
        }
    }
}

/// Makes endpoints obey. One backend may serve several endpoints and domains.
///
/// A backend has a domain from the first `attach` of an endpoint to it on, filled with what the
/// domain holds then; `map` and `unmap` follow; `destroy_domain` after the last `attach` elsewhere.
pub trait DmaBackend: Send {
    /// What this backend can do. Constant.
    fn capabilities(&self) -> BackendCapabilities;

    /// A VMM is there, or gone. When it comes, the devices it shares with us are bound, and its
    /// memory slots follow; while there is none, what `attach` is asked is only noted for such
    /// devices where nobody has bound them, and so nobody can drive them.
    fn vmm_present(&mut self, present: bool);

    /// Guest RAM has come.
    ///
    /// # Errors
    /// On error endpoints in bypass mode cannot reach it.
    fn add_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError>;

    /// Guest RAM goes. The core has unmapped from every domain what leads there.
    ///
    /// When it returns `Ok`, no endpoint in bypass mode can reach it any more.
    ///
    /// # Errors
    /// On error it is not known what can still be reached: the core quarantines the endpoints in
    /// bypass mode.
    fn remove_memory(&mut self, slot: &MemorySlot) -> Result<(), BackendError>;

    /// Switches an endpoint over, from wherever it was. A domain this backend has not got is made
    /// and filled from `contents`.
    ///
    /// # Errors
    /// See [`AttachError`]. A domain made for it is gone again.
    fn attach(
        &mut self,
        endpoint: EndpointId,
        target: Target,
        contents: &dyn Contents,
    ) -> Result<(), AttachError>;

    /// Forgets a domain no endpoint is attached to, with all its mappings.
    fn destroy_domain(&mut self, domain: DomainId);

    /// Ends all DMA of an endpoint by every means there is. What the last of them is, and whether
    /// it can fail, is the backend's to say in its own words in the log: the core cannot do more.
    fn quarantine(&mut self, endpoint: EndpointId);

    /// Makes a mapping, or the part of one that leads into a memory slot, reachable with exactly
    /// its access rights.
    ///
    /// # Errors
    /// On error some of it may be reachable: the core unmaps its range.
    fn map(&mut self, domain: DomainId, mapping: &Mapping) -> Result<(), BackendError>;

    /// Removes everything mapped in `range`, which may have holes. It splits no mapping, unless
    /// where one leads from one memory slot into the next. At least `least` bytes of it are mapped,
    /// where the backend has the domain.
    ///
    /// When it returns `Ok`, no endpoint can use an address of the range any more.
    ///
    /// # Errors
    /// On error it is not known what can still be reached: the core quarantines the endpoints.
    fn unmap(&mut self, domain: DomainId, range: IovaRange, least: u64)
    -> Result<(), BackendError>;

    /// [`Self::unmap`] of each of `parts` in turn, by as few calls of it as there can be: neighbours
    /// together. A part may cover one before it, and with that what is unmapped already.
    ///
    /// # Errors
    /// On error it is not known which of them can still be reached.
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
    /// How many bytes of it are mapped at least, where the backend has the domain.
    pub least: u64,
}

impl UnmapPart {
    /// Both as one, where they are neighbours.
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
