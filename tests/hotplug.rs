//! `ctl` adds endpoints to a running VM and removes them; the guest uses them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use common::daemon::{Daemon, EP, EP2, EP3, NO_EP};
use common::guest::{Guest, Setup};
use common::wire::{self, NOENT, OK};

const IOVA: u64 = 0x7000_0000;
const PAGE: u64 = 0xa0_0000;

/// One endpoint, and a range for others.
const CONFIG: &str = "address = '00:05.0'\nbypass = false\nhotplug = ['00:07.0-00:07.7']\n\
                      [[endpoint]]\naddress = '00:06.0'\n";

fn ctl(daemon: &Daemon, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .arg("ctl")
        .arg(daemon.control_socket())
        .args(args)
        .output()
        .expect("it runs")
}

/// Runs `ctl`, which must succeed. Returns its standard output.
fn ctl_output(daemon: &Daemon, args: &[&str]) -> String {
    let output = ctl(daemon, args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `ctl`, which must fail. Returns its standard error.
fn ctl_error(daemon: &Daemon, args: &[&str]) -> String {
    let output = ctl(daemon, args);
    assert!(!output.status.success(), "{args:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_added_endpoint_works_and_a_removed_one_is_gone() {
    let daemon = Daemon::with_config(CONFIG);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP2), NOENT);
    assert_eq!(guest.request(&wire::probe(EP2), 512 + 4).status(), NOENT);

    let region = "reserved = [{ first = 0x1000, last = 0x1fff }]";
    let answer = ctl_output(&daemon, &["add-endpoint", "00:07.0", region]);
    assert_eq!(answer, "endpoint 0000:00:07.0 is added\n");
    let regions: Vec<_> = guest.probe(EP2).iter().map(|r| (r.start, r.end)).collect();
    assert_eq!(regions, [(0x1000, 0x1fff), (0xfee0_0000, 0xfeef_ffff)]);
    assert_eq!(daemon.endpoint(EP2)["dma"], "blocked");
    assert_eq!(guest.attach(1, EP2), OK);
    assert_eq!(guest.map_page(1, IOVA, PAGE), OK);
    assert_eq!(daemon.gpa_of(EP2, IOVA), Some(PAGE));

    let answer = ctl_output(&daemon, &["--json", "remove-endpoint", "00:07.0"]);
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(answer["removed"]["first"], "0000:00:07.0");
    assert_eq!(daemon.gpa_of(EP2, IOVA), None);
    assert_eq!(daemon.domains(), [0u64; 0]);
    assert_eq!(guest.map_page(1, IOVA, PAGE), NOENT);
    assert_eq!(guest.detach(1, EP2), NOENT);
    assert_eq!(guest.attach(1, EP2), NOENT);
    assert_eq!(guest.request(&wire::probe(EP2), 512 + 4).status(), NOENT);
    // The other endpoint is not affected.
    assert_eq!(guest.attach(1, EP), OK);
}

#[test]
fn removing_an_endpoint_does_not_affect_others_in_its_domain() {
    let daemon = Daemon::with_config(CONFIG);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, IOVA, PAGE), OK);
    let answer = ctl_output(&daemon, &["add-endpoint", "00:08.0", "group = 'g'"]);
    assert!(
        answer.contains("`hotplug` in the configuration"),
        "{answer}"
    );
    assert_eq!(guest.attach(1, EP3), OK);
    assert_eq!(daemon.gpa_of(EP3, IOVA), Some(PAGE));
    ctl_output(&daemon, &["remove-endpoint", "00:08.0"]);
    assert_eq!(daemon.gpa_of(EP, IOVA), Some(PAGE));
    assert_eq!(guest.unmap(1, IOVA, IOVA + 0xfff), OK);
}

/// Every socket for VMMs and device processes has the configured mode, also one that the sandboxed thread makes.
#[test]
fn all_sockets_have_the_configured_mode_and_group() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let gid = fs::metadata(folder.path()).expect("a folder").gid();
    let emulated = |name: &str| {
        format!(
            "vfio-user = {{ listen = {:?}, connect = {:?} }}",
            at(name),
            at("c")
        )
    };
    let config = format!(
        "socket-mode = '0620'\nsocket-group = {gid}\n{CONFIG}{}\n\
         [[endpoint]]\naddress = '00:09.0'\nshadow = {:?}\n",
        emulated("client"),
        at("readers"),
    );
    let daemon = Daemon::with_config(&config);
    ctl_output(&daemon, &["add-endpoint", "00:07.0", &emulated("added")]);
    for path in [daemon.socket(), at("client"), at("readers"), at("added")] {
        let found = fs::metadata(&path).expect("a socket");
        assert_eq!(
            (found.mode() & 0o777, found.gid()),
            (0o620, gid),
            "{path:?}"
        );
    }
    let control = fs::metadata(daemon.control_socket()).expect("a socket");
    assert_eq!(control.mode() & 0o777, 0o600);
}

