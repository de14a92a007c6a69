//! Rights that are given up: capabilities, new privileges, core dumps; and the limit of locked
//! memory, which is used to the full.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::SandboxError;
use super::role::Needs;

/// For the whole process, before it has other threads: no program gives it rights, it leaves no
/// image of its memory, which is the guest's, and no process of its own user looks into it. It may
/// lock as much memory as it is allowed to.
///
/// # Errors
/// The kernel refuses.
pub(super) fn give_up_growth(needs: &Needs) -> Result<(), SandboxError> {
    let failed = |what| {
        move |source: rustix::io::Errno| SandboxError::System {
            what,
            source: source.into(),
        }
    };
    rustix::thread::set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    limit(Resource::Core, Some(0), Some(0)).map_err(failed("switch off core dumps"))?;
    // A build for debugging can be looked into by its own user.
    if !cfg!(debug_assertions) {
        close_to_others().map_err(|source| SandboxError::System {
            what: "keep others from looking into this process",
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

/// Sets a limit where it is another one: a service manager that has set it may not let others do so.
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

/// No core dump, and no tracing nor reading of its memory through /proc but by the super-user.
fn close_to_others() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(
        DumpableBehavior::NotDumpable,
    )?)
}

/// Takes from the calling thread all capabilities but those that the configuration needs.
///
/// # Errors
/// The kernel refuses.
pub(super) fn drop_capabilities(needs: &Needs) -> Result<CapabilitySet, SandboxError> {
    let failed = |source: rustix::io::Errno| SandboxError::System {
        what: "give up capabilities",
        source: source.into(),
    };
    let now = rustix::thread::capabilities(None).map_err(failed)?;
    let kept = needed(needs) & now.permitted;
    // An empty ambient set is what old kernels without one have.
    let _ = rustix::thread::clear_ambient_capability_set();
    if now.permitted == kept && now.effective == kept && now.inheritable.is_empty() {
        // Nor may a service be let do what it has no need of.
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

/// What a daemon that was started with all capabilities keeps of them.
fn needed(needs: &Needs) -> CapabilitySet {
    let mut kept = CapabilitySet::empty();
    if !needs.iommu_ioctls.is_empty() {
        // The guest's memory is pinned without regard to the limit.
        kept |= CapabilitySet::IPC_LOCK;
    }
    if needs.realtime {
        // The worker of each connection takes its priority, where the limit does not let it.
        kept |= CapabilitySet::SYS_NICE;
    }
    if needs.shadow {
        // Readers of other users that do not leave in time are killed.
        kept |= CapabilitySet::KILL;
    }
    if needs.emulated || needs.qmp || needs.textfile_folder.is_some() {
        // Sockets and folders of other users are used, at any time.
        kept |= CapabilitySet::DAC_OVERRIDE;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_kept_for_a_reason_only() {
        assert_eq!(needed(&Needs::default()), CapabilitySet::empty());
        let all = Needs::most();
        let kept = CapabilitySet::IPC_LOCK
            | CapabilitySet::SYS_NICE
            | CapabilitySet::KILL
            | CapabilitySet::DAC_OVERRIDE;
        assert_eq!(needed(&all), kept);
    }

    #[test]
    #[expect(unsafe_code, reason = "tries it in a child, which ends at once")]
    fn a_process_is_closed_to_others() {
        // SAFETY: the child makes system calls only, and leaves without running anything else.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let closed = close_to_others().is_ok()
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
