//! The interface to a service manager (systemd): socket activation, notifications, and its watchdog.
//!
//! | variable | meaning |
//! |---|---|
//! | `LISTEN_PID`, `LISTEN_FDS` | the number of inherited listening sockets, from descriptor 3 up (socket activation) |
//! | `NOTIFY_SOCKET` | the socket for READY=1, STOPPING=1 and WATCHDOG=1 |
//! | `WATCHDOG_PID`, `WATCHDOG_USEC` | the longest time between two WATCHDOG=1 |
//!
//! See sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use thiserror::Error;

/// The first descriptor that the service manager passes.
const FIRST_FD: RawFd = 3;

/// A variable of the service manager cannot be used.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The number of sockets is not one.
    #[error(
        "LISTEN_FDS passes {0:?} sockets, and the daemon takes one, for the VMM; \
         give the .socket unit exactly one ListenStream="
    )]
    Sockets(OsString),
    /// The daemon cannot connect to the socket of the service manager.
    #[error(
        "cannot connect to the service manager at NOTIFY_SOCKET {address:?}: {source}; \
         start the daemon without that variable, or as a service with Type=notify"
    )]
    Notify {
        /// The value of the variable.
        address: OsString,
        /// The error of the system.
        source: io::Error,
    },
    /// The time of the watchdog is not a number above 0.
    #[error(
        "WATCHDOG_USEC is {0:?}, not a number of microseconds above 0; set WatchdogSec= in the unit"
    )]
    Watchdog(OsString),
}

/// The service manager that started this process, if one did.
#[derive(Debug, Default)]
pub struct Service {
    socket: Option<RawFd>,
    notify: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Service {
    /// Reads the environment of this process.
    ///
    /// # Errors
    /// See [`ServiceError`].
    pub fn from_environment() -> Result<Self, ServiceError> {
        Self::new(std::process::id(), |name| std::env::var_os(name))
    }

    /// Reads the variables as the process with the number `process`.
    fn new(
        process: u32,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ServiceError> {
        // A parent may pass on variables that are meant for itself.
        let is_ours = |name: &str| variable(name).and_then(|v| number(&v)) == Some(process.into());
        let socket = match variable("LISTEN_FDS") {
            Some(count) if is_ours("LISTEN_PID") => match number(&count) {
                Some(1) => Some(FIRST_FD),
                _ => return Err(ServiceError::Sockets(count)),
            },
            _ => None,
        };
        let notify = variable("NOTIFY_SOCKET")
            .filter(|address| !address.is_empty())
            .map(|address| {
                connect(&address).map_err(|source| ServiceError::Notify { address, source })
            })
            .transpose()?;
        let watchdog = match variable("WATCHDOG_USEC") {
            // Without WATCHDOG_PID, the time applies to every process that has the variable.
            Some(time) if variable("WATCHDOG_PID").is_none() || is_ours("WATCHDOG_PID") => {
                match number(&time) {
                    Some(micros) if micros > 0 => Some(Duration::from_micros(micros)),
                    _ => return Err(ServiceError::Watchdog(time)),
                }
            }
            _ => None,
        };
        Ok(Self {
            socket,
            notify,
            watchdog,
        })
    }

    /// The inherited descriptor of the socket that listens for the VMM.
    pub fn socket(&self) -> Option<RawFd> {
        self.socket
    }

    /// The longest time between two WATCHDOG=1 before the service manager kills the daemon; `None` without a
    /// watchdog or a socket.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.notify.is_some())
    }

    /// Sends a notification such as `READY=1`. Without a service manager, does nothing.
    ///
    /// # Errors
    /// It cannot be sent, for example because the service manager is gone.
    pub fn notify(&self, state: &str) -> io::Result<()> {
        match &self.notify {
            Some(socket) => socket.send(state.as_bytes()).map(drop),
            None => Ok(()),
        }
    }
}

/// Connects in advance: the sandboxed daemon cannot open sockets later.
fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // Nonblocking: a service manager that does not read must not stop the daemon.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn number(text: &OsStr) -> Option<u64> {
    text.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(variables: &[(&str, &str)]) -> Result<Service, ServiceError> {
        Service::new(77, |name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.into())
        })
    }

    #[test]
    fn without_variables_there_is_no_service_manager() {
        let service = service(&[]).expect("no variables");
        assert_eq!((service.socket(), service.watchdog()), (None, None));
        service.notify("READY=1").expect("nothing to send to");
    }

    #[test]
    fn variables_for_another_process_are_ignored() {
        let other = service(&[
            ("LISTEN_PID", "78"),
            ("LISTEN_FDS", "1"),
            ("WATCHDOG_PID", "78"),
            ("WATCHDOG_USEC", "1000"),
        ]);
        let other = other.expect("not ours");
        assert_eq!((other.socket, other.watchdog), (None, None));
        assert_eq!(
            service(&[("LISTEN_FDS", "1")]).expect("ignored").socket,
            None
        );
    }

    #[test]
    fn exactly_one_listening_socket_is_accepted() {
        let of = |count| service(&[("LISTEN_PID", "77"), ("LISTEN_FDS", count)]);
        assert_eq!(of("1").expect("one").socket(), Some(3));
        for count in ["0", "2", "-1", "x", ""] {
            let refused = of(count).expect_err("not one").to_string();
            assert!(refused.contains("exactly one ListenStream="), "{refused}");
        }
    }

    #[test]
    fn the_manager_receives_notifications() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("a socket");
        let service = service(&[
            ("NOTIFY_SOCKET", path.to_str().expect("text")),
            ("WATCHDOG_USEC", "2000000"),
        ]);
        let service = service.expect("a manager");
        assert_eq!(service.watchdog(), Some(Duration::from_secs(2)));
        service.notify("READY=1").expect("sent");
        let mut received = [0; 64];
        let len = manager.recv(&mut received).expect("received");
        assert_eq!(&received[..len], b"READY=1");
    }

    #[test]
    fn abstract_addresses_are_understood() {
        let name = format!("vhost-device-iommu-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let manager = UnixDatagram::bind_addr(&address).expect("a socket");
        let service = service(&[("NOTIFY_SOCKET", &format!("@{name}"))]).expect("a manager");
        service.notify("READY=1").expect("sent");
        assert_eq!(manager.recv(&mut [0; 64]).expect("received"), 7);
    }

    #[test]
    fn unusable_variables_are_refused_with_a_cure() {
        let refused = service(&[("NOTIFY_SOCKET", "/nonexistent/notify")]).expect_err("no manager");
        assert!(refused.to_string().contains("Type=notify"), "{refused}");
        for time in ["0", "soon", "-1"] {
            let refused = service(&[("WATCHDOG_USEC", time)]).expect_err("no time");
            assert!(refused.to_string().contains("WatchdogSec="), "{refused}");
        }
    }
}
