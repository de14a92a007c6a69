//! The interface to a service manager (systemd): socket activation, kept descriptors, notifications, and its watchdog.
//!
//! | variable | meaning |
//! |---|---|
//! | `LISTEN_PID`, `LISTEN_FDS` | the number of inherited descriptors, from 3 up |
//! | `LISTEN_FDNAMES` | their names, with colons between: [`PREFIX`] for files that the process before has left; any other name is that of a listening socket (socket activation) |
//! | `FDSTORE` | the most descriptors that the service manager keeps; only the process `SYSTEMD_EXEC_PID` may use it |
//! | `NOTIFY_SOCKET` | the socket for READY=1, STOPPING=1 and WATCHDOG=1 |
//! | `WATCHDOG_PID`, `WATCHDOG_USEC` | the longest time between two WATCHDOG=1 |
//!
//! See sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3) and systemd.exec(5).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use thiserror::Error;

use crate::process::inherited::adopt;
use crate::process::keeper::{Keeper, MAX_KEPT};
use crate::process::keeper_message::{PREFIX, is_name};

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
    /// The names and the descriptors do not match.
    #[error(
        "LISTEN_FDNAMES has {names} names and LISTEN_FDS passes {count} descriptors; \
         start the daemon as a service, which gets the same number of both"
    )]
    Names {
        /// The number of names.
        names: usize,
        /// The number of descriptors.
        count: usize,
    },
    /// A descriptor is not open.
    #[error(
        "descriptor {fd} of LISTEN_FDS cannot be used: {source}; start the daemon as a service, or without that variable"
    )]
    Closed {
        /// The descriptor.
        fd: RawFd,
        /// The error of the system.
        source: io::Error,
    },
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
    passed: Passed,
    /// The most descriptors that the service manager keeps.
    room: usize,
    /// The value of `NOTIFY_SOCKET`.
    address: OsString,
    notify: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

/// The descriptors that the service manager passes.
#[derive(Debug, Default)]
struct Passed {
    socket: Option<RawFd>,
    /// By their names without [`PREFIX`].
    left: BTreeMap<String, OwnedFd>,
    /// The names of files that this process does not take over.
    refused: BTreeSet<String>,
}

impl Service {
    /// Reads the environment of this process. The caller must not have opened any file before: see [`adopt`].
    ///
    /// # Errors
    /// See [`ServiceError`].
    pub fn from_environment() -> Result<Self, ServiceError> {
        Self::new(std::process::id(), |name| std::env::var_os(name), adopt)
    }

