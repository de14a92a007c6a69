//! The request queue: chains to requests, requests to the core, outcomes to the used ring.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use log::debug;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, ChainRequest, DESCRIPTOR_LEN, Span, scatter};
use super::request_ring::{self, RingError};
use super::resume::UsedEntry;
use super::ring::{LockedRing, Ring, signal};
use super::view::GuestView;
use crate::address::{Access, IovaRange, Mapping};
use crate::faults::FaultReason;
use crate::ids::DomainId;
use crate::iommu::{Iommu, RequestError};
use crate::logging::limit::{self, LogLimit};
use crate::metrics::{FAULT_REASONS, Metrics, REQUEST_KINDS, SINGLES_PER_SAMPLE, STATUSES};
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::probe::{RESV_MEM_LEN, push_resv_mem};
use crate::protocol::reply::{Status, TAIL_LEN, write_reply};
use crate::protocol::request::{DecodeError, Request, RequestKind};
use crate::protocol::wire::{
    VIRTIO_IOMMU_ATTACH_F_BYPASS, VIRTIO_IOMMU_F_BYPASS_CONFIG, VIRTIO_IOMMU_F_MAP_UNMAP,
    VIRTIO_IOMMU_F_MMIO, VIRTIO_IOMMU_F_PROBE, VIRTIO_IOMMU_MAP_F_MMIO, VIRTIO_IOMMU_MAP_F_READ,
    VIRTIO_IOMMU_MAP_F_WRITE,
};
use crate::topology::ReservedKind;
use crate::warn_limited;

/// How long a pass may take chains; those left are put back for the next one. A single request
/// takes no longer than the arena is large.
const MAX_PASS: Duration = Duration::from_millis(1);
/// How long a driver that spins may wait for the first answer of a batch.
const MAX_SILENCE: Duration = Duration::from_micros(20);
/// How much work is done between two looks at the clock; one is a small MAP without a backend.
const WORK_PER_LOOK: u64 = 16;

/// What a pass over the ring came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Chains were served; there may be more.
    Served,
    /// Nothing is there.
    Empty,
    /// The ring is stopped, disabled, or out of reach, or beyond use until it is started anew.
    Stopped,
}

/// The state of the queue between passes. Buffers are kept, so that a pass allocates nothing.
#[derive(Debug, Default)]
pub struct RequestQueue {
    /// The driver has made the ring unusable.
    pub broken: bool,
    /// The last used entry that is not all zero.
    pub last_used: Option<UsedEntry>,
    chains: Vec<Chain>,
    spans: Vec<Span>,
    done: Vec<(u16, u32)>,
    reply: Vec<u8>,
    properties: Vec<u8>,
    /// Of the UNMAPs that come next, which were served together with one before.
    unmapped: VecDeque<Result<(), RequestError>>,
    ranges: Vec<IovaRange>,
    /// Where the last chain had what was read: a driver that waits for each answer frees and
    /// allocates the same descriptors and the same bytes again and again.
    places: Places,
    /// Passes of a single request, to look at the time of some of them.
    singles: u64,
}

/// The places of a chain in guest memory, as good as any other address where it had none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Places {
    descriptor: u64,
    request: u64,
}

impl Places {
    /// Has what is there fetched.
    pub fn prefetch(&self, view: &GuestView<'_>) {
        view.prefetch(self.descriptor);
        view.prefetch(self.request);
    }
}

/// What serving requests needs besides the queue.
pub struct Context<'a> {
    /// The core.
    pub iommu: &'a mut Iommu,
    /// Guest memory as it is during this pass.
    pub memory: &'a GuestMemoryMmap,
    /// Feature bits the driver has accepted.
    pub features: u64,
    /// What the configuration space promises.
    pub config: &'a ConfigSpace,
    /// Counters.
    pub metrics: &'a Metrics,
    /// The most requests of a pass.
    pub max_batch: usize,
}

