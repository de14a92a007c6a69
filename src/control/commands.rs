//! The control protocol: a client sends one line and gets one JSON document.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::{SystemTime, UNIX_EPOCH};

use log::info;
use serde_json::{Value, json};
use signal_hook::consts::SIGTERM;

use super::answer::{VERSION, hex, refusal, versioned};
use super::client::{answer_writer, may_change, read_request};
use super::figures::Figures;
use super::hotplug;
use super::lists::{MAX_MEMBERS, endpoint, write_domains, write_endpoints, write_mappings};
use super::subjects::Subjects;
use crate::address::{Access, Iova, IovaRange};
use crate::device::guest_memory::is_backed;
use crate::faults::log::ReportedFault;
use crate::ids::{DomainId, EndpointId};
use crate::logging;
use crate::process::handover::MIN_AGE;
use crate::process::life::Inheritance;
use crate::topology::PciAddress;
use crate::warn_limited;

/// The longest request line in bytes.
const MAX_LINE: u64 = 4096;
/// The most endpoints used by the guest that `status` lists; `endpoints` lists all.
const MAX_TOUCHED: usize = 1024;
/// The most unused endpoints that `status` lists.
const MAX_UNTOUCHED: usize = 256;
/// The most domains that `status` lists.
const MAX_DOMAINS: usize = 256;

const USAGE: &str = "the request is one of: status | endpoints | domains | mappings [DOMAIN|all] \
                     [FIRST..=LAST] | translate ENDPOINT IOVA | faults | stats | log-level [LEVEL] | \
                     add-endpoint KEYS | remove-endpoint RANGE | leave LIFE CONNECTIONS, in one line of up to 4096 bytes";

/// Answers one client.
///
/// # Errors
/// The client is too slow, or has hung up.
pub(super) fn answer(stream: &UnixStream, subjects: &Subjects) -> io::Result<()> {
    let line = read_request(stream, MAX_LINE, |_| true)?;
    let line = match str::from_utf8(&line) {
        Ok(line) if line.len() as u64 <= MAX_LINE => line,
        Ok(_) => "(too long)",
        Err(_) => "(no text)",
    };
    let mut out = answer_writer(stream);
    let words: Vec<_> = line.split_whitespace().collect();
    let document = match words.as_slice() {
        ["status"] => status(subjects),
        ["stats"] => stats(subjects),
        ["faults"] => faults(subjects),
        ["endpoints"] => return write_endpoints(&mut out, subjects),
        ["domains"] => return write_domains(&mut out, subjects),
        ["mappings", which @ ..] => match parse_mappings(which) {
            Ok((only, range)) => return write_mappings(&mut out, subjects, only, range),
            Err(why) => refusal(why),
        },
        ["translate", endpoint, iova] => translate(subjects, endpoint, iova),
        ["log-level"] => json!({ "version": VERSION, "level": logging::level() }),
        [
            "log-level" | "add-endpoint" | "remove-endpoint" | "leave",
            ..,
        ] if !may_change(stream) => {
            refusal("only root and the user that the daemon runs as may change anything")
        }
        ["log-level", level] => log_level(level),
        ["add-endpoint", ..] => {
            let keys = line.trim().trim_start_matches("add-endpoint");
            hotplug::add(&subjects.hotplug, keys.trim())
        }
        ["remove-endpoint", range] => hotplug::remove(&subjects.hotplug, range),
        ["leave", life, connections] => leave(subjects, life, connections),
        _ => refusal(USAGE),
    };
    if let Some(why) = document.get("error").and_then(Value::as_str) {
        warn_limited!("a control client is refused: {why}");
    }
    writeln!(out, "{document}")?;
    out.flush()?;
    if document.get("leaving").is_some() {
        info!("the next daemon takes over");
        // As if the keeper had sent it. Only after the answer, which the process may not live to send.
        signal_hook::low_level::raise(SIGTERM)?;
    }
    Ok(())
}

/// Whether this process may leave the VM to the next one. The arguments guard against a process that began, and
/// against a VMM that connected, after the client has looked: it has compared nothing with either.
fn leave(subjects: &Subjects, asked: &str, connections: &str) -> Value {
    let life = &subjects.life;
    if parse_number(asked) != Some(life.number()) {
        return refusal("this is another life of the daemon; ask for its status again");
    }
    if life.inheritance() == Inheritance::Pending {
        return refusal("the daemon still takes over from the one before; try again");
    }
    if !life.is_kept() {
        return refusal(
            "the VM's state or connection would end with this process, because nobody keeps it",
        );
    }
    if parse_number(connections) != Some(subjects.metrics.connections.get()) {
        return refusal("a VMM has connected since then; ask for the daemon's status again");
    }
    if life.age() < MIN_AGE {
        return refusal(&format!(
            "the daemon has run for less than {} s, and its keeper gives up after starts that are too frequent; try again later",
            MIN_AGE.as_secs()
        ));
    }
    json!({ "version": VERSION, "leaving": life.number() })
}

fn stats(subjects: &Subjects) -> Value {
    versioned(Figures::gather(subjects).to_json())
}

