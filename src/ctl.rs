//! The other end of the control socket: asks a running daemon and renders its answer for people.

mod hotplug;

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

use crate::args::Question;

/// How long a daemon may keep silent.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum CtlError {
    /// Nobody listens.
    #[error(
        "cannot ask the daemon at {}: {source}; is it running, with --control-path or `control`?",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the daemon did not answer: {0}")]
    Broken(#[from] io::Error),
    /// What came is no answer.
    #[error("the daemon's answer cannot be read: {0}")]
    NotJson(#[from] serde_json::Error),
    /// The daemon refused the question.
    #[error("the daemon says: {0}")]
    Refused(String),
}

/// Asks the daemon whose control socket is at `path`.
///
/// # Errors
/// See [`CtlError`].
pub fn ask(path: &Path, question: &Question) -> Result<Value, CtlError> {
    let connect = |source| CtlError::Connect {
        path: path.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(connect)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let line = match question {
        Question::Status => "status".into(),
        Question::Mappings { domain: None } => "mappings".into(),
        Question::Mappings {
            domain: Some(domain),
        } => format!("mappings {domain}"),
        Question::Translate { endpoint, iova } => format!("translate {endpoint} {iova}"),
        Question::AddEndpoint { endpoint, keys } => hotplug::add_line(endpoint, keys),
        Question::RemoveEndpoint { endpoint } => format!("remove-endpoint {endpoint}"),
    };
    writeln!(stream, "{line}")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let answer: Value = serde_json::from_str(&text)?;
    match answer.get("error").and_then(Value::as_str) {
        Some(message) => Err(CtlError::Refused(message.into())),
        None => Ok(answer),
    }
}

/// The answer to `question` as text for people.
pub fn render(question: &Question, answer: &Value) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = match question {
        Question::Status => render_status(&mut out, answer),
        Question::Mappings { .. } => render_mappings(&mut out, answer),
        Question::Translate { .. } => render_translation(&mut out, answer),
        Question::AddEndpoint { .. } => hotplug::render_added(&mut out, answer),
        Question::RemoveEndpoint { .. } => hotplug::render_removed(&mut out, answer),
    };
    out
}

fn render_status(out: &mut String, answer: &Value) -> std::fmt::Result {
    let connected = if answer["connected"] == true {
        "a VM is connected"
    } else {
        "no VM is connected"
    };
    writeln!(
        out,
        "{connected}; endpoints without a domain are {}",
        if answer["bypass"] == true {
            "in bypass mode"
        } else {
            "blocked"
        }
    )?;
    let arena = &answer["arena"];
    writeln!(
        out,
        "page tables: {} KiB of at most {} KiB",
        number(&arena["used_bytes"]) / 1024,
        number(&arena["limit_bytes"]) / 1024
    )?;

    writeln!(out, "\nendpoints ({} in all)", answer["endpoint_count"])?;
    for endpoint in items(&answer["endpoints"]) {
        let domain = match endpoint["domain"].as_u64() {
            Some(id) => format!("domain {id}"),
            None => "no domain".into(),
        };
        let host = match endpoint["host"].as_str() {
            Some(host) => format!("  host device {host}"),
            None => String::new(),
        };
        writeln!(
            out,
            "  {}  {:<11} {:<10} {domain}{host}",
            text(&endpoint["address"]),
            text(&endpoint["state"]),
            text(&endpoint["dma"]),
        )?;
    }

    writeln!(out, "\ndomains")?;
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
        writeln!(
            out,
            "  {:<5}  {} endpoints, {kind}",
            domain["id"].to_string(),
            items(&domain["endpoints"]).len()
        )?;
    }

    render_devices(out, answer)?;

    writeln!(out, "\nrequests since the daemon was started")?;
    for (kind, statuses) in answer["requests"].as_object().into_iter().flatten() {
        let counts: Vec<_> = statuses
            .as_object()
            .into_iter()
            .flatten()
            .map(|(status, count)| format!("{status} {count}"))
            .collect();
        let counts = if counts.is_empty() {
            "none".into()
        } else {
            counts.join(", ")
        };
        writeln!(out, "  {kind:<7} {counts}")?;
    }
    writeln!(
        out,
        "  chains returned unanswered: {}\n  worker: woken {} times; polled {} times with success, \
         {} without\n  faults: {} delivered, {} dropped\n  connections: {}, device resets: {}",
        answer["chains_refused"],
        answer["worker"]["wakeups"],
        answer["worker"]["polls_paid"],
        answer["worker"]["polls_unpaid"],
        answer["faults"]["delivered"],
        answer["faults"]["dropped"],
        answer["connections"],
        answer["resets"],
    )
}

/// Devices in other processes, where there are any.
fn render_devices(out: &mut String, answer: &Value) -> std::fmt::Result {
    let emulated = items(&answer["emulated"]);
    if !emulated.is_empty() {
        writeln!(out, "\nemulated devices")?;
    }
    let there = |end: &Value| {
        if end == true {
            "is there"
        } else {
            "is missing"
        }
    };
    for device in emulated {
        writeln!(
            out,
            "  {}  the VMM {}, the server {}; {} windows, {} accesses refused, {} times cut off",
            text(&device["address"]),
            there(&device["client"]),
            there(&device["server"]),
            device["windows"],
            device["refused"],
            device["cut_offs"],
        )?;
    }
    let readers = &answer["readers"];
    if !readers.is_null() {
        writeln!(
            out,
            "\nprocesses that follow the page tables: {} now, {} in all, {} refused, {} killed\n  \
             faults: {} passed on, {} more not",
            readers["now"],
            readers["registered"],
            readers["refused"],
            readers["killed"],
            readers["faults"],
            readers["faults_suppressed"],
        )?;
    }
    Ok(())
}

fn render_mappings(out: &mut String, answer: &Value) -> std::fmt::Result {
    for domain in items(&answer["domains"]) {
        let mappings = items(&domain["mappings"]);
        writeln!(out, "domain {}: {} mappings", domain["id"], mappings.len())?;
        for mapping in mappings {
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

fn render_translation(out: &mut String, answer: &Value) -> std::fmt::Result {
    if answer["result"] != "ok" {
        return writeln!(out, "fault: {}", text(&answer["reason"]));
    }
    writeln!(
        out,
        "guest-physical {}, {}{}; {}; the same on to I/O address {}",
        text(&answer["gpa"]),
        text(&answer["access"]),
        if answer["mmio"] == true { " mmio" } else { "" },
        if answer["backed"] == true {
            "there is memory"
        } else {
            "there is no memory"
        },
        text(&answer["last"]),
    )
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}
