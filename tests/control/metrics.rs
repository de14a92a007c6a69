//! Metrics at a socket and in a file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::bed::{Bed, exchange, make_refused_access, sample};
use crate::common::daemon::EP;
use crate::common::guest::{Guest, LOW_RAM};
use crate::common::wire::{NOENT, OK};

const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
const SOCKET: &str = "[metrics]\nsocket = 'FOLDER/metrics.sock'\nmode = '0660'";

/// Splits an answer into its first line and its body, whose length must be that of the header.
fn parts(answer: &str) -> (String, String) {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let (status, fields) = head.split_once("\r\n").expect("fields");
    let length = fields
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .expect("a length");
    assert_eq!(length.trim().parse(), Ok(body.len()));
    (status.to_owned(), body.to_owned())
}

/// Requires the rules of the text format: names and labels are well formed, each name has HELP and
/// TYPE before its samples, all of its samples are together, no sample appears twice, counters end
/// with `_total`, and the buckets of a histogram never decrease. Returns the number of samples.
fn check_format(page: &str) -> usize {
    assert!(page.ends_with('\n'));
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut current = "";
    let mut helped = "";
    let (mut bucket, mut bound) = (0.0, 0.0);
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help");
            assert!(!help.is_empty() && !kinds.contains_key(name), "{line}");
            helped = name;
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(name, helped, "{line}");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(name.starts_with("vhost_device_iommu_"), "{line}");
            kinds.insert(name, kind);
            current = name;
            (bucket, bound) = (0.0, 0.0);
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        assert!(seen.insert(series), "{line} appears twice");
        let value: f64 = value.parse().expect("a number");
        let (name, labels) = series.split_once('{').expect("labels");
        let labels = labels.strip_suffix('}').expect("the labels' end");
        assert!(labels.starts_with("vm=\"web-1\""), "{line}");
        for label in labels.split(',') {
            let (key, text) = label.split_once("=\"").expect("a label");
            assert!(
                key.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
                "{line}"
            );
            assert!(text.ends_with('"'), "{line}");
        }
        if kinds[current] != "histogram" {
            assert_eq!(name, current, "{line}");
            continue;
        }
        match name.strip_prefix(current).expect("its own name") {
            "_bucket" => {
                let text = labels.split("le=\"").nth(1).expect("a bound");
                let text = text.trim_end_matches('"');
                let next = if text == "+Inf" {
                    f64::INFINITY
                } else {
                    text.parse().unwrap()
                };
                assert!(next > bound && value >= bucket, "{line}");
                (bucket, bound) = (value, next);
            }
            "_count" => assert_eq!((value, bound), (bucket, f64::INFINITY), "{line}"),
            "_sum" => {}
            _ => panic!("{line}"),
        }
    }
    seen.len()
}

#[test]
fn the_socket_answers_in_the_format_of_prometheus() {
    let bed = Bed::new("", SOCKET);
    let socket = bed.path("metrics.sock");
    let mut guest = Guest::boot(&bed.daemon);
    assert_eq!(guest.attach(1, EP), OK);
    // The daemon serves a guest only once it has given all sockets their rights.
    let mode = fs::metadata(&socket).expect("a socket").mode();
    assert_eq!(mode & 0o7777, 0o660);
    for page in 1..=20 {
        assert_eq!(guest.map_page(1, page << 12, LOW_RAM), OK);
    }
    assert_eq!(guest.unmap(9, 0, 0xfff), NOENT);
    let reader = bed.reader();
    make_refused_access(&reader, 0x9000_0000);
    bed.daemon.wait_for("the fault", || {
        bed.daemon.control("faults")["endpoints"][0]["count"] == 1
    });

    let (status, page) = parts(&exchange(&socket, GET));
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert!(check_format(&page) > 50);
    for (name, labels, value) in [
        ("requests_total", ",type=\"map\",status=\"ok\"", 20.0),
        ("requests_total", ",type=\"unmap\",status=\"noent\"", 1.0),
        // A counter that begins with 1 would hide the first request from `increase()`.
        ("requests_total", ",type=\"map\",status=\"nomem\"", 0.0),
        ("mappings", "", 20.0),
        ("domains", "", 1.0),
        ("connected", "", 1.0),
        ("driver_unknown", "", 0.0),
        ("condemned_spaces", "", 0.0),
        ("faults_total", ",reason=\"mapping\"", 1.0),
        ("faults_dropped_total", "", 1.0),
        ("host_map_failures_total", ",type=\"map\"", 0.0),
        ("readers", "", 1.0),
        ("readers_killed_slow_total", "", 0.0),
        ("readers_refused_often_total", "", 0.0),
        ("keeper_messages_total", "", 0.0),
        ("keeper_delays_total", "", 0.0),
        ("readers_inherited_total", "", 0.0),
        ("log_messages_lost_total", "", 0.0),
        ("sandbox_enforced", ",part=\"filters\"", 1.0),
        ("endpoints", ",state=\"attached\"", 1.0),
    ] {
        assert_eq!(
            sample(&page, name, labels),
            Some(value),
            "{name}{labels} in {page}"
        );
    }
    let updated = sample(&page, "updated_timestamp_seconds", "").expect("a time");
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    let elapsed = elapsed.expect("after 1970").as_secs_f64();
    assert!(updated <= elapsed && updated > elapsed - 300.0, "{updated}");
    assert!(sample(&page, "page_table_bytes", "").is_some_and(|bytes| bytes >= 8192.0));
    assert!(sample(&page, "wakeups_total", "").is_some_and(|count| count > 0.0));
    assert!(sample(&page, "polls_total", ",result=\"paid\"").is_some());
    // The daemon times one in 16 batches of a single request, and counts it 16 times.
    let batches = sample(&page, "batch_duration_seconds_count", "").expect("batches");
    assert!(batches >= 16.0, "{batches}");
    assert!(sample(&page, "batch_duration_seconds_sum", "").is_some_and(|sum| sum > 0.0));
}

