//! The core: endpoints, domains, and the rules of the specification that connect them.
//!
//! The device drives the core by plain function calls. The core knows neither virtio nor sockets
//! nor VFIO. Each check carries the ID of the statement in `docs/conformance.md` that it implements.
//!
//! This file holds the state, `attach` moves endpoints between domains, `map` changes mappings,
//! `inspect` reads, `target` switches endpoints over in their backends, `memory` follows guest RAM
//! and the VMM, `hotplug` adds and removes endpoints, `filled` fills the backend of a new one,
//! `records` counts the memory of records, `offer` has the offer to the guest, `stored` writes the store, and `restore` goes on where an earlier process has
//! died: `rebuild` reads its tables and records, `adopt` has the backends take over their endpoints.
//!
//! An endpoint is in one of these states:
//!
//! ```text
//!               ATTACH                      failure in a backend
//! unattached ----------> attached(domain) ----------------------> quarantined
//!  bypass or <----------                  <----------------------
//!  blocked, as  DETACH, reset               ATTACH that succeeds
//!  `bypass` says
//! ```
//!
//! While the state of the guest's driver is unknown, all endpoints are unattached and blocked, and ATTACH is refused.

mod adopt;
mod attach;
mod domain;
mod error;
mod filled;
mod groups;
mod hotplug;
mod inspect;
mod map;
mod memory;
mod offer;
mod reachable;
mod rebuild;
mod records;
mod restore;
mod stored;
mod target;
#[cfg(test)]
mod tests;
mod withheld;

use std::collections::BTreeMap;

use crate::address::{IovaRange, PageMask};
use crate::backends::{DmaBackend, MemorySlot};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{Arena, ArenaError, Encoding, Format, Levels};
use crate::store::Store;
use crate::topology::{GroupId, MAX_ENDPOINTS, PciRange, ReservedRegions, Topology};

use self::domain::Domain;
use self::groups::Groups;

pub use self::error::RequestError;
pub use self::hotplug::{AddError, NewEndpoints, RemoveError};
pub use self::inspect::{Dma, DomainState, EndpointState, Totals, TotalsCursor};
pub use self::offer::GuestOffer;
pub use self::restore::{InterruptedBatch, Predecessor, RestoreError, Restored};

/// The IOMMU's offer to the guest, before backends narrow it.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width of I/O virtual addresses in bits.
    pub address_width: u8,
    /// Page sizes.
    pub page_sizes: PageMask,
    /// Highest domain ID, which also caps the number of live domains.
    pub last_domain: u32,
    /// Whether a new VM starts with `bypass` set: endpoints without a domain are in bypass mode.
    pub bypass_at_boot: bool,
    /// Size of the page-table arena in bytes.
    pub arena_limit: u64,
    /// How the page tables are encoded: for hardware that walks them, its format and the arena's place.
    pub encoding: Encoding,
}

/// The depth of tables of `format` that translate `width` bits of address.
fn levels_for(width: u8, format: Format) -> Result<Levels, ArenaError> {
    let bits = u32::from(width);
    let levels = Levels::for_width(bits).unwrap_or(Levels::Five);
    if format.has_levels(levels) {
        return Ok(levels);
    }
    let most = format.most_levels().address_bits();
    Err(ArenaError::TooWide { bits, most })
}

/// The state of an endpoint that is attached or quarantined. Unattached endpoints have none.
#[derive(Clone, Copy, Debug, Default)]
struct EndpointRecord {
    domain: Option<DomainId>,
    /// Blocked: its group has moved to another domain, and the endpoint has not followed yet.
    suspended: bool,
    /// Blocked: a backend failed.
    quarantined: bool,
}

/// The IOMMU of one VM.
pub struct Iommu {
    topology: Topology,
    /// By index. A removed backend leaves a `Vacant` tombstone, so that indexes stay valid.
    backends: Vec<Box<dyn DmaBackend>>,
    /// The indexes of the tombstones.
    vacant: Vec<usize>,
    /// There is, or was, a backend that gains from [`Self::map_all`].
    batches_maps: bool,
    /// A VMM is connected and has sent its first message.
    vmm_present: bool,
    /// The index of each endpoint's backend.
    backend_of: BTreeMap<EndpointId, usize>,
    /// The addresses that MAP accepts.
    input: IovaRange,
    page_sizes: PageMask,
    levels: Levels,
    last_domain: u32,
    /// Bytes of PROBE's property list; 0 until the device has said so.
    probe_size: u32,
    bypass_at_boot: bool,
    bypass: bool,
    driver: DriverState,
    arena: Arena,
    /// What a later process needs, beside the arena.
    store: Store,
    /// The state of an earlier process has not been restored yet: no endpoint is switched.
    adopting: bool,
    /// See [`Self::suspect`].
    suspects: Vec<PciRange>,
    /// The batch that an earlier process has left.
    interrupted: Option<InterruptedBatch>,
    endpoints: BTreeMap<EndpointId, EndpointRecord>,
    domains: BTreeMap<DomainId, Domain>,
    groups: Groups,
    /// Guest RAM, as the backends have it.
    memory: Vec<MemorySlot>,
    /// The endpoints whose places in the guest differ from the topology, or are not known.
    withheld: Vec<PciRange>,
    /// See [`Self::withhold_unattached`].
    spares_attached: bool,
}

