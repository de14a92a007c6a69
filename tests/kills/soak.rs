//! The soak: guest traffic, servers, readers, operators, hot-plug and kills together, for `VIOMMU_SOAK_SECONDS`.
//!
//! Every half second the guest compares the daemon's state with its own ([`crate::vmm`]). At intervals the
//! test stops the kills, the operators and the hot-plug for a moment and compares the daemon's descriptors, threads and
//! memory with those after a warm-up.

use std::path::Path;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::daemon::ask;
use crate::common::rng::Rng;
use crate::rounds::{KillBed, VICTIMS, Victim, number_from_env};

/// Kills before the test notes the daemon's descriptors, threads and memory.
const WARM_UP: u64 = 50;
/// KiB by which the daemon's memory may grow. Its allocator does not return all that it frees.
const SLACK_KIB: u64 = 1024;
/// The range of PCI addresses to which the operator adds endpoints.
const PLUGGED: &str = "00:09.0-00:09.7";

/// What the operators have done.
#[derive(Debug, Default)]
struct Done {
    questions: AtomicU64,
    plugged: AtomicU64,
}

#[test]
#[ignore = "takes VIOMMU_SOAK_SECONDS; run qemu-scripts/soak.sh"]
fn everything_together() {
    let seconds = number_from_env("VIOMMU_SOAK_SECONDS", 20);
    let seed = number_from_env("VIOMMU_KILLS_SEED", u64::from(std::process::id()));
    println!("{seconds} s, seed {seed}");
    let until = Instant::now() + Duration::from_secs(seconds);
    let interval = Duration::from_secs((seconds / 20).clamp(5, 60));
    let mut rng = Rng::new(seed);
    let mut bed = KillBed::new();
    bed.wait_until_all_work();
    let control = bed.daemon.control_socket();
    let (done, over, pause) = (Done::default(), AtomicBool::new(false), RwLock::new(()));
    let mut killed = [0u64; VICTIMS.len()];
    let mut comparisons = 0;
    std::thread::scope(|scope| {
        let ends = EndOnDrop(&over);
        let operators = [
            scope.spawn(|| ask_questions(&control, &done, &over, &pause)),
            scope.spawn(|| plug_and_unplug(&control, &done, &over, &pause)),
        ];
        let mut before = None;
        let mut next = Instant::now() + interval;
        while Instant::now() < until || before.is_none() {
            let victim = rng.pick(&VICTIMS);
            sleep(Duration::from_micros(rng.below(300_000)));
            comparisons += bed.comparisons();
            bed.kill(victim);
            bed.start(victim);
            killed[victim as usize] += 1;
            if !rng.one_in(4) {
                bed.wait_until_all_work();
            }
            bed.assert_works();
            for operator in &operators {
                assert!(!operator.is_finished(), "a check of an operator failed");
            }
            if killed.iter().sum::<u64>() < WARM_UP || (before.is_some() && Instant::now() < next) {
                continue;
            }
            next = Instant::now() + interval;
            let _operators_wait = pause.write().expect("no check failed");
            let now = bed.figures(before.map(|(fds, threads, _)| (fds, threads)));
            // If the first counts included peers that had just died, the later ones are the measure.
            let kib = before.map_or(now.2, |(.., kib)| kib);
            before = Some((now.0, now.1, kib));
            println!(
                "{killed:?} kills of {VICTIMS:?}, {comparisons} comparisons, {done:?}; descriptors, threads, KiB: \
                 {now:?}"
            );
            assert!(now.2 <= kib + SLACK_KIB, "{kib} KiB, then {now:?}");
        }
        drop(ends);
    });
    // A guest compares after 60 requests for the first time. A short soak can kill each guest before that.
    let hangs_at = Instant::now() + Duration::from_secs(60);
    while comparisons == 0 {
        assert!(Instant::now() < hangs_at, "the guest compares nothing");
        sleep(Duration::from_millis(20));
        bed.wait_until_all_work();
        bed.assert_works();
        comparisons += bed.comparisons();
    }
    for count in [&done.questions, &done.plugged] {
        assert!(count.load(Ordering::Relaxed) > 0, "{done:?}");
    }
    assert!(killed[Victim::Vmm as usize] > 0, "{killed:?}");
    bed.end();
}

/// Ends the operators on drop, even if the test panics.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn answer(control: &Path, request: &str) -> Value {
    let text = ask(control, request);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{request}: {error} in {text:?}"))
}

/// An operator who asks each question in turn.
fn ask_questions(control: &Path, done: &Done, over: &AtomicBool, pause: &RwLock<()>) {
    let questions = [
        "status",
        "stats",
        "endpoints",
        "domains",
        "mappings",
        "faults",
    ];
    for question in questions.iter().cycle() {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let _not_paused = pause.read().expect("no check failed");
        let answer = answer(control, question);
        assert!(answer["error"].is_null(), "{question}: {answer}");
        done.questions.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis(5));
    }
}

/// An operator who adds endpoints and removes them. The guest attaches one of them now and then.
fn plug_and_unplug(control: &Path, done: &Done, over: &AtomicBool, pause: &RwLock<()>) {
    while !over.load(Ordering::Relaxed) {
        let _not_paused = pause.read().expect("no check failed");
        let added = answer(control, &format!("add-endpoint range = '{PLUGGED}'"));
        assert_eq!(added["added"]["endpoints"], 8, "{added}");
        sleep(Duration::from_millis(10));
        let removed = answer(control, &format!("remove-endpoint {PLUGGED}"));
        assert!(removed["error"].is_null(), "{removed}");
        done.plugged.fetch_add(1, Ordering::Relaxed);
    }
}
