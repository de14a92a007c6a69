//! A guest, a kernel and a supervisor, which outlive the processes that serve them.

use std::collections::BTreeMap;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::host::Host;
use super::kernel::{KernelHandle, KernelState};
use super::model::Model;
use crate::address::{Access, Gpa, Iova, IovaRange, Mapping, PageMask};
use crate::backends::{MemorySlot, Target};
use crate::device::execute::Context;
use crate::device::plain_ring::PlainRing;
use crate::device::request_queue::{Pass, RequestQueue};
use crate::device::resume::UsedEntry;
use crate::device::testing::{DriverRing, RING_SIZE};
use crate::ids::{DomainId, EndpointId};
use crate::iommu::{Dma, EndpointState, Iommu, Predecessor, RestoreError, Restored, Settings};
use crate::metrics::Metrics;
use crate::page_table::words::SharedWords;
use crate::page_table::{Encoding, crash};
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::reply::TAIL_LEN;
use crate::store::newest;
use crate::topology::{
    EndpointSpec, GroupName, PciAddress, PciRange, ReservedKind, ReservedRegion, ReservedRegions,
    Topology,
};

pub(super) const A: EndpointId = EndpointId(0x30);
pub(super) const B: EndpointId = EndpointId(0x38);
/// Members of one group.
pub(super) const G1: EndpointId = EndpointId(0x48);
pub(super) const G2: EndpointId = EndpointId(0x49);
pub(super) const G3: EndpointId = EndpointId(0x4a);
pub(super) const ALL: [EndpointId; 5] = [A, B, G1, G2, G3];
pub(super) const D1: DomainId = DomainId(1);
pub(super) const D2: DomainId = DomainId(2);
pub(super) const D3: DomainId = DomainId(3);

pub(super) const PAGE: u64 = 0x1000;
const RING_AT: u64 = 0x1_0000;
const MEMORY_LEN: usize = 0x4_0000;
/// MAP_UNMAP, PROBE, BYPASS_CONFIG, and VERSION_1.
pub(super) const FEATURES: u64 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 32;

pub(super) const OK: u8 = 0;
pub(super) const DEVERR: u8 = 3;

/// A request of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Req {
    Attach(EndpointId, DomainId, bool),
    Detach(EndpointId, DomainId),
    /// First page, pages, first page of the target.
    Map(DomainId, u64, u64, u64),
    Unmap(DomainId, u64, u64),
    Probe(EndpointId),
    /// An unknown type.
    Junk,
}

impl Req {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut words = |kind: u8, words: &[u32]| {
            bytes.extend([kind, 0, 0, 0]);
            bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        };
        let halves = |value: u64| [value as u32, (value >> 32) as u32];
        match self {
            Self::Attach(e, d, bypass) => words(1, &[d.0, e.0, u32::from(bypass), 0]),
            Self::Detach(e, d) => words(2, &[d.0, e.0, 0, 0]),
            Self::Map(d, first, pages, gpa) => {
                let [a, b] = halves(first * PAGE);
                let [c, e] = halves((first + pages) * PAGE - 1);
                let [g, h] = halves(gpa * PAGE);
                words(3, &[d.0, a, b, c, e, g, h, 3]);
            }
            Self::Unmap(d, first, pages) => {
                let [a, b] = halves(first * PAGE);
                let [c, e] = halves((first + pages) * PAGE - 1);
                words(4, &[d.0, a, b, c, e, 0]);
            }
            Self::Probe(e) => {
                let mut all = [0; 17];
                all[0] = e.0;
                words(5, &all);
            }
            Self::Junk => words(9, &[1, 2, 3, 4]),
        }
        bytes
    }

    /// The range of a MAP or UNMAP.
    pub(super) fn range(self) -> IovaRange {
        match self {
            Self::Map(_, first, pages, _) | Self::Unmap(_, first, pages) => {
                IovaRange::from_len(Iova(first * PAGE), pages * PAGE).expect("a range")
            }
            _ => panic!("{self:?} has no range"),
        }
    }

    pub(super) fn mapping(self) -> Mapping {
        let Self::Map(.., gpa) = self else {
            panic!("{self:?} is no MAP");
        };
        Mapping {
            range: self.range(),
            gpa: Gpa(gpa * PAGE),
            access: Access::READ_WRITE,
            mmio: false,
        }
    }
}

