//! The sandbox: each thread keeps only the rights that its role needs.
//!
//! ```text
//! arm        confines the process as a whole, before it has threads: no new privileges, no core dumps
//! spawn      starts a thread of this crate, confined before its first step
//! enter      confines a thread that a library has started, or the main thread once all is set up
//!              capabilities -> Landlock -> seccomp; each holds for the thread and the threads it starts
//! ```
//!
//! A process that was not armed is not confined: `spawn` only starts a thread, and `enter` does nothing. This
//! is so for tests and for other programs that use this library.

mod calls;
mod files;
mod filter;
mod privileges;
mod role;
mod system;

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use landlock::RulesetCreated;
use log::{debug, error, info, warn};
use rustix::thread::CapabilitySet;
use thiserror::Error;

use crate::locks::{Mutex, Rank};

pub use filter::Violation;
pub use role::{Needs, Plugging, Role};

/// The sandbox of this process, if it is armed. A process can be armed only once, because the confinement
/// cannot be undone.
static ARMED: OnceLock<Armed> = OnceLock::new();

thread_local! {
    /// The role that the calling thread is confined to.
    static CONFINED: Cell<Option<Role>> = const { Cell::new(None) };
}

/// The process or a thread cannot be confined.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The kernel or the processor has no system call filters.
    #[error(
        "the sandbox cannot be made: there are no system call filters {scope}; use a kernel with \
         CONFIG_SECCOMP_FILTER on x86-64, AArch64 or 64-bit RISC-V"
    )]
    NoFilters {
        /// The processor or the kernel without filters, as the end of the sentence.
        scope: String,
    },
    /// A filter cannot be compiled.
    #[error(
        "the sandbox cannot be made: a filter cannot be compiled: {0}; report this as a defect"
    )]
    Filter(#[source] seccompiler::BackendError),
    /// The kernel refused a filter.
    #[error(
        "the sandbox cannot be made: the kernel refuses a filter of system calls: {0}; start the daemon \
         outside of a container or a service that forbids filters"
    )]
    Install(#[source] seccompiler::Error),
    /// The kernel refused the Landlock rules.
    #[error(
        "the sandbox cannot be made: the kernel refuses the rules for files (Landlock): {0}; start the daemon \
         in fewer nested sandboxes, or report this as a defect"
    )]
    Files(#[from] landlock::RulesetError),
    /// The kernel refused something else.
    #[error(
        "the sandbox cannot be made: cannot {step}: {source}; start the daemon outside of a container or a \
         service that forbids this"
    )]
    System {
        /// The step that failed.
        step: &'static str,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The process is armed already.
    #[error("this process is in its sandbox already; call `arm` only once")]
    Twice,
}

/// The settings by which threads are confined.
struct Armed {
    needs: Needs,
    violation: Violation,
    /// The Landlock rules. The main thread takes them, because threads that start later inherit its rules. They
    /// stay here if the thread `control` starts threads.
    files: Mutex<Option<RulesetCreated>>,
    /// The Landlock rules of the thread `control`, if it adds endpoints or writes a file with metrics.
    control_files: Mutex<Option<RulesetCreated>>,
}

/// Arms the process. The caller must do so before it starts any thread. From then on [`spawn`] confines the
/// threads it starts, and [`enter`] confines other threads.
///
/// # Errors
/// See [`SandboxError`]. A kernel without Landlock is not an error: the filters allow only the thread `control` to
/// open files, and only if the configuration needs that. [`enter`] then warns.
pub fn arm(needs: Needs, violation: Violation) -> Result<(), SandboxError> {
    system::check_filters()?;
    system::limit_the_allocator_to_one_arena();
    if violation == Violation::Report {
        system::name_violations()?;
    }
    privileges::confine_process(&needs)?;
    let control_files = needs
        .opens_files()
        .then(|| files::control_rules(&needs))
        .transpose()?;
    let armed = Armed {
        files: Mutex::new(Rank::SandboxFiles, Some(files::rules(&needs)?)),
        control_files: Mutex::new(Rank::SandboxControlFiles, control_files),
        needs,
        violation,
    };
    ARMED.set(armed).map_err(|_| SandboxError::Twice)
}

