//! Gives up rights: capabilities, new privileges, core dumps. Raises the limit of locked memory as far as
//! allowed.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::SandboxError;
use super::role::{Needs, Role};

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

/// Drops all capabilities of the calling thread that its role does not need. Returns those that any role keeps, as far
/// as the thread had them.
///
/// # Errors
/// The kernel refuses.
pub(super) fn drop_capabilities(role: Role, needs: &Needs) -> Result<CapabilitySet, SandboxError> {
    let failed = |source: rustix::io::Errno| SandboxError::System {
        step: "give up capabilities",
        source: source.into(),
    };
    let now = rustix::thread::capabilities(None).map_err(failed)?;
    let kept = needed(role, needs) & now.permitted;
    let kept_by_any = Role::ALL.into_iter().map(|role| needed(role, needs));
    let kept_by_any =
        kept_by_any.fold(CapabilitySet::empty(), |all, one| all | one) & now.permitted;
    // Fails on old kernels, which have no ambient set.
    let _ = rustix::thread::clear_ambient_capability_set();
    if now.permitted == kept && now.effective == kept && now.inheritable.is_empty() {
        // Nothing to drop. A sandboxed service may not be allowed to call capset.
        return Ok(kept_by_any);
    }
    let left = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, left).map_err(failed)?;
    Ok(kept_by_any)
}

/// The capabilities that a thread of this role needs. The children of the main thread inherit those of the main thread.
fn needed(role: Role, needs: &Needs) -> CapabilitySet {
    match role {
        Role::Main | Role::VhostUser | Role::Relay | Role::Worker | Role::PciWorker => {
            let mut kept = for_backends(needs);
            if needs.realtime {
                // The worker of each connection sets its priority, even above the limit.
                kept |= CapabilitySet::SYS_NICE;
            }
            kept
        }
        Role::VirtioPci | Role::Qmp => for_backends(needs),
        // Opens device nodes and makes sockets in folders of other users.
        Role::Control if needs.plugging.is_some() => {
            for_backends(needs) | CapabilitySet::DAC_OVERRIDE
        }
        Role::Shadow => for_readers(needs),
        // Reach the sockets and the folder of other users, at any time. They read nothing that a peer sends.
        Role::Connector if needs.connects() => CapabilitySet::DAC_OVERRIDE,
        Role::MetricsFile if needs.textfile_folder.is_some() => CapabilitySet::DAC_OVERRIDE,
        Role::Connector
        | Role::MetricsFile
        | Role::Control
        | Role::ShadowFaults
        | Role::Faults
        | Role::VfioUser
        | Role::Export
        | Role::Resets
        | Role::Signals
        | Role::VmmDevices
        | Role::Watchdog
        | Role::Closer => CapabilitySet::empty(),
    }
}

/// The capabilities of a thread that maps, unmaps or attaches.
fn for_backends(needs: &Needs) -> CapabilitySet {
    let mut kept = for_readers(needs);
    if !needs.iommu_ioctls.is_empty() {
        // Pins the guest's memory regardless of the limit of locked memory.
        kept |= CapabilitySet::IPC_LOCK;
    }
    kept
}

/// The capability to kill readers of other users that do not release memory in time.
fn for_readers(needs: &Needs) -> CapabilitySet {
    if needs.shadow {
        CapabilitySet::KILL
    } else {
        CapabilitySet::empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::role::Plugging;
    use super::*;

    #[test]
    fn each_role_keeps_only_the_capabilities_that_it_needs() {
        for role in Role::ALL {
            let nothing = CapabilitySet::empty();
            assert_eq!(needed(role, &Needs::default()), nothing, "{role:?}");
        }
        let all = Needs {
            textfile_folder: Some("/run/metrics".into()),
            ..Needs::all_without_files()
        };
        let plugging = Needs {
            plugging: Some(Plugging::default()),
            ..all.clone()
        };
        let backends = CapabilitySet::IPC_LOCK | CapabilitySet::KILL;
        for role in Role::ALL {
            let plain = needed(role, &all);
            let reaches_files = plain.contains(CapabilitySet::DAC_OVERRIDE);
            let reads_nothing = [Role::Connector, Role::MetricsFile].contains(&role);
            assert_eq!(reaches_files, reads_nothing, "{role:?}");
            if role != Role::Control {
                assert_eq!(needed(role, &plugging), plain, "{role:?}");
            }
        }
        let of = |role| needed(role, &plugging);
        assert_eq!(of(Role::Worker), backends | CapabilitySet::SYS_NICE);
        assert_eq!(of(Role::Main), of(Role::Worker), "it inherits them");
        assert_eq!(of(Role::VhostUser), of(Role::Main), "it inherits them");
        assert_eq!(of(Role::PciWorker), of(Role::Worker));
        assert_eq!(of(Role::VirtioPci), backends);
        assert_eq!(of(Role::Qmp), backends);
        assert_eq!(of(Role::Control), backends | CapabilitySet::DAC_OVERRIDE);
        assert_eq!(of(Role::Shadow), CapabilitySet::KILL);
        for role in [Role::VfioUser, Role::Export, Role::Faults, Role::Signals] {
            assert_eq!(of(role), CapabilitySet::empty(), "{role:?}");
        }
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