/// A step of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Requests that the driver makes available together.
    Batch(Vec<Req>),
    /// The driver writes `bypass`.
    Bypass(bool),
    /// The driver resets the device.
    Reset,
    /// The VM is reset.
    ResetVm,
}

/// One process.
struct Life {
    iommu: Iommu,
    queue: RequestQueue,
    ring: PlainRing,
}

impl Life {
    fn of(iommu: Iommu) -> Self {
        Self {
            iommu,
            queue: RequestQueue::default(),
            ring: PlainRing::new(RING_SIZE, RING_AT),
        }
    }
}

/// Everything that outlives a process.
pub(super) struct Bed {
    memory: Arc<GuestMemoryMmap>,
    driver: DriverRing,
    pub kernels: Vec<KernelHandle>,
    batchers: u8,
    /// The host's kernel in place of `kernels`.
    pub host: Option<Host>,
    /// The supervisor's memfds: an arena and a store for each life.
    pub left: Vec<(Arc<SharedWords>, Arc<SharedWords>)>,
    life: Option<Life>,
    /// Requests without an answer, by the index of the chain's first descriptor.
    waiting: Vec<(u32, Req)>,
    /// The answers: the status, or `None` for a chain that was returned unwritten.
    pub answers: Vec<(Req, Option<u8>)>,
    pub deaths: u64,
    metrics: Metrics,
}

pub(super) fn topology() -> Topology {
    topology_of(&ALL)
}

/// The topology with these endpoints alone.
pub(super) fn topology_of(endpoints: &[EndpointId]) -> Topology {
    let spec = |id: EndpointId, group: Option<&str>| {
        let at = PciAddress::from_endpoint_id(id);
        EndpointSpec {
            range: PciRange::new(at, at).expect("one function"),
            group: group.map(|name| GroupName::new(name).expect("a name")),
            reserved: Vec::new(),
        }
    };
    let msi = ReservedRegion {
        range: IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).expect("a range"),
        kind: ReservedKind::Msi,
    };
    Topology::new(
        "00:05.0".parse().expect("an address"),
        ReservedRegions::new(vec![msi]).expect("one region"),
        &endpoints
            .iter()
            .map(|id| spec(*id, [G1, G2, G3].contains(id).then_some("g")))
            .collect::<Vec<_>>(),
    )
    .expect("a topology")
}

pub(super) fn settings() -> Settings {
    Settings {
        address_width: 48,
        page_sizes: PageMask::TABLE,
        last_domain: 15,
        bypass_at_boot: true,
        arena_limit: 1 << 20,
        encoding: Encoding::default(),
    }
}

impl Bed {
    /// A guest with `count` kernels; bit n of `batchers` says whether the backend of kernel n gains from runs of MAPs.
    pub(super) fn new(count: usize, batchers: u8) -> Self {
        Self::with(count, batchers, None::<fn(&mut Iommu) -> Host>)
    }

    /// A guest whose devices are the host's. `add` adds the backends of the first process.
    pub(super) fn on_host(add: impl FnOnce(&mut Iommu) -> Host) -> Self {
        Self::with(0, 0, Some(add))
    }

