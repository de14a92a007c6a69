//! The control socket: what the IOMMU holds, for operators and tests, and which endpoints it has.
//!
//! One request per connection: a line, answered with one JSON document and the end of the stream.
//!
//! | line | answer |
//! |---|---|
//! | `status` | endpoints, domains, counters |
//! | `mappings`, `mappings DOMAIN` | every live mapping |
//! | `translate ENDPOINT IOVA` | where one byte leads, and whether there is memory |
//! | `add-endpoint KEYS` | the endpoint that was added; see `Config::with_endpoint` for the keys |
//! | `remove-endpoint RANGE` | the endpoints that were removed |

mod hotplug;

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;
use parking_lot::Mutex;
use serde_json::{Value, json};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::address::{Access, Iova, Mapping};
use crate::backends::vfio_user::{EmulatedState, Watch};
use crate::device::Device;
use crate::guest_memory::is_backed;
use crate::hotplug::Hotplug;
use crate::ids::{DomainId, EndpointId};
use crate::iommu::{Dma, EndpointState, Iommu};
use crate::metrics::Metrics;
use crate::protocol::reply::Status;
use crate::protocol::request::RequestKind;
use crate::sandbox::{self, Role};
use crate::shadow::Registry;
use crate::socket::{SocketFile, bind};
use crate::topology::PciAddress;
use crate::warn_limited;
use crate::watchdog::Pulse;

/// The control thread's events: a client, the end, the watchdog's question.
const CLIENT: u64 = 0;
const END: u64 = 1;
const PULSE: u64 = 2;
/// Version of the answers' format.
const VERSION: u32 = 1;
/// The longest request line in bytes.
const MAX_LINE: u64 = 4096;
/// How long a client may take to send its line.
const QUESTION_PATIENCE: Duration = Duration::from_secs(2);
/// How long a client may take to take its answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How long the socket rests where a client cannot be accepted.
const BACK_OFF: Duration = Duration::from_millis(100);
/// Mappings read while the core is locked once.
const MAPPINGS_PER_LOCK: usize = 512;
/// Endpoints that `status` lists though the guest has not touched them.
const MAX_UNTOUCHED: usize = 256;

/// What the answers are made from.
#[derive(Clone)]
pub struct Subjects {
    /// The core.
    pub iommu: Arc<Mutex<Iommu>>,
    /// The device in front of it.
    pub device: Arc<Device>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Processes that follow the page tables, where there are such endpoints.
    pub readers: Option<Arc<Registry>>,
    /// The endpoints' devices, which may come and go.
    pub hotplug: Arc<Hotplug>,
}

/// The thread that answers; dropping it ends it and removes the socket.
pub struct ControlServer {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    file: Arc<SocketFile>,
    pulse: Arc<Pulse>,
}

/// What ends the thread, wherever it is.
struct Stop {
    event: EventFd,
    /// The client that is being answered.
    client: Mutex<Option<UnixStream>>,
}

impl ControlServer {
    /// Listens at `path` and answers until dropped.
    ///
    /// # Errors
    /// Where the socket cannot be made.
    pub fn start(path: &Path, subjects: Subjects) -> io::Result<Self> {
        let (listener, file) = bind(path)?;
        let stop = Arc::new(Stop {
            event: EventFd::new(EFD_CLOEXEC)?,
            client: Mutex::new(None),
        });
        let epoll = Epoll::new()?;
        let pulse = Arc::new(Pulse::new("the control socket")?);
        for (fd, id) in [
            (listener.as_raw_fd(), CLIENT),
            (stop.event.as_raw_fd(), END),
            (pulse.event(), PULSE),
        ] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id))?;
        }
        let (watched, asked) = (stop.clone(), pulse.clone());
        let thread = sandbox::spawn(Role::Control, move || {
            serve(&listener, &epoll, &watched, &asked, &subjects);
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
            file: Arc::new(file),
            pulse,
        })
    }

    /// What its thread answers the watchdog with, between clients.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// The socket's file.
    pub fn file(&self) -> Arc<SocketFile> {
        self.file.clone()
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        if let Err(cause) = self.stop.event.write(1) {
            warn!("cannot stop the control thread: {cause}");
            return;
        }
        if let Some(client) = &*self.stop.client.lock() {
            // It may be gone already.
            let _ = client.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the control thread has panicked");
        }
        self.file.remove();
    }
}

