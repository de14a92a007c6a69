//! The thread that makes the resets of buses.
//!
//! A hot reset needs an ioctl with the number of `VFIO_IOMMU_MAP_DMA`, and a filter of system calls sees numbers alone.
//! So this thread makes it: it gets its jobs from the daemon, and parses nothing that comes from a client.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use crate::process::sandbox::{self, Role};
use crate::process::wait_budget::WaitBudget;
use crate::vfio::{BusReset, DeviceMark, GroupFile};

/// Sends jobs to the thread, which ends once this is dropped.
#[derive(Debug)]
pub(super) struct ResetThread(Sender<Job>);

/// A reset, and the sender of its outcome.
struct Job {
    reset: Reset,
    outcome: SyncSender<io::Result<()>>,
}

/// A reset of a bus.
pub(super) enum Reset {
    /// A hot reset that a device of the bus makes, with the groups of all affected devices.
    Hot(Arc<dyn BusReset>, Vec<GroupFile>),
    /// Closes devices, so that VFIO may reset their bus, and opens them again.
    Reopen(Vec<Arc<dyn BusReset>>),
}

impl ResetThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, jobs): (_, Receiver<Job>) = channel();
        sandbox::spawn(Role::Resets, move || {
            let mut budget = WaitBudget::new(PATIENCE, Instant::now());
            while let Ok(job) = jobs.recv() {
                // Cannot fail: the sender of the job waits for it.
                let _ = job.outcome.send(job.reset.make(&mut budget));
            }
        })?;
        Ok(Self(sender))
    }

    /// Makes a reset, and waits until it is done.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn make(&self, reset: Reset) -> io::Result<()> {
        let (outcome, done) = sync_channel(1);
        let gone = |_| io::Error::other("the thread that resets devices has ended");
        let sent = self.0.send(Job { reset, outcome });
        sent.map_err(|_| io::Error::other("the thread that resets devices has ended"))?;
        done.recv().map_err(gone)?
    }
}

impl Reset {
    /// `budget` is that of all waits for other processes.
    fn make(self, budget: &mut WaitBudget) -> io::Result<()> {
        match self {
            Self::Hot(device, groups) => {
                let groups: Vec<_> = groups.iter().map(|group| (**group).as_fd()).collect();
                device.hot_reset(&groups)
            }
            Self::Reopen(devices) => {
                let wait = budget.allow(PATIENCE, Instant::now());
                let outcome = reopen(&devices, wait.until);
                budget.charge(&wait, Instant::now());
                outcome
            }
        }
    }
}

/// Values for [`BusReset::mark`]: the hardware of a device can have one of them at most.
const LINES: [u8; 2] = [0x5a, 0xa5];
/// The first pause before devices are closed and opened once more, because another process has them open. Each pause is
/// twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// How long another process may take to close devices. Clients choose how often that is tried, and all exported devices wait
/// meanwhile, so the waits have a budget.
const PATIENCE: Duration = Duration::from_secs(2);

/// Closes the devices and opens them again, until no other process has them open meanwhile, or until `deadline`. The process
/// that keeps them for the next daemon was asked to close them, but does so in its own time: systemd leaves it to another
/// process.
fn reopen(devices: &[Arc<dyn BusReset>], deadline: Instant) -> io::Result<()> {
    let mut pause = FIRST_PAUSE;
    for line in LINES.into_iter().cycle() {
        let marks: io::Result<Vec<_>> =
            devices.iter().map(|device| mark(&**device, line)).collect();
        let marks = marks?;
        reopen_once(devices)?;
        let mut is_open = false;
        for (device, mark) in devices.iter().zip(&marks) {
            is_open |= device.has_mark(mark)?;
        }
        if !is_open {
            return Ok(());
        }
        if Instant::now() + pause > deadline {
            break;
        }
        std::thread::sleep(pause);
        pause = pause.saturating_mul(2);
    }
    Err(io::Error::other("another process has one of them open"))
}

fn mark(device: &dyn BusReset, line: u8) -> io::Result<DeviceMark> {
    device.mark(line).or_else(|_| {
        // An earlier try has closed it, and could not open it. Or the last client has left no room for a mark: what it has
        // left ends when the device is closed.
        device.close()?;
        device.open_again()?;
        device.mark(line)
    })
}

/// Closes all devices before it opens one again: VFIO resets a bus only if no device on it is open.
fn reopen_once(devices: &[Arc<dyn BusReset>]) -> io::Result<()> {
    let mut outcome = Ok(());
    let mut closed = Vec::new();
    for device in devices {
        match device.close() {
            Ok(()) => closed.push(device),
            Err(cause) => {
                outcome = Err(cause);
                break;
            }
        }
    }
    for device in closed {
        let opened = device.open_again();
        if opened.is_err() {
            outcome = opened;
        }
    }
    outcome
}
