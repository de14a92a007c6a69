//! Executes one request: decodes a chain's bytes, calls the core, and writes the answer into the chain.

use std::collections::VecDeque;

use log::debug;
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, ChainRequest, Span, scatter};
use super::view::GuestView;
use crate::address::{Access, Gpa, IovaRange, Mapping};
use crate::faults::FaultReason;
use crate::ids::DomainId;
use crate::iommu::{Iommu, RequestError};
use crate::logging::limit::{self, LogLimit};
use crate::metrics::{FAULT_REASONS, Metrics, REQUEST_KINDS, STATUSES};
use crate::protocol::config_space::ConfigSpace;
use crate::protocol::probe::{RESV_MEM_LEN, push_resv_mem};
use crate::protocol::reply::{Status, TAIL_LEN, write_reply};
use crate::protocol::request::{DecodeError, Request, RequestKind};
use crate::protocol::wire::{
    VIRTIO_IOMMU_ATTACH_F_BYPASS, VIRTIO_IOMMU_F_BYPASS_CONFIG, VIRTIO_IOMMU_F_MAP_UNMAP,
    VIRTIO_IOMMU_F_MMIO, VIRTIO_IOMMU_F_PROBE, VIRTIO_IOMMU_MAP_F_MMIO, VIRTIO_IOMMU_MAP_F_READ,
    VIRTIO_IOMMU_MAP_F_WRITE,
};
use crate::store::UNWRITTEN;
use crate::topology::{ReservedKind, Topology};
use crate::warn_limited;

/// Work between two reads of the clock. The unit is a small MAP without a backend.
pub const WORK_PER_CLOCK_READ: u64 = 16;

/// The parts of the device that a pass over the ring needs.
pub struct Context<'a> {
    /// The core.
    pub iommu: &'a mut Iommu,
    /// Guest memory. It does not change during a pass.
    pub memory: &'a GuestMemoryMmap,
    /// Feature bits the driver has accepted.
    pub features: u64,
    /// The configuration space, with which the answers must agree.
    pub config: &'a ConfigSpace,
    /// Counters.
    pub metrics: &'a Metrics,
    /// The most requests in a pass.
    pub max_batch: usize,
}

/// Executes requests. It keeps its buffers from one request to the next.
#[derive(Debug, Default)]
pub struct Executor {
    reply: Vec<u8>,
    properties: Vec<u8>,
    /// Outcomes of the next MAPs or UNMAPs, which [`Executor::run_ahead`] has executed ahead.
    outcomes: VecDeque<Result<(), RequestError>>,
    mappings: Vec<Mapping>,
}

impl Executor {
    /// Whether the next request has been executed ahead.
    pub fn has_outcomes(&self) -> bool {
        !self.outcomes.is_empty()
    }

