//! Each command, as text and as JSON.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bed::{Bed, ctl, make_refused_access};
use crate::common::daemon::{EP, EP2};
use crate::common::guest::{Guest, LOW_RAM};
use crate::common::wire::{self, INVAL, OK, RW};

/// Two domains with mappings: three in the first, one read-only in the second.
fn boot_with_two_domains(bed: &Bed) -> Guest {
    let mut guest = Guest::boot(&bed.daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.attach(7, EP2), OK);
    for page in [0x1000, 0x3000, 0x10_0000] {
        assert_eq!(guest.map_page(1, page, LOW_RAM + page), OK);
    }
    assert_eq!(guest.map(7, 0x1000, 0x2fff, LOW_RAM, wire::READ), OK);
    assert_eq!(guest.detach(99, EP), INVAL);
    guest
}

#[test]
fn every_command_prints_text_and_json() {
    let bed = Bed::new("", "");
    let _guest = boot_with_two_domains(&bed);
    for (args, part) in [
        (&["status"][..], "web-1: a VM is connected"),
        (&["status"], "page tables: "),
        (
            &["endpoints"],
            "0000:00:06.0  attached    translated domain 1",
        ),
        (
            &["endpoints"],
            "0000:00:08.7  unattached  blocked    no domain",
        ),
        (&["domains"], "  1      1 endpoints, 3 mappings, 12 KiB"),
        (&["domains"], "  7      1 endpoints, 1 mappings, 8 KiB"),
        (&["mappings"], "domain 1: 3 mappings"),
        (&["mappings", "--domain", "7"], "domain 7: 1 mappings"),
        (&["faults"], "none; 0 delivered, 0 dropped"),
        (
            &["translate", "00:06.0", "0x3008"],
            "guest-physical 0x3008, rw",
        ),
        (
            &["stats"],
            "2 domains, 4 mappings of 20 KiB, 2 endpoints attached",
        ),
        (&["stats"], "batches of requests"),
        (&["stats"], "detach  inval 1"),
        (&["log-level"], "info"),
    ] {
        let text = bed.text(args);
        assert!(text.contains(part), "{args:?}: {part:?} is not in {text}");
        let document = bed.json(args);
        assert_eq!(document["version"], 1, "{args:?}");
    }
    let endpoints = bed.json(&["endpoints"]);
    assert_eq!(endpoints["endpoints"].as_array().map(Vec::len), Some(17));
    let domains = bed.json(&["domains"]);
    assert_eq!(domains["domains"][1]["endpoints"], serde_json::json!([EP2]));
    let stats = bed.json(&["stats"]);
    let counted = stats["batches"]["buckets"].as_array().expect("buckets");
    let counted: u64 = counted.iter().filter_map(|b| b["count"].as_u64()).sum();
    assert_eq!(stats["batches"]["count"].as_u64(), Some(counted));
    assert_eq!(stats["endpoints_attached"], 2);
}

#[test]
fn mappings_can_be_queried_by_address() {
    let bed = Bed::new("", "");
    let _guest = boot_with_two_domains(&bed);
    let firsts = |args: &[&str]| -> Vec<(u64, String)> {
        let document = bed.json(&[&["mappings"], args].concat());
        let domains = document["domains"].as_array().expect("domains").clone();
        let each = domains.iter().flat_map(|domain| {
            let list = domain["mappings"].as_array().expect("mappings");
            let id = domain["id"].as_u64().expect("an ID");
            let first = |m: &serde_json::Value| m["first"].as_str().map(str::to_owned);
            list.iter()
                .map(move |m| (id, first(m).expect("an address")))
        });
        each.collect()
    };
    let owned = |list: &[(u64, &str)]| -> Vec<(u64, String)> {
        list.iter()
            .map(|(id, at)| (*id, (*at).to_owned()))
            .collect()
    };
    assert_eq!(
        firsts(&["--iova", "0x2000..=0x3000"]),
        owned(&[(1, "0x3000"), (7, "0x1000")])
    );
    assert_eq!(
        firsts(&["--domain", "1", "--iova", "4096..=4096"]),
        owned(&[(1, "0x1000")])
    );
    assert_eq!(firsts(&["--domain", "1", "--iova", "0x5000..=0x5fff"]), []);
    assert_eq!(firsts(&["--domain", "2"]), []);
    for wrong in ["5", "2..=1", "x..=y"] {
        let output = bed.ctl(&["mappings", "--domain", "1", "--iova", wrong]);
        assert!(!output.status.success());
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(why.contains("FIRST..=LAST"), "{wrong}: {why}");
    }
}

