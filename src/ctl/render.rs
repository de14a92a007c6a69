//! Answers as text for the operator.

use std::fmt::{Result, Write};

use serde_json::Value;

use super::fields::{items, note, number, text};
use super::{hotplug, places};
use crate::args::Question;

/// The answer to `question` as text for the operator.
pub fn render(question: &Question, answer: &Value) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = match question {
        Question::Status => status(&mut out, answer),
        Question::Endpoints => endpoints(&mut out, answer),
        Question::Domains => domains(&mut out, answer),
        Question::Mappings { .. } => mappings(&mut out, answer),
        Question::Faults => faults(&mut out, answer),
        Question::Translate { .. } => translation(&mut out, answer),
        Question::Stats | Question::Watch { .. } => stats(&mut out, answer),
        Question::LogLevel { .. } => writeln!(out, "{}", text(&answer["level"])),
        Question::AddEndpoint { .. } => hotplug::render_added(&mut out, answer),
        Question::RemoveEndpoint { .. } => hotplug::render_removed(&mut out, answer),
    };
    out
}

fn status(out: &mut String, answer: &Value) -> Result {
    let connected = if answer["connected"] == true {
        "a VM is connected"
    } else {
        "no VM is connected"
    };
    writeln!(
        out,
        "{}: {connected}; endpoints without a domain are {}",
        text(&answer["name"]),
        if answer["bypass"] == true {
            "in bypass mode"
        } else {
            "blocked"
        }
    )?;
    if answer["driver_unknown"] == true {
        writeln!(
            out,
            "ALL ENDPOINTS ARE BLOCKED: the guest's driver has domains that this daemon does not have, because the \
             daemon was restarted or the VM was restored; reset the VM"
        )?;
    }
    if answer["driver_awaited"] == true {
        writeln!(
            out,
            "all endpoints are blocked: the VMM has shared memory, and the guest's driver has not started yet"
        )?;
    }
    places::render(out, &answer["places"])?;
    life(out, &answer["life"])?;
    sandbox(out, &answer["sandbox"])?;
    if let Some(tables) = answer["acpi_tables"]["text"].as_str() {
        writeln!(out, "ACPI tables: {tables}")?;
    }
    let arena = &answer["arena"];
    writeln!(
        out,
        "page tables: {} KiB of at most {} KiB",
        number(&arena["used_bytes"]) / 1024,
        number(&arena["limit_bytes"]) / 1024
    )?;

    writeln!(out, "\nendpoints ({} in all)", answer["endpoint_count"])?;
    endpoints(out, answer)?;
    writeln!(out, "\ndomains ({} in all)", answer["domain_count"])?;
    domains(out, answer)?;
    devices(out, answer)?;
    writeln!(out, "\nsince the daemon was started")?;
    counts(out, answer)
}

/// What the process has taken over from the one before. A daemon of an older version does not report it.
fn life(out: &mut String, life: &Value) -> Result {
    let number = life["number"].as_u64().unwrap_or(1);
    match life["state"].as_str() {
        Some("taken-over") => {
            write!(
                out,
                "life {number}: the state of the daemon before was taken over"
            )?;
            if let Some(after) = life["resumed_after_ms"].as_f64() {
                write!(
                    out,
                    ", and the guest was answered {after:.1} ms after the start"
                )?;
            }
            writeln!(out)?;
        }
        Some("taking-over") => writeln!(
            out,
            "life {number}: the state of the daemon before is being taken over, and requests wait"
        )?,
        Some("refused") => writeln!(
            out,
            "THE STATE OF THE DAEMON BEFORE WAS REFUSED: {}",
            text(&life["reason"])
        )?,
        _ => {}
    }
    for lost in items(&life["lost"]) {
        writeln!(out, "NOT TAKEN OVER: {}", text(lost))?;
    }
    if life["kept"] == false {
        writeln!(
            out,
            "the VM's state ends with this process: nobody keeps it, or the VMM's connection (see the log); a daemon that is \
             started by systemd or `launch` survives its end"
        )?;
    }
    Ok(())
}