/// All figures, and the first endpoints and domains.
fn status(subjects: &Subjects) -> Value {
    let mut document = Figures::gather(subjects).to_json();
    // The core is locked only to copy the facts. They become text afterwards.
    let iommu = subjects.iommu.lock();
    let domains: Vec<_> = iommu.domains().take(MAX_DOMAINS).collect();
    let endpoints: Vec<_> = iommu.endpoints(MAX_TOUCHED, MAX_UNTOUCHED).collect();
    let endpoint_count = iommu.topology().endpoint_count();
    let (bypass, pages, input) = (iommu.bypass(), iommu.page_sizes(), iommu.input_range());
    let driver_unknown = iommu.is_driver_unknown();
    let driver_awaited = iommu.is_driver_awaited();
    let connected = subjects.device.is_connected();
    drop(iommu);

    let domains = domains.iter().map(|d| {
        json!({
            "id": d.id.0,
            "bypass": d.bypass,
            "endpoints": d.endpoints.iter().take(MAX_MEMBERS).map(|e| e.0).collect::<Vec<_>>(),
            "mappings": d.mappings,
            "mapped_bytes": d.mapped_bytes,
        })
    });
    document.insert("domains".into(), domains.collect());
    let devices = subjects.devices();
    let endpoints = endpoints.iter().map(|state| endpoint(state, &devices));
    document.insert("endpoints".into(), endpoints.collect());
    document.insert("endpoint_count".into(), endpoint_count.into());
    // These replace the figures above, so that they are of the same moment as the domains.
    document.insert("connected".into(), connected.into());
    document.insert("driver_unknown".into(), driver_unknown.into());
    document.insert("driver_awaited".into(), driver_awaited.into());
    let tables = subjects.device.table_state();
    if let Some(word) = tables.word() {
        let text = tables.to_string();
        document.insert("acpi_tables".into(), json!({ "state": word, "text": text }));
    }
    document.insert("bypass".into(), bypass.into());
    document.insert("page_size_mask".into(), hex(pages.bits()).into());
    let handover = serde_json::to_value((subjects.handover)());
    // Fails for no value of this type.
    document.insert("handover".into(), handover.unwrap_or_default());
    let input = json!([hex(input.first().0), hex(input.last().0)]);
    document.insert("input_range".into(), input);
    versioned(document)
}

fn faults(subjects: &Subjects) -> Value {
    let log = subjects.device.faults();
    let (recent, endpoints) = (log.recent(), log.endpoints());
    let endpoints = endpoints.iter().map(|(id, of)| {
        json!({
            "id": id.0,
            "address": PciAddress::from_endpoint_id(*id).to_string(),
            "count": of.count,
            "last": fault(&of.last),
        })
    });
    let mut document = Figures::gather(subjects).to_json();
    json!({
        "version": VERSION,
        "counts": document.remove("faults"),
        "endpoints": endpoints.collect::<Vec<_>>(),
        "recent": recent.iter().map(fault).collect::<Vec<_>>(),
    })
}

fn fault(reported: &ReportedFault) -> Value {
    let since_1970 = reported.time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let age = SystemTime::now().duration_since(reported.time);
    let fault = &reported.fault;
    json!({
        "number": reported.number,
        "time_s": since_1970.as_secs_f64(),
        "age_s": age.unwrap_or_default().as_secs_f64(),
        "id": fault.endpoint.0,
        "address": PciAddress::from_endpoint_id(fault.endpoint).to_string(),
        "iova": hex(fault.address.0),
        "access": fault.access.to_string(),
        "reason": fault.reason.name(),
        "delivered": reported.delivered,
    })
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

fn log_level(level: &str) -> Value {
    match logging::set_level(level) {
        Ok(()) => {
            info!("the level of the log is {level} now");
            json!({ "version": VERSION, "level": logging::level() })
        }
        Err(why) => refusal(&why.to_string()),
    }
}

/// The arguments of `mappings`: the domain, `None` for all domains, and the range.
fn parse_mappings(words: &[&str]) -> Result<(Option<DomainId>, IovaRange), &'static str> {
    let (domain, range) = match words {
        [] => (None, None),
        [range] if range.contains("..=") => (None, Some(range)),
        [domain] => (Some(domain), None),
        [domain, range] => (Some(domain), Some(range)),
        _ => return Err("mappings takes a domain and a range, in this order, or one of them"),
    };
    let domain = match domain {
        None | Some(&"all") => None,
        Some(text) => {
            let number = parse_number(text).and_then(|n| u32::try_from(n).ok());
            Some(DomainId(number.ok_or("the domain is a number, or all")?))
        }
    };
    let Some(range) = range else {
        return Ok((domain, IovaRange::ALL));
    };
    let ends = range.split_once("..=");
    let ends = ends.and_then(|(a, b)| Some((parse_number(a)?, parse_number(b)?)));
    let range = ends.and_then(|(first, last)| IovaRange::new(Iova(first), Iova(last)));
    let range =
        range.ok_or("the range is FIRST..=LAST, such as 0x1000..=0x2fff, both ends included")?;
    Ok((domain, range))
}

/// A number in decimal, or in hexadecimal after `0x`.
fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_takes_a_domain_and_a_range() {
        let range = |first, last| IovaRange::new(Iova(first), Iova(last)).expect("a range");
        for (words, expected) in [
            (&[][..], (None, IovaRange::ALL)),
            (&["3"], (Some(DomainId(3)), IovaRange::ALL)),
            (&["all"], (None, IovaRange::ALL)),
            (&["0x10..=31"], (None, range(16, 31))),
            (&["7", "0..=0"], (Some(DomainId(7)), range(0, 0))),
            (&["all", "1..=2"], (None, range(1, 2))),
        ] {
            assert_eq!(parse_mappings(words), Ok(expected), "{words:?}");
        }
        for words in [
            &["-1"][..],
            &["4294967296"],
            &["1..=0"],
            &["..="],
            &["1..2"],
            &["1", "2"],
            &["1..=2", "1"],
            &["1", "1..=2", "3"],
        ] {
            assert!(parse_mappings(words).is_err(), "{words:?}");
        }
    }
}
