//! Lets every daemon of a test program relay its VMMs' connections: a process that keeps descriptors makes it do so. Set
//! `VIOMMU_TEST_RELAY=1` for that, or [`ALWAYS`]. The tests must not notice the relay.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::kept::Keeper;

/// Every daemon of this test program relays, whatever the environment says.
pub static ALWAYS: AtomicBool = AtomicBool::new(false);

/// Keeps the descriptors of one daemon until this is dropped.
pub struct Relayed {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relayed {
    /// A keeper for the daemon that `command` starts, if the test program is to use the relay and the test has no keeper of
    /// its own.
    pub fn prepare(command: &mut Command) -> Option<Self> {
        let is_wanted =
            ALWAYS.load(Ordering::Relaxed) || std::env::var_os("VIOMMU_TEST_RELAY").is_some();
        if !is_wanted || command.get_args().any(|word| word == "--keeper-fd") {
            return None;
        }
        let mut keeper = Keeper::empty();
        keeper.prepare(command);
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                keeper.take();
                thread::sleep(Duration::from_millis(1));
            }
        });
        Some(Self {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                thread::panicking() || ended.is_ok(),
                "the keeper has panicked"
            );
        }
    }
}
