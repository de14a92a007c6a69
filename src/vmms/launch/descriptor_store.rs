//! The descriptors that a daemon leaves to the next one: `launch` in place of a service manager's file descriptor store.
//!
//! The messages are those of [`Keeper`](crate::process::keeper::Keeper). Their sender is the daemon, which the guest may
//! control: everything is bounded.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::locks::{Mutex, Rank};
use crate::process::keeper::MAX_KEPT;
use crate::process::keeper_message::{KeeperMessage, MAX_MESSAGE};

/// Keeps what daemons send, until it is dropped.
pub(super) struct DescriptorStore {
    receiver: Arc<FileReceiver>,
    /// Each daemon inherits it.
    daemons_end: UnixDatagram,
}

struct FileReceiver {
    socket: UnixDatagram,
    /// The most files that it keeps.
    room: usize,
    /// By their names. A thread receives messages only with this lock, so that none is on its way to the map.
    files: Mutex<BTreeMap<String, OwnedFd>>,
    ended: AtomicBool,
    complained: AtomicBool,
}

impl DescriptorStore {
    /// An empty store with a thread that receives messages.
    ///
    /// # Errors
    /// No socket or thread can be made.
    pub fn new() -> io::Result<Self> {
        let (socket, daemons_end) = UnixDatagram::pair()?;
        let receiver = Arc::new(FileReceiver::new(socket, MAX_KEPT));
        let copy = receiver.clone();
        thread::Builder::new()
            .name("keeper".into())
            .spawn(move || copy.run())?;
        Ok(Self {
            receiver,
            daemons_end,
        })
    }

    /// The number of the daemon's end of the socket.
    pub fn daemons_end(&self) -> RawFd {
        self.daemons_end.as_raw_fd()
    }

    /// Takes all messages that have been sent. Those of a process that has ended are all there.
    pub fn receive(&self) {
        self.receiver.receive();
    }

    pub fn is_empty(&self) -> bool {
        self.receiver.files.lock().is_empty()
    }

    /// The names and numbers of all files. They stay open until a daemon releases them.
    pub fn numbers(&self) -> Vec<(String, RawFd)> {
        let files = self.receiver.files.lock();
        let number = |(name, file): (&String, &OwnedFd)| (name.clone(), file.as_raw_fd());
        files.iter().map(number).collect()
    }
}

impl Drop for DescriptorStore {
    fn drop(&mut self) {
        self.receiver.ended.store(true, Ordering::Release);
        // Wakes the thread.
        if self.receiver.socket.shutdown(Shutdown::Both).is_err() {
            // It waits until the process ends.
        }
    }
}

impl FileReceiver {
    fn new(socket: UnixDatagram, room: usize) -> Self {
        Self {
            socket,
            room,
            files: Mutex::new(Rank::KeptFiles, BTreeMap::new()),
            ended: AtomicBool::new(false),
            complained: AtomicBool::new(false),
        }
    }