impl RequestQueue {
    /// Serves up to a batch of requests. The driver sees their answers when all are done, or after
    /// 20 microseconds those that are.
    ///
    /// No lock of the ring is held while the core works.
    pub fn serve(&mut self, ring: &impl Ring, context: &mut Context<'_>) -> Pass {
        if self.broken {
            return Pass::Stopped;
        }
        let view = GuestView::new(context.memory);
        let taken = self.take_chains(ring, &view, context);
        if taken != Pass::Served {
            return taken;
        }
        let chains = std::mem::take(&mut self.chains);
        let weight = self.weight(chains.len());
        let started = (weight > 0).then(Instant::now);
        let mut told = started;
        let mut work = 0;
        let mut left = chains.len();
        let backends = context.iommu.has_backends();
        for (at, chain) in chains.iter().enumerate() {
            if work >= WORK_PER_LOOK && self.unmapped.is_empty() {
                work = 0;
                let now = Instant::now();
                if started.is_some_and(|started| now - started > MAX_PASS) {
                    break;
                }
                if told.is_some_and(|told| now - told > MAX_SILENCE) {
                    self.publish(ring, &view, 0);
                    told = Some(now);
                }
            }
            if backends && self.unmapped.is_empty() {
                self.unmap_together(chains.get(at..).unwrap_or(&[]), context);
            }
            let used = match &chain.request {
                Some(request) => {
                    let (used, done) = self.answer(&view, request, context);
                    work += done;
                    used
                }
                None => None,
            };
            if used.is_none() {
                context.metrics.chains_refused.inc();
            }
            self.done.push((chain.head, used.unwrap_or(0)));
            left -= 1;
        }
        self.chains = chains;
        self.chains.clear();
        self.spans.clear();
        self.publish(ring, &view, left);
        if let Some(started) = started {
            context.metrics.batches.record(started.elapsed(), weight);
        }
        Pass::Served
    }

    /// How many batches one of `requests` counts for; 0 where its time is not looked at.
    fn weight(&mut self, requests: usize) -> u64 {
        if requests > 1 {
            return 1;
        }
        self.singles = self.singles.wrapping_add(1);
        if self.singles.is_multiple_of(SINGLES_PER_SAMPLE) {
            SINGLES_PER_SAMPLE
        } else {
            0
        }
    }

    /// Where several UNMAPs of one domain are next, serves them in one go: a backend takes hardly
    /// longer for all of them than for one. Their outcomes wait until it is their turn.
    fn unmap_together(&mut self, chains: &[Chain], context: &mut Context<'_>) {
        let mut domain = None;
        self.ranges.clear();
        for chain in chains {
            let Some((of, range)) = unmap_in(chain, context.features) else {
                break;
            };
            if *domain.get_or_insert(of) != of {
                break;
            }
            self.ranges.push(range);
        }
        if let Some(domain) = domain
            && self.ranges.len() > 1
        {
            context
                .iommu
                .unmap_all(domain, &self.ranges, &mut self.unmapped);
        }
    }

    /// Asks the driver to notify of its next request. Returns whether one has come meanwhile, for
    /// which it may not.
    pub fn ask_for_kick(&self, ring: &impl Ring, memory: &GuestMemoryMmap) -> bool {
        let mut ring = ring.lock();
        if self.broken || !ring.is_running() {
            return false;
        }
        let queue = ring.queue_mut();
        // Out of reach is tried again when memory changes.
        let more = queue.enable_notification(memory).unwrap_or(false);
        more && queue.disable_notification(memory).is_ok()
    }

    /// Asks the driver not to notify: the ring is looked at anyway. With event indices it does not
    /// until it is asked to.
    pub fn do_without_kicks(&self, ring: &impl Ring, memory: &GuestMemoryMmap) {
        let mut ring = ring.lock();
        if ring.is_running() && !ring.queue().event_idx_enabled() {
            // Out of reach, it cannot be looked at either.
            let _ = ring.queue_mut().disable_notification(memory);
        }
    }

    /// Where the last chain that was taken was.
    pub fn places(&self) -> Places {
        self.places
    }