    fn with(count: usize, batchers: u8, add: Option<impl FnOnce(&mut Iommu) -> Host>) -> Self {
        let ranges = [(GuestAddress(0), MEMORY_LEN)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("guest memory"));
        let driver = DriverRing::new(memory.clone(), RING_AT);
        let mut bed = Self {
            memory,
            driver,
            kernels: (0..count).map(|_| KernelHandle::default()).collect(),
            batchers,
            host: None,
            left: Vec::new(),
            life: None,
            waiting: Vec::new(),
            answers: Vec::new(),
            deaths: 0,
            metrics: Metrics::default(),
        };
        let mut iommu = Iommu::new(settings(), topology()).expect("memory");
        iommu.keep_journal();
        match add {
            Some(add) => bed.host = Some(add(&mut iommu)),
            None => bed.add_backends(&mut iommu),
        }
        iommu.note_features(FEATURES);
        bed.keep(&iommu);
        iommu.connect();
        bed.life = Some(Life::of(iommu));
        bed
    }

    fn add_backends(&self, iommu: &mut Iommu) {
        if let Some(host) = &self.host {
            return host.add_backends(iommu, false);
        }
        let count = self.kernels.len();
        for (index, kernel) in self.kernels.iter().enumerate() {
            let mine: Vec<_> = ALL.iter().copied().skip(index).step_by(count).collect();
            let backend = kernel.backend(self.batchers >> index & 1 != 0);
            iommu
                .add_backend(Box::new(backend), &mine)
                .expect("common addresses");
        }
    }

    /// The supervisor gets the memfds of a process.
    fn keep(&mut self, iommu: &Iommu) {
        let arena = iommu.arena().memory().clone();
        self.left.push((arena, iommu.store().memory().clone()));
    }

    pub(super) fn iommu(&mut self) -> &mut Iommu {
        &mut self.life.as_mut().expect("a process").iommu
    }

    /// Executes a step in the process, which dies at point `at`. Returns whether it lives, and the points that it has passed.
    pub(super) fn step(&mut self, step: &Step, at: u64) -> (bool, u64) {
        if let Step::Batch(requests) = step {
            for request in requests {
                let head = self.driver.put(&request.bytes(), TAIL_LEN.max(0x60));
                self.waiting.push((head, *request));
            }
        }
        if matches!(step, Step::Reset | Step::ResetVm) {
            // The next driver begins with empty rings.
            self.driver = DriverRing::new(self.memory.clone(), RING_AT);
            self.driver.clear();
            let life = self.life.as_mut().expect("a process");
            life.ring = PlainRing::new(RING_SIZE, RING_AT);
        }
        let (lived, passed) = crash::run(at, || self.serve(step));
        self.note_death(lived.is_none());
        self.take_answers();
        (lived.is_some(), passed)
    }

    fn note_death(&mut self, has_died: bool) {
        if has_died {
            self.life = None;
            self.deaths += 1;
        }
    }

    /// The process dies between two requests.
    pub(super) fn die(&mut self) {
        self.note_death(true);
    }

    /// The VMM changes guest memory, and the process dies at point `at`. Returns whether it lives.
    pub(super) fn change_memory(&mut self, slots: &[MemorySlot], at: u64) -> bool {
        let (lived, _) = crash::run(at, || self.iommu().set_memory(slots.to_vec()));
        self.note_death(lived.is_none());
        lived.is_some()
    }

    /// The state of an endpoint.
    pub(super) fn life_endpoint(&mut self, endpoint: EndpointId) -> EndpointState {
        self.iommu().endpoint(endpoint).expect("an endpoint")
    }

    fn serve(&mut self, step: &Step) {
        let life = self.life.as_mut().expect("a process");
        match step {
            Step::Batch(_) => {
                while with_context(&mut life.iommu, &self.memory, &self.metrics, |context| {
                    life.queue.serve(&life.ring, context)
                }) == Pass::Served
                {}
            }
            Step::Bypass(bypass) => life.iommu.set_bypass(*bypass),
            Step::Reset | Step::ResetVm => {
                if *step == Step::Reset {
                    life.iommu.reset();
                } else {
                    life.iommu.reset_vm();
                }
                life.queue = RequestQueue::default();
            }
        }
    }

