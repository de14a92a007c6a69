//! The process that started this one, and what it keeps for the next one: a service manager, `launch`, or neither.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use thiserror::Error;

use crate::process::inherited::adopt;
use crate::process::keeper::{Keeper, MAX_KEPT};
use crate::process::keeper_message::is_name;
use crate::process::service::{Service, ServiceError};

/// The descriptors that another process passes cannot be used.
#[derive(Debug, Error)]
pub enum SupervisorError {
    /// A variable of the service manager cannot be used.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The text is not the name and the number of a descriptor that no other option names.
    #[error(
        "--kept-fd {0:?} is not NAME=N with a name and a number of its own; leave it out: only `launch` gives this option"
    )]
    NotAFile(String),
    /// There are more descriptors than a daemon leaves.
    #[error(
        "there are {0} options --kept-fd, and {MAX_KEPT} is the most; leave them out: only `launch` gives them"
    )]
    TooMany(usize),
    /// A descriptor is not open, or is not a socket.
    #[error(
        "descriptor {fd} cannot be used: {source}; leave out --keeper-fd and --kept-fd: only `launch` gives these options"
    )]
    Closed {
        /// The descriptor.
        fd: RawFd,
        /// The error of the system.
        source: io::Error,
    },
}

/// The process that started this one.
#[derive(Debug)]
pub struct Supervisor {
    /// The service manager, if there is one.
    pub service: Service,
    /// What outlives this process.
    pub keeper: Keeper,
}

impl Supervisor {
    /// Finds it in the environment of this process, and in the options that `launch` gives: the descriptor of its socket,
    /// and NAME=N for each file that the process before has left. `launch` comes first, because it may run as a service
    /// itself.
    ///
    /// The caller must not have opened any file before: see [`adopt`].
    ///
    /// # Errors
    /// See [`SupervisorError`].
    pub fn find(socket: Option<RawFd>, left: &[String]) -> Result<Self, SupervisorError> {
        let launch = socket.map(|fd| launcher(fd, left)).transpose()?;
        let mut service = Service::from_environment()?;
        let keeper = match launch {
            Some(keeper) => keeper,
            None => service.keeper()?,
        };
        Ok(Self { service, keeper })
    }

    /// Logs what is lost: files that this process does not take over, and the state of the VM when this process ends.
    pub fn log_losses(&self) {
        let refused: Vec<_> = self.service.refused().collect();
        if !refused.is_empty() {
            log::warn!(
                "descriptors that the daemon before has left are closed, because the service manager keeps none any more, \
                 or has several with one name: {}",
                refused.join(", ")
            );
        }
        if !self.keeper.is_present() {
            log::info!(
                "the VM's state ends with this daemon, because the process that started it keeps no descriptors; \
                 run the daemon as a service of systemd 254 or later with FileDescriptorStoreMax=, or with `launch`"
            );
        }
    }
}

/// `launch` as the keeper at the other end of the socket `fd`.
fn launcher(fd: RawFd, left: &[String]) -> Result<Keeper, SupervisorError> {
    if left.len() > MAX_KEPT {
        return Err(SupervisorError::TooMany(left.len()));
    }
    // All options before any descriptor: each number may be adopted once.
    let mut files = BTreeMap::new();
    let mut numbers = BTreeSet::from([fd]);
    for text in left {
        let file = kept_file(text)
            .filter(|(name, fd)| numbers.insert(*fd) && files.insert(name.clone(), *fd).is_none());
        file.ok_or_else(|| SupervisorError::NotAFile(text.clone()))?;
    }
    let adopt = |fd| adopt(fd).map_err(|source| SupervisorError::Closed { fd, source });
    let socket = UnixDatagram::from(adopt(fd)?);
    let files = files.into_iter().map(|(name, fd)| Ok((name, adopt(fd)?)));
    let files: Vec<(String, OwnedFd)> = files.collect::<Result<_, SupervisorError>>()?;
    Keeper::new(socket, files).map_err(|source| SupervisorError::Closed { fd, source })
}

/// The name and the number in NAME=N.
fn kept_file(text: &str) -> Option<(String, RawFd)> {
    let (name, number) = text.split_once('=')?;
    let number: RawFd = number.parse().ok()?;
    (is_name(name) && number >= 0).then(|| (name.into(), number))
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn pipe() -> RawFd {
        OwnedFd::from(io::pipe().expect("a pipe").0).into_raw_fd()
    }

    #[test]
    fn the_launcher_keeps_files_and_passes_those_of_the_process_before() {
        let (launcher, ours) = UnixDatagram::pair().expect("sockets");
        let left = [format!("file.3={}", pipe()), format!("arena.1={}", pipe())];
        let found = Supervisor::find(Some(ours.into_raw_fd()), &left).expect("a launcher");
        assert_eq!(found.keeper.names(), ["arena.1", "file.3"]);
        found.keeper.release_unclaimed();
        let mut bytes = [0; 64];
        let len = launcher.recv(&mut bytes).expect("a message");
        assert_eq!(&bytes[..len], b"FDSTOREREMOVE=1\nFDNAME=viommu.arena.1");
    }

    #[test]
    fn without_a_launcher_and_a_service_manager_nothing_is_kept() {
        let found = Supervisor::find(None, &[]).expect("nothing");
        assert!(!found.keeper.is_present());
    }

    /// None of these adopts a descriptor, because the others belong to somebody else in this process.
    #[test]
    fn options_that_launch_does_not_give_are_refused() {
        for text in [
            "a",
            "a=",
            "=5",
            "a=-1",
            "a=x",
            "a b=5",
            "a=5=6",
            "a=4294967296",
        ] {
            let refused = launcher(RawFd::MAX, &[text.into()]).expect_err(text);
            assert!(matches!(refused, SupervisorError::NotAFile(_)), "{refused}");
        }
        let same_name = ["a=5".to_owned(), "a=6".to_owned()];
        let same_number = ["a=5".to_owned(), "b=5".to_owned()];
        let the_sockets = [format!("a={}", RawFd::MAX)];
        for left in [&same_name[..], &same_number, &the_sockets] {
            let refused = launcher(RawFd::MAX, left).expect_err("doubled");
            assert!(matches!(refused, SupervisorError::NotAFile(_)), "{refused}");
        }
        let many: Vec<_> = (0..=MAX_KEPT).map(|n| format!("f{n}={n}")).collect();
        let refused = launcher(RawFd::MAX, &many).expect_err("too many");
        assert!(matches!(refused, SupervisorError::TooMany(_)), "{refused}");
    }

    #[test]
    fn descriptors_that_are_not_open_are_refused() {
        let refused = launcher(RawFd::MAX, &[]).expect_err("closed").to_string();
        assert!(refused.contains("only `launch`"), "{refused}");
    }
}