    /// Takes chains off the ring.
    fn take_chains(
        &mut self,
        ring: &impl Ring,
        view: &GuestView<'_>,
        context: &Context<'_>,
    ) -> Pass {
        let mut ring = ring.lock();
        if !ring.is_running() {
            return Pass::Stopped;
        }
        let queue = ring.queue_mut();
        let (table, size) = (queue.desc_table(), queue.size());
        let count = match request_ring::available(queue, view) {
            Ok(0) => return Pass::Empty,
            Ok(count) => count,
            // The ring's memory is away; it is tried again when memory changes.
            Err(RingError::OutOfReach) => return Pass::Stopped,
            Err(RingError::TooMany) => {
                self.broken = true;
                warn_limited!(
                    "the request ring is left alone until the driver starts it anew: it promises \
                     more requests than the ring has room for"
                );
                return Pass::Stopped;
            }
        };
        if usize::from(count) > context.max_batch {
            context.metrics.batch_full.inc();
        }
        for _ in 0..usize::from(count).min(context.max_batch) {
            let Some(head) = request_ring::take(queue, view) else {
                break;
            };
            let chain = Chain::read(view, head, table, size, &mut self.spans);
            self.chains.push(chain);
        }
        let Some(last) = self.chains.last() else {
            return Pass::Stopped;
        };
        self.places = Places {
            descriptor: table.saturating_add(u64::from(last.head) * DESCRIPTOR_LEN),
            request: last.request.as_ref().map_or(0, |request| request.at),
        };
        Pass::Served
    }

    /// Returns the chains that are done, and puts the last `left` ones taken back.
    fn publish(&mut self, ring: &impl Ring, view: &GuestView<'_>, left: usize) {
        let mut ring = ring.lock();
        let queue = ring.queue_mut();
        let (size, before) = (queue.size(), queue.next_used());
        let left = u16::try_from(left).unwrap_or(0);
        queue.set_next_avail(queue.next_avail().wrapping_sub(left));
        self.done.retain(|&(head, _)| {
            if head >= size {
                warn_limited!("request {head} is not in the ring and cannot be returned");
            }
            head < size
        });
        let returned = request_ring::publish(queue, view, &self.done);
        let lost = self.done.len() - returned;
        if lost > 0 {
            warn_limited!(
                "{lost} requests cannot be returned: the used ring is not in guest memory"
            );
        }
        let returned = self.done.get(..returned).unwrap_or(&[]);
        if let Some(index) = returned.iter().rposition(|entry| *entry != (0, 0))
            && let Some(&(head, len)) = returned.get(index)
        {
            let index = u16::try_from(index).unwrap_or(0);
            let slot = before.wrapping_add(index).checked_rem(size).unwrap_or(0);
            self.last_used = Some(UsedEntry { slot, head, len });
        }
        self.done.clear();
        if request_ring::wants_notification(queue, view, before) {
            signal(&ring);
        }
    }

    /// Serves one request. Returns the used length, or `None` where nothing is written, and how
    /// much work it was.
    fn answer(
        &mut self,
        view: &GuestView<'_>,
        chain: &ChainRequest,
        context: &mut Context<'_>,
    ) -> (Option<u32>, u64) {
        self.properties.clear();
        let mut work = 1;
        let status = match chain.bytes {
            None => {
                warn_limited!("a request's device-readable part is not in guest memory");
                Status::IoErr
            }
            Some(bytes) => match Request::decode(bytes.as_slice()) {
                Ok(request) if !is_available(&request, context.features) => {
                    warn_limited!(
                        "{} request without its feature negotiated",
                        request.kind().name()
                    );
                    return (None, work);
                }
                Ok(request) => {
                    work = work_of(&request, context.iommu.has_backends());
                    self.execute(&request, chain, context)
                }
                Err(DecodeError::UnknownType) => {
                    warn_limited!("unknown request type {:#x}", first_byte(bytes.as_slice()));
                    return (None, work);
                }
                Err(cause @ DecodeError::TooShort { kind, .. }) => {
                    warn_limited!("{cause}");
                    count(context.metrics, kind, Status::IoErr);
                    Status::IoErr
                }
            },
        };
        self.reply.resize(chain.writable_len, 0);
        write_reply(&mut self.reply, &self.properties, status);
        let spans = self.spans.get(chain.spans.clone()).unwrap_or(&[]);
        let used = scatter(view, spans, &self.reply)
            .then(|| u32::try_from(chain.writable_len).ok())
            .flatten();
        (used, work)
    }