#[test]
fn faults_show_endpoint_address_reason_and_time() {
    let bed = Bed::new("", "");
    let mut guest = Guest::boot(&bed.daemon);
    let reader = bed.reader();
    let wait_for_faults = |count: u64| {
        let faults = || {
            bed.daemon.control("faults")["recent"]
                .as_array()
                .map(Vec::len)
        };
        bed.daemon
            .wait_for("faults", || faults() == Some(count as usize));
    };
    make_refused_access(&reader, 0x7000);
    wait_for_faults(1);
    guest.post_event_buffer(24);
    assert_eq!(guest.attach(1, EP), OK);
    make_refused_access(&reader, 0x8000);
    wait_for_faults(2);
    let document = bed.json(&["faults"]);
    let recent = document["recent"].as_array().expect("faults");
    let seen: Vec<_> = recent
        .iter()
        .map(|f| {
            format!(
                "{} {} {} {} {}",
                f["address"], f["iova"], f["access"], f["reason"], f["delivered"]
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            r#""0000:00:06.0" "0x7000" "r-" "domain" false"#,
            r#""0000:00:06.0" "0x8000" "r-" "mapping" true"#,
        ]
    );
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970");
    let time = recent[1]["time_s"].as_f64().expect("a time");
    assert!((now.as_secs_f64() - time).abs() < 20.0, "{time}");
    assert_eq!(document["endpoints"][0]["count"], 2);
    assert_eq!(document["counts"]["reasons"]["mapping"], 1);
    assert_eq!(document["counts"]["reasons"]["domain"], 1);
    let text = bed.text(&["faults"]);
    assert!(
        text.contains("domain 1, mapping 1; 1 delivered, 1 dropped"),
        "{text}"
    );
    assert!(
        text.contains("r- at 0x7000, domain, not delivered"),
        "{text}"
    );
}

#[test]
fn a_live_view_shows_rates() {
    let bed = Bed::new("", "");
    let mut guest = boot_with_two_domains(&bed);
    let mut watch = ctl(
        &bed.daemon.control_socket(),
        &["watch", "--count", "2", "--json"],
    );
    let mut watch = watch
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("it runs");
    while watch.try_wait().expect("its own child").is_none() {
        assert_eq!(guest.map(1, 0x20_0000, 0x20_0fff, LOW_RAM, RW), OK);
        assert_eq!(guest.unmap(1, 0x20_0000, 0x20_0fff), OK);
    }
    let output = watch.wait_with_output().expect("it ends");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 2);
    for line in lines {
        let rates = line["rates"].as_array().expect("rates");
        let map = rates.iter().find(|rate| rate[0] == "map ok").expect("maps");
        assert!(map[1].as_f64().is_some_and(|rate| rate > 0.0), "{map}");
    }
    let text = bed.text(&["watch", "--count", "1"]);
    assert!(text.starts_with("web-1: a VM is connected"), "{text}");
    assert!(
        text.contains("map ok") && text.contains("limit arena-limit hit"),
        "{text}"
    );
}

#[test]
fn the_level_of_the_log_changes_while_the_daemon_runs() {
    let bed = Bed::new("control-mode = '0666'", "");
    let mut guest = Guest::boot(&bed.daemon);
    let mut attached = || {
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.detach(1, EP), OK);
        bed.daemon.log().matches("attached to domain 1").count()
    };
    assert_eq!(attached(), 0);
    assert_eq!(bed.text(&["log-level", "debug"]), "debug\n");
    assert_eq!(attached(), 1);
    assert_eq!(bed.json(&["log-level"])["level"], "debug");
    assert_eq!(bed.text(&["log-level", "default"]), "info\n");
    assert_eq!(attached(), 1);
    let wrong = bed.ctl(&["log-level", "loud"]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("use off, error"));
    assert!(
        bed.daemon
            .log()
            .contains("the level of the log is debug now")
    );

    // Another user may query if the mode of the socket allows it, but may change nothing. Only root
    // can run a process of another user.
    let owner = std::fs::metadata(bed.daemon.control_socket()).expect("a socket");
    if std::os::unix::fs::MetadataExt::uid(&owner) != 0 {
        return;
    }
    let folder = bed.daemon.control_socket();
    let folder = folder.parent().expect("a folder");
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).expect("opened");
    let other = |args: &[&str]| {
        let mut command = ctl(&bed.daemon.control_socket(), args);
        command.uid(65534).gid(65534).output().expect("it runs")
    };
    let queried = other(&["status"]);
    let why = String::from_utf8_lossy(&queried.stderr).into_owned();
    assert!(queried.status.success(), "{why}");
    let refused = other(&["log-level", "trace"]);
    assert!(!refused.status.success());
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("only root and the user"), "{why}");
    assert_eq!(bed.text(&["log-level"]), "info\n");
}
