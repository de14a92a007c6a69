//! The interposer in one process: accesses by messages that a device's server sends, MAP and UNMAP with a device in
//! the domain, and the removal of many windows. The interposer, the backend, the core and the sockets are real; the server
//! is a thread.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a bench ends by panicking; its counts are small"
)]

#[path = "../../tests/vfio_user_messages/bed.rs"]
#[allow(dead_code, reason = "the bench uses a part of it")]
mod bed;
#[path = "../../tests/vfio_user_messages/connection.rs"]
#[allow(dead_code, reason = "the bench uses a part of it")]
mod connection;
#[path = "../common/fragment.rs"]
mod fragment;
mod mappings;
mod server;
mod windows;

use std::time::{Duration, Instant};

use bed::{Bed, RAM_LEN};
use serde_json::json;
use server::{Access, Server};
use vhost_device_iommu::address::Access as Rights;
use vhost_device_iommu::backends::vfio_user::Isolation;

/// Each figure is the median of this many rounds. The rounds of all measures alternate.
const ROUNDS: usize = 9;
/// How long one round of one measure takes.
const ROUND: Duration = Duration::from_millis(200);
const PAGE: u64 = 4096;

/// Accesses to measure: name, kind, bytes of one access, accesses in flight.
const MEASURES: [(&str, Access, u64, usize); 8] = [
    ("read_4k", Access::Read, PAGE, 1),
    ("read_4k_16_in_flight", Access::Read, PAGE, 16),
    ("read_128k", Access::Read, 32 * PAGE, 1),
    ("read_128k_4_in_flight", Access::Read, 32 * PAGE, 4),
    ("write_4k", Access::Write, PAGE, 1),
    ("write_4k_16_in_flight", Access::Write, PAGE, 16),
    ("write_128k", Access::Write, 32 * PAGE, 1),
    ("write_128k_4_in_flight", Access::Write, 32 * PAGE, 4),
];

fn main() {
    // `cargo test --benches` runs this too; there is nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let chosen = std::env::args().nth(1).filter(|arg| !arg.starts_with('-'));
    let is_chosen = |name: &str| chosen.as_ref().is_none_or(|c| name.starts_with(c.as_str()));
    let mut figures = serde_json::Map::new();
    let mut rates = accesses(&is_chosen);
    if rates.iter().any(|rounds| !rounds.is_empty()) {
        println!("| access | a second | MB/s |\n|---|---|---|");
    }
    for (index, rounds) in rates.iter_mut().enumerate() {
        let (name, _, bytes, _) = MEASURES[index / 2];
        let name = format!("{name}{}", ["", "_kept"][index % 2]);
        if let Some(rate) = median(rounds) {
            println!("| {name} | {rate:.0} | {:.0} |", rate * bytes as f64 / 1e6);
            figures.insert(format!("{name}_per_s"), json!(rate));
        }
    }
    let mut times = Vec::new();
    if is_chosen("map_with") {
        times.extend(mappings::measure());
    }
    if is_chosen("map_run") {
        times.extend(mappings::measure_runs());
    }
    for (name, ns) in times {
        println!("{name}: {ns:.1} ns");
        figures.insert(format!("{name}_ns"), json!(ns));
    }
    if is_chosen("windows") {
        for (name, figure) in windows::measure() {
            println!("{name}: {figure:.1}");
            figures.insert(name.into(), json!(figure));
        }
    }
    fragment::write("interposer", &json!({ "interposer": figures }));
}

/// The accesses a second of each round of each chosen measure: with connections that end with the process, and with those
/// that are kept for a later one, in turns.
fn accesses(is_chosen: &dyn Fn(&str) -> bool) -> Vec<Vec<f64>> {
    let beds = [
        Bed::new(Isolation::Messages),
        Bed::kept(Isolation::Messages),
    ];
    let mut pairs = Vec::new();
    for bed in &beds {
        bed.attach();
        // Each page is a mapping of its own, in the reverse order of the memory behind it.
        for page in 0..RAM_LEN / PAGE {
            let at = RAM_LEN - (page + 1) * PAGE;
            bed.map(page * PAGE, at, PAGE, Rights::READ_WRITE)
                .expect("mapped");
        }
        let (client, server) = bed.raw_pair();
        let mut server = Server::new(server.stream);
        server.answer_windows();
        pairs.push((client, server));
    }
    let mut rates = vec![Vec::new(); MEASURES.len() * beds.len()];
    for _ in 0..ROUNDS {
        for (index, (name, access, bytes, in_flight)) in MEASURES.iter().enumerate() {
            for (kept, (_, server)) in pairs.iter_mut().enumerate() {
                if is_chosen(name) {
                    let begin = Instant::now();
                    let count = server.run(*access, *bytes, *in_flight, RAM_LEN, ROUND);
                    let rate = count as f64 / begin.elapsed().as_secs_f64();
                    rates[index * beds.len() + kept].push(rate);
                }
            }
        }
    }
    rates
}

fn median(rounds: &mut [f64]) -> Option<f64> {
    rounds.sort_by(f64::total_cmp);
    rounds.get(rounds.len() / 2).copied()
}
