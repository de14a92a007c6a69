//! SIGTERM and SIGINT end the daemon in order, or by force if that takes too long.
//!
//! If the service manager keeps the state, the daemon ends between two batches of requests instead, and leaves everything
//! as it is: the next daemon goes on there. If there is no next one, the service manager closes what it keeps, and the VMM
//! sees the connection close then.
#![expect(unsafe_code, reason = "_exit, which does not wait for the threads")]

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use log::{error, info};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::daemon::StopHandle;
use crate::process::peer_event;
use crate::process::sandbox::{self, Role};

/// The longest time for an orderly end, and for the rest of the start if the signal comes during it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tells the signal thread which daemon to end.
pub struct SignalHandler(SyncSender<StopHandle>);

impl SignalHandler {
    /// The signal ends this daemon, whether it has come already or comes later.
    pub fn set_daemon(&self, stop: StopHandle) {
        // Fails only for a second daemon, which is ignored: the channel holds one, and its receiver lives as long
        // as the process.
        let _ = self.0.try_send(stop);
    }
}

/// Handles signals from now on. The first one ends the daemon that the caller passes to [`SignalHandler::set_daemon`];
/// it may come before that call.
///
/// The caller must call this before the daemon makes anything that outlives a killed process, such as a socket's
/// file. A VMM can keep a thread from ending, for example with a kick descriptor that blocks. The process ends all
/// the same: after 5 seconds it removes its sockets and exits with status 1.
///
/// # Errors
/// The signal handlers or the thread cannot be made.
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
    info!("a signal ends the daemon");
    match named.recv_timeout(PATIENCE) {
        Ok(stop) if stop.is_kept() => {
            // While the guest is served: the kernel's part of the end takes much longer than the start of the next process.
            peer_event::retire();
            if !stop.leave(PATIENCE) {
                error!("a request takes too long; the next daemon will finish it");
            }
            stop.remove_sockets();
            // SAFETY:
            // - the call does not return and runs no exit handler of this process
            unsafe { libc::_exit(0) }
        }
        Ok(stop) => {
            stop.stop();
            std::thread::sleep(PATIENCE);
            error!("some threads do not end; exiting without them");
            stop.remove_sockets();
        }
        Err(_) => error!("the start takes too long; exiting in the middle of it"),
    }
    // SAFETY:
    // - the call does not return and runs no exit handler of this process
    unsafe { libc::_exit(1) }
}
