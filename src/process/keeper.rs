//! Descriptors that outlive this process. The process that started this one keeps them, and passes them to the next one.
//!
//! ```text
//! this process --- FDSTORE=1, FDNAME=name, descriptor ---> service manager (systemd), or `launch`
//!                                                              |
//! the next one <-- descriptors and their names at its start ---+
//! ```
//!
//! The messages are those of sd_notify(3), section "FDSTORE=1". A keeper that has a file under one name ignores it under
//! another one, so [`Keeper::keep`] counts the users of each file and chooses its name.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::locks::{Mutex, Rank};
use crate::process::inherited::is_same_file;
use crate::process::keeper_message::{KeeperMessage, is_name};
use crate::warn_limited;

pub use crate::process::keeper_message::PREFIX;

/// The most descriptors that are kept: `FileDescriptorStoreMax=` of the unit.
pub const MAX_KEPT: usize = 1024;
/// How long a message may wait for the keeper.
const PATIENCE: Duration = Duration::from_secs(1);

/// Keeps descriptors beyond the end of this process.
#[derive(Debug)]
pub struct Keeper {
    socket: Option<UnixDatagram>,
    /// The most descriptors that it keeps.
    room: usize,
    files: Mutex<KeptFiles>,
}

#[derive(Debug, Default)]
struct KeptFiles {
    kept: BTreeMap<String, KeptFile>,
    /// The number in the next name that [`Keeper::keep`] chooses.
    next: u64,
}

#[derive(Debug)]
struct KeptFile {
    file: Arc<OwnedFd>,
    /// 0 for a file that the process before has left and nobody has claimed.
    users: u32,
}

impl Keeper {
    /// Keeps nothing: no process would pass anything on.
    pub fn none() -> Self {
        Self {
            socket: None,
            room: 0,
            files: Mutex::new(Rank::KeptFiles, KeptFiles::default()),
        }
    }

