//! SIGTERM and SIGINT: an orderly end, and an end all the same where that takes too long.
#![expect(
    unsafe_code,
    reason = "leaves the process without waiting for its threads"
)]

use std::io;
use std::time::Duration;

use log::{error, info};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::daemon::StopHandle;

/// How long an orderly end may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// From now on the first signal ends the daemon behind `stop`.
///
/// A thread that a frontend keeps from ending (with a kick descriptor that blocks, for example) does
/// not keep the process: after 5 seconds its sockets are removed and it exits with status 1.
///
/// # Errors
/// Where the handlers or the thread cannot be made.
pub fn stop_on_signals(stop: StopHandle) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.forever().next().is_none() {
                return;
            }
            info!("told to end");
            stop.stop();
            std::thread::sleep(PATIENCE);
            error!("threads do not end; leaving without them");
            stop.remove_sockets();
            // SAFETY:
            // - the call does not return, and runs no code of this process
            unsafe { libc::_exit(1) }
        })?;
    Ok(())
}
