//! Child processes that do not outlive this process.
#![expect(
    unsafe_code,
    reason = "prepares a child between fork and exec, and sends signals other than SIGKILL"
)]

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libc::{c_int, pid_t};

/// The interval at which an ending child is polled.
const INTERVAL: Duration = Duration::from_millis(5);

/// A child process, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    /// How long the child may take to end after SIGTERM.
    patience: Duration,
    status: Option<ExitStatus>,
}

impl Running {
    /// Starts `command` with the descriptors `inherited` under the same numbers. When the calling thread
    /// dies, the child gets the signal `at_death`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(
        mut command: Command,
        inherited: Vec<RawFd>,
        at_death: c_int,
        patience: Duration,
    ) -> io::Result<Self> {
        let parent = pid_t::try_from(std::process::id()).map_err(io::Error::other)?;
        // SAFETY:
        // - between fork and exec the closure makes three kinds of system calls, all of which are
        //   async-signal-safe, and neither allocates nor takes locks
        // - the descriptors are the caller's, open until the program has been started
        unsafe { command.pre_exec(move || prepare(parent, at_death, &inherited)) };
        Ok(Self {
            child: command.spawn()?,
            patience,
            status: None,
        })
    }

    /// The exit status, if the child has ended.
    pub fn poll(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Sends a signal, unless the child has ended.
    pub fn signal(&mut self, signal: c_int) -> io::Result<()> {
        if self.poll()?.is_some() {
            return Ok(());
        }
        let pid = pid_t::try_from(self.child.id()).map_err(io::Error::other)?;
        // SAFETY:
        // - no pointer is passed
        // - the number is the child's: only poll() and end() reap it, and they have not
        if unsafe { libc::kill(pid, signal) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Ends the child: SIGTERM first, and SIGKILL if that takes too long.
    pub fn end(&mut self) -> io::Result<ExitStatus> {
        self.signal(libc::SIGTERM)?;
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(status) = self.poll()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                break;
            }
            sleep(INTERVAL);
        }
        self.child.kill()?;
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.end().is_err() {
            // No other means is left; the kernel ends the child with this process.
        }
    }
}

/// The exit status of this process for a child's status: the same, or 128 plus the signal's number.
pub(super) fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| Some(status.signal()?.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Runs in the child before its program.
fn prepare(parent: pid_t, at_death: c_int, inherited: &[RawFd]) -> io::Result<()> {
    // SAFETY:
    // - the call takes numbers only
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, at_death) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // The call above does not notice a parent that died before it.
    // SAFETY:
    // - the call has no arguments and cannot fail
    if unsafe { libc::getppid() } != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    for &fd in inherited {
        // SAFETY:
        // - no pointer is passed; the flags are this child's own, the parent keeps its
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
