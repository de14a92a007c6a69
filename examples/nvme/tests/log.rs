//! What a guest can have the log say.

use std::sync::atomic::{AtomicUsize, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

use super::driver::Driver;

/// Counts what is said of drivers that go wrong. Other tests may be heard too, a little.
struct Listener(AtomicUsize);

static LISTENER: Listener = Listener(AtomicUsize::new(0));

impl Log for Listener {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let said = record.args().to_string();
        if said.contains("the driver enables") || said.contains("cannot be reached") {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_driver_that_goes_wrong_again_and_again_fills_no_log() {
    log::set_logger(&LISTENER).expect("the only one");
    log::set_max_level(LevelFilter::Warn);
    let driver = Driver::new();
    for _ in 0..100 {
        // A page size there is not; then a queue where no memory is.
        for (queue, mode) in [(0x10000u64, 0x0046_0081), (1 << 40, 0x0046_0001)] {
            driver.set(0x14, 0);
            driver.controller.write(0x28, &queue.to_le_bytes());
            driver.set(0x14, mode);
            driver.wait("stopped", |status| status & 2 == 2);
        }
    }
    let said = LISTENER.0.load(Ordering::Relaxed);
    assert!((2..50).contains(&said), "{said} lines");
}
