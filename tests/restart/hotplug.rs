//! The daemon dies, or is replaced, after `ctl` has added and removed endpoints, and while it does so.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;

use serde_json::{Value, json};
use vhost_device_iommu::endpoints::changes::ChangeRecord;
use vhost_device_iommu::process::keeper::Keeper as LibraryKeeper;
use vhost_device_iommu::topology::PciRange;

use super::*;

const FILE: &str = "address = '00:05.0'\nbypass = false\n\
                    [[endpoint]]\naddress = '00:06.0'\n[[endpoint]]\naddress = '00:08.0'\n";
const IOVA: u64 = 0x7000_0000;
const GPA: u64 = 0xa0_0000;
const KEYS: &str = "address = '00:07.0', group = 'g'";

struct Bed {
    keeper: Keeper,
    daemon: Daemon,
    guest: Guest,
}

impl Bed {
    fn new(file: &str) -> Self {
        let keeper = Keeper::empty();
        let daemon = Daemon::kept_with_config(&keeper, file, &[]);
        let guest = Guest::boot(&daemon);
        Self {
            keeper,
            daemon,
            guest,
        }
    }

    /// The same, with the endpoint [`EP2`] added and attached to domain 1, which has a mapping.
    fn with_added() -> Self {
        let mut bed = Self::new(FILE);
        bed.ctl(&format!("add-endpoint {KEYS}"));
        assert_eq!(bed.guest.attach(1, EP2), OK);
        assert_eq!(bed.guest.map_page(1, IOVA, GPA), OK);
        bed
    }

    fn ctl(&self, line: &str) {
        let answer = self.daemon.control(line);
        assert!(answer["error"].is_null(), "{line}: {answer}");
    }

    fn die(&mut self) {
        self.daemon.die(&mut self.keeper);
    }

    /// Ends the daemon, changes its file or what the keeper has, and starts the next one.
    fn die_and(&mut self, change: impl FnOnce(&mut Self)) {
        self.daemon.kill();
        self.keeper.take();
        change(self);
        self.daemon.start_again(&mut self.keeper);
    }

    fn write_file(&self, text: &str) {
        std::fs::write(self.daemon.folder().join("vm.toml"), text).expect("written");
    }

    /// Changes the record of changes as a daemon does in the middle of one.
    fn in_the_middle(&self, step: impl FnOnce(&mut ChangeRecord)) {
        step(&mut record(&self.keeper));
    }

    fn life(&self) -> Value {
        self.daemon.status()["life"].clone()
    }

    fn lost(&self) -> String {
        self.life()["lost"].to_string()
    }

    fn has(&self, endpoint: u32) -> bool {
        let status = self.daemon.status();
        let endpoints = status["endpoints"].as_array().expect("a list");
        endpoints.iter().any(|e| e["id"] == endpoint)
    }
}

/// The record that the keeper has.
fn record(keeper: &Keeper) -> ChangeRecord {
    let (_manager, ours) = UnixDatagram::pair().expect("sockets");
    let file: OwnedFd = keeper.files["hotplug"].try_clone().expect("a copy");
    let keeper = LibraryKeeper::new(ours, [("hotplug".to_owned(), file)]).expect("a keeper");
    ChangeRecord::find(&keeper).expect("whole").0
}

fn range(text: &str) -> PciRange {
    text.parse().expect("a range")
}

#[test]
fn endpoints_that_ctl_adds_and_removes_stay_so() {
    let mut bed = Bed::with_added();
    bed.ctl("remove-endpoint 00:06.0");
    for round in 0..kills() / 10 {
        if round % 2 == 0 {
            bed.die();
        } else {
            bed.daemon.terminate();
            assert!(bed.daemon.wait_for_end().success());
            bed.daemon.start_again(&mut bed.keeper);
        }
        let found = bed.daemon.endpoint(EP2);
        assert_eq!(
            (&found["state"], &found["domain"]),
            (&json!("attached"), &json!(1))
        );
        let described = &bed.daemon.status()["handover"]["endpoints"];
        assert_eq!(described["0000:00:07.0"], "group g", "{described}");
        assert_eq!(bed.daemon.gpa_of(EP2, IOVA), Some(GPA));
        assert!(!bed.has(EP), "it was removed");
        assert_eq!(bed.guest.attach(1, EP), NOENT);
        assert_eq!(bed.guest.map_page(1, IOVA + PAGE, GPA), OK);
        assert_eq!(bed.guest.unmap(1, IOVA + PAGE, IOVA + PAGE + 0xfff), OK);
        assert_eq!(bed.lost(), "[]");
    }
    // Both ways once more.
    bed.ctl("remove-endpoint 00:07.0");
    bed.ctl("add-endpoint address = '00:06.0'");
    assert_eq!(bed.guest.attach(2, EP), OK);
    bed.die();
    assert!(!bed.has(EP2));
    assert_eq!(bed.daemon.endpoint(EP)["domain"], 2);
    bed.keeper.take();
    let records = bed
        .keeper
        .files
        .keys()
        .filter(|name| name.contains("hotplug"));
    assert_eq!(records.count(), 1, "{:?}", bed.keeper.files.keys());
}

