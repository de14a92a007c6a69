//! The request queue: chains to requests, requests to the core, outcomes to the used ring.

use std::time::{Duration, Instant};

use log::debug;
use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, ChainRequest, Span, scatter};
use super::restart::UsedEntry;
use super::ring::{is_running, notify};
use crate::address::{Access, IovaRange, Mapping};
use crate::iommu::{Iommu, RequestError};
use crate::log_limit::{self, LogLimit};
use crate::metrics::{Metrics, REQUEST_KINDS, STATUSES};
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

/// Chains taken off the ring before their outcomes are published.
const MAX_BATCH: usize = 64;
/// How long a pass may take chains; those left are put back for the next one. A single request
/// takes no longer than the arena is large.
const MAX_PASS: Duration = Duration::from_millis(1);

/// What a pass over the ring came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Chains were served; there may be more.
    Served,
    /// Nothing is there, and the driver will notify.
    Idle,
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
}

impl RequestQueue {
    /// Serves up to a batch of requests.
    ///
    /// No lock of the ring is held while the core works.
    pub fn serve(&mut self, vring: &VringRwLock, context: &mut Context<'_>) -> Pass {
        if self.broken {
            return Pass::Stopped;
        }
        let taken = self.take_chains(vring, context.memory);
        if taken != Pass::Served {
            return taken;
        }
        let started = Instant::now();
        let chains = std::mem::take(&mut self.chains);
        for chain in &chains {
            if !self.done.is_empty() && started.elapsed() > MAX_PASS {
                break;
            }
            let used = match &chain.request {
                Some(request) => self.answer(request, context),
                None => None,
            };
            if used.is_none() {
                context.metrics.chains_refused.inc();
            }
            self.done.push((chain.head, used.unwrap_or(0)));
        }
        let left = chains.len() - self.done.len();
        self.chains = chains;
        self.chains.clear();
        self.spans.clear();
        self.publish(vring, context.memory, left);
        Pass::Served
    }

    /// Takes chains off the ring; where there are none, asks the driver to notify.
    fn take_chains(&mut self, vring: &VringRwLock, memory: &GuestMemoryMmap) -> Pass {
        let mut ring = vring.get_mut();
        if !is_running(&ring) {
            return Pass::Stopped;
        }
        let queue = ring.get_queue_mut();
        let size = queue.size();
        // A second time where requests came in before the driver was asked.
        for _ in 0..2 {
            match queue.iter(memory) {
                Ok(chains) => {
                    for chain in chains.take(MAX_BATCH) {
                        let chain = Chain::read(memory, chain, size, &mut self.spans);
                        self.chains.push(chain);
                    }
                }
                Err(cause @ virtio_queue::Error::InvalidAvailRingIndex) => {
                    return self.give_up(&cause.to_string());
                }
                // The ring's memory is away; it is tried again when memory changes.
                Err(_) => return Pass::Stopped,
            }
            if !self.chains.is_empty() {
                return Pass::Served;
            }
            match queue.enable_notification(memory) {
                Ok(false) => return Pass::Idle,
                Ok(true) => {}
                Err(_) => return Pass::Stopped,
            }
        }
        self.give_up("it promises requests that cannot be read")
    }

    fn give_up(&mut self, cause: &str) -> Pass {
        self.broken = true;
        warn_limited!("the request ring is left alone until the driver starts it anew: {cause}");
        Pass::Stopped
    }

    /// Returns the chains that are done, and puts the last `left` ones taken back.
    fn publish(&mut self, vring: &VringRwLock, memory: &GuestMemoryMmap, left: usize) {
        let mut ring = vring.get_mut();
        let queue = ring.get_queue_mut();
        let left = u16::try_from(left).unwrap_or(0);
        queue.set_next_avail(queue.next_avail().wrapping_sub(left));
        for (head, len) in self.done.drain(..) {
            // The crate refuses such a head too, and says so each time.
            if head >= queue.size() {
                warn_limited!("request {head} is not in the ring and cannot be returned");
                continue;
            }
            let slot = queue.next_used() % queue.size();
            match queue.add_used(memory, head, len) {
                Ok(()) if (head, len) != (0, 0) => {
                    self.last_used = Some(UsedEntry { slot, head, len });
                }
                Ok(()) => {}
                Err(cause) => warn_limited!("cannot return request {head}: {cause}"),
            }
        }
        notify(&mut ring, memory);
    }

    /// Serves one request. Returns the used length, or `None` where nothing is written.
    fn answer(&mut self, chain: &ChainRequest, context: &mut Context<'_>) -> Option<u32> {
        self.properties.clear();
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
                    return None;
                }
                Ok(request) => self.execute(&request, chain, context),
                Err(DecodeError::UnknownType) => {
                    warn_limited!("unknown request type {:#x}", first_byte(bytes.as_slice()));
                    return None;
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
        if !scatter(context.memory, spans, &self.reply) {
            return None;
        }
        u32::try_from(chain.writable_len).ok()
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
                // A flood of one kind must not hide the others.
                static LIMITS: [LogLimit; REQUEST_KINDS] =
                    [const { LogLimit::new() }; REQUEST_KINDS];
                log_limit::log(
                    &LIMITS[request.kind() as usize],
                    log::Level::Warn,
                    module_path!(),
                    format_args!(
                        "{} refused with status {}: {error}{}",
                        request.kind().name(),
                        status.name(),
                        InDomain(request)
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
                    Mapping {
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
                iommu.unmap(domain, range)?;
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

const _: () = assert!(RequestKind::ALL.len() == REQUEST_KINDS);
const _: () = assert!(Status::ALL.len() == STATUSES);

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
        .get(kind as usize)
        .and_then(|kinds| kinds.get(status as usize))
    {
        counter.inc();
    }
}

fn first_byte(bytes: &[u8]) -> u8 {
    bytes.first().copied().unwrap_or(0)
}

/// " (domain 3)" for messages, where the request names one.
struct InDomain<'a>(&'a Request);

impl std::fmt::Display for InDomain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Request::Map { domain, .. } | Request::Unmap { domain, .. } => {
                write!(f, " (domain {domain})")
            }
            Request::Attach { .. } | Request::Detach { .. } | Request::Probe { .. } => Ok(()),
        }
    }
}
