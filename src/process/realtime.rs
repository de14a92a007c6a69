//! Realtime scheduling of the thread that serves requests.
//!
//! A driver spins until it is answered. Where all processors are a guest's, a worker of ordinary
//! priority waits for the scheduler while the driver burns the time it waits for.
#![expect(
    unsafe_code,
    reason = "asks the system for a scheduling policy and for a limit"
)]

use std::io;
use std::thread;

use thiserror::Error;

/// Why threads cannot have a realtime priority.
#[derive(Debug, Error)]
#[error(
    "realtime-priority = {priority}: {source}; raise the limit (LimitRTPRIO={priority} in the unit, or \
     `ulimit -r {priority}`), or leave the key out"
)]
pub struct RealtimeError {
    priority: u8,
    source: io::Error,
}

/// A priority under SCHED_FIFO that threads of this process were found to be allowed.
#[derive(Clone, Copy, Debug)]
pub struct Realtime {
    priority: u8,
}

impl Realtime {
    /// Tries `priority`, `1..=99` (sched(7)). The process's soft limit is raised to it, so that what was
    /// found holds when privileges are gone.
    ///
    /// # Errors
    /// Where threads are not allowed to have it.
    pub fn new(priority: u8) -> Result<Self, RealtimeError> {
        let this = Self { priority };
        raise_limit(priority);
        // Of a thread of its own: this one keeps its policy.
        let tried = thread::scope(|scope| {
            let thread = thread::Builder::new().name("realtime".into());
            let thread = thread.spawn_scoped(scope, || this.apply())?;
            thread
                .join()
                .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        });
        match tried {
            Ok(()) => Ok(this),
            Err(source) => Err(RealtimeError { priority, source }),
        }
    }

    /// Gives the calling thread the priority.
    ///
    /// # Errors
    /// As the system says.
    pub fn apply(self) -> io::Result<()> {
        // SAFETY: all fields of a sched_param may be zero.
        let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
        parameters.sched_priority = self.priority.into();
        // SAFETY: has no conditions.
        let this = unsafe { libc::pthread_self() };
        // SAFETY: `this` is a thread that lives, and the parameters are only read.
        let error =
            unsafe { libc::pthread_setschedparam(this, libc::SCHED_FIFO, &raw const parameters) };
        match error {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Raises the soft limit as far as is allowed. Where that is too little, the attempt tells.
fn raise_limit(priority: u8) {
    let wanted = libc::rlim_t::from(priority);
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is written only.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_RTPRIO, &raw mut limit) } == 0;
    if known && limit.rlim_cur < wanted {
        let raised = libc::rlimit {
            rlim_cur: wanted,
            rlim_max: limit.rlim_max.max(wanted),
        };
        // SAFETY: `raised` is read only. Refused, nothing has changed.
        unsafe { libc::setrlimit(libc::RLIMIT_RTPRIO, &raw const raised) };
    }
}