/// The protection that is absent. A daemon of an older version does not report it.
fn sandbox(out: &mut String, sandbox: &Value) -> Result {
    if sandbox["filters"] == false {
        writeln!(
            out,
            "NO SANDBOX: the daemon runs with --no-sandbox, which is for debugging only"
        )?;
    }
    if sandbox["landlock"] == "missing" {
        let absent: Vec<_> = items(&sandbox["absent"]).iter().map(text).collect();
        writeln!(
            out,
            "NO LANDLOCK in this kernel: {}; use a kernel with Landlock",
            absent.join("; ")
        )?;
    }
    Ok(())
}

fn endpoints(out: &mut String, answer: &Value) -> Result {
    for endpoint in items(&answer["endpoints"]) {
        let domain = match endpoint["domain"].as_u64() {
            Some(id) => format!("domain {id}"),
            None => "no domain".into(),
        };
        let host = match endpoint["host"].as_str() {
            Some(host) => format!("  host device {host}{}", host_iommu(endpoint)),
            None => String::new(),
        };
        // The core's word for its DMA is not true yet.
        let dma = if endpoint["taken_over"] == false {
            "VMM's"
        } else {
            text(&endpoint["dma"])
        };
        let exported = note(&endpoint["exported"], ", exported");
        let emulated = note(&endpoint["emulated"], "  emulated");
        writeln!(
            out,
            "  {}  {:<11} {:<10} {domain}{host}{exported}{emulated}",
            text(&endpoint["address"]),
            text(&endpoint["state"]),
            dma,
        )?;
    }
    Ok(())
}

/// The name of the host's IOMMU behind an endpoint, and what the guest's rights mean to it.
fn host_iommu(endpoint: &Value) -> String {
    let iommu = &endpoint["host_iommu"];
    let Some(name) = iommu["name"].as_str() else {
        return String::new();
    };
    let note = match iommu["write_only"].as_str() {
        Some("readable") => ", which lets it read write-only mappings",
        Some("unknown") => ", which may let it read write-only mappings",
        Some(_) | None => "",
    };
    format!(" behind {name}{note}")
}

fn domains(out: &mut String, answer: &Value) -> Result {
    for domain in items(&answer["domains"]) {
        let kind = if domain["bypass"] == true {
            "bypass".into()
        } else {
            format!(
                "{} mappings, {} KiB",
                domain["mappings"],
                number(&domain["mapped_bytes"]) / 1024
            )
        };
        let members = domain["endpoint_count"]
            .as_u64()
            .unwrap_or(items(&domain["endpoints"]).len() as u64);
        writeln!(
            out,
            "  {:<5}  {members} endpoints, {kind}",
            domain["id"].to_string(),
        )?;
    }
    Ok(())
}

fn faults(out: &mut String, answer: &Value) -> Result {
    let counts = &answer["counts"];
    writeln!(
        out,
        "{}; {} delivered, {} dropped, {} of them by the rate limit",
        pairs(&counts["reasons"]),
        counts["delivered"],
        counts["dropped"],
        counts["suppressed"],
    )?;
    for endpoint in items(&answer["endpoints"]) {
        write!(
            out,
            "\n  {}: {}, the last one",
            text(&endpoint["address"]),
            endpoint["count"]
        )?;
        fault(out, &endpoint["last"])?;
    }
    if !items(&answer["recent"]).is_empty() {
        writeln!(out, "\n\nlatest faults")?;
    }
    for one in items(&answer["recent"]) {
        write!(
            out,
            "  {:<6} {}",
            one["number"].to_string(),
            text(&one["address"])
        )?;
        fault(out, one)?;
        writeln!(out)?;
    }
    Ok(())
}