/// Starts a thread named after its role, and waits until it is confined. It runs `run` only then.
///
/// # Errors
/// The system has no thread left, or the thread cannot be confined.
pub fn spawn(role: Role, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(role.name().into());
    let Some(armed) = ARMED.get() else {
        return thread.spawn(run);
    };
    let (sender, outcome) = sync_channel(1);
    let thread = thread.spawn(move || {
        let done = armed.confine(role);
        let is_confined = done.is_ok();
        // Cannot fail: the receiver waits for it.
        let _ = sender.send(done);
        if is_confined {
            run();
        }
    })?;
    let done = outcome.recv().map_err(io::Error::other)?;
    done.map_err(io::Error::other)?;
    Ok(thread)
}

/// Confines the calling thread and the threads that it will start. Does nothing if the process is not armed or
/// the thread is confined already. Aborts the process if the kernel refuses: no thread may run unconfined.
pub fn enter(role: Role) {
    if CONFINED.get().is_some() {
        return;
    }
    let Some(armed) = ARMED.get() else {
        return;
    };
    if let Err(cause) = armed.confine(role) {
        error!("the thread {} cannot be confined: {cause}", role.name());
        std::process::abort();
    }
}

impl Armed {
    /// Confines the calling thread.
    fn confine(&self, role: Role) -> Result<(), SandboxError> {
        CONFINED.set(Some(role));
        let programs = filter::programs(role, &self.needs, self.violation)?;
        let mut rights = None;
        // Children of the main thread inherit its capabilities and Landlock rules.
        if !role.is_child_of_main() {
            let kept = privileges::drop_capabilities(&self.needs)?;
            rights = Some((kept, self.restrict_files(role)?));
        }
        for program in &programs {
            seccompiler::apply_filter(program).map_err(SandboxError::Install)?;
        }
        match rights {
            Some((kept, enforced)) if role == Role::Main => {
                log_confinement(kept, enforced, &self.needs);
            }
            _ => debug!("{} is confined", role.name()),
        }
        Ok(())
    }

    /// Puts the calling thread under the Landlock rules of its role. Returns whether the kernel enforces them.
    fn restrict_files(&self, role: Role) -> Result<bool, SandboxError> {
        let mut files = self.files.lock();
        let mut control_files = self.control_files.lock();
        let rules = if role == Role::Control && control_files.is_some() {
            control_files.take()
        } else if role == Role::Main && self.needs.plugging.is_none() {
            files.take()
        } else {
            let copy = files.as_ref().map(RulesetCreated::try_clone);
            copy.transpose().map_err(|source| SandboxError::System {
                step: "copy the rules for files",
                source,
            })?
        };
        // Without rules here, the main thread has taken them, and this thread has inherited them.
        rules.map_or(Ok(true), files::restrict)
    }
}

fn log_confinement(kept: CapabilitySet, enforced: bool, needs: &Needs) {
    let files = files_protection(enforced, needs);
    let names: Vec<_> = kept.iter_names().map(|(name, _)| name).collect();
    let kept = if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    };
    info!("sandboxed: system calls filtered, files {files}, capabilities {kept}");
    if !enforced && needs.opens_files() {
        warn!(
            "without Landlock the thread `control`, which reads what clients send, can open every file that the \
             daemon's user can: `hotplug` and `metrics.textfile` need files; use a kernel with Landlock \
             (CONFIG_SECURITY_LANDLOCK, and `landlock` in its parameter lsm=), or leave out both keys"
        );
    }
}

/// The protection of files, as a part of a sentence. `enforced` tells whether the kernel has Landlock.
fn files_protection(enforced: bool, needs: &Needs) -> &'static str {
    match (enforced, needs.opens_files()) {
        (true, false) => "out of reach",
        (true, true) => "out of reach, except those of `hotplug` and `metrics.textfile`",
        (false, false) => "protected by the filter alone, as this kernel has no Landlock",
        (false, true) => "NOT protected from the thread `control`, as this kernel has no Landlock",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_does_not_promise_protection_that_only_landlock_gives() {
        let plain = Needs::default();
        let plugging = Needs {
            plugging: Some(Plugging::default()),
            ..Needs::default()
        };
        let textfile = Needs {
            textfile_folder: Some("/run/metrics".into()),
            ..Needs::default()
        };
        assert_eq!(files_protection(true, &plain), "out of reach");
        assert!(files_protection(false, &plain).contains("filter alone"));
        for needs in [&plugging, &textfile] {
            assert!(files_protection(true, needs).contains("except"));
            assert!(files_protection(false, needs).contains("NOT protected"));
        }
    }
}
