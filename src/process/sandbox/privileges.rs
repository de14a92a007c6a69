//! Gives up rights: capabilities, new privileges, core dumps. Raises the limit of locked memory as far as
//! allowed.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::SandboxError;
use super::role::Needs;

/// Confines the whole process; must be called before it has other threads. It gets no rights from programs that
/// it runs. It leaves no core dump, which would have the guest's memory in it, and other processes of its user
/// cannot trace it. It may lock as much memory as its hard limit allows.
///
/// # Errors
/// The kernel refuses.
pub(super) fn confine_process(needs: &Needs) -> Result<(), SandboxError> {
    let failed = |step| {
        move |source: rustix::io::Errno| SandboxError::System {
            step,
            source: source.into(),
        }
    };
    rustix::thread::set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    limit(Resource::Core, Some(0), Some(0)).map_err(failed("switch off core dumps"))?;
    // Its own user may trace a debug build.
    if !cfg!(debug_assertions) {
        disable_dumps_and_tracing().map_err(|source| SandboxError::System {
            step: "keep other processes from tracing this one",
            source,
        })?;
    }
    if !needs.iommu_ioctls.is_empty() {
        let most = rustix::process::getrlimit(Resource::Memlock).maximum;
        limit(Resource::Memlock, most, most)
            .map_err(failed("use the limit of locked memory to the full"))?;
    }
    Ok(())
}

/// Sets a limit if it differs: a sandboxed service may not change a limit that the service manager has set.
fn limit(
    resource: Resource,
    current: Option<u64>,
    maximum: Option<u64>,
) -> Result<(), rustix::io::Errno> {
    let wanted = Rlimit { current, maximum };
    if rustix::process::getrlimit(resource) == wanted {
        return Ok(());
    }
    rustix::process::setrlimit(resource, wanted)
}

/// Allows only root to dump the process, to trace it, or to read its memory through /proc.
fn disable_dumps_and_tracing() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(
        DumpableBehavior::NotDumpable,
    )?)
}

/// Drops all capabilities of the calling thread that the configuration does not need. Returns those that stay.
///
/// # Errors
/// The kernel refuses.
pub(super) fn drop_capabilities(needs: &Needs) -> Result<CapabilitySet, SandboxError> {
    let failed = |source: rustix::io::Errno| SandboxError::System {
        step: "give up capabilities",
        source: source.into(),
    };
    let now = rustix::thread::capabilities(None).map_err(failed)?;
    let kept = needed(needs) & now.permitted;
    // Fails on old kernels, which have no ambient set.
    let _ = rustix::thread::clear_ambient_capability_set();
    if now.permitted == kept && now.effective == kept && now.inheritable.is_empty() {
        // Nothing to drop. A sandboxed service may not be allowed to call capset.
        return Ok(kept);
    }
    let left = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, left).map_err(failed)?;
    Ok(kept)
}

/// The capabilities that the configuration needs.
fn needed(needs: &Needs) -> CapabilitySet {
    let mut kept = CapabilitySet::empty();
    if !needs.iommu_ioctls.is_empty() {
        // Pins the guest's memory regardless of the limit of locked memory.
        kept |= CapabilitySet::IPC_LOCK;
    }
    if needs.realtime {
        // The worker of each connection sets its priority, even above the limit.
        kept |= CapabilitySet::SYS_NICE;
    }
    if needs.shadow {
        // Kills readers of other users that do not release memory in time.
        kept |= CapabilitySet::KILL;
    }
    if needs.emulated || needs.qmp || needs.textfile_folder.is_some() {
        // Opens sockets and folders of other users, at any time.
        kept |= CapabilitySet::DAC_OVERRIDE;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_needed_capabilities_are_kept() {
        assert_eq!(needed(&Needs::default()), CapabilitySet::empty());
        let all = Needs::all_without_files();
        let kept = CapabilitySet::IPC_LOCK
            | CapabilitySet::SYS_NICE
            | CapabilitySet::KILL
            | CapabilitySet::DAC_OVERRIDE;
        assert_eq!(needed(&all), kept);
    }

    #[test]
    #[expect(unsafe_code, reason = "forks a child, which ends at once")]
    fn dumps_and_tracing_can_be_disabled() {
        // SAFETY: the child makes system calls only, and leaves without running anything else.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let closed = disable_dumps_and_tracing().is_ok()
                && rustix::process::dumpable_behavior() == Ok(DumpableBehavior::NotDumpable);
            // SAFETY: does not return.
            unsafe { libc::_exit(i32::from(!closed)) };
        }
        let mut status = -1;
        // SAFETY: status is valid for writes.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
    }
}