/// The knowledge of the guest's driver. Endpoints reach memory only if its state is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DriverState {
    /// Its domains are those of the core. That there is no driver is known, too.
    Known,
    /// A VMM has connected and shares memory, and no request ring has started since: the VMM may have a driver that has
    /// attached endpoints at another daemon.
    Awaited,
    /// It has attached endpoints of which the core does not know.
    Unknown,
}

impl Iommu {
    /// Makes an IOMMU whose endpoints are all unattached.
    ///
    /// # Errors
    /// The arena cannot be made.
    pub fn new(settings: Settings, topology: Topology) -> Result<Self, ArenaError> {
        let iommu = Self::build(settings, topology, false)?;
        iommu.store.complete();
        Ok(iommu)
    }

    /// Makes an IOMMU whose store is not complete.
    fn build(settings: Settings, topology: Topology, adopting: bool) -> Result<Self, ArenaError> {
        let levels = levels_for(settings.address_width, settings.encoding.format)?;
        let domains = records::most_domains(settings.last_domain, settings.arena_limit);
        let mut iommu = Self {
            topology,
            backends: Vec::new(),
            vacant: Vec::new(),
            batches_maps: false,
            vmm_present: false,
            backend_of: BTreeMap::new(),
            input: IovaRange::of_width(settings.address_width),
            page_sizes: settings.page_sizes,
            levels,
            last_domain: settings.last_domain,
            probe_size: 0,
            bypass_at_boot: settings.bypass_at_boot,
            bypass: settings.bypass_at_boot,
            driver: DriverState::Known,
            arena: Arena::with_encoding(settings.arena_limit, settings.encoding)?,
            store: Store::new(domains, MAX_ENDPOINTS)?,
            adopting,
            suspects: Vec::new(),
            interrupted: None,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            groups: Groups::default(),
            memory: Vec::new(),
            withheld: Vec::new(),
            spares_attached: false,
        };
        if adopting {
            iommu.keep_journal();
        }
        iommu.store.set_offer(&iommu.offer_words());
        iommu.record_state();
        Ok(iommu)
    }

    /// Puts endpoints behind a backend. Must be called before the guest runs, because it narrows
    /// the offer to the guest to the backend's capabilities. Endpoints that the backend fails to
    /// take over are quarantined.
    ///
    /// # Errors
    /// The backend's aperture has no address in common with the input range.
    pub fn add_backend(
        &mut self,
        backend: Box<dyn DmaBackend>,
        endpoints: &[EndpointId],
    ) -> Result<(), String> {
        let can = backend.capabilities();
        let input = self.input.intersection(can.aperture).ok_or_else(|| {
            format!(
                "a backend translates {} only, and {} is offered; narrow the address width",
                can.aperture, self.input
            )
        })?;
        let granule = self.page_sizes.granule().max(can.page_sizes.granule());
        let shared = self.page_sizes.bits() & can.page_sizes.bits() & !(granule - 1);
        self.page_sizes = PageMask::new(shared | granule).unwrap_or(self.page_sizes);
        self.input = input;
        self.store.set_offer(&self.offer_words());
        self.push_backend(backend, endpoints);
        Ok(())
    }

    /// Puts endpoints behind a backend of the start.
    fn push_backend(&mut self, mut backend: Box<dyn DmaBackend>, endpoints: &[EndpointId]) {
        let index = self.backends.len();
        self.batches_maps |= backend.batches_maps();
        backend.keep_records(self.object_records(), self.adopting);
        self.backends.push(backend);
        for &endpoint in endpoints {
            self.backend_of.insert(endpoint, index);
            self.retarget(endpoint, self.bypass_target());
        }
    }

    /// The addresses MAP accepts.
    pub fn input_range(&self) -> IovaRange {
        self.input
    }

    /// The page sizes offered to the guest.
    pub fn page_sizes(&self) -> PageMask {
        self.page_sizes
    }

    /// Highest domain ID.
    pub fn last_domain(&self) -> u32 {
        self.last_domain
    }

    /// The endpoints behind this IOMMU.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The memory of the page tables.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Whether any endpoint is behind a backend.
    pub fn has_backends(&self) -> bool {
        self.backends.len() > self.vacant.len()
    }

    /// The memory of the page tables, for backends that allocate endpoint slots in it.
    pub fn arena_mut(&mut self) -> &mut Arena {
        &mut self.arena
    }

    /// Whether endpoints without a domain are in bypass mode.
    pub fn bypass(&self) -> bool {
        self.bypass
    }

    /// Group and reserved regions of an endpoint.
    fn group_and_reserved(
        &self,
        endpoint: EndpointId,
    ) -> Result<(Option<GroupId>, ReservedRegions), RequestError> {
        self.topology
            .endpoint(endpoint)
            .map(|info| (info.group, info.reserved.clone()))
            .ok_or(RequestError::NoSuchEndpoint(endpoint))
    }

    fn check_domain_id(&self, id: DomainId) -> Result<(), RequestError> {
        // OPS-6
        if id.0 > self.last_domain {
            return Err(RequestError::DomainOutOfRange {
                id,
                last: self.last_domain,
            });
        }
        Ok(())
    }
}
