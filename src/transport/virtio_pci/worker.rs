//! The thread that serves the request ring.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use log::{error, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::PciRing;
use crate::device::{Device, QUEUES};
use crate::process::event_loop::EventLoop;
use crate::process::sandbox::{self, Role};
use crate::warn_limited;

/// The tokens of the descriptors that the worker waits for.
const KICK: u64 = 0;
const WAKE: u64 = 1;
const PULSE: u64 = 2;
const STOP: u64 = 3;
/// How long the worker rests after a wait has failed.
const RETRY: Duration = Duration::from_millis(100);

/// The running worker. Dropping it ends and joins the thread.
pub(super) struct RingWorker {
    kick: Arc<EventFd>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl RingWorker {
    /// Serves the rings of `device`: that of the request queue, and that of the event queue. Calls `when_dead` if the
    /// thread ends by itself: without it the driver would wait for ever.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub(super) fn start(
        device: Arc<Device>,
        rings: [PciRing; QUEUES],
        when_dead: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let kick = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let events = EventLoop::new()?;
        for (fd, token) in [
            (kick.as_raw_fd(), KICK),
            (device.wake_event(), WAKE),
            (device.pulse().event(), PULSE),
            (stop.as_raw_fd(), STOP),
        ] {
            events.add(fd, token)?;
        }
        let kicks = kick.clone();
        let thread = sandbox::spawn(Role::PciWorker, move || {
            let mut end = Death {
                is_expected: false,
                when_dead,
            };
            run(&device, &rings, &events, &kicks);
            end.is_expected = true;
        })?;
        Ok(Self {
            kick,
            stop,
            thread: Some(thread),
        })
    }

    /// The driver has kicked the request queue. Does not wait for the worker.
    pub(super) fn kick(&self) {
        match self.kick.write(1) {
            // A counter that is full is readable, too.
            Err(cause) if cause.kind() != io::ErrorKind::WouldBlock => {
                warn_limited!("cannot wake the worker: {cause}");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

impl Drop for RingWorker {
    fn drop(&mut self) {
        if let Err(cause) = self.stop.write(1) {
            warn!("cannot stop the worker: {cause}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the worker has panicked");
        }
    }
}

/// Calls `when_dead` when the thread ends before it was told to.
struct Death<F: Fn()> {
    is_expected: bool,
    when_dead: F,
}

impl<F: Fn()> Drop for Death<F> {
    fn drop(&mut self) {
        if !self.is_expected {
            error!("the thread that serves the rings has ended");
            (self.when_dead)();
        }
    }
}

fn run(device: &Device, rings: &[PciRing; QUEUES], events: &EventLoop, kicks: &EventFd) {
    let [requests, faults] = rings;
    loop {
        let ready = match events.wait(None) {
            Ok(ready) => ready,
            Err(cause) => {
                warn_limited!("the worker cannot wait for kicks: {cause}");
                std::thread::sleep(RETRY);
                continue;
            }
        };
        if ready.contains(STOP) {
            return;
        }
        device.begin_event(faults);
        if ready.contains(KICK) {
            // The count does not matter.
            let _ = kicks.read();
            device.serve_kick(requests);
        }
        if ready.contains(WAKE) {
            device.serve_wake(requests);
        }
        if ready.contains(PULSE) {
            device.answer_watchdog();
        }
    }
}
