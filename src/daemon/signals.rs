//! SIGTERM and SIGINT: an orderly end, and an end all the same where that takes too long.
#![expect(
    unsafe_code,
    reason = "leaves the process without waiting for its threads"
)]

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use log::{error, info};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::daemon::StopHandle;
use crate::process::sandbox::{self, Role};

/// How long an orderly end may take, and the start of a daemon that is to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the daemon that the signals end is named.
pub struct SignalHandler(SyncSender<StopHandle>);

impl SignalHandler {
    /// A signal that came, or comes, ends this daemon.
    pub fn set_daemon(&self, stop: StopHandle) {
        // The thread listens until the signal that ends the process, and keeps the first.
        let _ = self.0.try_send(stop);
    }
}

/// From now on the first signal ends the daemon that [`SignalHandler::set_daemon`] names, before or after.
///
/// Called before the daemon makes anything that outlives a killed process, such as its sockets'
/// files. A thread that a frontend keeps from ending (with a kick descriptor that blocks, for
/// example) does not keep the process: after 5 seconds its sockets are removed and it exits with
/// status 1.
///
/// # Errors
/// Where the handlers or the thread cannot be made.
pub fn handle_signals() -> io::Result<SignalHandler> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let (daemon, named) = sync_channel(1);
    sandbox::spawn(Role::Signals, move || {
        if signals.forever().next().is_some() {
            end(&named);
        }
    })?;
    Ok(SignalHandler(daemon))
}

fn end(named: &Receiver<StopHandle>) {
    info!("told to end");
    match named.recv_timeout(PATIENCE) {
        Ok(stop) => {
            stop.stop();
            std::thread::sleep(PATIENCE);
            error!("threads do not end; leaving without them");
            stop.remove_sockets();
        }
        Err(_) => error!("the start does not end; leaving in the middle of it"),
    }
    // SAFETY:
    // - the call does not return, and runs no code of this process
    unsafe { libc::_exit(1) }
}
