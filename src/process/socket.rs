//! Listening sockets at paths, and the files of these sockets.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use log::debug;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::process::connector;

/// The most clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// The file of a listening socket. Dropping it removes the file if it is still the same one.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// The identity of a file: device, inode, and creation time if the file system has it. The inode alone is not
/// enough: the next file may get the number of one that was removed.
type Identity = (u64, u64, Option<SystemTime>);

impl SocketFile {
    /// The file of a socket that another process has created. It is removed here in case that process does not.
    ///
    /// # Errors
    /// The file does not exist.
    pub fn of_another(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(path)?,
        })
    }

    /// Leaves the file where it is.
    pub fn forget(mut self) {
        // No file has this path.
        self.path.clear();
    }

    /// Removes the file if it is still the same one.
    pub fn remove(&self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(cause) = fs::remove_file(&self.path)
        {
            debug!("cannot remove {}: {cause}", self.path.display());
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The access rights of a socket's file. By default they follow from the umask of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketRights {
    /// The mode of its file; `None` for all rights that the umask leaves.
    pub mode: Option<u32>,
    /// The number of the file's group; `None` for the group of the process.
    pub group: Option<u32>,
}

/// Creates a listening socket at `path` with these rights. It replaces the file of a socket without a listener.
/// At no time can a user connect without these rights.
///
/// # Errors
/// As for [`bind`], and if the file cannot get its group or mode.
pub fn bind_for(path: &Path, rights: SocketRights) -> io::Result<(UnixListener, SocketFile)> {
    let shown = path.display();
    bind_with(path, || {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let socket = File::from(socket);
        if let Some(mode) = rights.mode {
            // At first the file has rights for its owner only.
            socket.set_permissions(Permissions::from_mode(mode & 0o700))?;
        }
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        if rights.group.is_some() {
            lchown(path, None, rights.group).map_err(|cause| {
                let what = format!(
                    "cannot give {shown} its group: {cause}; make the daemon's user a member of the group"
                );
                io::Error::new(cause.kind(), what)
            })?;
        }
        if let Some(mode) = rights.mode {
            fs::set_permissions(path, Permissions::from_mode(mode))?;
        }
        // Nobody can connect before.
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(UnixListener::from(OwnedFd::from(socket)))
    })
}

/// Creates a listening socket at `path` with the rights that the umask leaves. It replaces the file of a socket
/// without a listener.
///
/// # Errors
/// Another kind of file is there, another process listens on the socket, or the folder of `path` is missing.
pub fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    bind_for(path, SocketRights::default())
}

/// Refuses a folder that does not exist or is another kind of file.
fn check_folder(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|it| !it.as_os_str().is_empty()) else {
        return Ok(());
    };
    let (shown, inside) = (folder.display(), path.display());
    let what = match fs::metadata(folder) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => format!(
            "{shown}, where the socket {inside} is to be, is not a folder; choose another path"
        ),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => format!(
            "the folder {shown} of the socket {inside} does not exist; make it, or choose another path"
        ),
        Err(cause) if cause.kind() == io::ErrorKind::NotADirectory => format!(
            "a part of {shown}, where the socket {inside} is to be, is not a folder; choose another path"
        ),
        Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => format!(
            "the folder {shown} of the socket {inside} is out of reach for this user; let the user in, or \
             choose another path"
        ),
        Err(cause) => format!("the folder {shown} of the socket {inside} cannot be used: {cause}"),
    };
    Err(io::Error::new(io::ErrorKind::NotFound, what))
}

fn bind_with(
    path: &Path,
    make: impl FnOnce() -> io::Result<UnixListener>,
) -> io::Result<(UnixListener, SocketFile)> {
    let shown = path.display();
    check_folder(path)?;
    let refuse = |kind, why: String| Err(io::Error::new(kind, why));
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return refuse(
                io::ErrorKind::AlreadyExists,
                format!("{shown} exists and is not a socket; remove it or choose another path"),
            );
        }
        match probe(path) {
            Err(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)?;
            }
            Ok(()) => {
                return refuse(
                    io::ErrorKind::AddrInUse,
                    format!("another process listens on {shown}; stop it or choose another path"),
                );
            }
            Err(cause) => {
                return refuse(
                    cause.kind(),
                    format!(
                        "{shown} exists and may be in use ({cause}); remove it or choose another \
                         path"
                    ),
                );
            }
        }
    }
    let made =
        make().map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {shown}: {e}")))?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path)?,
    };
    Ok((made, file))
}

/// Whether a process listens at `path`; `ConnectionRefused` if none does.
fn probe(path: &Path) -> io::Result<()> {
    match connector::connect(path) {
        // The listener's backlog is full.
        Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => Ok(()),
        outcome => outcome.map(drop),
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino(), found.created().ok()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::sync_channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_a_socket_without_a_listener_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let (listener, file) = bind(&path).expect("a free path");
        let taken = bind(&path).expect_err("in use");
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        assert!(taken.to_string().contains("choose another path"));
        drop(listener);
        // File systems reuse the inode of a removed file, and creation times advance by clock ticks.
        std::thread::sleep(Duration::from_millis(50));
        let (_listener, second) = bind(&path).expect("no listener any more");
        drop(file);
        assert!(path.exists(), "it is another file now");
        drop(second);
        assert!(!path.exists());

        fs::write(&path, "text").expect("a file");
        let refused = bind(&path).expect_err("no socket");
        assert!(refused.to_string().contains("not a socket"), "{refused}");
        assert!(path.exists());
    }

    #[test]
    fn a_socket_has_the_rights_it_is_given() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        for mode in [0o600, 0o666, 0o000, 0o660] {
            let group = Some(folder.path().metadata().expect("a group").gid());
            let rights = SocketRights {
                mode: Some(mode),
                group,
            };
            let (listener, file) = bind_for(&path, rights).expect("a free path");
            let found = fs::metadata(&path).expect("it is there");
            assert_eq!(found.mode() & 0o7777, mode);
            assert_eq!(Some(found.gid()), group);
            if mode & 0o200 != 0 {
                UnixStream::connect(&path).expect("it listens");
                let taken = bind_for(&path, rights).expect_err("in use");
                assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
            }
            drop((listener, file));
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_folder_that_cannot_hold_a_socket_is_named_with_the_cure() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("file"), "text").expect("a file");
        for (path, parts) in [
            (
                "missing/s",
                ["missing of the socket", "does not exist; make it"],
            ),
            (
                "file/s",
                ["file, where the socket", "is not a folder; choose"],
            ),
            ("file/below/s", ["file/below", "is not a folder; choose"]),
        ] {
            let error = bind(&folder.path().join(path)).expect_err(path).to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
            assert!(!error.contains("os error"), "{error}");
        }
    }

    #[test]
    #[expect(unsafe_code, reason = "shortens the backlog")]
    fn a_listener_that_does_not_accept_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let (listener, _file) = bind(&path).expect("a free path");
        // SAFETY:
        // - the descriptor is open, as it is borrowed, and listens already; no pointer is passed
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        // Fill the backlog, until a connection has to wait.
        let mut accepted = Vec::new();
        loop {
            let path = path.clone();
            let (sender, receiver) = sync_channel(1);
            std::thread::spawn(move || sender.send(UnixStream::connect(path)));
            match receiver.recv_timeout(Duration::from_millis(200)) {
                Ok(stream) => accepted.push(stream),
                Err(_) => break,
            }
            assert!(accepted.len() < 10, "the backlog is not short");
        }
        let refused = bind(&path).expect_err("in use");
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    }
}