    fn execute(
        &mut self,
        request: &Request,
        chain: &ChainRequest,
        context: &mut Context<'_>,
    ) -> Status {
        let status = match self.apply(request, chain, context) {
            Ok(()) => Status::Ok,
            Err(error) => {
                let status = Status::from(&error);
                count_cause(context.metrics, request.kind(), &error);
                // A flood of one kind must not hide the others.
                static LIMITS: [LogLimit; RequestKind::COUNT] =
                    [const { LogLimit::new() }; RequestKind::COUNT];
                limit::log(
                    &LIMITS[request.kind().index()],
                    log::Level::Warn,
                    module_path!(),
                    format_args!(
                        "{} refused with status {}: {error} ({})",
                        request.kind().name(),
                        status.name(),
                        Subject(request)
                    ),
                );
                status
            }
        };
        count(context.metrics, request.kind(), status);
        status
    }

    fn apply(
        &mut self,
        request: &Request,
        chain: &ChainRequest,
        context: &mut Context<'_>,
    ) -> Result<(), RequestError> {
        let iommu = &mut *context.iommu;
        match *request {
            Request::Attach {
                domain,
                endpoint,
                flags,
                reserved_is_zero,
            } => {
                // ATTACH-1
                if !reserved_is_zero {
                    return Err(RequestError::ReservedNotZero);
                }
                // ATTACH-2
                let known = if has(context.features, VIRTIO_IOMMU_F_BYPASS_CONFIG) {
                    VIRTIO_IOMMU_ATTACH_F_BYPASS
                } else {
                    0
                };
                check_flags(flags, known)?;
                let bypass = flags & VIRTIO_IOMMU_ATTACH_F_BYPASS != 0;
                iommu.attach(endpoint, domain, bypass)?;
                debug!("endpoint {endpoint} attached to domain {domain}");
            }
            Request::Detach { domain, endpoint } => {
                iommu.detach(endpoint, domain)?;
                debug!("endpoint {endpoint} detached from domain {domain}");
            }
            Request::Map {
                domain,
                virt_start,
                virt_end,
                phys_start,
                flags,
            } => {
                // MAP-3
                let mut known = VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE;
                if has(context.features, VIRTIO_IOMMU_F_MMIO) {
                    known |= VIRTIO_IOMMU_MAP_F_MMIO;
                }
                check_flags(flags, known)?;
                let range =
                    IovaRange::new(virt_start, virt_end).ok_or(RequestError::EmptyRange {
                        first: virt_start,
                        last: virt_end,
                    })?;
                iommu.map(
                    domain,
                    &Mapping {
                        range,
                        gpa: phys_start,
                        access: Access {
                            read: flags & VIRTIO_IOMMU_MAP_F_READ != 0,
                            write: flags & VIRTIO_IOMMU_MAP_F_WRITE != 0,
                        },
                        mmio: flags & VIRTIO_IOMMU_MAP_F_MMIO != 0,
                    },
                )?;
            }
            Request::Unmap {
                domain,
                virt_start,
                virt_end,
            } => {
                let range =
                    IovaRange::new(virt_start, virt_end).ok_or(RequestError::EmptyRange {
                        first: virt_start,
                        last: virt_end,
                    })?;
                match self.unmapped.pop_front() {
                    Some(outcome) => outcome?,
                    None => {
                        iommu.unmap(domain, range)?;
                    }
                }
            }
            Request::Probe { endpoint } => {
                let regions = iommu.probe(endpoint)?;
                // PROBE-7
                let need = context.config.probe_size as usize;
                let have = chain.writable_len.saturating_sub(TAIL_LEN);
                if have < need {
                    return Err(RequestError::ProbeTooSmall { need, have });
                }
                for region in regions.iter() {
                    push_resv_mem(
                        &mut self.properties,
                        region.range,
                        region.kind == ReservedKind::Msi,
                    );
                }
            }
        }
        Ok(())
    }
}

const _: () = assert!(RequestKind::COUNT == REQUEST_KINDS);
const _: () = assert!(Status::COUNT == STATUSES);
const _: () = assert!(FaultReason::COUNT == FAULT_REASONS);

/// Size of PROBE's property list that holds `regions` regions, in bytes.
pub fn probe_size(regions: usize) -> u32 {
    u32::try_from(regions.saturating_mul(RESV_MEM_LEN).max(512)).unwrap_or(u32::MAX)
}

