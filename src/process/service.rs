//! What a service manager (systemd) hands to the daemon, and what it wants to hear.
//!
//! | variable | means |
//! |---|---|
//! | `LISTEN_PID`, `LISTEN_FDS` | the first descriptors from 3 up are sockets that listen: socket activation |
//! | `NOTIFY_SOCKET` | where to say that the daemon is ready, ends, and is alive |
//! | `WATCHDOG_PID`, `WATCHDOG_USEC` | how often it has to say that it is alive |
//!
//! The forms are those of sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use thiserror::Error;

/// The first descriptor that is handed over.
const FIRST_FD: RawFd = 3;

/// Why the environment cannot be obeyed.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// More or fewer sockets than one.
    #[error(
        "LISTEN_FDS hands over {0:?} sockets where one is wanted, the VMM's; \
         give the .socket unit exactly one ListenStream="
    )]
    Sockets(OsString),
    /// The socket of the service manager cannot be reached.
    #[error(
        "the service manager cannot be told anything over NOTIFY_SOCKET {address:?}: {source}; \
         start the daemon without that variable, or as a service with Type=notify"
    )]
    Notify {
        /// The variable's value.
        address: OsString,
        /// What the system said.
        source: io::Error,
    },
    /// The watchdog's time is none.
    #[error(
        "WATCHDOG_USEC is {0:?}, not a number of microseconds above 0; set WatchdogSec= in the unit"
    )]
    Watchdog(OsString),
}

/// The service manager, or nobody.
#[derive(Debug, Default)]
pub struct Service {
    socket: Option<RawFd>,
    notify: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Service {
    /// What this process's environment says.
    ///
    /// # Errors
    /// Where it says something that cannot be.
    pub fn from_environment() -> Result<Self, ServiceError> {
        Self::new(std::process::id(), |name| std::env::var_os(name))
    }

    /// What the variables say to the process with this number.
    fn new(
        process: u32,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ServiceError> {
        // Variables that a parent has passed on by mistake are another process's.
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
            // Without a number of a process it is meant for this one.
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

    /// The descriptor of the socket that listens for the VMM, where one was handed over.
    pub fn socket(&self) -> Option<RawFd> {
        self.socket
    }

    /// How long the daemon may be silent before it counts as dead; `None` where nobody listens.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.notify.is_some())
    }

    /// Says something, such as `READY=1`; `Ok` where nobody listens.
    ///
    /// # Errors
    /// Where it cannot be said, as where the service manager is gone.
    pub fn tell(&self, state: &str) -> io::Result<()> {
        match &self.notify {
            Some(socket) => socket.send(state.as_bytes()).map(drop),
            None => Ok(()),
        }
    }
}

/// Connected once, so that a daemon that may open no sockets any more can still speak.
fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // A service manager that does not read must not stop the daemon.
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
    fn nobody_is_there_without_variables() {
        let service = service(&[]).expect("nothing said");
        assert_eq!((service.socket(), service.watchdog()), (None, None));
        service.tell("READY=1").expect("nobody listens");
    }

    #[test]
    fn what_is_meant_for_another_process_is_ignored() {
        let other = service(&[
            ("LISTEN_PID", "78"),
            ("LISTEN_FDS", "1"),
            ("WATCHDOG_PID", "78"),
            ("WATCHDOG_USEC", "1000"),
        ]);
        let other = other.expect("not ours");
        assert_eq!((other.socket, other.watchdog), (None, None));
        assert_eq!(
            service(&[("LISTEN_FDS", "1")]).expect("nobody's").socket,
            None
        );
    }

    #[test]
    fn one_socket_is_taken_and_no_other_number() {
        let of = |count| service(&[("LISTEN_PID", "77"), ("LISTEN_FDS", count)]);
        assert_eq!(of("1").expect("one").socket(), Some(3));
        for count in ["0", "2", "-1", "x", ""] {
            let refused = of(count).expect_err("not one").to_string();
            assert!(refused.contains("exactly one ListenStream="), "{refused}");
        }
    }

    #[test]
    fn the_manager_hears_what_it_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("a socket");
        let service = service(&[
            ("NOTIFY_SOCKET", path.to_str().expect("text")),
            ("WATCHDOG_USEC", "2000000"),
        ]);
        let service = service.expect("a manager");
        assert_eq!(service.watchdog(), Some(Duration::from_secs(2)));
        service.tell("READY=1").expect("told");
        let mut heard = [0; 64];
        let len = manager.recv(&mut heard).expect("heard");
        assert_eq!(&heard[..len], b"READY=1");
    }

    #[test]
    fn abstract_addresses_are_understood() {
        let name = format!("vhost-device-iommu-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let manager = UnixDatagram::bind_addr(&address).expect("a socket");
        let service = service(&[("NOTIFY_SOCKET", &format!("@{name}"))]).expect("a manager");
        service.tell("READY=1").expect("told");
        assert_eq!(manager.recv(&mut [0; 64]).expect("heard"), 7);
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_cure() {
        let refused = service(&[("NOTIFY_SOCKET", "/nonexistent/notify")]).expect_err("no manager");
        assert!(refused.to_string().contains("Type=notify"), "{refused}");
        for time in ["0", "soon", "-1"] {
            let refused = service(&[("WATCHDOG_USEC", time)]).expect_err("no time");
            assert!(refused.to_string().contains("WatchdogSec="), "{refused}");
        }
    }
}
