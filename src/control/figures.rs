//! All counters and gauges, gathered once for every form of answer.

use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::places::PlaceState;
use super::subjects::{DeviceReports, Subjects};
use crate::endpoints::kinds;
use crate::endpoints::status::{DeviceFigure, FigureValue};
use crate::faults::FaultReason;
use crate::iommu::{Totals, TotalsCursor};
use crate::logging;
use crate::metrics::{AdoptionCounters, Counter};
use crate::process::life::Inheritance;
use crate::process::sandbox::{self, Protection};
use crate::protocol::reply::Status;
use crate::protocol::request::RequestKind;
use crate::shadow::Registry;
use crate::topology::PciAddress;

/// The most domains or endpoints that are counted under one lock of the core.
const COUNTED_PER_LOCK: usize = 1024;

/// Gauges as of now, and counters since the daemon started.
pub(super) struct Figures {
    /// When they were gathered.
    pub gathered_at: SystemTime,
    pub name: String,
    pub connected: bool,
    /// All endpoints are blocked because the state of the guest's driver is unknown.
    pub driver_unknown: bool,
    /// The places of devices behind ports and the number of checks; `None` if nothing is compared.
    pub places: Option<(PlaceState, u64)>,
    /// Address spaces that the host has refused to destroy.
    pub condemned_spaces: usize,
    pub totals: Totals,
    /// Bytes of the page tables, and their limit.
    pub tables: (u64, u64),
    /// The number of domain IDs.
    pub max_domains: u64,
    /// Counts by kind and status.
    pub requests: Vec<(RequestKind, Vec<(Status, u64)>)>,
    pub chains_refused: u64,
    /// Upper bound in nanoseconds and number of batches of each bucket; the last bucket has no bound.
    pub batches: Vec<(Option<u64>, u64)>,
    pub batches_ns: u64,
    pub faults: Vec<(FaultReason, u64)>,
    pub faults_delivered: u64,
    pub faults_dropped: u64,
    pub faults_suppressed: u64,
    /// Requests that failed in a backend, by kind.
    pub backend_failures: Vec<(RequestKind, u64)>,
    pub wakeups: u64,
    pub polls_paid: u64,
    pub polls_paid_ns: u64,
    pub polls_unpaid: u64,
    pub connections: u64,
    pub life: LifeFigures,
    pub resets: u64,
    pub needs_reset: u64,
    pub windows_refused: u64,
    pub windows_without_memory: u64,
    pub readers: Option<ReaderFigures>,
    pub adoption: Option<AdoptionFigures>,
    pub devices: Vec<KindFigures>,
    pub limits: Vec<LimitFigures>,
    pub log_suppressed: u64,
    pub log_lost: u64,
    /// The protection by the sandbox; `None` without a sandbox.
    pub sandbox: Option<Protection>,
    pub clients_answered: u64,
    pub clients_cut_off: u64,
    pub unwritten: u64,
}

/// What this process has taken over.
pub(super) struct LifeFigures {
    pub process: u32,
    pub age: Duration,
    pub number: u64,
    pub kept: bool,
    pub inheritance: Inheritance,
    pub resumed_after: Option<Duration>,
    pub lost: Vec<String>,
    /// Messages to the keeper.
    pub keeper_messages: u64,
    /// How often the VMM had to wait for the keeper.
    pub keeper_delays: u64,
}

/// Figures of shadow readers.
pub(super) struct ReaderFigures {
    pub now: u64,
    pub registered: u64,
    pub refused: u64,
    pub refused_often: u64,
    pub killed: u64,
    pub killed_slow: u64,
    pub inherited: u64,
    pub faults: u64,
    pub faults_suppressed: u64,
}

/// Figures of devices that come from the VMM.
#[derive(Serialize)]
pub(super) struct AdoptionFigures {
    pub taken: u64,
    pub requests: u64,
    pub refused: u64,
    pub limited: u64,
    pub waits: u64,
    pub late: u64,
}

/// Figures of all devices of one kind.
pub(super) struct KindFigures {
    /// The name of the list.
    pub list: &'static str,
    /// The figures of each device, by endpoint. All devices have the same figures in the same order.
    pub devices: Vec<(PciAddress, Vec<DeviceFigure>)>,
}

