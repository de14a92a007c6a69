//! The daemon is killed again and again while a stock guest works. `launch` starts it again, and the guest notices nothing.

use super::*;
use crate::launched::{End, Launched};

/// Kills in each test of a run of the suite; the environment can ask for more.
fn kills() -> u32 {
    let more = std::env::var("VIOMMU_KILLS").ok();
    more.map_or(50, |text| text.parse().expect("VIOMMU_KILLS is a number"))
}

/// Mappings of a round of traffic.
const ROUND: u64 = 3_000;

guest_tests! {
    kills_oldest_strict: kills_in_traffic(oldest, Strict, VhostUser);
    kills_oldest_lazy: kills_in_traffic(oldest, Lazy, VhostUser);
    kills_newest_strict: kills_in_traffic(newest, Strict, VhostUser);
    kills_newest_lazy: kills_in_traffic(newest, Lazy, VhostUser);
    kills_newest_strict_over_virtio_pci: kills_in_traffic(newest, Strict, VirtioPci);
    kills_newest_lazy_over_virtio_pci: kills_in_traffic(newest, Lazy, VirtioPci);
}

/// The longest time from a daemon's start to its kill, in milliseconds. Over virtio-pci each kick of the guest waits in
/// QEMU for the daemon, inside a VFIO ioctl of many mappings: a guest whose daemon hardly ever runs reports a soft lockup.
fn longest_pause(transport: Transport) -> u64 {
    match transport {
        Transport::VhostUser => 293,
        Transport::VirtioPci => 1201,
    }
}

/// Requires that the domain of each program holds exactly the mappings that the program reports.
#[track_caller]
fn assert_agreement(launched: &Launched, vm: &mut Vm, programs: &[(&str, &str)]) {
    let mut expected = BTreeMap::new();
    for (program, endpoint) in programs {
        let dump = vm.run_within(&format!("ask {program} dump"), LONG_ANSWER);
        let table = Table::from_dump(&dump);
        assert!(!table.0.is_empty(), "{program} has mapped nothing");
        expected.insert(launched.status().domain_of(endpoint), table);
    }
    launched.status();
    for (domain, table) in launched.control.tables() {
        let believed = expected.remove(&domain).unwrap_or_default();
        Table::assert_same(&believed, &table, &format!("domain {domain}"));
    }
    assert!(
        expected.is_empty(),
        "domains the daemon lacks: {:?}",
        expected.keys()
    );
}

/// Random traffic over VFIO and of the network interface's driver, while the daemon is killed at random moments.
fn kills_in_traffic(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let config = config_of(setup.machine, kernel);
    let options = options(kernel, mode, &[], "slots=2,maxmem=4G", "");
    let (mut vm, launched) = Launched::start(setup, test_dir, transport.key(), &config, &options);
    test_dir.note("up");
    vm.qmp("set_link", json!({"name": "nic", "up": false}));
    vm.run(&bind_all());
    start_mapper(&mut vm, "pair", 1, &[FIRST, SECOND]);
    start_mapper(&mut vm, "single", 2, &[THIRD]);
    let noise = warnings(&mut vm);
    let (mut kills, mut inside, mut pause) = (0, 0, 0u64);
    while kills < self::kills() {
        vm.begin(&format!(
            "ask single churn {} >/run/single.answer & single=$!; \
             for _ in $(seq 5); do ifconfig eth0 up && ifconfig eth0 down || exit; done & \
             nic=$!; ask pair churn {ROUND} && wait $single && wait $nic && cat /run/single.answer",
            ROUND / 5
        ));
        let (lines, status) = loop {
            // In an order that does not repeat soon. Both are prime.
            pause = (pause * 31 + 17) % longest_pause(transport);
            if let Some(answer) = vm.finish(Duration::from_millis(1 + pause)) {
                break answer;
            }
            launched.end(End::Killed);
            if transport == Transport::VirtioPci {
                launched.status();
            }
            kills += 1;
            inside += 1;
        };
        assert_eq!(status, 0, "{lines:?}");
        let done = lines.iter().filter(|line| line.starts_with("ok")).count();
        assert_eq!(done, 2, "{lines:?}");
        wait_for("the end of the interface's mappings", ANSWER, || {
            let status = launched.status();
            let domain = status.domain_of(NIC);
            let entry = status.domains().iter().find(|d| d["id"] == domain);
            (number(entry.expect("listed"), "mappings") == 0).then_some(())
        });
        assert_agreement(&launched, &mut vm, &[("pair", FIRST), ("single", THIRD)]);
        test_dir.note(&format!("{kills} kills, tables agree"));
        // Also between requests.
        launched.end(End::Killed);
        kills += 1;
        assert_agreement(&launched, &mut vm, &[("pair", FIRST), ("single", THIRD)]);
        assert_eq!(launched.status().refusals(), Vec::<String>::new());
    }
    assert!(
        inside > kills / 2,
        "only {inside} of {kills} kills fell into the traffic"
    );
    let life = launched.status().0["life"].clone();
    assert_eq!(life["state"], "taken-over", "{life}");
    // A daemon that is killed before it has taken over counts as none.
    let lives = number(&life, "number");
    assert!(
        (u64::from(kills) / 2..=u64::from(kills) + 1).contains(&lives),
        "{life}"
    );
    // The guest has noticed nothing.
    assert_eq!(warnings(&mut vm), noise);
    // A new driver is served as if nothing had been.
    vm.qmp("system_reset", json!({}));
    vm.wait_until_up();
    for (domain, table) in launched.control.tables() {
        Table::assert_same(&Table::default(), &table, &format!("domain {domain}"));
    }
    vm.run(&bind_all());
    start_mapper(&mut vm, "again", 3, &[SECOND, THIRD]);
    launched.end(End::Killed);
    vm.run_within("ask again churn 2000", LONG_ANSWER);
    assert_agreement(&launched, &mut vm, &[("again", SECOND)]);
}

/// Warnings and errors in the guest's log, without the time. Not those of the clocks: on a busy machine an emulated guest stands
/// still for seconds, whatever the daemon does.
fn warnings(vm: &mut Vm) -> Vec<String> {
    let mut lines = vm.run("dmesg -r | sed -n 's/^<[0-4]>\\[[^]]*\\] //p'");
    lines.retain(|line| {
        !["clocksource:", "hrtimer:"]
            .iter()
            .any(|word| line.starts_with(word))
    });
    lines
}
