//! A live view: the rates of counters since the last query, per second.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::ask::{CtlError, ask};
use super::fields::{items, number, text};
use crate::args::Question;

/// Clears the terminal and moves the cursor to its first line.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// Counters that are shown as rates: the path in the answer, and the name.
const RATES: [(&[&str], &str); 9] = [
    (&["batches", "count"], "batches"),
    (&["chains_refused"], "chains refused"),
    (&["worker", "wakeups"], "wakeups"),
    (&["worker", "polls_paid"], "polls paid"),
    (&["worker", "polls_unpaid"], "polls unpaid"),
    (&["faults", "delivered"], "faults delivered"),
    (&["faults", "dropped"], "faults dropped"),
    (&["log", "suppressed"], "messages not logged"),
    (&["resets"], "resets"),
];

/// Queries the daemon at `path` every `interval`, `count` times or for ever, and writes the rates to `out`:
/// a line of JSON each time, or a text, which replaces the one before on a terminal.
///
/// # Errors
/// The daemon does not answer any more, or `out` is closed.
pub fn watch(
    path: &Path,
    interval: Duration,
    count: Option<u64>,
    as_json: bool,
    out: &mut (impl Write + IsTerminal),
) -> Result<(), CtlError> {
    let question = Question::Stats;
    let clears = out.is_terminal();
    let mut before = (Instant::now(), ask(path, &question)?);
    let mut shown = 0;
    while count.is_none_or(|count| shown < count) {
        std::thread::sleep(interval);
        let now = (Instant::now(), ask(path, &question)?);
        let seconds = (now.0 - before.0).as_secs_f64();
        let rates = rates(&before.1, &now.1, seconds);
        if as_json {
            let line = json!({ "seconds": seconds, "rates": rates, "stats": now.1 });
            writeln!(out, "{line}")?;
        } else {
            let clear = if clears { CLEAR } else { "" };
            writeln!(out, "{clear}{}", view(&now.1, &rates))?;
        }
        out.flush()?;
        before = now;
        shown += 1;
    }
    Ok(())
}

/// The rate of each counter per second, by name.
fn rates(before: &Value, now: &Value, seconds: f64) -> Vec<(String, f64)> {
    let mut rates = Vec::new();
    let mut add = |name: String, before: &Value, now: &Value| {
        // A daemon that was restarted counts from 0 again.
        let more = number(now).saturating_sub(number(before));
        #[expect(clippy::cast_precision_loss, reason = "it is shown in a few digits")]
        rates.push((name, more as f64 / seconds.max(0.001)));
    };
    for (kind, statuses) in now["requests"].as_object().into_iter().flatten() {
        for (status, count) in statuses.as_object().into_iter().flatten() {
            let earlier = &before["requests"][kind][status];
            add(format!("{kind} {status}"), earlier, count);
        }
    }
    for (place, name) in RATES {
        let find = |document: &Value| {
            let found = place.iter().try_fold(document, |at, key| at.get(key));
            found.cloned().unwrap_or_default()
        };
        add(name.to_owned(), &find(before), &find(now));
    }
    for limit in items(&now["limits"]) {
        let earlier = items(&before["limits"]);
        let earlier = earlier.iter().find(|l| l["name"] == limit["name"]);
        let hits = earlier.map(|l| l["hits"].clone()).unwrap_or_default();
        let name = format!("limit {} hit", text(&limit["key"]));
        add(name, &hits, &limit["hits"]);
    }
    rates
}

fn view(now: &Value, rates: &[(String, f64)]) -> String {
    let mut view = format!(
        "{}: {}; {} domains, {} mappings, page tables {} of {} KiB\n",
        text(&now["name"]),
        if now["connected"] == true {
            "a VM is connected"
        } else {
            "no VM is connected"
        },
        now["domain_count"],
        now["mappings"],
        number(&now["arena"]["used_bytes"]) / 1024,
        number(&now["arena"]["limit_bytes"]) / 1024,
    );
    for (name, rate) in rates {
        // Writing to a string cannot fail.
        let _ = writeln!(view, "  {name:<24} {rate:>12.1} /s");
    }
    view
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_in_a_second() {
        let before = json!({ "requests": { "map": { "ok": 100 } }, "worker": { "wakeups": 5 },
            "limits": [{ "name": "a", "key": "a", "hits": 1 }] });
        let now = json!({ "requests": { "map": { "ok": 300, "nomem": 4 } },
            "worker": { "wakeups": 5 }, "limits": [{ "name": "a", "key": "a", "hits": 3 }] });
        let rates = rates(&before, &now, 2.0);
        let rate = |name: &str| rates.iter().find(|(n, _)| n == name).map(|(_, rate)| *rate);
        assert_eq!(rate("map ok"), Some(100.0));
        assert_eq!(rate("map nomem"), Some(2.0));
        assert_eq!(rate("wakeups"), Some(0.0));
        assert_eq!(rate("limit a hit"), Some(1.0));
        assert_eq!(rate("resets"), Some(0.0));
    }
}
