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
#[cfg(test)]
mod processors;
mod protection;
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

pub use files::FileRules;
pub use filter::Violation;
pub use protection::Protection;
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
    /// The Landlock rules of the thread `control`, if it adds endpoints.
    control_files: Mutex<Option<RulesetCreated>>,
    /// The Landlock rules of the thread `metrics-file`.
    metrics_files: Mutex<Option<RulesetCreated>>,
    /// How far the kernel enforces rules for files. The first thread that is confined finds out.
    enforced: OnceLock<FileRules>,
}

/// Arms the process. The caller must do so before it starts any thread. From then on [`spawn`] confines the
/// threads it starts, and [`enter`] confines other threads.
///
/// # Errors
/// See [`SandboxError`]. A kernel without Landlock is not an error: the filters allow only the threads `control` and
/// `metrics-file` to open files, and only if the configuration needs that. [`enter`] then warns.
pub fn arm(needs: Needs, violation: Violation) -> Result<(), SandboxError> {
    system::check_filters()?;
    system::limit_the_allocator_to_one_arena();
    if violation == Violation::Report {
        system::name_violations()?;
    }
    privileges::confine_process(&needs)?;
    let control_files = needs
        .plugging
        .as_ref()
        .map(|plugging| files::control_rules(&needs, plugging))
        .transpose()?;
    let metrics_files = needs
        .textfile_folder
        .as_deref()
        .map(files::textfile_rules)
        .transpose()?;
    let armed = Armed {
        files: Mutex::new(Rank::SandboxFiles, Some(files::rules(&needs)?)),
        control_files: Mutex::new(Rank::SandboxControlFiles, control_files),
        metrics_files: Mutex::new(Rank::SandboxMetricsFiles, metrics_files),
        enforced: OnceLock::new(),
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

/// Whether the calling thread is confined.
pub fn is_confined() -> bool {
    CONFINED.get().is_some()
}

/// Whether the threads of this process are confined, or will be.
pub fn is_armed() -> bool {
    ARMED.get().is_some()
}

/// The protection of this process by its sandbox; `None` without a sandbox.
pub fn protection() -> Option<Protection> {
    let armed = ARMED.get()?;
    Some(Protection {
        files: *armed.enforced.get()?,
        control_opens_files: armed.needs.plugging.is_some(),
        writes_metrics: armed.needs.textfile_folder.is_some(),
    })
}

impl Armed {
    /// Confines the calling thread.
    fn confine(&self, role: Role) -> Result<(), SandboxError> {
        CONFINED.set(Some(role));
        let programs = filter::programs(role, &self.needs, self.violation)?;
        let mut kept_by_any = CapabilitySet::empty();
        // Children of the main thread inherit its capabilities and Landlock rules.
        if !role.is_child_of_main() {
            kept_by_any = privileges::drop_capabilities(role, &self.needs)?;
            self.restrict_files(role)?;
        }
        for program in &programs {
            seccompiler::apply_filter(program).map_err(SandboxError::Install)?;
        }
        if role == Role::Main {
            log_confinement(kept_by_any);
        } else {
            debug!("{} is confined", role.name());
        }
        Ok(())
    }

    /// Puts the calling thread under the Landlock rules of its role.
    fn restrict_files(&self, role: Role) -> Result<(), SandboxError> {
        let mut files = self.files.lock();
        let mut control_files = self.control_files.lock();
        let mut metrics_files = self.metrics_files.lock();
        let rules = if role == Role::Control && control_files.is_some() {
            control_files.take()
        } else if role == Role::MetricsFile && metrics_files.is_some() {
            metrics_files.take()
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
        if let Some(rules) = rules {
            let enforced = files::restrict(rules)?;
            self.enforced.get_or_init(|| enforced);
        }
        Ok(())
    }
}

fn log_confinement(kept: CapabilitySet) {
    let Some(protection) = protection() else {
        return;
    };
    let names: Vec<_> = kept.iter_names().map(|(name, _)| name).collect();
    let kept = if names.is_empty() {
        "none".into()
    } else {
        format!("{}, each in the threads that need it", names.join(", "))
    };
    let files = protection.summary();
    info!("sandboxed: system calls filtered, files {files}, capabilities {kept}");
    if protection.files == FileRules::Missing {
        warn!(
            "without Landlock {}; use a kernel with Landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` in its \
             parameter lsm=)",
            protection.absent().join("; ")
        );
    }
}
