//! Waits for the daemon and the VMM.

use std::process::ExitStatus;

use super::daemons::Daemons;
use super::error::{LaunchError, system};
use super::events::{Event, Events};
use super::process::Running;

/// Waits until the VMM has ended, and starts the daemon again meanwhile when it ends. If that cannot be, ends the VMM.
///
/// # Errors
/// The daemon has ended for good, or a system call fails.
pub(super) fn supervise(
    mut vmm: Running,
    daemons: &mut Daemons<'_>,
    events: &Events,
) -> Result<ExitStatus, LaunchError> {
    let failed = || system("wait for the daemon and the VMM");
    // A signal has asked the VM to end, so the end of the daemon is no failure.
    let mut signalled = false;
    loop {
        match events.next_until(daemons.deadline()) {
            Some(Event::Signal(signal)) => {
                signalled = true;
                vmm.signal(signal)
                    .map_err(system("send the VMM a signal"))?;
            }
            Some(Event::Ready(life)) => daemons.note_ready(life),
            Some(Event::Child) => {}
            None => daemons.end_late_one().map_err(failed())?,
        }
        if let Some(status) = daemons.poll().map_err(failed())? {
            // A service manager may signal both at once.
            signalled |= events.drain();
            // After the events are drained, which may have told of its end.
            let vmm_status = vmm.poll().map_err(failed())?;
            if signalled {
                return vmm_status.map_or_else(|| vmm.end().map_err(failed()), Ok);
            }
            let again = match vmm_status {
                None => daemons.start_again(status),
                Some(_) => Err(LaunchError::DaemonEnded(status)),
            };
            if let Err(error) = again {
                vmm.end().map_err(failed())?;
                return Err(error);
            }
        } else if let Some(status) = vmm.poll().map_err(failed())? {
            return Ok(status);
        }
    }
}
