//! A service manager for unit tests.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::process::inherited::is_same_file;
use crate::process::keeper::{Keeper, PREFIX};

/// Nothing that works takes so long.
const HANG: Duration = Duration::from_secs(30);

pub(crate) type Files = BTreeMap<String, OwnedFd>;

/// A service manager: keeps descriptors from one life of the daemon to the next.
pub(crate) struct Manager {
    files: Arc<Mutex<Files>>,
    /// The daemon's end of each life.
    lives: Vec<UnixDatagram>,
    settled: (mpsc::Sender<()>, mpsc::Receiver<()>),
}

impl Manager {
    pub(crate) fn new() -> Self {
        Self {
            files: Arc::default(),
            lives: Vec::new(),
            settled: mpsc::channel(),
        }
    }

    /// The keeper of the next life, with all that the one before has left.
    pub(crate) fn keeper(&mut self) -> Arc<Keeper> {
        if !self.lives.is_empty() {
            self.settle();
        }
        let (ours, theirs) = UnixDatagram::pair().expect("sockets");
        let files = self.files.clone();
        let settled = self.settled.0.clone();
        std::thread::spawn(move || {
            while let Some((message, file)) = receive(&ours) {
                if message == "settle" {
                    let _ = settled.send(());
                } else {
                    store(&mut files.lock().expect("files"), &message, file);
                }
            }
        });
        self.lives.push(theirs.try_clone().expect("a copy"));
        let left: Vec<_> = self
            .files
            .lock()
            .expect("files")
            .iter()
            .map(|(name, file)| (name.clone(), file.try_clone().expect("a copy")))
            .collect();
        Arc::new(Keeper::new(theirs, left).expect("a keeper"))
    }

    /// Waits until all messages of the present life are read.
    pub(crate) fn settle(&self) {
        let life = self.lives.last().expect("a life");
        life.send(b"settle").expect("sent");
        self.settled.1.recv_timeout(HANG).expect("settled");
    }

    /// The names of what is kept.
    pub(crate) fn names(&self) -> Vec<String> {
        self.settle();
        self.files.lock().expect("files").keys().cloned().collect()
    }

    /// Changes what is kept.
    pub(crate) fn with_files<T>(&self, change: impl FnOnce(&mut Files) -> T) -> T {
        self.settle();
        change(&mut self.files.lock().expect("files"))
    }
}

fn receive(socket: &UnixDatagram) -> Option<(String, Option<OwnedFd>)> {
    let mut bytes = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let len = rustix::net::recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC);
    let len = len.ok()?.bytes;
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last();
        }
    }
    Some((String::from_utf8_lossy(&bytes[..len]).into(), file))
}

/// Handles a message as systemd does.
fn store(files: &mut Files, message: &str, file: Option<OwnedFd>) {
    let name = message
        .lines()
        .find_map(|line| line.strip_prefix("FDNAME="));
    let name = name
        .and_then(|name| name.strip_prefix(PREFIX))
        .expect("a name");
    match file {
        Some(file) => {
            assert!(message.starts_with("FDSTORE=1\n"), "{message}");
            let is_there = |kept: &OwnedFd| is_same_file(kept.as_fd(), file.as_fd()) == Some(true);
            if !files.values().any(is_there) {
                files.insert(name.into(), file);
            }
        }
        None => {
            assert!(message.starts_with("FDSTOREREMOVE=1\n"), "{message}");
            files.remove(name);
        }
    }
}