/// A limit of the configuration.
pub(super) struct LimitFigures {
    /// Its name.
    pub name: &'static str,
    /// Its key in the configuration.
    pub key: &'static str,
    pub value: u64,
    /// The amount in use, if the limit bounds an amount.
    pub used: Option<u64>,
    /// How often the daemon reached it.
    pub hits: u64,
}

impl Figures {
    /// Gathers the figures. They may be of different moments, as the core is locked for a moment at a time.
    pub fn gather(subjects: &Subjects) -> Self {
        let totals = totals(subjects);
        let (tables, last_domain, driver_unknown, condemned_spaces) = {
            let iommu = subjects.iommu.lock();
            let arena = iommu.arena();
            let tables = (arena.used_bytes(), arena.limit_bytes());
            (
                tables,
                iommu.last_domain(),
                iommu.is_driver_unknown(),
                iommu.condemned_spaces(),
            )
        };
        let metrics = &subjects.metrics;
        let by_kind = |counters: &[Counter; RequestKind::COUNT]| {
            let kinds = RequestKind::ALL.into_iter().zip(counters);
            kinds.map(|(kind, c)| (kind, c.get())).collect()
        };
        let readers = subjects.readers.as_deref();
        let mut figures = Self {
            gathered_at: SystemTime::now(),
            name: subjects.name.clone(),
            connected: subjects.device.is_connected(),
            driver_unknown,
            places: subjects
                .places
                .as_ref()
                .map(|places| (places.state(), places.checks())),
            condemned_spaces,
            totals,
            tables,
            max_domains: u64::from(last_domain) + 1,
            requests: requests(subjects),
            chains_refused: metrics.chains_refused.get(),
            batches: metrics.batches.buckets().collect(),
            batches_ns: metrics.batches.sum_ns(),
            faults: FaultReason::ALL
                .into_iter()
                .zip(metrics.faults.iter().map(Counter::get))
                .collect(),
            faults_delivered: metrics.faults_delivered.get(),
            faults_dropped: metrics.faults_dropped.get(),
            faults_suppressed: metrics.faults_suppressed.get()
                + readers.map_or(0, |r| r.counters().faults_suppressed.get()),
            backend_failures: by_kind(&metrics.backend_failures),
            wakeups: metrics.wakeups.get(),
            polls_paid: metrics.polls_paid.get(),
            polls_paid_ns: metrics.polls_paid_ns.get(),
            polls_unpaid: metrics.polls_unpaid.get(),
            connections: metrics.connections.get(),
            life: LifeFigures {
                process: subjects.life.process(),
                age: subjects.life.age(),
                number: subjects.life.number(),
                kept: subjects.life.is_kept(),
                inheritance: subjects.life.inheritance(),
                resumed_after: subjects.life.resumed_after(),
                lost: subjects.life.lost(),
                keeper_messages: subjects.keeper.counters().messages.get(),
                keeper_delays: subjects.keeper.counters().delays.get(),
            },
            resets: metrics.resets.get(),
            needs_reset: metrics.needs_reset.get(),
            windows_refused: metrics.windows_refused.get(),
            windows_without_memory: metrics.windows_without_memory.get(),
            readers: readers.map(reader_figures),
            adoption: subjects.adoption.as_deref().map(adoption_figures),
            devices: device_figures(&subjects.devices()),
            limits: Vec::new(),
            log_suppressed: logging::suppressed(),
            log_lost: logging::lost(),
            sandbox: sandbox::protection(),
            clients_answered: subjects.clients.answered.get(),
            clients_cut_off: subjects.clients.cut_off.get(),
            unwritten: subjects.clients.unwritten.get(),
        };
        figures.limits = limits(subjects, &figures);
        figures
    }

