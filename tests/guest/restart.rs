//! The daemon is killed again and again while a stock guest works. `launch` starts it again, and the guest notices nothing.

use super::*;
use crate::vm::{Control, Launcher};

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
}

/// A VM under `launch`.
struct Launched {
    control: Control,
    launcher: u32,
}

impl Launched {
    fn start(
        setup: &Setup,
        kernel: &Kernel,
        mode: Mode,
        transport: Transport,
        test_dir: &TestDir,
    ) -> (Vm, Self) {
        let config = test_dir.path("vm.toml");
        let control = test_dir.path("control.sock");
        let sockets = format!(
            "{} = '{}'\ncontrol = '{}'\n",
            transport.key(),
            test_dir.path("iommu.sock").display(),
            control.display()
        );
        fs::write(&config, sockets + &config_of(setup.machine, kernel)).expect("written");
        let binary = env!("CARGO_BIN_EXE_vhost-device-iommu");
        let words = ["launch", "--max-restarts", "1000000", "--config"];
        let launcher = Launcher {
            words: std::iter::once(binary)
                .chain(words)
                .map(str::to_owned)
                .chain([config.display().to_string(), "--".into()])
                .collect(),
            accel: setup
                .machine
                .accel()
                .iter()
                .map(|word| (*word).to_owned())
                .collect(),
        };
        let options = VmOptions {
            iommu: Vec::new(),
            ..options(kernel, mode, &[], "slots=2,maxmem=4G", "")
        };
        let mut vm = Vm::launch(setup, test_dir, "vm", &launcher, &options);
        vm.wait_until_up();
        let launcher = vm.pid();
        let control = Control(control);
        (vm, Self { control, launcher })
    }

    /// The daemon's process; `None` while there is none.
    fn daemon(&self) -> Option<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.launcher)).expect("launch runs");
        let children = tasks
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: String = children.collect();
        let mut children = children.split_whitespace();
        let is_daemon = |pid: &&str| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.starts_with("vhost-device-io"))
        };
        children.find(is_daemon)?.parse().ok()
    }

    /// Kills the daemon, and waits until another one answers.
    fn kill(&self) {
        let old = wait_for("a daemon", ANSWER, || self.daemon());
        let status = Command::new("sh")
            .args(["-c", &format!("kill -KILL {old}")])
            .status();
        assert!(status.expect("sh runs").success());
        wait_for("another daemon", ANSWER, || {
            let new = self.daemon()?;
            (new != old && self.control.answers()).then_some(())
        });
    }

    /// The status, once the daemon has taken over.
    fn status(&self) -> Status {
        wait_for("the state of the daemon before", ANSWER, || {
            let status = self.control.status();
            (status.0["life"]["state"] != "taking-over").then_some(status)
        })
    }

    /// Requires that the domain of each program holds exactly the mappings that the program reports.
    #[track_caller]
    fn agrees(&self, vm: &mut Vm, programs: &[(&str, &str)]) {
        let mut expected = BTreeMap::new();
        for (program, endpoint) in programs {
            let dump = vm.run_within(&format!("ask {program} dump"), LONG_ANSWER);
            let table = Table::from_dump(&dump);
            assert!(!table.0.is_empty(), "{program} has mapped nothing");
            expected.insert(self.status().domain_of(endpoint), table);
        }
        self.status();
        for (domain, table) in self.control.tables() {
            let believed = expected.remove(&domain).unwrap_or_default();
            Table::assert_same(&believed, &table, &format!("domain {domain}"));
        }
        assert!(
            expected.is_empty(),
            "domains the daemon lacks: {:?}",
            expected.keys()
        );
    }
}

/// Random traffic over VFIO and of the network interface's driver, while the daemon is killed at random moments.
fn kills_in_traffic(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let (mut vm, launched) = Launched::start(setup, kernel, mode, transport, test_dir);
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
            // 0 to 292 ms, in an order that does not repeat soon.
            pause = (pause * 31 + 17) % 293;
            if let Some(answer) = vm.finish(Duration::from_millis(1 + pause)) {
                break answer;
            }
            launched.kill();
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
        launched.agrees(&mut vm, &[("pair", FIRST), ("single", THIRD)]);
        test_dir.note(&format!("{kills} kills, tables agree"));
        // Also between requests.
        launched.kill();
        kills += 1;
        launched.agrees(&mut vm, &[("pair", FIRST), ("single", THIRD)]);
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
    launched.kill();
    vm.run_within("ask again churn 2000", LONG_ANSWER);
    launched.agrees(&mut vm, &[("again", SECOND)]);
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
