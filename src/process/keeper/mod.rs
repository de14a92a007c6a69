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
//!
//! The files of [`Keeper::keep`] are chosen by another process, the VMM. So their number in a second is limited, and they are
//! closed by a [`Closer`], without the lock.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::locks::{Mutex, Rank};
use crate::metrics::Counter;
use crate::process::closer::Closer;
use crate::process::inherited::is_same_file;
use crate::process::keeper_message::{KeeperMessage, is_name};
use crate::process::rate_limit::RateLimit;
use crate::process::unkept::UnkeptConnections;
use crate::warn_limited;

pub use crate::process::keeper_message::PREFIX;

/// The most descriptors that are kept: `FileDescriptorStoreMax=` of the unit.
pub const MAX_KEPT: usize = 1024;
/// How long a message may wait for the keeper.
const PATIENCE: Duration = Duration::from_secs(1);
/// The names that [`Keeper::keep`] chooses begin with this.
const CHOSEN: &str = "file.";
/// [`Keeper::keep`] passes so many new files on at once: all that may be kept.
const BURST: u32 = 1024;
const _: () = assert!(BURST as usize == MAX_KEPT);
/// After that, it passes one on in this time: the service manager serves others, too.
const REFILL: Duration = Duration::from_millis(20);
/// The most files of [`Keeper::retire`] without users: two descriptors for each event of a VMM's rings.
const MAX_IDLE: usize = 8;

/// Keeps descriptors beyond the end of this process.
#[derive(Debug)]
pub struct Keeper {
    socket: Option<UnixDatagram>,
    /// The most descriptors that it keeps.
    room: usize,
    files: Mutex<KeptFiles>,
    closer: OnceLock<Closer>,
    counters: KeeperCounters,
    unkept: Arc<UnkeptConnections>,
}

/// Counters of a keeper, since this process's start.
#[derive(Debug, Default)]
pub struct KeeperCounters {
    /// Messages to the process that keeps the descriptors.
    pub messages: Counter,
    /// How often the VMM had to wait, because it had changed its descriptors too often.
    pub delays: Counter,
}

#[derive(Debug)]
struct KeptFiles {
    kept: BTreeMap<String, KeptFile>,
    /// The number in the next name that [`Keeper::keep`] chooses.
    next: u64,
    /// Limits the files that [`Keeper::keep`] chooses a name for.
    rate: RateLimit,
    /// Files of [`Keeper::retire`] that have no users, the oldest first.
    idle: VecDeque<String>,
}

impl KeptFiles {
    fn new(kept: BTreeMap<String, KeptFile>, next: u64) -> Self {
        Self {
            kept,
            next,
            rate: RateLimit::new(BURST, REFILL),
            idle: VecDeque::new(),
        }
    }

    /// The names of the files that nobody has claimed.
    fn unclaimed(&self) -> Vec<String> {
        let kept = self.kept.iter();
        let unclaimed = kept.filter(|(name, kept)| kept.users == 0 && !self.idle.contains(name));
        unclaimed.map(|(name, _)| name.clone()).collect()
    }