/// Whether the feature that makes a request available was negotiated.
fn is_available(request: &Request, features: u64) -> bool {
    match request.kind() {
        RequestKind::Attach | RequestKind::Detach => true,
        RequestKind::Map | RequestKind::Unmap => has(features, VIRTIO_IOMMU_F_MAP_UNMAP),
        RequestKind::Probe => has(features, VIRTIO_IOMMU_F_PROBE),
    }
}

/// The domain and the range of a chain that is an UNMAP and gets as far as the core.
fn unmap_in(chain: &Chain, features: u64) -> Option<(DomainId, IovaRange)> {
    let bytes = chain.request.as_ref()?.bytes?;
    let request = Request::decode(bytes.as_slice()).ok()?;
    let Request::Unmap {
        domain,
        virt_start,
        virt_end,
    } = request
    else {
        return None;
    };
    let range = IovaRange::new(virt_start, virt_end)?;
    is_available(&request, features).then_some((domain, range))
}

/// What a request may cost, in small MAPs without a backend.
fn work_of(request: &Request, has_backends: bool) -> u64 {
    /// Table entries that are written in the time of a small MAP.
    const PAGES: u64 = 64;
    let pages = match *request {
        Request::Attach { .. } | Request::Detach { .. } | Request::Probe { .. } => {
            return WORK_PER_LOOK;
        }
        Request::Map {
            virt_start,
            virt_end,
            ..
        }
        | Request::Unmap {
            virt_start,
            virt_end,
            ..
        } => virt_end.0.saturating_sub(virt_start.0) >> 12,
    };
    // A system call takes as long as many.
    let work = if has_backends { WORK_PER_LOOK / 2 } else { 1 };
    work + pages / PAGES
}

fn has(features: u64, bit: u32) -> bool {
    features >> bit & 1 != 0
}

fn check_flags(flags: u32, known: u32) -> Result<(), RequestError> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(RequestError::UnknownFlags(unknown)),
    }
}

fn count(metrics: &Metrics, kind: RequestKind, status: Status) {
    if let Some(counter) = metrics
        .requests
        .get(kind.index())
        .and_then(|kinds| kinds.get(status.index()))
    {
        counter.inc();
    }
}

fn first_byte(bytes: &[u8]) -> u8 {
    bytes.first().copied().unwrap_or(0)
}

/// Counts what is behind a refusal: a limit, or a backend.
fn count_cause(metrics: &Metrics, kind: RequestKind, error: &RequestError) {
    match error {
        RequestError::OutOfFrames { .. } => metrics.arena_full.inc(),
        RequestError::DomainOutOfRange { .. } => metrics.domain_beyond.inc(),
        RequestError::Backend(_) | RequestError::Quarantined { .. } => {
            if let Some(counter) = metrics.backend_failures.get(kind.index()) {
                counter.inc();
            }
        }
        RequestError::NoSuchEndpoint(_)
        | RequestError::NoSuchDomain(_)
        | RequestError::NotAttached { .. }
        | RequestError::BypassMismatch { .. }
        | RequestError::BypassDomain(_)
        | RequestError::UnknownFlags(_)
        | RequestError::ReservedNotZero
        | RequestError::EmptyRange { .. }
        | RequestError::Misaligned { .. }
        | RequestError::OutsideInputRange { .. }
        | RequestError::PhysOutOfRange(_)
        | RequestError::Overlap { .. }
        | RequestError::Reserved { .. }
        | RequestError::WouldSplit { .. }
        | RequestError::GroupElsewhere { .. }
        | RequestError::RegionClash { .. }
        | RequestError::ProbeTooSmall { .. } => {}
    }
}

/// "endpoint 0x30, domain 3" for messages: what a request names of the two.
struct Subject<'a>(&'a Request);

impl std::fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Request::Map { domain, .. } | Request::Unmap { domain, .. } => {
                write!(f, "domain {domain}")
            }
            Request::Attach {
                domain, endpoint, ..
            }
            | Request::Detach { domain, endpoint } => {
                write!(f, "endpoint {endpoint}, domain {domain}")
            }
            Request::Probe { endpoint } => write!(f, "endpoint {endpoint}"),
        }
    }
}