    /// The figures as JSON.
    pub fn to_json(&self) -> Map<String, Value> {
        let totals = &self.totals;
        let mut fields = json!({
            "name": self.name,
            "connected": self.connected,
            "driver_unknown": self.driver_unknown,
            "places": self.places.as_ref().map(|(state, checks)| state.to_json(*checks)),
            "condemned_spaces": self.condemned_spaces,
            "domain_count": totals.domains,
            "mappings": totals.mappings,
            "mapped_bytes": totals.mapped_bytes,
            "endpoints_attached": totals.attached,
            "endpoints_quarantined": totals.quarantined,
            "arena": { "limit_bytes": self.tables.1, "used_bytes": self.tables.0 },
            "requests": self.requests_json(),
            "chains_refused": self.chains_refused,
            "batches": self.batches_json(),
            "faults": {
                "reasons": by_name(self.faults.iter().map(|(r, n)| (r.name(), *n))),
                "delivered": self.faults_delivered,
                "dropped": self.faults_dropped,
                "suppressed": self.faults_suppressed,
            },
            "backend_failures":
                by_name(self.backend_failures.iter().map(|(kind, n)| (kind.name(), *n))),
            "worker": self.worker_json(),
            "connections": self.connections,
            "life": self.life_json(),
            "resets": self.resets,
            "virtio_pci": {
                "needs_reset": self.needs_reset,
                "windows_refused": self.windows_refused,
                "windows_without_memory": self.windows_without_memory,
            },
            "readers": self.readers_json(),
            "adoption": self.adoption,
            "limits": self.limits.iter().map(limit_json).collect::<Vec<_>>(),
            "log": {
                "level": logging::level(),
                "suppressed": self.log_suppressed,
                "lost": self.log_lost,
            },
            "sandbox": self.sandbox_json(),
            "clients": {
                "answered": self.clients_answered,
                "cut_off": self.clients_cut_off,
                "metrics_unwritten": self.unwritten,
            },
        });
        for kind in &self.devices {
            fields[kind.list] = kind.devices.iter().map(device_json).collect();
        }
        match fields {
            Value::Object(fields) => fields,
            // The literal above is an object.
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => Map::new(),
        }
    }

    /// Counts by request kind and status, without those that are 0.
    fn requests_json(&self) -> Value {
        let kinds = self.requests.iter().map(|(kind, statuses)| {
            let counted = statuses.iter().filter(|(_, n)| *n > 0);
            let counts = by_name(counted.map(|(status, n)| (status.name(), *n)));
            (kind.name().to_owned(), counts)
        });
        Value::Object(kinds.collect())
    }

    fn batches_json(&self) -> Value {
        let buckets = self.batches.iter();
        json!({
            "count": self.batches.iter().map(|(_, n)| n).sum::<u64>(),
            "sum_ns": self.batches_ns,
            "buckets": buckets
                .map(|(bound, count)| json!({ "up_to_ns": bound, "count": count }))
                .collect::<Vec<_>>(),
        })
    }

    fn worker_json(&self) -> Value {
        json!({
            "wakeups": self.wakeups,
            "polls_paid": self.polls_paid,
            "polls_paid_ns": self.polls_paid_ns,
            "polls_unpaid": self.polls_unpaid,
        })
    }

    fn sandbox_json(&self) -> Value {
        let files = self.sandbox.map(|protection| protection.files.name());
        json!({
            "filters": self.sandbox.is_some(),
            "landlock": files.unwrap_or("off"),
            "absent": self.sandbox.map(Protection::absent).unwrap_or_default(),
        })
    }

    fn life_json(&self) -> Value {
        let life = &self.life;
        let reason = match &life.inheritance {
            Inheritance::Refused(reason) => Some(reason),
            Inheritance::None | Inheritance::Pending | Inheritance::TakenOver => None,
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": life.process,
            "age_s": life.age.as_secs_f64(),
            "number": life.number,
            "kept": life.kept,
            "state": life.inheritance.name(),
            "reason": reason,
            "resumed_after_ms": life.resumed_after.map(|after| after.as_secs_f64() * 1e3),
            "lost": life.lost,
            "keeper_messages": life.keeper_messages,
            "keeper_delays": life.keeper_delays,
        })
    }

    fn readers_json(&self) -> Value {
        let Some(readers) = &self.readers else {
            return Value::Null;
        };
        json!({
            "now": readers.now,
            "registered": readers.registered,
            "refused": readers.refused,
            "refused_often": readers.refused_often,
            "killed": readers.killed,
            "killed_slow": readers.killed_slow,
            "inherited": readers.inherited,
            "faults": readers.faults,
            "faults_suppressed": readers.faults_suppressed,
        })
    }
}