#[test]
fn invalid_additions_and_removals_are_refused_with_their_cure() {
    let daemon = Daemon::with_config(CONFIG);
    let before = daemon.status();
    let nowhere = format!(
        "vfio-user = {{ listen = '/no/where', connect = {:?} }}",
        daemon.socket().with_file_name("server")
    );
    for (args, cure) in [
        (&["add-endpoint", "00:06.0"][..], "overlap"),
        (&["add-endpoint", "00:05.0"], "IOMMU's own"),
        (&["add-endpoint", "nonsense"], "PCI address"),
        (&["add-endpoint", "00:07.0", "colour = 1"], "unknown key"),
        (
            &["add-endpoint", "00:07.0", "shadow = '/h'"],
            "start the VM anew",
        ),
        (
            &["add-endpoint", "00:07.0", "vfio = '65:00.0'"],
            "`export = ",
        ),
        (
            &[
                "add-endpoint",
                "00:07.0",
                "vfio = 'ff:1f.7'",
                "export = '/x/y'",
            ],
            "vhost-device-iommu check",
        ),
        (&["add-endpoint", "00:07.0", &nowhere], "/no/where"),
        (
            &[
                "add-endpoint",
                "00:07.0",
                "vfio-user = { listen = '/no/where', connect = '/x' }",
            ],
            "out of the daemon's reach",
        ),
        (&["remove-endpoint", "00:07.0"], "ctl SOCKET status"),
        (&["remove-endpoint", "00:06.0-00:06.1"], "ctl SOCKET status"),
        (&["remove-endpoint", "nonsense"], "PCI address"),
    ] {
        let message = ctl_error(&daemon, args);
        assert!(message.contains(cure), "{args:?}: {message}");
    }
    let after = daemon.status();
    assert_eq!(after["endpoints"], before["endpoints"]);
    assert_eq!(
        daemon.thread_count(),
        Daemon::with_config(CONFIG).thread_count()
    );
    // Malformed lines of the protocol itself are refused, too.
    for line in [
        "add-endpoint",
        "remove-endpoint",
        "add-endpoint }",
        "add-endpoint range",
    ] {
        assert!(daemon.control(line)["error"].is_string(), "{line}");
    }
}

#[test]
fn adding_and_removing_endpoints_does_not_stop_a_busy_guest() {
    let daemon = Daemon::with_config(CONFIG);
    let mut guest = Guest::boot_with(&daemon, Setup::default());
    assert_eq!(guest.attach(1, EP), OK);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                let added = daemon.control("add-endpoint range = '00:07.0-00:07.7'");
                assert_eq!(added["added"]["endpoints"], 8, "{added}");
                let removed = daemon.control("remove-endpoint 00:07.0-00:07.7");
                assert!(removed["error"].is_null(), "{removed}");
            }
            done.store(true, Ordering::Relaxed);
        });
        let mut attached = 0;
        while !done.load(Ordering::Relaxed) {
            assert_eq!(guest.map_page(1, IOVA, PAGE), OK);
            match guest.attach(2, EP2) {
                OK => attached += 1,
                status => assert_eq!(status, NOENT),
            }
            assert_eq!(guest.unmap(1, IOVA, IOVA + 0xfff), OK);
            assert_eq!(guest.attach(1, NO_EP), NOENT);
        }
        eprintln!("attached {attached} times");
    });
    assert_eq!(daemon.domains(), [1]);
}

#[test]
fn the_viot_table_has_the_hotplug_ranges() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, viot) = (folder.path().join("vm.toml"), folder.path().join("viot"));
    fs::write(&config, CONFIG).expect("written");
    let status = Command::new(env!("CARGO_BIN_EXE_vhost-device-iommu"))
        .args([
            "viot".as_ref(),
            config.as_os_str(),
            "-o".as_ref(),
            viot.as_os_str(),
        ])
        .status();
    assert!(status.expect("it runs").success());
    let bytes = fs::read(viot).expect("a table");
    // The table has a header, the IOMMU, and two ranges with first endpoint, segments and
    // functions.
    let ranges: Vec<_> = bytes[64..].chunks(24).map(|n| n[4..16].to_vec()).collect();
    let node = |first: u8, last: u8| vec![first, 0, 0, 0, 0, 0, 0, 0, first, 0, last, 0];
    assert_eq!(ranges, [node(0x30, 0x30), node(0x38, 0x3f)]);
}
