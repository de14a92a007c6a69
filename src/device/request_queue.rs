//! The request queue: chains to requests, requests to the core, outcomes to the used ring.

use log::debug;
use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, ChainRequest, Span, scatter};
use crate::address::{Access, IovaRange, Mapping};
use crate::iommu::{Iommu, RequestError};
use crate::metrics::Metrics;
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

/// What a pass over the ring came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Chains were served; there may be more.
    Served,
    /// Nothing was available.
    Empty,
    /// The ring is stopped, disabled, or beyond use until it is started anew.
    Stopped,
}

/// The state of the queue between passes. Buffers are kept, so that a pass allocates nothing.
#[derive(Debug, Default)]
pub struct RequestQueue {
    /// The driver has made the ring unusable.
    pub broken: bool,
    /// The last entry written to the used ring: descriptor index and length.
    pub last_used: Option<(u16, u32)>,
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
        match self.take_chains(vring, context.memory) {
            Ok(true) => {}
            Ok(false) => return Pass::Stopped,
            Err(cause) => {
                self.broken = true;
                warn_limited!(
                    "the request ring is left alone until the driver starts it anew: {cause}"
                );
                return Pass::Stopped;
            }
        }
        if self.chains.is_empty() {
            return Pass::Empty;
        }
        let chains = std::mem::take(&mut self.chains);
        for chain in &chains {
            let used = match &chain.request {
                Some(request) => self.answer(request, context),
                None => None,
            };
            if used.is_none() {
                context.metrics.chains_refused.inc();
            }
            self.done.push((chain.head, used.unwrap_or(0)));
        }
        self.chains = chains;
        self.chains.clear();
        self.spans.clear();
        self.publish(vring, context.memory);
        Pass::Served
    }

    /// Takes chains off the ring; `Ok(false)` where the ring is not running.
    fn take_chains(
        &mut self,
        vring: &VringRwLock,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, virtio_queue::Error> {
        let mut ring = vring.get_mut();
        if !ring.is_enabled() || !ring.get_queue().ready() {
            return Ok(false);
        }
        let queue = ring.get_queue_mut();
        let size = queue.size();
        for chain in queue.iter(memory)?.take(MAX_BATCH) {
            let chain = Chain::read(memory, chain, size, &mut self.spans);
            self.chains.push(chain);
        }
        Ok(true)
    }

    fn publish(&mut self, vring: &VringRwLock, memory: &GuestMemoryMmap) {
        let mut ring = vring.get_mut();
        for (head, len) in self.done.drain(..) {
            match ring.get_queue_mut().add_used(memory, head, len) {
                Ok(()) => self.last_used = Some((head, len)),
                Err(cause) => warn_limited!("cannot return request {head}: {cause}"),
            }
        }
        match ring.needs_notification() {
            Ok(false) => {}
            Ok(true) => {
                if let Err(cause) = ring.signal_used_queue() {
                    warn_limited!("cannot notify the driver: {cause}");
                }
            }
            Err(cause) => warn_limited!("cannot tell whether to notify the driver: {cause}"),
        }
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
                warn_limited!(
                    "{} refused with status {}: {error}{}",
                    request.kind().name(),
                    status.name(),
                    InDomain(request)
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
