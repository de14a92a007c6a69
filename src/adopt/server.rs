//! Serves daemons: one connection of a service manager, or one after the other at a socket.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::message::{answer, receive_request};
use super::peer::PeerProcess;
use super::pick::{Picked, WantedNodes, pick};
use super::policy::check_named;
use super::{AdoptError, Policy};
use crate::host::sysfs::HostRoot;

/// How long a daemon may take for its request, and for taking the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the server waits after a connection that it could not accept, for example for lack of descriptors.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Gives up all rights of this process but the one that the helper needs.
///
/// No Landlock rules: a process under such rules may not trace one that is not.
///
/// # Errors
/// The kernel refuses.
pub fn confine() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let now = rustix::thread::capabilities(None)?;
    let kept = now.permitted & CapabilitySet::SYS_PTRACE;
    // Fails on old kernels, which have no ambient set.
    let _ = rustix::thread::clear_ambient_capability_set();
    let left = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    if now != left {
        rustix::thread::set_capabilities(None, left)?;
    }
    Ok(())
}

/// Serves the daemons that connect to `listener`, one after the other. A daemon that is refused is named on standard error.
///
/// A VMM can delay the one that comes after it by a file that takes long to close, so all must be of one VM.
pub fn serve(listener: &UnixListener, policy: &Policy, root: &HostRoot) {
    loop {
        match listener.accept() {
            Ok((daemon, _)) => {
                if let Err(cause) = serve_connection(&daemon, policy, root) {
                    // Nobody may read it.
                    let _ = writeln!(io::stderr(), "vhost-device-iommu: adopt: {cause}");
                }
            }
            Err(_) => std::thread::sleep(BACK_OFF),
        }
    }
}

/// Serves the next daemon that connects to `listener`, if one does within a moment. For a service manager that starts a process
/// for each.
///
/// # Errors
/// As [`serve_connection`]; or no connection can be accepted.
pub fn serve_next(
    listener: &UnixListener,
    policy: &Policy,
    root: &HostRoot,
) -> Result<(), AdoptError> {
    let failed = |source| AdoptError::System {
        step: "accept a connection",
        source,
    };
    let patience = Timespec {
        tv_sec: i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let mut events = [PollFd::new(listener, PollFlags::IN)];
    let count = poll(&mut events, Some(&patience)).map_err(|cause| failed(cause.into()))?;
    if count == 0 {
        return Ok(());
    }
    let (daemon, _) = listener.accept().map_err(failed)?;
    serve_connection(&daemon, policy, root)
}

/// Serves one request of the daemon at the other end of `daemon`.
///
/// # Errors
/// The daemon is refused, and knows the reason; or it takes no answer.
pub fn serve_connection(
    daemon: &UnixStream,
    policy: &Policy,
    root: &HostRoot,
) -> Result<(), AdoptError> {
    let picked = look(daemon, policy, root);
    let outcome = picked.as_ref().map(|picked| &picked.found);
    let sent = answer(daemon, outcome, Instant::now() + PATIENCE);
    match picked {
        Err(refusal) => Err(refusal),
        Ok(_) => sent.map_err(|source| AdoptError::System {
            step: "answer the daemon",
            source,
        }),
    }
}

fn look(daemon: &UnixStream, policy: &Policy, root: &HostRoot) -> Result<Picked, AdoptError> {
    // First: a daemon whose request is not read does not get the reason.
    let request = receive_request(daemon, Instant::now() + PATIENCE);
    let asker = PeerProcess::of(daemon.as_fd(), "daemon's own")?;
    let file = policy.file(&asker)?;
    let (wanted, socket) = request?;
    check_named(&file, &wanted)?;
    let vmm = PeerProcess::of(socket.as_fd(), "VMM's")?;
    let image = vmm.image()?;
    let nodes = WantedNodes::read(root, &wanted);
    let picked = pick(&vmm, &nodes)?;
    vmm.check_image(&image)?;
    Ok(picked)
}