fn fault(out: &mut String, fault: &Value) -> Result {
    write!(
        out,
        " {:.1} s ago: {} at {}, {}{}",
        fault["age_s"].as_f64().unwrap_or(0.0),
        text(&fault["access"]),
        text(&fault["iova"]),
        text(&fault["reason"]),
        if fault["delivered"] == true {
            ""
        } else {
            ", not delivered"
        }
    )
}

fn stats(out: &mut String, answer: &Value) -> Result {
    writeln!(
        out,
        "{}: {} domains, {} mappings of {} KiB, {} endpoints attached, {} quarantined",
        text(&answer["name"]),
        answer["domain_count"],
        answer["mappings"],
        number(&answer["mapped_bytes"]) / 1024,
        answer["endpoints_attached"],
        answer["endpoints_quarantined"],
    )?;
    writeln!(out, "\nsince the daemon was started")?;
    counts(out, answer)?;
    writeln!(out, "\nbatches of requests, by duration")?;
    let batches = &answer["batches"];
    let all = number(&batches["count"]).max(1);
    let mut so_far = 0;
    for bucket in items(&batches["buckets"]) {
        let count = number(&bucket["count"]);
        so_far += count;
        if count == 0 {
            continue;
        }
        let bound = match bucket["up_to_ns"].as_u64() {
            Some(ns) => format!("up to {:>6} us", ns / 1000),
            None => "longer".to_owned(),
        };
        let percent = so_far.saturating_mul(1000) / all;
        writeln!(
            out,
            "  {bound:<16} {count:>12}  {:>3}.{} %",
            percent / 10,
            percent % 10
        )?;
    }
    let mean = number(&batches["sum_ns"]) / all;
    writeln!(out, "  mean {mean} ns")?;
    devices(out, answer)?;
    writeln!(out, "\nlimits")?;
    for limit in items(&answer["limits"]) {
        let used = match limit["used"].as_u64() {
            Some(used) => format!("{used} used"),
            None => String::new(),
        };
        writeln!(
            out,
            "  {:<14} {:>14}  {used:<22} hit {} times",
            text(&limit["key"]),
            limit["value"].to_string(),
            limit["hits"],
        )?;
    }
    Ok(())
}

/// The counters that tell whether the daemon is in order.
fn counts(out: &mut String, answer: &Value) -> Result {
    for (kind, statuses) in answer["requests"].as_object().into_iter().flatten() {
        writeln!(out, "  {kind:<7} {}", pairs(statuses))?;
    }
    writeln!(
        out,
        "  chains returned unanswered: {}\n  requests failed by a backend: {}\n  worker: woken {} times; \
         polled {} times with success, {} without\n  faults: {} delivered, {} dropped\n  \
         connections: {}, device resets: {}\n  messages to the keeper: {}, waits of the VMM for it: {}\n  messages not logged: {}, lost: {}; control clients: {} answered, \
         {} cut off",
        answer["chains_refused"],
        pairs(&answer["backend_failures"]),
        answer["worker"]["wakeups"],
        answer["worker"]["polls_paid"],
        answer["worker"]["polls_unpaid"],
        answer["faults"]["delivered"],
        answer["faults"]["dropped"],
        answer["connections"],
        answer["resets"],
        number(&answer["life"]["keeper_messages"]),
        number(&answer["life"]["keeper_delays"]),
        answer["log"]["suppressed"],
        number(&answer["log"]["lost"]),
        answer["clients"]["answered"],
        answer["clients"]["cut_off"],
    )
}

/// The counts in an object, without those that are 0, such as "ok 3, noent 1".
fn pairs(counts: &Value) -> String {
    let pairs: Vec<_> = counts
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, count)| **count != 0)
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    if pairs.is_empty() {
        "none".into()
    } else {
        pairs.join(", ")
    }
}