fn serve(listener: &UnixListener, epoll: &Epoll, stop: &Stop, pulse: &Pulse, subjects: &Subjects) {
    let mut events = [EpollEvent::default(); 3];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Ok(ready) => ready,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
            Err(cause) => {
                warn!("the control socket is closed: {cause}");
                return;
            }
        };
        let is_there = |id| events.iter().take(ready).any(|event| event.data() == id);
        if is_there(END) {
            return;
        }
        pulse.answer();
        if !is_there(CLIENT) {
            continue;
        }
        let client = listener.accept().and_then(|(stream, _)| {
            *stop.client.lock() = Some(stream.try_clone()?);
            Ok(stream)
        });
        match client {
            Ok(stream) => {
                if let Err(cause) = answer(&stream, subjects) {
                    warn_limited!("a control client got no answer: {cause}");
                }
                *stop.client.lock() = None;
            }
            Err(cause) => {
                warn_limited!("cannot accept a control client: {cause}");
                std::thread::sleep(BACK_OFF);
            }
        }
    }
}

/// A stream with an end to all patience, however the client divides it up.
struct Bounded<'a> {
    stream: &'a UnixStream,
    until: Instant,
}

impl Bounded<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn answer(stream: &UnixStream, subjects: &Subjects) -> io::Result<()> {
    let bounded = |patience| Bounded {
        stream,
        until: Instant::now() + patience,
    };
    let mut line = Vec::new();
    BufReader::new(bounded(QUESTION_PATIENCE).take(MAX_LINE + 1)).read_until(b'\n', &mut line)?;
    let mut out = BufWriter::new(bounded(ANSWER_PATIENCE));
    let line = match str::from_utf8(&line) {
        Ok(line) if line.len() as u64 <= MAX_LINE => line,
        Ok(_) => "(too long)",
        Err(_) => "(no text)",
    };
    let words: Vec<_> = line.split_whitespace().collect();
    let document = match words.as_slice() {
        ["add-endpoint", ..] => {
            let keys = line.trim().trim_start_matches("add-endpoint");
            hotplug::add(&subjects.hotplug, keys.trim())
        }
        ["remove-endpoint", range] => hotplug::remove(&subjects.hotplug, range),
        ["status"] => status(subjects),
        ["mappings"] => return write_mappings(&mut out, subjects, None),
        ["mappings", domain] => match parse_number(domain).and_then(|n| u32::try_from(n).ok()) {
            Some(id) => return write_mappings(&mut out, subjects, Some(DomainId(id))),
            None => refusal("the domain is a number"),
        },
        ["translate", endpoint, iova] => translate(subjects, endpoint, iova),
        _ => refusal(
            "the request is one of: status | mappings [DOMAIN] | translate ENDPOINT IOVA | \
             add-endpoint KEYS | remove-endpoint RANGE, in one line of up to 4096 bytes",
        ),
    };
    if let Some(why) = document.get("error").and_then(Value::as_str) {
        warn_limited!("a control client is refused: {why}");
    }
    writeln!(out, "{document}")?;
    out.flush()
}

fn refusal(message: &str) -> Value {
    json!({ "version": VERSION, "error": message })
}

fn status(subjects: &Subjects) -> Value {
    // Facts first, text later: the core is locked for as long as it takes to copy them.
    let iommu = subjects.iommu.lock();
    let domains: Vec<_> = iommu.domains().collect();
    let endpoints: Vec<_> = iommu.endpoints(MAX_UNTOUCHED).collect();
    let endpoint_count = iommu.topology().endpoint_count();
    let (bypass, pages, input) = (iommu.bypass(), iommu.page_sizes(), iommu.input_range());
    let arena = (iommu.arena().limit_bytes(), iommu.arena().used_bytes());
    let connected = subjects.device.is_connected();
    drop(iommu);

    let domains: Vec<_> = domains
        .iter()
        .map(|d| {
            json!({
                "id": d.id.0,
                "bypass": d.bypass,
                "endpoints": d.endpoints.iter().map(|e| e.0).collect::<Vec<_>>(),
                "mappings": d.mappings,
                "mapped_bytes": d.mapped_bytes,
            })
        })
        .collect();
    let (hosts, watches) = (subjects.hotplug.hosts(), subjects.hotplug.watches());
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|state| endpoint(state, hosts.get(&state.id)))
        .collect();
    let metrics = &subjects.metrics;
    json!({
        "version": VERSION,
        "connected": connected,
        "bypass": bypass,
        "page_size_mask": hex(pages.bits()),
        "input_range": [hex(input.first().0), hex(input.last().0)],
        "endpoint_count": endpoint_count,
        "endpoints": endpoints,
        "domains": domains,
        "requests": requests(metrics),
        "arena": {
            "limit_bytes": arena.0,
            "used_bytes": arena.1,
        },
        "faults": {
            "delivered": metrics.faults_delivered.get(),
            "dropped": metrics.faults_dropped.get(),
        },
        "readers": subjects.readers.as_deref().map(readers),
        "emulated": watches.iter().map(Watch::state).map(emulated).collect::<Vec<_>>(),
        "worker": {
            "wakeups": metrics.wakeups.get(),
            "polls_paid": metrics.polls_paid.get(),
            "polls_paid_ns": metrics.polls_paid_ns.get(),
            "polls_unpaid": metrics.polls_unpaid.get(),
        },
        "chains_refused": metrics.chains_refused.get(),
        "connections": metrics.connections.get(),
        "resets": metrics.resets.get(),
    })
}