#[test]
fn malformed_http_requests_are_answered() {
    let bed = Bed::new("", SOCKET);
    let socket = bed.path("metrics.sock");
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(10_000));
    for (question, expected) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"stats\n\n", "400 Bad Request"),
        (b"\0\xff\n\n", "400 Bad Request"),
        (long.as_bytes(), "431 Request Header Fields Too Large"),
    ] {
        let answer = exchange(&socket, question);
        // The daemon closes a connection before it has read a long request to its end, at worst
        // before the answer is read.
        if answer.is_empty() && question.len() > 4096 {
            continue;
        }
        let (status, _) = parts(&answer);
        assert_eq!(status, format!("HTTP/1.1 {expected}"));
    }
    // The daemon does not wait for a silent client.
    let silent = std::os::unix::net::UnixStream::connect(&socket).expect("connected");
    assert_eq!(parts(&exchange(&socket, GET)).0, "HTTP/1.1 200 OK");
    drop(silent);
    assert!(bed.daemon.control("stats")["clients"]["cut_off"].as_u64() >= Some(1));
}

#[test]
fn a_metrics_socket_causes_no_wakeups() {
    let bed = Bed::new("", SOCKET);
    let _guest = Guest::boot(&bed.daemon);
    let mut before = u64::MAX;
    // Wait until the wakeups of the start and of the boot have ended.
    bed.daemon.wait_for("rest", || {
        std::thread::sleep(Duration::from_millis(300));
        let now = bed.daemon.context_switches();
        std::mem::replace(&mut before, now) == now
    });
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(bed.daemon.context_switches(), before);
}

#[test]
fn the_file_is_always_complete_and_removed_with_the_daemon() {
    let bed = Bed::new("", "[metrics]\ntextfile = 'FOLDER/vm.prom'\ninterval-s = 1");
    let file = bed.path("vm.prom");
    bed.daemon.wait_for("the file", || file.exists());
    let mode = fs::metadata(&file).expect("a file").mode();
    assert_eq!(
        mode & 0o7777,
        0o644,
        "a collector of another user reads the file"
    );
    let mut guest = Guest::boot(&bed.daemon);
    assert_eq!(guest.attach(1, EP), OK);
    let (mut versions, mut last) = (BTreeSet::new(), String::new());
    let hangs_at = Instant::now() + Duration::from_secs(60);
    // The third one is from after the request.
    while versions.len() < 3 {
        assert!(Instant::now() < hangs_at, "{} versions", versions.len());
        last = fs::read_to_string(&file).expect("it is there");
        assert!(check_format(&last) > 40);
        versions.insert(fs::metadata(&file).expect("it is there").ino());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(
        sample(&last, "requests_total", ",type=\"attach\",status=\"ok\""),
        Some(1.0)
    );
    bed.daemon.terminate();
    bed.daemon.wait_for_end();
    let left: Vec<_> = fs::read_dir(bed.folder.path()).expect("a folder").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_file_that_cannot_be_written_is_logged_and_counted() {
    let bed = Bed::new(
        "",
        "[metrics]\ntextfile = 'FOLDER/absent/vm.prom'\ninterval-s = 1",
    );
    let unwritten = || bed.daemon.control("stats")["clients"]["metrics_unwritten"].as_u64();
    bed.daemon
        .wait_for("two attempts", || unwritten() >= Some(2));
    let log = bed.daemon.log();
    assert!(log.contains("the metrics cannot be written to"), "{log}");
    assert!(log.contains("give the daemon a folder"), "{log}");
}
