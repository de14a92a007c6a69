//! Realtime scheduling of the worker, which serves requests.
//!
//! The driver spins until it has its answer. If the guest keeps all processors busy, a worker of ordinary
//! priority waits for the processor that the spinning driver occupies.
#![expect(unsafe_code, reason = "sets a scheduling policy and a resource limit")]

use std::io;
use std::thread;

use thiserror::Error;

/// Threads of this process cannot have the realtime priority.
#[derive(Debug, Error)]
#[error(
    "realtime-priority = {priority}: {source}; raise the limit (LimitRTPRIO={priority} in the unit, or \
     `ulimit -r {priority}`), or leave the key out"
)]
pub struct RealtimeError {
    priority: u8,
    source: io::Error,
}

/// A priority under SCHED_FIFO that threads of this process may have, as an attempt has shown.
#[derive(Clone, Copy, Debug)]
pub struct Realtime {
    priority: u8,
}

impl Realtime {
    /// Tries `priority`, `1..=99` (sched(7)). Raises the soft limit of the process to it, so that the priority
    /// is still allowed after the process has dropped its privileges.
    ///
    /// # Errors
    /// Threads of this process may not have it.
    pub fn new(priority: u8) -> Result<Self, RealtimeError> {
        let this = Self { priority };
        raise_limit(priority);
        // In a thread of its own: the calling thread keeps its policy.
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
    /// The error of the system.
    pub fn apply(self) -> io::Result<()> {
        // SAFETY: zero is a value of every field of a sched_param.
        let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
        parameters.sched_priority = self.priority.into();
        // SAFETY: has no conditions.
        let this = unsafe { libc::pthread_self() };
        // SAFETY: `this` is the calling thread, and the parameters are read only.
        let error =
            unsafe { libc::pthread_setschedparam(this, libc::SCHED_FIFO, &raw const parameters) };
        match error {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Raises the soft limit to `priority`, and the hard limit if that is lower. If the kernel refuses, the attempt
/// that follows fails.
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
        // SAFETY: `raised` is read only. If the kernel refuses, the limits stay as they are.
        unsafe { libc::setrlimit(libc::RLIMIT_RTPRIO, &raw const raised) };
    }
}