/// Also without a VMM, whose state alone would not need the endpoints.
#[test]
fn changes_outlive_a_daemon_without_a_vmm() {
    let mut keeper = Keeper::empty();
    let mut daemon = Daemon::kept_over_vfio_user(&keeper, FILE);
    for line in [
        "add-endpoint range = '00:07.0-00:07.7'",
        "remove-endpoint 00:07.2-00:07.3",
        "remove-endpoint 00:06.0",
    ] {
        assert!(daemon.control(line)["error"].is_null(), "{line}");
    }
    let listed = |daemon: &Daemon| daemon.control("endpoints")["endpoints"].clone();
    let before = listed(&daemon);
    assert_eq!(before.as_array().map(Vec::len), Some(7), "{before}");
    daemon.die(&mut keeper);
    assert_eq!(listed(&daemon), before);
    daemon.terminate();
    daemon.wait_for_end();
    daemon.start_again(&mut keeper);
    assert_eq!(listed(&daemon), before);
}

/// What a daemon leaves that dies in an addition, after each step that a later one can see.
#[test]
fn a_death_in_an_addition_leaves_the_endpoint_or_nothing() {
    // Recorded, and not in the core.
    let mut bed = Bed::new(FILE);
    bed.die_and(|bed| {
        bed.in_the_middle(|r| r.begin_addition(KEYS, range("00:07.0")).expect("room"));
    });
    assert_eq!(bed.daemon.endpoint(EP2)["state"], "unattached");
    assert_eq!(bed.guest.attach(1, EP2), OK);
    bed.die();
    assert_eq!(bed.daemon.endpoint(EP2)["state"], "attached");
    assert_eq!(bed.lost(), "[]");

    // In the core, and attached by the guest already.
    let mut bed = Bed::with_added();
    let again = |bed: &mut Bed| {
        bed.in_the_middle(|r| {
            r.abandon_addition(range("00:07.0"));
            r.begin_addition(KEYS, range("00:07.0")).expect("room");
        });
    };
    bed.die_and(again);
    assert_eq!(bed.daemon.gpa_of(EP2, IOVA), Some(GPA));
    assert_eq!(bed.lost(), "[]");

    // The next daemon dies of it, too.
    bed.die_and(|bed| {
        again(bed);
        drop(record(&bed.keeper));
    });
    assert!(!bed.has(EP2));
    assert_eq!(bed.guest.attach(1, EP2), NOENT);
    assert!(
        bed.lost().contains("two daemons have died of it"),
        "{}",
        bed.lost()
    );
    bed.ctl(&format!("add-endpoint {KEYS}"));
    assert_eq!(bed.guest.attach(1, EP2), OK);
    bed.die();
    assert_eq!(bed.lost(), "[]");
}

/// The endpoint is blocked until the operator removes it again, or the guest attaches it again.
#[test]
fn a_death_in_a_removal_leaves_the_endpoint_blocked() {
    let half = |bed: &mut Bed| {
        bed.in_the_middle(|r| r.begin_removal(range("00:07.0")).expect("room"));
    };
    let mut bed = Bed::with_added();
    bed.die_and(half);
    assert_eq!(bed.daemon.endpoint(EP2)["state"], "quarantined");
    assert_eq!(bed.daemon.gpa_of(EP2, IOVA), None);
    assert!(bed.lost().contains("remove it again"), "{}", bed.lost());
    bed.die();
    assert_eq!(bed.daemon.endpoint(EP2)["state"], "quarantined");
    bed.ctl("remove-endpoint 00:07.0");
    bed.die();
    assert!(!bed.has(EP2));
    assert_eq!(bed.lost(), "[]");

    let mut bed = Bed::with_added();
    bed.die_and(half);
    assert_eq!(bed.guest.attach(1, EP2), OK);
    bed.die();
    assert_eq!(bed.daemon.gpa_of(EP2, IOVA), Some(GPA));
    assert_eq!(bed.lost(), "[]");

    // The core has given it up already.
    let mut bed = Bed::new(FILE);
    bed.die_and(|bed| {
        bed.in_the_middle(|r| {
            r.begin_addition(KEYS, range("00:07.0")).expect("room");
            r.finish_addition();
        });
        half(bed);
    });
    assert_ne!(bed.daemon.endpoint(EP2)["state"], "attached");
    assert_eq!(bed.daemon.endpoint(EP2)["dma"], "blocked");
    bed.ctl("remove-endpoint 00:07.0");
}

