//! Log messages that a guest can cause.

use std::sync::atomic::{AtomicUsize, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

use super::driver::Driver;

/// Counts messages about faulty drivers. Other tests add a few.
struct MessageCounter(AtomicUsize);

static COUNTER: MessageCounter = MessageCounter(AtomicUsize::new(0));

impl Log for MessageCounter {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let message = record.args().to_string();
        if message.contains("the driver enables") || message.contains("cannot be reached") {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_driver_that_fails_repeatedly_does_not_fill_the_log() {
    log::set_logger(&COUNTER).expect("the only one");
    log::set_max_level(LevelFilter::Warn);
    let driver = Driver::new();
    for _ in 0..100 {
        // An unsupported page size; then a queue outside of memory.
        for (queue, mode) in [(0x10000u64, 0x0046_0081), (1 << 40, 0x0046_0001)] {
            driver.set(0x14, 0);
            driver.controller.write(0x28, &queue.to_le_bytes());
            driver.set(0x14, mode);
            driver.wait("stopped", |status| status & 2 == 2);
        }
    }
    let messages = COUNTER.0.load(Ordering::Relaxed);
    assert!((2..50).contains(&messages), "{messages} messages");
}