    /// The keeper at the other end of `socket`, which has these files, each with its name without [`PREFIX`].
    ///
    /// # Errors
    /// The socket takes no time limit.
    pub fn new(
        socket: UnixDatagram,
        left: impl IntoIterator<Item = (String, OwnedFd)>,
    ) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let unclaimed = |(name, file)| {
            let file = Arc::new(file);
            (name, KeptFile { file, users: 0 })
        };
        let kept: BTreeMap<_, _> = left.into_iter().map(unclaimed).collect();
        let numbers = kept.keys().filter_map(|name| number_of(name));
        let next = numbers.max().map_or(0, |highest| highest + 1);
        Ok(Self {
            socket: Some(socket),
            room: MAX_KEPT,
            files: Mutex::new(Rank::KeptFiles, KeptFiles { kept, next }),
        })
    }

    /// Limits the number of kept descriptors to `room`, and to [`MAX_KEPT`]: the service manager drops more without a
    /// word.
    #[must_use]
    pub fn with_room(self, room: usize) -> Self {
        Self {
            room: room.min(MAX_KEPT),
            ..self
        }
    }

    /// Makes the keeper close what it has under this name, without [`PREFIX`], which this process refused to take over.
    pub fn discard(&self, name: &str) {
        // A name of another daemon: it must not become a second line of the message.
        if !name.contains(char::is_control) {
            self.remove(name);
        }
    }

    /// Whether there is a keeper: whether anything outlives this process.
    pub fn is_present(&self) -> bool {
        self.socket.is_some()
    }

    /// The names of all files that are kept, or that the process before has left.
    pub fn names(&self) -> Vec<String> {
        self.files.lock().kept.keys().cloned().collect()
    }

    /// The names of the files that the process before has left, and nobody has claimed.
    pub fn unclaimed(&self) -> Vec<String> {
        let files = self.files.lock();
        let unclaimed = files.kept.iter().filter(|(_, kept)| kept.users == 0);
        unclaimed.map(|(name, _)| name.clone()).collect()
    }

    /// The file with this name, which the process before has left, or this one has kept. It has one user more.
    pub fn claim(&self, name: &str) -> Option<Arc<OwnedFd>> {
        let mut files = self.files.lock();
        let kept = files.kept.get_mut(name)?;
        kept.users = kept.users.saturating_add(1);
        Some(kept.file.clone())
    }

    /// Keeps a file until it is released as often as it was kept or claimed. Returns its name: the same for all
    /// descriptors of one open file.
    ///
    /// # Errors
    /// See [`Self::keep_as`].
    pub fn keep(&self, file: BorrowedFd<'_>) -> io::Result<String> {
        let mut files = self.files.lock();
        let is_same = |kept: &KeptFile| is_same_file(kept.file.as_fd(), file) == Some(true);
        if let Some((name, kept)) = files.kept.iter_mut().find(|(_, kept)| is_same(kept)) {
            kept.users = kept.users.saturating_add(1);
            return Ok(name.clone());
        }
        let name = format!("file.{}", files.next);
        self.send_file(&mut files, &name, file)?;
        files.next += 1;
        Ok(name)
    }

    /// Keeps a file under a name of the caller's choice (see [`is_name`]). No other name may have the file. A file that
    /// has the name already is replaced.
    ///
    /// # Errors
    /// The keeper does not take the message within a second, there are too many files, or it is no name.
    pub fn keep_as(&self, name: &str, file: BorrowedFd<'_>) -> io::Result<()> {
        let mut files = self.files.lock();
        if files.kept.contains_key(name) {
            // If the message is lost, the keeper has the file: the next call must try again.
            self.send(KeeperMessage::Remove(name), None)?;
            files.kept.remove(name);
        }
        self.send_file(&mut files, name, file)
    }

    /// Has one user of the file less. The last one makes the keeper close it.
    pub fn release(&self, name: &str) {
        let mut files = self.files.lock();
        let Some(kept) = files.kept.get_mut(name) else {
            return;
        };
        kept.users = kept.users.saturating_sub(1);
        if kept.users == 0 {
            files.kept.remove(name);
            self.remove(name);
        }
    }

    /// Makes the keeper close a file, however many users it has.
    pub fn drop_file(&self, name: &str) {
        let mut files = self.files.lock();
        if files.kept.remove(name).is_some() {
            self.remove(name);
        }
    }

    /// Releases what the process before has left and nobody has claimed. Returns the names.
    pub fn release_unclaimed(&self) -> Vec<String> {
        let mut files = self.files.lock();
        let unclaimed = files.kept.iter().filter(|(_, kept)| kept.users == 0);
        let names: Vec<String> = unclaimed.map(|(name, _)| name.clone()).collect();
        for name in &names {
            files.kept.remove(name);
            self.remove(name);
        }
        names
    }

    fn send_file(&self, files: &mut KeptFiles, name: &str, file: BorrowedFd<'_>) -> io::Result<()> {
        if !self.is_present() {
            return Ok(());
        }
        if !is_name(name) {
            let text = format!("no file can be kept under the name {name:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if files.kept.len() >= self.room {
            let text = format!(
                "{} descriptors are kept already; a VMM with fewer regions of memory needs fewer, and \
                 FileDescriptorStoreMax= of the unit allows up to {MAX_KEPT}",
                self.room
            );
            return Err(io::Error::other(text));
        }
        let own = Arc::new(file.try_clone_to_owned()?);
        self.send(KeeperMessage::Store(name), Some(file))?;
        let kept = KeptFile {
            file: own,
            users: 1,
        };
        files.kept.insert(name.into(), kept);
        Ok(())
    }

    fn remove(&self, name: &str) {
        if let Err(cause) = self.send(KeeperMessage::Remove(name), None) {
            warn_limited!("the keeper still has the descriptor {name}: {cause}");
        }
    }

    fn send(&self, message: KeeperMessage<'_>, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let message = message.to_string();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let file: Vec<_> = file.into_iter().collect();
        if !file.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&file)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let bytes = [IoSlice::new(message.as_bytes())];
        let sent = rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|cause| {
            let text = format!("the keeper of descriptors does not take a message: {cause}");
            io::Error::new(cause.kind(), text)
        })
    }
}