fn endpoint(state: &EndpointState, host: Option<&String>) -> Value {
    json!({
        "id": state.id.0,
        "address": PciAddress::from_endpoint_id(state.id).to_string(),
        "state": if state.quarantined {
            "quarantined"
        } else if state.domain.is_some() {
            "attached"
        } else {
            "unattached"
        },
        "dma": match state.dma {
            Dma::Translated => "translated",
            Dma::Bypass => "bypass",
            Dma::Blocked => "blocked",
        },
        "domain": state.domain.map(|d| d.0),
        "host": host,
    })
}

fn readers(registry: &Registry) -> Value {
    let counters = registry.counters();
    json!({
        "now": registry.reader_count(),
        "registered": counters.registered.get(),
        "refused": counters.refused.get(),
        "killed": counters.killed.get(),
        "faults": counters.faults.get(),
        "faults_suppressed": counters.faults_suppressed.get(),
    })
}

fn emulated(state: EmulatedState) -> Value {
    json!({
        "id": state.endpoint.0,
        "address": PciAddress::from_endpoint_id(state.endpoint).to_string(),
        "client": state.ends.client,
        "server": state.ends.server,
        "windows": state.windows,
        "refused": state.refused,
        "cut_offs": state.ends.cut_offs,
    })
}

/// Counters by request kind and status; statuses that never occurred are left out.
fn requests(metrics: &Metrics) -> Value {
    let mut kinds = serde_json::Map::new();
    for (kind, counters) in RequestKind::ALL.iter().zip(&metrics.requests) {
        let mut statuses = serde_json::Map::new();
        for (status, counter) in Status::ALL.iter().zip(counters) {
            if counter.get() > 0 {
                statuses.insert(status.name().into(), counter.get().into());
            }
        }
        kinds.insert(kind.name().into(), statuses.into());
    }
    kinds.into()
}

/// Writes all mappings, a piece at a time, so that the core is never locked for long and never
/// while the client is waited for. Mappings that change meanwhile may be shown either way.
fn write_mappings(
    out: &mut impl Write,
    subjects: &Subjects,
    only: Option<DomainId>,
) -> io::Result<()> {
    let domains: Vec<_> = subjects
        .iommu
        .lock()
        .domain_ids()
        .filter(|id| only.is_none_or(|o| o == *id))
        .collect();
    write!(out, "{{\"version\":{VERSION},\"domains\":[")?;
    for (index, &id) in domains.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        write!(out, "{comma}{{\"id\":{},\"mappings\":[", id.0)?;
        let mut next = Some(Iova(0));
        let mut comma = "";
        while let Some(from) = next {
            let piece: Vec<Mapping> = subjects
                .iommu
                .lock()
                .mappings(id, from)
                .take(MAPPINGS_PER_LOCK)
                .collect();
            next = match piece.last() {
                Some(last) if piece.len() == MAPPINGS_PER_LOCK => {
                    last.range.last().0.checked_add(1).map(Iova)
                }
                _ => None,
            };
            for mapping in &piece {
                let mapping = json!({
                    "first": hex(mapping.range.first().0),
                    "last": hex(mapping.range.last().0),
                    "gpa": hex(mapping.gpa.0),
                    "access": mapping.access.to_string(),
                    "mmio": mapping.mmio,
                });
                write!(out, "{comma}{mapping}")?;
                comma = ",";
            }
        }
        write!(out, "]}}")?;
    }
    writeln!(out, "]}}")?;
    out.flush()
}

fn translate(subjects: &Subjects, endpoint: &str, iova: &str) -> Value {
    let endpoint = endpoint
        .parse::<PciAddress>()
        .ok()
        .map(PciAddress::endpoint_id)
        .or_else(|| {
            parse_number(endpoint)
                .and_then(|n| u32::try_from(n).ok())
                .map(EndpointId)
        });
    let (Some(endpoint), Some(iova)) = (endpoint, parse_number(iova)) else {
        return refusal("translate takes a PCI address or an endpoint number, and an address");
    };
    let translated = subjects
        .iommu
        .lock()
        .translate(endpoint, Iova(iova), Access::NONE);
    match translated {
        Ok(t) => json!({
            "version": VERSION,
            "result": "ok",
            "gpa": hex(t.gpa.0),
            "last": hex(t.contiguous_last.0),
            "access": t.access.to_string(),
            "mmio": t.mmio,
            "backed": subjects.device.memory().is_some_and(|m| is_backed(&m, t.gpa, 1)),
        }),
        Err(fault) => json!({
            "version": VERSION,
            "result": "fault",
            "reason": fault.reason.name(),
        }),
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// A number in decimal, or in hexadecimal after `0x`.
fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