    fn run(&self) {
        while !self.ended.load(Ordering::Acquire) {
            let mut wanted = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut wanted, None) {
                Ok(_) => self.receive(),
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn receive(&self) {
        let mut files = self.files.lock();
        while !self.ended.load(Ordering::Acquire) {
            match self.receive_one(&mut files) {
                Ok(Ok(())) => {}
                Ok(Err(why)) => {
                    // A daemon that sends such messages may send many.
                    if !self.complained.swap(true, Ordering::Relaxed) {
                        let _ = writeln!(
                            io::stderr(),
                            "vhost-device-iommu: the daemon cannot leave a descriptor to the next one: {why}"
                        );
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Receives and carries out one message, or tells why it is refused.
    fn receive_one(
        &self,
        files: &mut BTreeMap<String, OwnedFd>,
    ) -> rustix::io::Result<Result<(), &'static str>> {
        let mut bytes = [0; MAX_MESSAGE];
        // Room for one more than a message may have.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.socket, &mut slices, &mut control, flags)?;
        let mut sent: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                sent.extend(descriptors);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Ok(Err(
                "it has several, or this process may open no more files (ulimit -n)",
            ));
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Ok(Err("its message is too long"));
        }
        let message = KeeperMessage::parse(bytes.get(..received.bytes).unwrap_or_default());
        Ok(match (message, sent.pop(), sent.pop()) {
            (Some(KeeperMessage::Store(name)), Some(file), None) => {
                // Of two files with one name the later one counts: the daemon removes the other before.
                if files.len() < self.room || files.contains_key(name) {
                    files.insert(name.into(), file);
                    Ok(())
                } else {
                    Err("there are too many")
                }
            }
            (Some(KeeperMessage::Remove(name)), None, None) => {
                files.remove(name);
                Ok(())
            }
            _ => Err("its message is none that a daemon sends"),
        })
    }
}

/// Lets this process open [`MAX_KEPT`] files more than so far, as far as its hard limit allows.
pub(super) fn allow_more_files() {
    let limit = getrlimit(Resource::Nofile);
    let Some(current) = limit.current else {
        return;
    };
    let more = current.saturating_add(u64::try_from(MAX_KEPT).unwrap_or(0));
    let wanted = Rlimit {
        current: Some(limit.maximum.map_or(more, |maximum| maximum.min(more))),
        ..limit
    };
    if setrlimit(Resource::Nofile, wanted).is_err() {
        // The message about the first file that cannot be kept names the cure.
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::time::{Duration, Instant};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::process::inherited::is_same_file;
    use crate::process::keeper::Keeper;

    /// A store without a thread, and the daemon's end.
    fn store() -> (FileReceiver, UnixDatagram) {
        let (socket, daemon) = UnixDatagram::pair().expect("sockets");
        (FileReceiver::new(socket, 3), daemon)
    }

    fn names(store: &FileReceiver) -> Vec<String> {
        store.files.lock().keys().cloned().collect()
    }

    fn pipe() -> OwnedFd {
        io::pipe().expect("a pipe").0.into()
    }

    fn send(daemon: &UnixDatagram, text: &str, files: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        let bytes = [IoSlice::new(text.as_bytes())];
        sendmsg(daemon, &bytes, &mut control, SendFlags::empty()).expect("sent");
    }

    const STORE: &str = "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.";
    const REMOVE: &str = "FDSTOREREMOVE=1\nFDNAME=viommu.";

    #[test]
    fn all_that_a_dead_daemon_has_sent_is_there() {
        let (store, daemon) = store();
        let keeper = Keeper::new(daemon, []).expect("a keeper");
        let file = pipe();
        keeper.keep_as("a", file.as_fd()).expect("kept");
        keeper.keep_as("b", pipe().as_fd()).expect("kept");
        keeper.release("b");
        keeper.keep_as("c", pipe().as_fd()).expect("kept");
        drop(keeper);
        store.receive();
        assert_eq!(names(&store), ["a", "c"]);
        let kept = &store.files.lock()["a"];
        assert_ne!(is_same_file(kept.as_fd(), file.as_fd()), Some(false));
        assert!(!store.complained.load(Ordering::Relaxed));
    }

    #[test]
    fn the_thread_receives_and_ends_with_the_store() {
        let store = DescriptorStore::new().expect("a store");
        let daemon = store.daemons_end.try_clone().expect("a copy");
        send(&daemon, &format!("{STORE}a"), &[pipe().as_fd()]);
        let deadline = Instant::now() + Duration::from_secs(20);
        while store.is_empty() {
            assert!(Instant::now() < deadline, "nothing is received");
            thread::yield_now();
        }
        assert_eq!(store.numbers()[0].0, "a");
        let receiver = Arc::downgrade(&store.receiver);
        drop(store);
        while receiver.strong_count() > 0 {
            assert!(Instant::now() < deadline, "the thread does not end");
            thread::yield_now();
        }
    }

    #[test]
    fn messages_that_no_daemon_sends_change_nothing() {
        let files = [pipe(), pipe(), pipe()];
        let files = files.each_ref().map(AsFd::as_fd);
        let long = format!("{STORE}{}", "x".repeat(MAX_MESSAGE));
        for (text, files) in [
            ("", &files[..0]),
            ("", &files[..1]),
            ("READY=1", &files[..0]),
            (&format!("{STORE}b"), &files[..0]),
            (&format!("{STORE}b"), &files[..2]),
            (&format!("{STORE}b"), &files[..3]),
            (&format!("{STORE}b\n"), &files[..1]),
            (&format!("{REMOVE}a"), &files[..1]),
            (&format!("{STORE}../b"), &files[..1]),
            (&long, &files[..1]),
        ] {
            let (store, daemon) = store();
            send(&daemon, &format!("{STORE}a"), &[pipe().as_fd()]);
            store.receive();
            assert!(!store.complained.load(Ordering::Relaxed));
            send(&daemon, text, files);
            store.receive();
            assert!(store.complained.load(Ordering::Relaxed), "{text:?}");
            assert_eq!(names(&store), ["a"], "{text:?}");
            send(&daemon, &format!("{REMOVE}a"), &[]);
            store.receive();
            assert!(names(&store).is_empty(), "it goes on after {text:?}");
        }
    }

    #[test]
    fn no_more_files_are_kept_than_the_most() {
        let (store, daemon) = store();
        let file = pipe();
        for name in ["a", "b", "c"] {
            send(&daemon, &format!("{STORE}{name}"), &[pipe().as_fd()]);
        }
        send(&daemon, &format!("{STORE}more"), &[file.as_fd()]);
        store.receive();
        assert!(store.complained.load(Ordering::Relaxed));
        assert_eq!(names(&store), ["a", "b", "c"]);
        // One in place of another is not one more.
        send(&daemon, &format!("{STORE}b"), &[file.as_fd()]);
        store.receive();
        let kept = &store.files.lock()["b"];
        assert_ne!(is_same_file(kept.as_fd(), file.as_fd()), Some(false));
    }
}