/// Emulated and exported devices, shadow readers, and devices that come from the VMM, if there are any.
fn devices(out: &mut String, answer: &Value) -> Result {
    if answer["adoption"].is_object() {
        writeln!(
            out,
            "\ndevices from the VMM\n  {}",
            pairs(&answer["adoption"])
        )?;
    }
    let emulated = items(&answer["emulated"]);
    if !emulated.is_empty() || !items(&answer["exports"]).is_empty() {
        writeln!(out, "\ndevices over vfio-user")?;
    }
    let connection = |end: &Value| {
        if end == true {
            "is connected"
        } else {
            "is not connected"
        }
    };
    for device in emulated {
        writeln!(
            out,
            "  {}  emulated: the VMM {}, the server {}; {} windows, {} accesses refused, {} times cut off, \
             {} of them for slow replies, {} for deadline-ms ({}), {} for total-deadline-ms ({}), {} for \
             connect-deadline-ms ({})",
            text(&device["address"]),
            connection(&device["client"]),
            connection(&device["server"]),
            device["windows"],
            device["refused"],
            device["cut_offs"],
            device["slow_cut_offs"],
            device["deadline_cut_offs"],
            device["deadline_ms"],
            device["total_deadline_cut_offs"],
            device["total_deadline_ms"],
            device["connect_deadline_cut_offs"],
            device["connect_deadline_ms"],
        )?;
    }
    for device in emulated
        .iter()
        .filter(|device| device["windows_missing"].as_u64().is_some_and(|n| n > 0))
    {
        writeln!(
            out,
            "  {}  {} windows are missing at the server, which takes {}; {} were refused so far",
            text(&device["address"]),
            device["windows_missing"],
            device["windows_limit"],
            device["windows_refused"],
        )?;
    }
    for device in emulated.iter().filter(|d| d["keeps_memory"] == true) {
        writeln!(
            out,
            "  {}  a former server has not hung up and may still map guest memory; {} memory slots were removed meanwhile",
            text(&device["address"]),
            device["kept_slots"],
        )?;
    }
    for device in items(&answer["exports"]) {
        writeln!(
            out,
            "  {}  exported: a client {}; {} clients so far, {} cut off{}{}",
            text(&device["address"]),
            connection(&device["client"]),
            device["clients"],
            device["cut_offs"],
            note(
                &device["held"],
                "; a process of a former client has, or may have, its descriptor"
            ),
            note(
                &device["leftover"],
                "; not reset: it has, or may have, the state of a client that has gone"
            ),
        )?;
    }
    let readers = &answer["readers"];
    if !readers.is_null() {
        writeln!(
            out,
            "\nshadow readers: {} now, {} in all, {} refused, {} killed ({} for slow accesses), {} inherited\n  \
             faults: {} passed on, {} suppressed",
            readers["now"],
            readers["registered"],
            readers["refused"],
            readers["killed"],
            readers["killed_slow"],
            readers["inherited"],
            readers["faults"],
            readers["faults_suppressed"],
        )?;
    }
    Ok(())
}

fn mappings(out: &mut String, answer: &Value) -> Result {
    for domain in items(&answer["domains"]) {
        let list = items(&domain["mappings"]);
        writeln!(out, "domain {}: {} mappings", domain["id"], list.len())?;
        for mapping in list {
            writeln!(
                out,
                "  {:>18}..={:<18} -> {:<18} {}{}",
                text(&mapping["first"]),
                text(&mapping["last"]),
                text(&mapping["gpa"]),
                text(&mapping["access"]),
                if mapping["mmio"] == true { " mmio" } else { "" },
            )?;
        }
    }
    Ok(())
}

fn translation(out: &mut String, answer: &Value) -> Result {
    if answer["result"] != "ok" {
        return writeln!(out, "fault: {}", text(&answer["reason"]));
    }
    writeln!(
        out,
        "guest-physical {}, {}{}; {}; contiguous up to I/O address {}",
        text(&answer["gpa"]),
        text(&answer["access"]),
        if answer["mmio"] == true { " mmio" } else { "" },
        if answer["backed"] == true {
            "backed by guest RAM"
        } else {
            "not backed by guest RAM"
        },
        text(&answer["last"]),
    )
}
