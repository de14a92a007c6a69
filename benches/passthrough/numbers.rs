//! Medians of the rounds.

use crate::{BLOCK, Interface, PAGE};

/// The median of these numbers.
pub fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_unstable_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// One request through the daemon and by the bare system call, in one round; microseconds.
#[derive(Clone, Copy)]
pub struct Compared {
    pub daemon: f64,
    pub bare: f64,
    /// The median of the differences.
    pub added: f64,
}

impl Compared {
    /// From pairs of times that were measured one after the other: the daemon's and the bare
    /// call's.
    pub fn of(pairs: &[(f64, f64)]) -> Self {
        let median_of =
            |f: fn(&(f64, f64)) -> f64| median(&mut pairs.iter().map(f).collect::<Vec<_>>());
        Self {
            daemon: median_of(|p| p.0),
            bare: median_of(|p| p.1),
            added: median_of(|p| p.0 - p.1),
        }
    }
}

/// The figures of all rounds for one request.
pub struct Row {
    title: String,
    /// Own, daemon, bare, added: one number of each for each round.
    columns: [Vec<f64>; 4],
}

impl Row {
    /// Row number `at` of an interface: MAP and UNMAP of a page, then of a block.
    pub fn new(interface: Interface, at: usize) -> Self {
        let kind = [PAGE, BLOCK][at / 2];
        let request = ["MAP", "UNMAP"][at % 2];
        Self {
            title: format!("{:30} {:6} {request:6}", interface.title(), kind.name),
            columns: Default::default(),
        }
    }

    /// Adds the columns of one round.
    pub fn add(&mut self, line: &str) {
        let numbers = line.split_whitespace();
        for (column, number) in self.columns.iter_mut().zip(numbers) {
            column.push(number.parse().expect("a number"));
        }
    }
}

/// Prints rows.
pub fn report(rows: &[Row]) {
    for Row { title, columns } in rows {
        let [own, daemon, bare, added] = columns.clone().map(|mut column| {
            let quarter = column.len() / 4;
            let median = (!column.is_empty()).then(|| median(&mut column));
            (median.unwrap_or(0.0), column.get(quarter).copied(), column)
        });
        print!("  {title} own {:6.3}", own.0);
        if let (Some(low), column) = (added.1, added.2) {
            let high = column[column.len() - 1 - column.len() / 4];
            let part = |us: f64| 100.0 * us / bare.0;
            print!(
                "  daemon {:8.2}  bare {:8.2}  added {:5.2}: {:.1} % (half of the rounds {:.1} to {:.1} %)",
                daemon.0,
                bare.0,
                added.0,
                part(added.0),
                part(low),
                part(high)
            );
        }
        println!();
    }
}