    /// A new process takes over what the last one has left, finishes the batch, and dies at point `at`. Returns whether it
    /// lives, and the points that it has passed.
    pub(super) fn restore(&mut self, at: u64) -> (bool, u64) {
        let (outcome, passed) = crash::run(at, || self.take_over());
        self.note_death(outcome.is_none());
        self.take_answers();
        if let Some(outcome) = &outcome {
            let restored = outcome.as_ref().expect("restored");
            assert_eq!(restored.features, FEATURES);
        }
        (outcome.is_some(), passed)
    }

    /// A new process takes over what the last one has left, and dies before the ring runs.
    pub(super) fn die_before_the_ring_runs(&mut self) {
        self.successor().1.expect("restored");
    }

    /// Another driver clears the ring, while there is no process.
    pub(super) fn replace_driver(&mut self) {
        self.driver = DriverRing::new(self.memory.clone(), RING_AT);
        self.driver.clear();
        self.waiting.clear();
    }

    /// The driver makes a request available.
    pub(super) fn put(&mut self, request: Req) {
        let head = self.driver.put(&request.bytes(), TAIL_LEN.max(0x60));
        self.waiting.push((head, request));
    }

    /// As [`Self::take_over`], but the ring may be broken afterwards. Returns whether it is.
    pub(super) fn finish_changed_ring(&mut self) -> bool {
        let (iommu, restored) = self.successor();
        restored.expect("restored");
        let is_broken = self.go_on(iommu);
        self.take_answers();
        is_broken
    }

    /// The last used entry that the process knows of.
    pub(super) fn last_used(&self) -> Option<UsedEntry> {
        self.life.as_ref().expect("a process").queue.last_used
    }

    /// A new process takes over what the last one has left, and serves the ring.
    pub(super) fn take_over(&mut self) -> Result<Restored, RestoreError> {
        let (iommu, outcome) = self.successor();
        let is_broken = self.go_on(iommu);
        assert!(!is_broken, "the ring is whole");
        outcome
    }

    /// As [`Self::take_over`], but the memory is damaged. Returns whether the ring is broken.
    pub(super) fn take_over_damaged(&mut self) -> Result<bool, RestoreError> {
        let (iommu, outcome) = self.successor();
        let is_broken = self.go_on(iommu);
        outcome.map(|_| is_broken)
    }

    /// A new process takes over this memory, and serves the ring.
    pub(super) fn take_over_from(
        &mut self,
        old: Predecessor<'_>,
    ) -> Result<Restored, RestoreError> {
        let (iommu, outcome) = self.successor_of(old);
        let is_broken = self.go_on(iommu);
        assert!(!is_broken, "the ring is whole");
        outcome
    }

    /// The core of a new process, which takes over the newest memory.
    fn successor(&mut self) -> (Iommu, Result<Restored, RestoreError>) {
        let stores: Vec<_> = self.left.iter().map(|(_, store)| store.words()).collect();
        let index = newest(&stores).expect("a complete store");
        let (arena, store) = self.left[index].clone();
        self.successor_of(Predecessor {
            arena: arena.words(),
            store: store.words(),
        })
    }

    fn successor_of(&mut self, old: Predecessor<'_>) -> (Iommu, Result<Restored, RestoreError>) {
        let mut iommu = Iommu::successor(settings(), topology()).expect("memory");
        self.add_backends(&mut iommu);
        self.keep(&iommu);
        iommu.connect();
        let outcome = iommu.restore(old);
        (iommu, outcome)
    }

    /// The ring of a new process runs: the process finishes the batch, and serves the ring. Returns whether the ring is
    /// broken.
    fn go_on(&mut self, mut iommu: Iommu) -> bool {
        let interrupted = iommu.take_interrupted();
        let life = self.life.insert(Life::of(iommu));
        if let Some(interrupted) = interrupted {
            with_context(&mut life.iommu, &self.memory, &self.metrics, |context| {
                life.queue
                    .finish_interrupted(&life.ring, context, interrupted);
            });
            if life.queue.broken {
                return true;
            }
            self.serve(&Step::Batch(Vec::new()));
        }
        false
    }