fn totals(subjects: &Subjects) -> Totals {
    let mut totals = Totals::default();
    let mut next = Some(TotalsCursor::Domain(crate::ids::DomainId(0)));
    while let Some(from) = next {
        let iommu = subjects.iommu.lock();
        next = iommu.add_totals(&mut totals, from, COUNTED_PER_LOCK);
    }
    totals
}

fn requests(subjects: &Subjects) -> Vec<(RequestKind, Vec<(Status, u64)>)> {
    let kinds = RequestKind::ALL.into_iter().zip(&subjects.metrics.requests);
    kinds
        .map(|(kind, counters)| {
            let counts = counters.iter().map(Counter::get);
            let counts = Status::ALL.into_iter().zip(counts);
            (kind, counts.collect())
        })
        .collect()
}

fn reader_figures(registry: &Registry) -> ReaderFigures {
    let counters = registry.counters();
    ReaderFigures {
        now: registry.reader_count() as u64,
        registered: counters.registered.get(),
        refused: counters.refused.get(),
        refused_often: counters.refused_often.get(),
        killed: counters.killed.get(),
        killed_slow: counters.killed_slow.get(),
        inherited: counters.inherited.get(),
        faults: counters.faults.get(),
        faults_suppressed: counters.faults_suppressed.get(),
    }
}

fn adoption_figures(counters: &AdoptionCounters) -> AdoptionFigures {
    AdoptionFigures {
        taken: counters.taken.get(),
        requests: counters.requests.get(),
        refused: counters.refused.get(),
        limited: counters.limited.get(),
        waits: counters.waits.get(),
        late: counters.late.get(),
    }
}

fn device_figures(devices: &DeviceReports) -> Vec<KindFigures> {
    let kinds = kinds::status_names().map(|names| {
        let devices = devices.iter();
        let devices = devices.filter(|(_, device)| device.names == Some(names));
        let devices = devices.filter_map(|(endpoint, device)| {
            let status = device.status.as_ref()?;
            Some((PciAddress::from_endpoint_id(*endpoint), status.figures()))
        });
        KindFigures {
            list: names.list,
            devices: devices.collect(),
        }
    });
    kinds.collect()
}

fn device_json((endpoint, figures): &(PciAddress, Vec<DeviceFigure>)) -> Value {
    let mut fields = json!({
        "id": endpoint.endpoint_id().0,
        "address": endpoint.to_string(),
    });
    for figure in figures {
        fields[figure.field] = match figure.value {
            FigureValue::Flag(holds) => holds.into(),
            FigureValue::Count(count) => count.into(),
        };
    }
    fields
}

fn limits(subjects: &Subjects, figures: &Figures) -> Vec<LimitFigures> {
    let metrics = &subjects.metrics;
    let mut limits = vec![
        LimitFigures {
            name: "arena_bytes",
            key: "arena-limit",
            value: figures.tables.1,
            used: Some(figures.tables.0),
            hits: metrics.arena_full.get(),
        },
        LimitFigures {
            name: "domains",
            key: "domains",
            value: figures.max_domains,
            used: Some(figures.totals.domains),
            hits: metrics.domain_beyond.get(),
        },
        LimitFigures {
            name: "batch",
            key: "batch",
            value: subjects.limits.batch as u64,
            used: None,
            hits: metrics.batch_full.get(),
        },
        LimitFigures {
            name: "fault_rate",
            key: "fault-rate",
            value: subjects.limits.fault_rate.into(),
            used: None,
            hits: figures.faults_suppressed,
        },
    ];
    if let Some(readers) = &subjects.readers {
        limits.push(LimitFigures {
            name: "readers",
            key: "readers.limit",
            value: readers.limits().readers as u64,
            used: Some(readers.most_readers() as u64),
            hits: readers.counters().refused_full.get(),
        });
    }
    limits
}

fn limit_json(limit: &LimitFigures) -> Value {
    json!({
        "name": limit.name,
        "key": limit.key,
        "value": limit.value,
        "used": limit.used,
        "hits": limit.hits,
    })
}

fn by_name(counts: impl Iterator<Item = (&'static str, u64)>) -> Value {
    let fields = counts.map(|(name, count)| (name.to_owned(), count.into()));
    Value::Object(fields.collect())
}