/// The number in a name that [`Keeper::keep`] has chosen.
fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix("file.")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

    use super::*;

    fn keeper() -> (UnixDatagram, Keeper) {
        let (manager, ours) = UnixDatagram::pair().expect("sockets");
        manager.set_nonblocking(true).expect("set");
        (manager, Keeper::new(ours, []).expect("a keeper"))
    }

    /// The next message, and its descriptor.
    fn received(manager: &UnixDatagram) -> Option<(String, Option<OwnedFd>)> {
        let mut bytes = [0; 256];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [io::IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::empty();
        let len = rustix::net::recvmsg(manager, &mut slices, &mut control, flags);
        let len = len.ok()?.bytes;
        let mut file = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                file = files.last();
            }
        }
        Some((String::from_utf8_lossy(&bytes[..len]).into(), file))
    }

    fn pipe() -> OwnedFd {
        io::pipe().expect("a pipe").0.into()
    }

    #[test]
    fn a_file_is_kept_once_and_released_by_its_last_user() {
        let (manager, keeper) = keeper();
        let file = pipe();
        let name = keeper.keep(file.as_fd()).expect("kept");
        assert_eq!(name, "file.0");
        let (message, sent) = received(&manager).expect("a message");
        assert_eq!(message, "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.file.0");
        let sent = sent.expect("a descriptor");
        assert_ne!(is_same_file(sent.as_fd(), file.as_fd()), Some(false));

        if is_same_file(file.as_fd(), file.as_fd()).is_some() {
            let copy = file.try_clone().expect("a copy");
            assert_eq!(keeper.keep(copy.as_fd()).expect("kept"), name);
            assert!(received(&manager).is_none(), "it would be ignored");
            keeper.release(&name);
            assert!(received(&manager).is_none(), "it has a user");
        }
        assert_eq!(keeper.keep(pipe().as_fd()).expect("kept"), "file.1");
        received(&manager).expect("a message");
        keeper.release(&name);
        let (message, none) = received(&manager).expect("a message");
        assert_eq!(message, "FDSTOREREMOVE=1\nFDNAME=viommu.file.0");
        assert!(none.is_none());
        keeper.release(&name);
        assert!(received(&manager).is_none(), "gone already");
        assert_eq!(keeper.names(), ["file.1"]);
    }

    #[test]
    fn what_is_left_is_claimed_or_released() {
        let (manager, ours) = UnixDatagram::pair().expect("sockets");
        manager.set_nonblocking(true).expect("set");
        let left = ["arena.1", "file.7", "store.1"].map(|name| (name.to_owned(), pipe()));
        let keeper = Keeper::new(ours, left).expect("a keeper");
        let arena = keeper.claim("arena.1").expect("left");
        assert!(arena.as_raw_fd() >= 0);
        assert!(keeper.claim("arena.2").is_none());
        assert_eq!(keeper.unclaimed(), ["file.7", "store.1"]);
        assert_eq!(keeper.release_unclaimed(), ["file.7", "store.1"]);
        for name in ["file.7", "store.1"] {
            let (message, _) = received(&manager).expect("a message");
            assert_eq!(message, format!("FDSTOREREMOVE=1\nFDNAME=viommu.{name}"));
        }
        assert_eq!(keeper.keep(pipe().as_fd()).expect("kept"), "file.8");
    }

    #[test]
    fn a_named_file_replaces_the_one_before() {
        let (manager, keeper) = keeper();
        for life in 0..2 {
            keeper.keep_as("vmm", pipe().as_fd()).expect("kept");
            if life > 0 {
                let (message, _) = received(&manager).expect("a message");
                assert_eq!(message, "FDSTOREREMOVE=1\nFDNAME=viommu.vmm");
            }
            let (message, _) = received(&manager).expect("a message");
            assert_eq!(message, "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.vmm");
        }
    }

    #[test]
    fn a_file_whose_removal_was_lost_is_removed_before_it_is_replaced() {
        let (manager, keeper) = keeper();
        keeper.keep_as("vmm", pipe().as_fd()).expect("kept");
        received(&manager).expect("a message");
        let lost = (0..1000).find_map(|_| keeper.keep_as("vmm", pipe().as_fd()).err());
        assert!(lost.is_some(), "nobody reads");
        while received(&manager).is_some() {}
        keeper.keep_as("vmm", pipe().as_fd()).expect("kept");
        let (message, _) = received(&manager).expect("a message");
        assert_eq!(message, "FDSTOREREMOVE=1\nFDNAME=viommu.vmm");
    }

    #[test]
    fn no_more_files_are_kept_than_the_keeper_has_room_for() {
        let (manager, keeper) = keeper();
        let keeper = keeper.with_room(2);
        for _ in 0..2 {
            keeper.keep(pipe().as_fd()).expect("room");
            received(&manager).expect("a message");
        }
        let refused = keeper.keep(pipe().as_fd()).expect_err("full").to_string();
        assert!(refused.contains("FileDescriptorStoreMax="), "{refused}");
        assert!(received(&manager).is_none(), "nothing was sent");
        keeper.release("file.0");
        keeper.keep(pipe().as_fd()).expect("room again");
    }

    #[test]
    fn a_file_without_a_usable_name_is_not_kept() {
        let (manager, keeper) = keeper();
        keeper
            .keep_as("a\nFDPOLL=1", pipe().as_fd())
            .expect_err("two lines");
        assert!(received(&manager).is_none());
    }

    #[test]
    fn without_a_keeper_nothing_is_kept() {
        let keeper = Keeper::none();
        assert!(!keeper.is_present());
        keeper.keep(pipe().as_fd()).expect("nothing to do");
        keeper
            .keep_as("vmm", pipe().as_fd())
            .expect("nothing to do");
        assert!(keeper.names().is_empty());
    }

    #[test]
    fn a_keeper_that_is_gone_or_full_is_an_error() {
        let (manager, keeper) = keeper();
        drop(manager);
        let refused = keeper.keep(pipe().as_fd()).expect_err("gone");
        assert!(refused.to_string().contains("keeper"), "{refused}");
        assert!(keeper.names().is_empty());

        let (_manager, keeper) = self::keeper();
        let full = (0..1000).find_map(|_| keeper.keep(pipe().as_fd()).err());
        assert!(full.is_some(), "nobody reads");
    }
}