    /// If `chains` begin with several UNMAPs of one domain, or with several MAPs of a domain for which that saves time,
    /// executes them in one call of the core: a backend takes hardly longer for all of them than for one.
    /// [`Executor::answer`] uses their outcomes later.
    ///
    /// Takes at most one chain more than it executes ahead, or two if it executes none. So the calls for one batch take
    /// no more than two chains for each of its requests, however many of these are refused.
    pub fn run_ahead<'a>(
        &mut self,
        chains: impl Iterator<Item = &'a Chain>,
        context: &mut Context<'_>,
    ) {
        let features = context.features;
        let mut run = chains.map_while(|chain| decode_run(chain, features));
        match run.next() {
            Some(Run::Unmap(domain, first)) => {
                let mut rest = run.map_while(|next| match next {
                    Run::Unmap(of, range) => (of == domain).then_some(range),
                    Run::Map(..) => None,
                });
                // The core stops at a refusal, so each range is decoded only when the core takes it.
                if let Some(second) = rest.next() {
                    let ranges = [first, second].into_iter().chain(rest);
                    let iommu = &mut *context.iommu;
                    iommu.unmap_all(domain, ranges, &mut self.outcomes);
                }
            }
            Some(Run::Map(domain, first)) if context.iommu.batches_maps(domain) => {
                self.mappings.clear();
                self.mappings.push(first);
                self.mappings.extend(run.map_while(|next| match next {
                    Run::Map(of, mapping) => (of == domain).then_some(mapping),
                    Run::Unmap(..) => None,
                }));
                if self.mappings.len() > 1 {
                    let iommu = &mut *context.iommu;
                    iommu.map_all(domain, &self.mappings, &mut self.outcomes);
                }
            }
            Some(Run::Map(..)) | None => {}
        }
    }

    /// Executes one request and writes the answer into its `spans`. Returns the used length, or `None` if nothing was
    /// written, and the work in the unit of [`WORK_PER_CLOCK_READ`].
    pub fn answer(
        &mut self,
        view: &GuestView<'_>,
        chain: &ChainRequest,
        spans: &[Span],
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
                    context.iommu.journal().done(UNWRITTEN);
                    return (None, work);
                }
                Ok(request) => {
                    work = cost_of(&request, context.iommu.has_backends());
                    self.execute(&request, chain, context)
                }
                Err(DecodeError::UnknownType) => {
                    warn_limited!("unknown request type {:#x}", first_byte(bytes.as_slice()));
                    context.iommu.journal().done(UNWRITTEN);
                    return (None, work);
                }
                Err(cause @ DecodeError::TooShort { kind, .. }) => {
                    warn_limited!("{cause}");
                    count(context.metrics, kind, Status::IoErr);
                    Status::IoErr
                }
            },
        };
        context.iommu.journal().done(status as u8);
        (self.reply(view, chain, spans, status), work)
    }

    /// Writes an answer. Returns the used length, or `None` if nothing was written.
    pub fn reply(
        &mut self,
        view: &GuestView<'_>,
        chain: &ChainRequest,
        spans: &[Span],
        status: Status,
    ) -> Option<u32> {
        self.reply.resize(chain.writable_len, 0);
        write_reply(&mut self.reply, &self.properties, status);
        let spans = spans.get(chain.spans.clone()).unwrap_or(&[]);
        scatter(view, spans, &self.reply)
            .then(|| u32::try_from(chain.writable_len).ok())
            .flatten()
    }

    /// Writes the answer of a request that an earlier process has executed.
    pub fn reply_again(
        &mut self,
        view: &GuestView<'_>,
        chain: &ChainRequest,
        spans: &[Span],
        status: Status,
    ) -> Option<u32> {
        self.properties.clear();
        self.reply(view, chain, spans, status)
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
                // One limit for each kind: a flood of one must not hide the others.
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
                check_map_flags(flags, context.features)?;
                let range =
                    IovaRange::new(virt_start, virt_end).ok_or(RequestError::EmptyRange {
                        first: virt_start,
                        last: virt_end,
                    })?;
                match self.outcomes.pop_front() {
                    Some(outcome) => outcome?,
                    None => iommu.map(domain, &mapping_of(range, phys_start, flags))?,
                }
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
                match self.outcomes.pop_front() {
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

/// The number of reserved regions of one endpoint that a property list of PROBE has room for: one of `bytes`, or the larger
/// one that the endpoints of a topology need.
pub fn probe_room(bytes: u32, topology: &Topology) -> usize {
    let bytes = bytes.max(probe_size(topology.max_reserved_count()));
    usize::try_from(bytes).unwrap_or(usize::MAX) / RESV_MEM_LEN
}

/// Whether the driver has accepted the feature that a request belongs to.
fn is_available(request: &Request, features: u64) -> bool {
    match request.kind() {
        RequestKind::Attach | RequestKind::Detach => true,
        RequestKind::Map | RequestKind::Unmap => has(features, VIRTIO_IOMMU_F_MAP_UNMAP),
        RequestKind::Probe => has(features, VIRTIO_IOMMU_F_PROBE),
    }
}

/// A request that may be executed ahead.
enum Run {
    Map(DomainId, Mapping),
    Unmap(DomainId, IovaRange),
}

/// The MAP or UNMAP in `chain`; `None` for other requests, and for those that never reach the core.
fn decode_run(chain: &Chain, features: u64) -> Option<Run> {
    let bytes = chain.request.as_ref()?.bytes?;
    let request = Request::decode(bytes.as_slice()).ok()?;
    if !is_available(&request, features) {
        return None;
    }
    match request {
        Request::Map {
            domain,
            virt_start,
            virt_end,
            phys_start,
            flags,
        } => {
            check_map_flags(flags, features).ok()?;
            let range = IovaRange::new(virt_start, virt_end)?;
            Some(Run::Map(domain, mapping_of(range, phys_start, flags)))
        }
        Request::Unmap {
            domain,
            virt_start,
            virt_end,
        } => Some(Run::Unmap(domain, IovaRange::new(virt_start, virt_end)?)),
        Request::Attach { .. } | Request::Detach { .. } | Request::Probe { .. } => None,
    }
}

/// The mapping of a MAP with known flags.
fn mapping_of(range: IovaRange, gpa: Gpa, flags: u32) -> Mapping {
    Mapping {
        range,
        gpa,
        access: Access {
            read: flags & VIRTIO_IOMMU_MAP_F_READ != 0,
            write: flags & VIRTIO_IOMMU_MAP_F_WRITE != 0,
        },
        mmio: flags & VIRTIO_IOMMU_MAP_F_MMIO != 0,
    }
}

fn check_map_flags(flags: u32, features: u64) -> Result<(), RequestError> {
    // MAP-3
    let mut known = VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE;
    if has(features, VIRTIO_IOMMU_F_MMIO) {
        known |= VIRTIO_IOMMU_MAP_F_MMIO;
    }
    check_flags(flags, known)
}

/// Upper estimate of a request's work, in the unit of [`WORK_PER_CLOCK_READ`].
fn cost_of(request: &Request, has_backends: bool) -> u64 {
    /// Table entries that can be written in the time of a small MAP.
    const PAGES: u64 = 64;
    let pages = match *request {
        Request::Attach { .. } | Request::Detach { .. } | Request::Probe { .. } => {
            return WORK_PER_CLOCK_READ;
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
    // A backend makes a system call, which takes as long as many small MAPs.
    let work = if has_backends {
        WORK_PER_CLOCK_READ / 2
    } else {
        1
    };
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

/// Counts the cause of a refusal if it is a limit or a backend.
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
        | RequestError::UnknownDriver
        | RequestError::Misplaced(_)
        | RequestError::UnknownFlags(_)
        | RequestError::ReservedNotZero
        | RequestError::EmptyRange { .. }
        | RequestError::Misaligned { .. }
        | RequestError::OutsideInputRange { .. }
        | RequestError::PhysOutOfRange(_)
        | RequestError::TargetsTables(_)
        | RequestError::TableTooDeep(_)
        | RequestError::Overlap { .. }
        | RequestError::Reserved { .. }
        | RequestError::WouldSplit { .. }
        | RequestError::GroupElsewhere { .. }
        | RequestError::RegionClash { .. }
        | RequestError::ProbeTooSmall { .. } => {}
    }
}

/// The endpoint and the domain that a request names, for messages: "endpoint 0000:00:06.0, domain 3".
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
