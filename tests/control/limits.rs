//! The test hits each limit of the configuration once, and the daemon counts the hit.

use std::time::{Duration, Instant};

use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::ShadowReader;

use crate::bed::{Bed, exchange, make_refused_access, sample};
use crate::common::daemon::EP;
use crate::common::guest::{Guest, LOW_RAM, Layout};
use crate::common::wire::{self, NOMEM, OK, RANGE, RW, TAIL};

#[test]
fn each_limit_that_is_hit_is_counted() {
    let bed = Bed::new(
        "arena-limit = '1M'\ndomains = 3\nbatch = 4\nfault-rate = 1",
        "[readers]\nlimit = 1\n[metrics]\nsocket = 'FOLDER/metrics.sock'",
    );
    let keys = [
        ("arena-limit", 1 << 20),
        ("domains", 3),
        ("batch", 4),
        ("fault-rate", 1),
        ("readers.limit", 1),
    ];
    let mut guest = Guest::boot(&bed.daemon);
    for (key, value) in keys {
        let (limit, _, hits) = bed.limit(key);
        assert_eq!((limit, hits), (value, 0), "{key}");
    }

    // The arena, and the domain IDs.
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map(1, 0, (1 << 30) - 1 - 0x1000, 0x1000, RW), NOMEM);
    assert_eq!(bed.limit("arena-limit").2, 1);
    assert_eq!(guest.attach(3, EP), RANGE);
    assert_eq!(guest.map_page(77, 0, 0), RANGE);
    assert_eq!(bed.limit("domains"), (3, Some(1), 2));

    // The length of a batch.
    assert_eq!(bed.limit("batch").2, 0);
    let layout = Layout::plain(36, TAIL);
    for page in 1..=30 {
        let first = page << 12;
        guest.submit(&wire::map(1, first, first + 0xfff, LOW_RAM, RW), &layout);
    }
    guest.kick();
    for _ in 0..30 {
        assert_eq!(guest.complete().1.status(), OK);
    }
    let hits = bed.limit("batch").2;
    assert!((1..=7).contains(&hits), "{hits}");

    // The number of readers, and the rate of their faults.
    let reader = bed.reader();
    assert_eq!(bed.limit("readers.limit").1, Some(1));
    ShadowReader::connect(&bed.path("disk.sock"), EndpointId(EP)).expect_err("one too many");
    assert_eq!(bed.limit("readers.limit").2, 1);
    let begun = Instant::now();
    for address in 0..200 {
        make_refused_access(&reader, 0x7000_0000 + address);
    }
    let all = || {
        let faults = bed.daemon.control("faults");
        let recent = faults["recent"].as_array().expect("faults").len() as u64;
        recent + bed.limit("fault-rate").2
    };
    bed.daemon.wait_for("the faults", || all() == 200);
    let passed = 200 - bed.limit("fault-rate").2;
    let most = 65 + begun.elapsed().as_secs();
    assert!((64..=most).contains(&passed), "{passed}");

    let page = exchange(&bed.path("metrics.sock"), b"GET /metrics HTTP/1.1\r\n\r\n");
    for (key, value) in keys {
        let name = match key {
            "arena-limit" => "arena_bytes".to_owned(),
            "readers.limit" => "readers".to_owned(),
            other => other.replace('-', "_"),
        };
        let labels = format!(",limit=\"{name}\"");
        assert_eq!(sample(&page, "limit", &labels), Some(value as f64), "{key}");
        let hits = sample(&page, "limit_hits_total", &labels).expect("hits");
        assert_eq!(hits, bed.limit(key).2 as f64, "{key}");
        assert!(hits > 0.0, "{key}");
    }
    let text = bed.text(&["stats"]);
    assert!(
        text.contains("domains                     3  1 used                 hit 2 times"),
        "{text}"
    );
}

/// `fault-rate` determines how many faults pass.
#[test]
fn the_rate_of_reader_faults_is_configurable() {
    let bed = Bed::new("fault-rate = 10000", "");
    let _guest = Guest::boot(&bed.daemon);
    let reader = bed.reader();
    let count = || {
        let faults = bed.daemon.control("faults");
        let passed = faults["endpoints"][0]["count"].as_u64().unwrap_or(0);
        (passed, bed.limit("fault-rate").2)
    };
    // Each round makes 32 faults, half of the burst that the limit allows. At 10000 faults in a second,
    // the pause of 5 milliseconds makes room for 50 more.
    for round in 1..=10 {
        for address in 0..32 {
            make_refused_access(&reader, 0x7000_0000 + address);
        }
        bed.daemon.wait_for("the faults", || {
            let (passed, held) = count();
            passed + held == 32 * round
        });
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(count(), (320, 0));
}
