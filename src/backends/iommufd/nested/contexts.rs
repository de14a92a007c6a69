//! The context descriptors that name the tables of domains to an SMMU, and the tags of their cached translations.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use crate::address::Gpa;
use crate::backends::{BackendError, BackendErrorKind};
use crate::ids::DomainId;
use crate::page_table::ArenaError;
use crate::page_table::words::SharedWords;
use crate::vfio::nesting::ContextDescriptor;

/// The most domains that may have devices behind SMMUs at a time. The kernel keeps the memory of all descriptors pinned.
const MAX_CONTEXTS: u16 = 4095;

const WORDS: usize = ContextDescriptor::BYTES / 8;

/// The descriptors, in memory that the SMMU reads through the second stage. The descriptor of a domain has the ASID as its
/// index. ASID 0 is not used.
#[derive(Debug)]
pub(super) struct Contexts {
    memory: SharedWords,
    /// The guest-physical address of the memory.
    base: Gpa,
    last: u16,
    /// The highest ASID used so far.
    used: u16,
    /// ASIDs without cached translations, below `used`.
    free: Vec<u16>,
    /// The number of ASIDs that are never used again: a device may use their tables still.
    condemned: usize,
    domains: BTreeMap<DomainId, u16>,
}

impl Contexts {
    /// Bytes of the memory for ASIDs of `asid_bits` bits: whole pages.
    pub(super) fn bytes(asid_bits: u8) -> u64 {
        (u64::from(Self::last(asid_bits)) + 1) * ContextDescriptor::BYTES as u64
    }

    fn last(asid_bits: u8) -> u16 {
        let last = (1_u32 << asid_bits.min(16)) - 1;
        u16::try_from(last).unwrap_or(u16::MAX).min(MAX_CONTEXTS)
    }

    /// Descriptors at `base`, all of them invalid.
    ///
    /// # Errors
    /// The system has no memory for them.
    pub(super) fn new(base: Gpa, asid_bits: u8) -> Result<Self, ArenaError> {
        let bytes = usize::try_from(Self::bytes(asid_bits)).unwrap_or(usize::MAX);
        Ok(Self {
            memory: SharedWords::new(c"viommu-contexts", bytes)?,
            base,
            last: Self::last(asid_bits),
            used: 0,
            free: Vec::new(),
            condemned: 0,
            domains: BTreeMap::new(),
        })
    }

    /// The memory.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// The ASID of a domain, if it has one.
    pub(super) fn asid(&self, domain: DomainId) -> Option<u16> {
        self.domains.get(&domain).copied()
    }

    /// The number of [`Self::condemn`]ed descriptors.
    pub(super) fn condemned(&self) -> usize {
        self.condemned
    }

    /// The address of the descriptor of a domain. Makes one if there is none, from `describe`, which gets the ASID.
    ///
    /// # Errors
    /// There are no more ASIDs.
    pub(super) fn descriptor(
        &mut self,
        domain: DomainId,
        describe: impl FnOnce(u16) -> ContextDescriptor,
    ) -> Result<Gpa, BackendError> {
        if let Some(asid) = self.asid(domain) {
            return Ok(self.address(asid));
        }
        let asid = match self.free.pop() {
            Some(asid) => asid,
            None if self.used < self.last => {
                self.used += 1;
                self.used
            }
            None => {
                return Err(BackendError {
                    kind: BackendErrorKind::NoMem,
                    message: format!(
                        "domain {domain} gets no context descriptor: {} domains have one",
                        self.last
                    ),
                });
            }
        };
        let Some([first, rest @ ..]) = describe(asid).words() else {
            self.free.push(asid);
            return Err(BackendError {
                kind: BackendErrorKind::Range,
                message: format!("the table of domain {domain} is where no SMMU can reach it"),
            });
        };
        let at = usize::from(asid) * WORDS;
        for (index, word) in rest.into_iter().enumerate() {
            self.memory.store(at + 1 + index, word);
        }
        // Last, because it makes the descriptor valid.
        self.memory.store(at, first);
        self.domains.insert(domain, asid);
        Ok(self.address(asid))
    }

    /// Makes the descriptor of a domain invalid: a device that reads it from now on reaches nothing. Returns its ASID.
    pub(super) fn invalidate(&mut self, domain: DomainId) -> Option<u16> {
        let asid = self.domains.remove(&domain)?;
        self.memory.store(usize::from(asid) * WORDS, 0);
        Some(asid)
    }

    /// Makes an ASID available again. No SMMU may have cached translations of it, and no device may use its table.
    pub(super) fn release(&mut self, asid: u16) {
        self.free.push(asid);
    }

    /// Never uses an ASID again, which [`Self::invalidate`] has returned.
    pub(super) fn condemn(&mut self) {
        self.condemned += 1;
    }

    fn address(&self, asid: u16) -> Gpa {
        Gpa(self.base.0 + u64::from(asid) * ContextDescriptor::BYTES as u64)
    }
}