#[test]
fn a_damaged_record_blocks_everything_and_is_said() {
    let mut bed = Bed::with_added();
    bed.die_and(|bed| {
        let file = bed.keeper.files["hotplug"].try_clone().expect("a copy");
        // The magic number.
        std::fs::File::from(file)
            .write_all_at(&[7], 0)
            .expect("written");
    });
    let life = bed.life();
    assert_eq!(life["state"], "refused", "{life}");
    assert!(
        life["reason"].to_string().contains("endpoints that `ctl`"),
        "{life}"
    );
    for endpoint in [EP, EP3] {
        assert_eq!(bed.daemon.endpoint(endpoint)["dma"], "blocked");
        assert_ne!(bed.guest.attach(1, endpoint), OK);
    }
    assert!(!bed.has(EP2));
    // The next driver has what the file says, and changes are recorded again.
    bed.guest.reboot();
    assert_eq!(bed.guest.attach(1, EP), OK);
    bed.ctl(&format!("add-endpoint {KEYS}"));
    assert_eq!(bed.guest.attach(1, EP2), OK);
    bed.die();
    assert_eq!(bed.daemon.endpoint(EP2)["state"], "attached");
}

#[test]
fn a_file_that_contradicts_an_addition_blocks_the_endpoint() {
    let mut bed = Bed::with_added();
    // The same in the file is no contradiction.
    let same = format!("{FILE}[[endpoint]]\n{}\n", KEYS.replace(", ", "\n"));
    bed.die_and(|bed| bed.write_file(&same));
    assert_eq!(bed.daemon.gpa_of(EP2, IOVA), Some(GPA));
    assert_eq!(bed.lost(), "[]");
    bed.die_and(|bed| bed.write_file(&format!("{FILE}[[endpoint]]\naddress = '00:07.0'\n")));
    assert_eq!(bed.daemon.endpoint(EP2)["state"], "quarantined");
    assert_eq!(bed.daemon.gpa_of(EP2, IOVA), None);
    assert!(
        bed.lost().contains("contradicts the file"),
        "{}",
        bed.lost()
    );
    // The others go on.
    assert_eq!(bed.guest.attach(2, EP), OK);
}

/// Sends a command to a daemon that may die meanwhile. `None` if it has not answered.
fn ask(control: &Path, line: &str) -> Option<bool> {
    let mut stream = UnixStream::connect(control).ok()?;
    writeln!(stream, "{line}").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let answer: Value = serde_json::from_str(&text).ok()?;
    Some(answer["error"].is_null())
}

/// What has the operator's answer is there after the death, or gone. What has none is one of both.
#[test]
fn kills_at_random_leave_what_the_operator_was_told() {
    let mut bed = Bed::new(FILE);
    assert_eq!(bed.guest.attach(1, EP), OK);
    let mut rng = Rng::new(5);
    let control = bed.daemon.control_socket();
    let mut unanswered = 0;
    for kill in 0..kills() {
        let is_there = bed.has(EP2);
        let line = if is_there {
            "remove-endpoint 00:07.0".to_owned()
        } else {
            format!("add-endpoint {KEYS}")
        };
        let pause = Duration::from_micros(rng.below(3000));
        let told = thread::scope(|scope| {
            let told = scope.spawn(|| ask(&control, &line));
            thread::sleep(pause);
            bed.daemon.kill();
            told.join().expect("asked")
        });
        bed.daemon.start_again(&mut bed.keeper);
        let life = bed.life();
        assert_eq!(life["state"], "taken-over", "{life}");
        match told {
            Some(done) => {
                assert!(done, "{line}");
                assert_eq!(bed.has(EP2), !is_there, "kill {kill}: {line}");
            }
            None => unanswered += 1,
        }
        // The guest uses whatever there is.
        let status = bed.guest.attach(2, EP2);
        assert_eq!(status == OK, bed.has(EP2), "{status}");
        assert_eq!(bed.daemon.endpoint(EP)["state"], "attached");
        assert_eq!(bed.guest.map_page(1, IOVA, GPA), OK);
        assert_eq!(bed.guest.unmap(1, IOVA, IOVA + 0xfff), OK);
    }
    println!("{unanswered} of {} commands had no answer", kills());
}