    /// Reads the variables as the process with the number `process`.
    fn new(
        process: u32,
        variable: impl Fn(&str) -> Option<OsString>,
        adopt: impl Fn(RawFd) -> io::Result<OwnedFd>,
    ) -> Result<Self, ServiceError> {
        // A parent may pass on variables that are meant for itself.
        let is_ours = |name: &str| variable(name).and_then(|v| number(&v)) == Some(process.into());
        // First: a socket that is opened earlier could get the number of a descriptor that is not there.
        let passed = match variable("LISTEN_FDS") {
            Some(count) if is_ours("LISTEN_PID") => {
                Passed::new(&count, variable("LISTEN_FDNAMES").as_deref(), adopt)?
            }
            _ => Passed::default(),
        };
        let room = match variable("FDSTORE") {
            // Where the manager does not say for whom it keeps descriptors, it is every process that has the variable.
            Some(room) if variable("SYSTEMD_EXEC_PID").is_none() || is_ours("SYSTEMD_EXEC_PID") => {
                number(&room).map_or(0, |room| usize::try_from(room).unwrap_or(MAX_KEPT))
            }
            _ => 0,
        };
        let address = variable("NOTIFY_SOCKET").unwrap_or_default();
        let notify = (!address.is_empty())
            .then(|| notify_socket(&address))
            .transpose()?;
        if let Some(socket) = &notify {
            // A service manager that does not read must not stop the daemon.
            let nonblocking = socket.set_nonblocking(true);
            nonblocking.map_err(|source| ServiceError::Notify {
                address: address.clone(),
                source,
            })?;
        }
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
            passed,
            room,
            address,
            notify,
            watchdog,
        })
    }

    /// The service manager as the keeper of descriptors, which has what the process before has left. Only the first call
    /// gets that. Without a service manager that keeps descriptors (systemd 254 or later, with
    /// `FileDescriptorStoreMax=`), [`Keeper::none`].
    ///
    /// Makes the service manager close files that this process does not take over: those with a name that no daemon
    /// gives, or that several files have; and all of them, if it keeps descriptors no longer. [`Self::refused`] names
    /// them.
    ///
    /// # Errors
    /// [`ServiceError::Notify`].
    pub fn keeper(&mut self) -> Result<Keeper, ServiceError> {
        let left = std::mem::take(&mut self.passed.left);
        let is_idle = self.room == 0 && left.is_empty() && self.passed.refused.is_empty();
        if is_idle || self.notify.is_none() {
            self.passed.refused.extend(left.into_keys());
            return Ok(Keeper::none());
        }
        let socket = notify_socket(&self.address)?;
        let keeper = Keeper::new(socket, left).map_err(|source| ServiceError::Notify {
            address: self.address.clone(),
            source,
        })?;
        for name in &self.passed.refused {
            keeper.discard(name);
        }
        if self.room == 0 {
            self.passed.refused.extend(keeper.release_unclaimed());
            return Ok(Keeper::none());
        }
        Ok(keeper.with_room(self.room))
    }

    /// The names of files that the process before has left, and that this one does not take over.
    pub fn refused(&self) -> impl Iterator<Item = &str> {
        self.passed.refused.iter().map(String::as_str)
    }

    /// The inherited descriptor of the socket that listens for the VMM.
    pub fn socket(&self) -> Option<RawFd> {
        self.passed.socket
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

impl Passed {
    /// The descriptors with the values `count` of `LISTEN_FDS` and `names` of `LISTEN_FDNAMES`.
    fn new(
        count: &OsStr,
        names: Option<&OsStr>,
        adopt: impl Fn(RawFd) -> io::Result<OwnedFd>,
    ) -> Result<Self, ServiceError> {
        let number = number(count).and_then(|number| usize::try_from(number).ok());
        let number = number.filter(|number| (1..=MAX_KEPT + 1).contains(number));
        let number = number.ok_or_else(|| ServiceError::Sockets(count.into()))?;
        let names: Vec<_> = match names {
            Some(names) => names.as_bytes().split(|byte| *byte == b':').collect(),
            None => vec![&b"unknown"[..]; number],
        };
        if names.len() != number {
            return Err(ServiceError::Names {
                names: names.len(),
                count: number,
            });
        }
        let mut passed = Self::default();
        let mut sockets = 0;
        for (fd, name) in (FIRST_FD..).zip(names) {
            let Some(name) = name.strip_prefix(PREFIX.as_bytes()) else {
                passed.socket.get_or_insert(fd);
                sockets += 1;
                continue;
            };
            let file = adopt(fd).map_err(|source| ServiceError::Closed { fd, source })?;
            passed.insert(String::from_utf8_lossy(name).into(), file);
        }
        if sockets > 1 {
            return Err(ServiceError::Sockets(sockets.to_string().into()));
        }
        Ok(passed)
    }

    /// Of several files with one name none is taken over: which of them is the right one is not known.
    fn insert(&mut self, name: String, file: OwnedFd) {
        let is_double = self.left.contains_key(&name) || self.refused.contains(&name);
        if is_double || !is_name(&name) {
            self.left.remove(&name);
            self.refused.insert(name);
        } else {
            self.left.insert(name, file);
        }
    }
}

/// Connects in advance: the sandboxed daemon cannot open sockets later.
fn notify_socket(address: &OsStr) -> Result<UnixDatagram, ServiceError> {
    connect(address).map_err(|source| ServiceError::Notify {
        address: address.into(),
        source,
    })
}

fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

fn number(text: &OsStr) -> Option<u64> {
    text.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn service(variables: &[(&str, &str)]) -> Result<Service, ServiceError> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.into())
        };
        // Descriptors 3 to 9 are open.
        Service::new(77, variable, |fd| match fd {
            3..=9 => Ok(io::pipe()?.0.into()),
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
        })
    }

    /// The variables of a process that gets these descriptors.
    fn passing<'a>(count: &'a str, names: &'a str) -> Vec<(&'a str, &'a str)> {
        [
            ("LISTEN_PID", "77"),
            ("LISTEN_FDS", count),
            ("LISTEN_FDNAMES", names),
        ]
        .into()
    }

    /// A service manager's socket, and its path.
    fn manager(folder: &tempfile::TempDir) -> (UnixDatagram, String) {
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("a socket");
        manager.set_nonblocking(true).expect("set");
        (manager, path.to_str().expect("text").to_owned())
    }

    /// All messages that wait for the manager, in order.
    fn messages(manager: &UnixDatagram) -> Vec<String> {
        let mut bytes = [0; 256];
        let next = || {
            let len = manager.recv(&mut bytes).ok()?;
            Some(String::from_utf8_lossy(&bytes[..len]).into_owned())
        };
        std::iter::from_fn(next).collect()
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
        assert_eq!((other.socket(), other.watchdog), (None, None));
        let other = service(&[("LISTEN_FDS", "1")]).expect("ignored");
        assert_eq!(other.socket(), None);
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
    fn kept_files_are_told_from_the_listening_socket_by_their_names() {
        for (count, names, socket, left) in [
            ("1", "vhost-user", Some(3), &[][..]),
            ("2", "viommu.file.0:vhost-user", Some(4), &["file.0"]),
            ("3", "any:viommu.a:viommu.b", Some(3), &["a", "b"]),
            ("2", "viommu.a:viommu.b", None, &["a", "b"]),
        ] {
            let service = service(&passing(count, names)).expect(names);
            assert_eq!(service.socket(), socket, "{names}");
            let found: Vec<_> = service.passed.left.keys().collect();
            assert_eq!(found, left, "{names}");
            assert_eq!(service.refused().count(), 0);
        }
        let refused = service(&passing("3", "a:viommu.x:b")).expect_err("two sockets");
        assert!(
            refused.to_string().contains("passes \"2\" sockets"),
            "{refused}"
        );
    }

    #[test]
    fn names_that_do_not_match_the_descriptors_are_refused() {
        for (count, names) in [("2", "viommu.a"), ("1", "viommu.a:viommu.b"), ("2", "")] {
            let refused = service(&passing(count, names)).expect_err(names);
            assert!(matches!(refused, ServiceError::Names { .. }), "{refused}");
        }
        let refused = service(&passing("8", &["viommu.a"; 8].join(":"))).expect_err("not open");
        assert!(
            matches!(refused, ServiceError::Closed { fd: 10, .. }),
            "{refused}"
        );
        let many = (MAX_KEPT + 2).to_string();
        let refused = service(&passing(&many, "")).expect_err("too many");
        assert!(matches!(refused, ServiceError::Sockets(_)), "{refused}");
    }

    #[test]
    fn a_manager_that_keeps_descriptors_is_the_keeper() {
        let folder = tempfile::tempdir().expect("a folder");
        let (manager, path) = manager(&folder);
        for (more, is_kept) in [
            (&[][..], false),
            (&[("FDSTORE", "0")], false),
            (&[("FDSTORE", "many")], false),
            (&[("FDSTORE", "2")], true),
            (&[("FDSTORE", "2"), ("SYSTEMD_EXEC_PID", "77")], true),
            (&[("FDSTORE", "2"), ("SYSTEMD_EXEC_PID", "78")], false),
        ] {
            let variables = [&[("NOTIFY_SOCKET", &*path)], more].concat();
            let mut service = service(&variables).expect("a manager");
            let keeper = service.keeper().expect("a keeper or none");
            assert_eq!(keeper.is_present(), is_kept, "{more:?}");
            let file = io::pipe().expect("a pipe").0;
            let kept: Vec<_> = (0..3)
                .map(|n| keeper.keep_as(&format!("f{n}"), file.as_fd()).is_ok())
                .collect();
            // The third is one too many for it.
            assert_eq!(kept, [true, true, !is_kept], "{more:?}");
            assert_eq!(messages(&manager).len(), if is_kept { 2 } else { 0 });
        }
        let mut service = service(&[("FDSTORE", "2")]).expect("no manager");
        assert!(!service.keeper().expect("none").is_present());
    }

    #[test]
    fn files_that_are_not_taken_over_are_closed_and_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let (manager, path) = manager(&folder);
        let names = "viommu.a:viommu.b:viommu.a:viommu.x y:viommu.c:viommu.a";
        let mut variables = passing("6", names);
        variables.extend([("NOTIFY_SOCKET", &*path), ("FDSTORE", "9")]);
        let mut service = service(&variables).expect("a manager");
        let keeper = service.keeper().expect("a keeper");
        assert_eq!(keeper.names(), ["b", "c"]);
        assert_eq!(service.refused().collect::<Vec<_>>(), ["a", "x y"]);
        let removed = ["a", "x y"].map(|name| format!("FDSTOREREMOVE=1\nFDNAME=viommu.{name}"));
        assert_eq!(messages(&manager), removed);

        // The manager keeps descriptors no longer.
        variables.pop();
        let mut service = self::service(&variables).expect("a manager");
        assert!(!service.keeper().expect("none").is_present());
        let refused: Vec<_> = service.refused().collect();
        assert_eq!(refused, ["a", "b", "c", "x y"]);
        assert_eq!(messages(&manager).len(), 4);
    }

    #[test]
    fn the_manager_receives_notifications() {
        let folder = tempfile::tempdir().expect("a folder");
        let (manager, path) = manager(&folder);
        let service = service(&[("NOTIFY_SOCKET", &path), ("WATCHDOG_USEC", "2000000")]);
        let service = service.expect("a manager");
        assert_eq!(service.watchdog(), Some(Duration::from_secs(2)));
        service.notify("READY=1").expect("sent");
        assert_eq!(messages(&manager), ["READY=1"]);
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
