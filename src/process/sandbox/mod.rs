//! What is left to the process once it serves: no more than it needs, thread by thread.
//!
//! ```text
//! arm        the whole process, before it has threads: no new privileges, no core dumps
//! spawn      a thread of ours: confined before its first step
//! enter      a thread that somebody else has made, or the main thread when all is set up
//!              capabilities -> Landlock -> seccomp, each of the thread alone and inherited
//! ```
//!
//! A process that was not armed, as of tests and of other programs with this library, is not
//! confined: `spawn` makes a thread and `enter` does nothing.

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
use log::{debug, error, info};
use rustix::thread::CapabilitySet;
use thiserror::Error;

use crate::locks::{Mutex, Rank};

pub use filter::Violation;
pub use role::{Needs, Plugging, Role};

/// The sandbox of this process, if it is armed. A process is confined as a whole and for good, so
/// that there is no second one.
static ARMED: OnceLock<Armed> = OnceLock::new();

thread_local! {
    /// What the calling thread is confined to.
    static CONFINED: Cell<Option<Role>> = const { Cell::new(None) };
}

/// Why the process cannot be confined.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// There are no filters here.
    #[error(
        "the sandbox cannot be made: there are no system call filters {why}; use a kernel with \
         CONFIG_SECCOMP_FILTER, or give --no-sandbox to run without any protection"
    )]
    NoFilters {
        /// Where there are none.
        why: String,
    },
    /// A filter could not be made or installed.
    #[error("the sandbox cannot be made: {0}; --no-sandbox runs without any protection")]
    Filter(#[source] seccompiler::BackendError),
    /// The kernel refused a filter.
    #[error("the sandbox cannot be made: {0}; --no-sandbox runs without any protection")]
    Install(#[source] seccompiler::Error),
    /// The kernel refused the rules for files.
    #[error("the sandbox cannot be made: {0}; --no-sandbox runs without any protection")]
    Files(#[from] landlock::RulesetError),
    /// The kernel refused something else.
    #[error("the sandbox cannot be made: cannot {what}: {source}; --no-sandbox runs without it")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was done already.
    #[error("the sandbox of this process is made already; call it once")]
    Twice,
}

/// What threads are confined with.
struct Armed {
    needs: Needs,
    violation: Violation,
    /// Until the main thread is confined, whose threads inherit them; for good where the thread
    /// `control` makes others.
    files: Mutex<Option<RulesetCreated>>,
    /// Those of the thread `control`, where it adds endpoints.
    control_files: Mutex<Option<RulesetCreated>>,
}

/// Begins to confine the process, before it has threads: threads of [`spawn`] are confined from now
/// on, and [`enter`] confines the others.
///
/// # Errors
/// The kernel cannot do it; see [`SandboxError`]. A kernel without Landlock is no error: the filters
/// let no file be opened either.
pub fn arm(needs: Needs, violation: Violation) -> Result<(), SandboxError> {
    system::filters_are_there()?;
    system::keep_the_allocator_from_files();
    if violation == Violation::Report {
        system::name_violations()?;
    }
    privileges::give_up_growth(&needs)?;
    let more_for_control = needs.plugging.is_some() || needs.textfile_folder.is_some();
    let control_files = more_for_control
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

/// A thread named after its role, which is confined before its first step; that is waited for.
///
/// # Errors
/// The system has no thread left, or the kernel does not confine it.
pub fn spawn(role: Role, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(role.name().into());
    let Some(armed) = ARMED.get() else {
        return thread.spawn(run);
    };
    let (sender, outcome) = sync_channel(1);
    let thread = thread.spawn(move || {
        let done = armed.confine(role);
        let is_confined = done.is_ok();
        // Its receiver is there until it has it.
        let _ = sender.send(done);
        if is_confined {
            run();
        }
    })?;
    let done = outcome.recv().map_err(io::Error::other)?;
    done.map_err(io::Error::other)?;
    Ok(thread)
}

/// Confines the calling thread, and the threads that it will make, if the process is armed and it
/// has not been done. Where the kernel refuses, the process ends: nobody runs with less.
pub fn enter(role: Role) {
    if CONFINED.get().is_some() {
        return;
    }
    let Some(armed) = ARMED.get() else {
        return;
    };
    if let Err(cause) = armed.confine(role) {
        error!("the thread {} is not run: {cause}", role.name());
        std::process::abort();
    }
}

impl Armed {
    /// Confines the calling thread.
    fn confine(&self, role: Role) -> Result<(), SandboxError> {
        CONFINED.set(Some(role));
        let programs = filter::programs(role, &self.needs, self.violation)?;
        let mut rights = None;
        // The main thread's children have the rest from it.
        if !role.is_child_of_main() {
            let kept = privileges::drop_capabilities(&self.needs)?;
            rights = Some((kept, self.restrict_files(role)?));
        }
        for program in &programs {
            seccompiler::apply_filter(program).map_err(SandboxError::Install)?;
        }
        match rights {
            Some((kept, enforced)) if role == Role::Main => tell(kept, enforced),
            _ => debug!("{} is confined", role.name()),
        }
        Ok(())
    }

    /// Whether there is anything in the kernel that enforces it.
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
                what: "copy the rules for files",
                source,
            })?
        };
        // Later than the main thread, threads are its children and have its rules.
        rules.map_or(Ok(true), files::restrict)
    }
}

fn tell(kept: CapabilitySet, enforced: bool) {
    let files = if enforced {
        "out of reach"
    } else {
        "kept away by the filter alone, as this kernel has no Landlock"
    };
    let names: Vec<_> = kept.iter_names().map(|(name, _)| name).collect();
    let kept = if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    };
    info!("sandboxed: system calls filtered, files {files}, capabilities {kept}");
}