    fn take_answers(&mut self) {
        while let Some((head, len)) = self.driver.take_used() {
            let at = self.waiting.iter().position(|(of, _)| *of == head);
            let at = at.expect("each request is answered once");
            let (_, request) = self.waiting.remove(at);
            let status = (len > 0).then(|| {
                let len = usize::try_from(len).expect("small");
                self.driver.written(head)[len - TAIL_LEN]
            });
            self.answers.push((request, status));
        }
    }

    /// Checks that core, tables, kernels and answers agree.
    pub(super) fn check(&mut self, model: &mut Model) {
        assert!(self.waiting.is_empty(), "{:?} have no answer", self.waiting);
        let answers = std::mem::take(&mut self.answers);
        let kernels = self.kernels.clone();
        let iommu = self.iommu();
        for (request, status) in answers {
            model.apply(request, status);
        }
        model.check(iommu);
        if let Some(host) = &self.host {
            let life = self.life.as_ref().expect("a process");
            let deaths = usize::try_from(self.deaths).expect("few");
            host.check(&life.iommu, deaths);
        }
        let iommu = self.iommu();
        for (index, kernel) in kernels.iter().enumerate() {
            let state = kernel.lock().state.clone();
            for (&domain, held) in &state.domains {
                let used = state.targets.values().any(|t| *t == Target::Domain(domain));
                let table: Vec<_> = iommu.mappings(domain, Iova(0)).collect();
                let held: Vec<_> = held.values().copied().collect();
                assert!(!used || held == table, "{domain}: {held:?}, {table:?}");
                assert!(
                    iommu.has_domain(domain),
                    "kernel {index} has a stale domain"
                );
            }
            for (&endpoint, &target) in &state.targets {
                let seen = iommu.endpoint(endpoint).expect("an endpoint");
                let expected = match (seen.dma, seen.domain) {
                    (Dma::Blocked, _) => Target::Blocked,
                    (Dma::Bypass, _) => Target::Bypass,
                    (Dma::Translated, Some(domain)) => Target::Domain(domain),
                    (Dma::Translated, None) => panic!("translated without a domain"),
                };
                assert_eq!(target, expected, "endpoint {endpoint}");
                if let Target::Domain(domain) = target {
                    assert!(state.domains.contains_key(&domain), "no {domain}");
                }
            }
        }
    }

    /// The state that guest and devices can observe.
    pub(super) fn snapshot(&mut self) -> Snapshot {
        let kernels = self.kernels.iter().map(|k| k.lock().state.clone());
        // A domain that no endpoint uses has no effect.
        let kernels = kernels.map(|mut state| {
            let targets = state.targets.clone();
            state
                .domains
                .retain(|id, _| targets.values().any(|t| *t == Target::Domain(*id)));
            state
        });
        let kernels = kernels.collect();
        let iommu = self.iommu();
        let domains: Vec<_> = iommu.domain_ids().collect();
        Snapshot {
            bypass: iommu.bypass(),
            endpoints: iommu.endpoints(usize::MAX, 10).collect(),
            mappings: domains
                .into_iter()
                .map(|id| (id, iommu.mappings(id, Iova(0)).collect()))
                .collect(),
            kernels,
        }
    }
}

fn with_context<T>(
    iommu: &mut Iommu,
    memory: &GuestMemoryMmap,
    metrics: &Metrics,
    act: impl FnOnce(&mut Context<'_>) -> T,
) -> T {
    let config = ConfigSpace {
        page_sizes: iommu.page_sizes(),
        input_range: iommu.input_range(),
        last_domain: iommu.last_domain(),
        probe_size: 0x40,
    };
    act(&mut Context {
        iommu,
        memory,
        features: FEATURES,
        config: &config,
        metrics,
        max_batch: 64,
    })
}

/// See [`Bed::snapshot`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Snapshot {
    bypass: bool,
    endpoints: Vec<EndpointState>,
    mappings: BTreeMap<DomainId, Vec<Mapping>>,
    kernels: Vec<KernelState>,
}