    /// Has one user of the file less. Returns whether it has none now.
    fn leave(&mut self, name: &str) -> bool {
        let Some(kept) = self.kept.get_mut(name) else {
            return false;
        };
        kept.users = kept.users.saturating_sub(1);
        kept.users == 0
    }
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
            files: Mutex::new(Rank::KeptFiles, KeptFiles::new(BTreeMap::new(), 0)),
            closer: OnceLock::new(),
            counters: KeeperCounters::default(),
            unkept: Arc::default(),
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
            files: Mutex::new(Rank::KeptFiles, KeptFiles::new(kept, next)),
            closer: OnceLock::new(),
            counters: KeeperCounters::default(),
            unkept: Arc::default(),
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
        self.files.lock().unclaimed()
    }

    /// The users of a file.
    #[cfg(test)]
    pub(crate) fn users(&self, name: &str) -> u32 {
        let files = self.files.lock();
        files.kept.get(name).map_or(0, |kept| kept.users)
    }

    /// The counters.
    pub fn counters(&self) -> &KeeperCounters {
        &self.counters
    }

    /// The connections whose descriptors could not all be kept.
    pub fn unkept(&self) -> &Arc<UnkeptConnections> {
        &self.unkept
    }

    /// Closes files that the VMM has chosen in a thread of their own from now on.
    ///
    /// # Errors
    /// See [`Closer::start`].
    pub fn start_closer(&self) -> io::Result<()> {
        // Fails if there is one.
        let _ = self.closer.set(Closer::start()?);
        Ok(())
    }

    /// The file with this name, which the process before has left, or this one has kept. It has one user more.
    pub fn claim(&self, name: &str) -> Option<Arc<OwnedFd>> {
        let mut files = self.files.lock();
        let kept = files.kept.get_mut(name)?;
        kept.users = kept.users.saturating_add(1);
        Some(kept.file.clone())
    }

    /// Keeps a file until it is released as often as it was kept or claimed. Returns its name: the same for all
    /// descriptors of one open file. Waits for a moment after too many files.
    ///
    /// # Errors
    /// See [`Self::keep_as`].
    pub fn keep(&self, file: BorrowedFd<'_>) -> io::Result<String> {
        loop {
            let mut files = self.files.lock();
            let is_same = |kept: &KeptFile| is_same_file(kept.file.as_fd(), file) == Some(true);
            if let Some((name, kept)) = files.kept.iter_mut().find(|(_, kept)| is_same(kept)) {
                kept.users = kept.users.saturating_add(1);
                let name = name.clone();
                files.idle.retain(|idle| *idle != name);
                return Ok(name);
            }
            if self.is_present()
                && let Err(wait) = files.rate.take(Instant::now())
            {
                drop(files);
                self.counters.delays.inc();
                std::thread::sleep(wait);
                continue;
            }
            let name = format!("{CHOSEN}{}", files.next);
            self.send_file(&mut files, &name, file)?;
            files.next += 1;
            return Ok(name);
        }
    }

    /// Keeps a file under a name of the caller's choice (see [`is_name`]). No other name may have the file. A file that
    /// has the name already is replaced.
    ///
    /// # Errors
    /// The keeper does not take the message within a second, there are too many files, or it is no name.
    pub fn keep_as(&self, name: &str, file: BorrowedFd<'_>) -> io::Result<()> {
        let mut files = self.files.lock();
        let mut replaced = None;
        if files.kept.contains_key(name) {
            // If the message is lost, the keeper has the file: the next call must try again.
            self.send(KeeperMessage::Remove(name), None)?;
            replaced = files.kept.remove(name);
        }
        let sent = self.send_file(&mut files, name, file);
        drop(files);
        drop(replaced);
        sent
    }

    /// Has one user of the file less. The last one makes the keeper close it.
    pub fn release(&self, name: &str) {
        let mut files = self.files.lock();
        if files.leave(name) {
            let removed = self.remove_file(&mut files, name);
            drop(files);
            self.close(name, removed);
        }
    }

    /// Releases files. An empty name is that of a file that could not be kept.
    pub fn release_all(&self, names: &[String]) {
        for name in names.iter().filter(|name| !name.is_empty()) {
            self.release(name);
        }
    }

    /// As [`Self::release`], for a file that may soon be kept again: it is one of the few that stay without a user. A guest
    /// that masks and unmasks an interrupt makes the VMM change between two descriptors.
    pub fn retire(&self, name: &str) {
        let mut files = self.files.lock();
        if !files.leave(name) || files.idle.iter().any(|idle| idle == name) {
            return;
        }
        files.idle.push_back(name.to_owned());
        if files.idle.len() > MAX_IDLE
            && let Some(oldest) = files.idle.pop_front()
        {
            let removed = self.remove_file(&mut files, &oldest);
            drop(files);
            self.close(&oldest, removed);
        }
    }

    /// Makes the keeper close all files without a user of [`Self::retire`].
    pub fn release_idle(&self) {
        loop {
            let mut files = self.files.lock();
            let Some(name) = files.idle.pop_front() else {
                return;
            };
            let removed = self.remove_file(&mut files, &name);
            drop(files);
            self.close(&name, removed);
        }
    }

    /// Makes the keeper close a file, however many users it has. Returns whether there was one.
    pub fn drop_file(&self, name: &str) -> bool {
        let mut files = self.files.lock();
        let removed = self.remove_file(&mut files, name);
        drop(files);
        let is_removed = removed.is_some();
        self.close(name, removed);
        is_removed
    }

    /// Releases what the process before has left and nobody has claimed. Returns the names.
    pub fn release_unclaimed(&self) -> Vec<String> {
        let mut files = self.files.lock();
        let names = files.unclaimed();
        let removed: Vec<_> = names
            .iter()
            .map(|name| self.remove_file(&mut files, name))
            .collect();
        drop(files);
        for (name, removed) in names.iter().zip(removed) {
            self.close(name, removed);
        }
        names
    }

    fn remove_file(&self, files: &mut KeptFiles, name: &str) -> Option<KeptFile> {
        let removed = files.kept.remove(name)?;
        files.idle.retain(|idle| idle != name);
        self.remove(name);
        Some(removed)
    }

    /// Closes a removed file. The caller must not hold the lock: the kernel may wait for a process that the VMM has chosen.
    fn close(&self, name: &str, removed: Option<KeptFile>) {
        let Some(removed) = removed else { return };
        match self.closer.get() {
            Some(closer) if name.starts_with(CHOSEN) => closer.close(removed.file),
            // Not the daemon's own files: they must not wait behind such a file.
            _ => drop(removed),
        }
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
        self.counters.messages.inc();
        let sent = rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|cause| {
            let text = format!("the keeper of descriptors does not take a message: {cause}");
            io::Error::new(cause.kind(), text)
        })
    }
}

/// The number in a name that [`Keeper::keep`] has chosen.
fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix(CHOSEN)?.parse().ok()
}
