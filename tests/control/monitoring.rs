//! The alert rules and the dashboard of `packaging/monitoring`, against the metrics of a daemon.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use serde_json::Value;

use crate::bed::{Bed, exchange};

const PREFIX: &str = "vhost_device_iommu_";
/// Metrics of exported devices, which need a device of the host.
const OF_EXPORTS: [&str; 3] = ["export_up", "export_leftover_state", "export_held"];
/// Metrics of a daemon that has taken the state of another one over.
const OF_TAKE_OVERS: [&str; 1] = ["life_resumed_seconds"];
/// Labels whose values a daemon without trouble or devices does not show.
const STATES: [&str; 2] = ["refused", "taking-over"];

fn tree(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(tree(name)).expect("a file of the tree")
}

/// The metrics of a daemon with a shadow endpoint and an emulated device.
fn page() -> String {
    let bed = Bed::new(
        "",
        "[[endpoint]]\naddress = '00:09.0'\n\
         vfio-user = { listen = 'FOLDER/l.sock', connect = 'FOLDER/c.sock' }\n\
         [metrics]\nsocket = 'FOLDER/metrics.sock'",
    );
    let socket = bed.path("metrics.sock");
    bed.daemon.wait_for("the socket", || socket.exists());
    let answer = exchange(&socket, b"GET /metrics HTTP/1.1\r\n\r\n");
    let (_, page) = answer.split_once("\r\n\r\n").expect("a head");
    page.to_owned()
}

/// Names of all metrics, without the prefix: those of the page, and those that need a device or another daemon.
fn names(page: &str) -> BTreeSet<String> {
    let types = page.lines().filter_map(|line| {
        let (name, _) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        name.strip_prefix(PREFIX)
    });
    let others = OF_EXPORTS.into_iter().chain(OF_TAKE_OVERS);
    types.chain(others).map(str::to_owned).collect()
}

/// Each metric of an expression, with its selectors `label="value"`. A series of a histogram counts as the histogram.
fn used(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let pieces = text.split(PREFIX).skip(1);
    pieces
        .map(|piece| {
            let end = piece.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let (name, rest) = piece.split_at(end.unwrap_or(piece.len()));
            let name = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .unwrap_or(name);
            let labels = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
            let labels = labels.map_or("", |(labels, _)| labels).split(',');
            let equal = labels.filter_map(|label| {
                let (key, value) = label.split_once('=')?;
                let value = value.strip_prefix('"')?.strip_suffix('"')?;
                // `=~` begins with `~`, and `!=` leaves a `!` behind the name.
                (!key.ends_with('!')).then(|| (key.to_owned(), value.to_owned()))
            });
            (name.to_owned(), equal.collect())
        })
        .collect()
}

/// Requires that the daemon has each metric of the expression, and each label with its value.
fn check_expression(text: &str, page: &str, names: &BTreeSet<String>) {
    let used = used(text);
    assert!(!used.is_empty(), "{text} uses no metric of the daemon");
    for (name, labels) in used {
        assert!(
            names.contains(&name),
            "there is no metric {PREFIX}{name}: {text}"
        );
        for (key, value) in labels {
            let label = format!(",{key}=\"{value}\"");
            let begin = format!("{PREFIX}{name}{{");
            let has = |line: &str| line.starts_with(&begin) && line.contains(&label);
            assert!(
                page.lines().any(has) || STATES.contains(&&*value),
                "{PREFIX}{name} has no {key}=\"{value}\": {text}"
            );
        }
    }
}

/// Collects the texts of the keys `expr` and `definition`.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value.as_str() {
                    Some(text) if key == "expr" || key == "definition" => {
                        found.push(text.to_owned());
                    }
                    _ => expressions(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn dashboard_and_rules_use_metrics_of_the_daemon() {
    let page = page();
    let names = names(&page);
    let dashboard = read("packaging/monitoring/grafana-dashboard.json");
    let dashboard: Value = serde_json::from_str(&dashboard).expect("JSON");
    let mut found = Vec::new();
    expressions(&dashboard, &mut found);
    assert!(found.len() > 40, "{found:?}");
    let panels = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len(), "the panels have different IDs");

    let rules = read("packaging/monitoring/prometheus-rules.yml");
    let lines = rules.lines().map(str::trim_start);
    let rules = lines.filter_map(|line| line.strip_prefix("expr: "));
    found.extend(rules.map(str::to_owned));
    for text in found {
        check_expression(&text, &page, &names);
    }
}

/// The page for operators has each metric.
#[test]
fn each_metric_is_documented() {
    let text = read("docs/control.md");
    let (_, table) = text.split_once("\n## Metrics\n").expect("a section");
    for name in names(&page()) {
        let has = |end: char| table.contains(&format!("`{name}{end}"));
        assert!(has('`') || has('{'), "docs/control.md has no {name}");
    }
}

/// Each alert has a test for promtool, and a line that says what to do.
#[test]
fn each_alert_is_tested_and_documented() {
    let rules = read("packaging/monitoring/prometheus-rules.yml");
    let tests = read("tests/control/prometheus-rules.test.yml");
    let guide = read("docs/operations.md");
    let lines = rules.lines().map(str::trim_start);
    let alerts: Vec<_> = lines
        .filter_map(|line| line.strip_prefix("- alert: "))
        .collect();
    assert!(alerts.len() > 20, "{alerts:?}");
    for alert in alerts {
        assert!(
            tests.contains(&format!("alertname: {alert}\n")),
            "no test of {alert}"
        );
        assert!(
            guide.contains(&format!("`{alert}`")),
            "docs/operations.md has no {alert}"
        );
    }
}

/// The command to run, if this machine has it.
fn promtool() -> Option<String> {
    let named = env::var("VIOMMU_PROMTOOL").ok();
    let command = named.clone().unwrap_or_else(|| "promtool".to_owned());
    let ran = Command::new(&command)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let runs = ran.is_ok_and(|status| status.success());
    assert!(
        runs || named.is_none(),
        "VIOMMU_PROMTOOL={command} cannot be run"
    );
    if !runs {
        println!("SKIPPED: no promtool; name the command in VIOMMU_PROMTOOL to run this");
    }
    runs.then_some(command)
}

#[test]
fn prometheus_accepts_metrics_and_rules_and_the_alerts_fire() {
    let Some(promtool) = promtool() else { return };
    for (verb, file) in [
        ("check", "packaging/monitoring/prometheus-rules.yml"),
        ("test", "tests/control/prometheus-rules.test.yml"),
    ] {
        let output = Command::new(&promtool)
            .args([verb, "rules"])
            .arg(tree(file))
            .output()
            .expect("promtool");
        assert!(output.status.success(), "{verb} {file}: {output:?}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let metrics = folder.path().join("metrics");
    fs::write(&metrics, page()).expect("written");
    let output = Command::new(&promtool)
        .args(["check", "metrics"])
        .stdin(fs::File::open(&metrics).expect("the file"))
        .output()
        .expect("promtool");
    assert!(output.status.success(), "{output:?}");
    // It also lints.
    assert!(output.stderr.is_empty(), "{output:?}");
}
