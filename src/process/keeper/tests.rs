//! Tests of the keeper: the test is the process that keeps.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

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

/// A socket whose last `close` lasts until the other end, which is returned, has gone.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let mut ours = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
    let (theirs, _) = listener.accept().expect("connected");
    ours.set_nonblocking(true).expect("set");
    while ours.write(&[0; 4096]).is_ok() {}
    ours.set_nonblocking(false).expect("set");
    rustix::net::sockopt::set_socket_linger(&ours, Some(Duration::from_secs(600))).expect("set");
    (ours.into(), theirs)
}

/// Nothing that works takes so long.
const HANG: Duration = Duration::from_secs(30);

/// Runs `act` in a thread. `None` if it does not end.
fn ends<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, done) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || sender.send(act()));
    done.recv_timeout(HANG).ok()
}

#[test]
fn nobody_waits_for_a_descriptor_that_does_not_close() {
    let (manager, ours) = UnixDatagram::pair().expect("sockets");
    manager.set_nonblocking(true).expect("set");
    let (unclaimed, theirs) = lingering();
    let left = [("file.3".to_owned(), unclaimed), ("b".to_owned(), pipe())];
    let keeper = Arc::new(Keeper::new(ours, left).expect("a keeper"));
    keeper.start_closer().expect("a thread");
    let mut peers = vec![theirs];
    let by_release: [fn(&Keeper, &str); 3] = [
        |keeper, name| keeper.release(name),
        |keeper, name| {
            keeper.retire(name);
            keeper.release_idle();
        },
        |keeper, name| {
            keeper.drop_file(name);
        },
    ];
    for release in by_release {
        let (file, theirs) = lingering();
        peers.push(theirs);
        let name = keeper.keep(file.as_fd()).expect("kept");
        drop(file);
        while received(&manager).is_some() {}
        let releasing = keeper.clone();
        ends(move || release(&releasing, &name)).expect("nobody waits");
    }
    let releasing = keeper.clone();
    let released = ends(move || releasing.release_unclaimed());
    assert_eq!(released.expect("nobody waits"), ["b", "file.3"]);
    assert!(keeper.names().is_empty());
}

/// The keeper's own files do not wait behind one that the VMM has chosen.
#[test]
fn own_files_are_closed_at_once() {
    let (manager, keeper) = keeper();
    keeper.start_closer().expect("a thread");
    let (file, _theirs) = lingering();
    let name = keeper.keep(file.as_fd()).expect("kept");
    drop(file);
    received(&manager).expect("a message");
    keeper.release(&name);
    let (own, peer) = UnixStream::pair().expect("sockets");
    keeper.keep_as("own", own.as_fd()).expect("kept");
    drop(own);
    keeper.drop_file("own");
    // A message has a copy of the descriptor.
    while received(&manager).is_some() {}
    assert!(has_ended(peer), "it is closed");
}

/// Descriptors of another process must not use up those of this one.
#[test]
fn a_closer_that_waits_holds_few_descriptors() {
    let closer = Closer::start().expect("a thread");
    let (file, _theirs) = lingering();
    closer.close(Arc::new(file));
    let other = Arc::new(pipe());
    // The thread may not have begun to wait yet, and then takes one more.
    let is_closed = (0..300).any(|_| {
        for _ in 0..1000 {
            closer.close(other.clone());
        }
        assert!(Arc::strong_count(&other) <= 300);
        let (last, mut peer) = UnixStream::pair().expect("sockets");
        closer.close(Arc::new(last.into()));
        let brief = Some(Duration::from_millis(100));
        peer.set_read_timeout(brief).expect("set");
        matches!(peer.read(&mut [0]), Ok(0))
    });
    assert!(is_closed, "no more are held");
}

fn has_ended(mut peer: UnixStream) -> bool {
    peer.set_read_timeout(Some(HANG)).expect("set");
    matches!(peer.read(&mut [0]), Ok(0))
}

/// The thread that closes it waits alone.
#[test]
fn the_lock_is_free_while_a_descriptor_is_closed() {
    let (manager, keeper) = keeper();
    let keeper = Arc::new(keeper);
    let (file, theirs) = lingering();
    let name = keeper.keep(file.as_fd()).expect("kept");
    drop(file);
    received(&manager).expect("a message");
    let closing = keeper.clone();
    let closed = std::thread::spawn(move || closing.release(&name));
    let message = std::iter::from_fn(|| {
        std::thread::sleep(Duration::from_millis(1));
        Some(received(&manager))
    });
    assert!(message.take(30_000).flatten().next().is_some());
    let others = keeper.clone();
    let kept = ends(move || others.keep(pipe().as_fd()).map(|_| others.names().len()));
    assert_eq!(kept.expect("the lock is free").expect("kept"), 1);
    assert!(!closed.is_finished());
    drop(theirs);
    closed.join().expect("closed");
}

/// A manager that counts and forgets.
struct Counting {
    counted: std::thread::JoinHandle<(u64, u64)>,
    end: UnixDatagram,
}

impl Counting {
    /// How many files were stored, and how many removed.
    fn count(self) -> (u64, u64) {
        self.end.send(&[]).expect("sent");
        self.counted.join().expect("counted")
    }
}

fn counting() -> (Arc<Keeper>, Counting) {
    let (manager, ours) = UnixDatagram::pair().expect("sockets");
    let end = ours.try_clone().expect("a copy");
    let counted = std::thread::spawn(move || {
        let (mut stored, mut removed) = (0, 0);
        while let Some((message, _)) = received(&manager).filter(|(text, _)| !text.is_empty()) {
            if message.starts_with("FDSTOREREMOVE") {
                removed += 1;
            } else {
                stored += 1;
            }
        }
        (stored, removed)
    });
    let keeper = Arc::new(Keeper::new(ours, []).expect("a keeper"));
    (keeper, Counting { counted, end })
}

#[test]
fn a_vmm_that_changes_between_its_descriptors_causes_no_messages() {
    let (keeper, counted) = counting();
    let ends = [pipe(), pipe()];
    if is_same_file(ends[0].as_fd(), ends[0].as_fd()).is_none() {
        return;
    }
    let mut last = keeper.keep(ends[1].as_fd()).expect("kept");
    for _ in 0..1000 {
        for end in &ends {
            let copy = end.try_clone().expect("a copy");
            let name = keeper.keep(copy.as_fd()).expect("kept");
            keeper.retire(&std::mem::replace(&mut last, name));
        }
    }
    assert!(keeper.unclaimed().is_empty());
    assert!(keeper.release_unclaimed().is_empty());
    keeper.retire(&last);
    // More than stay without a user.
    for _ in 0..20 {
        let name = keeper.keep(pipe().as_fd()).expect("kept");
        keeper.retire(&name);
    }
    assert_eq!(keeper.names().len(), MAX_IDLE);
    keeper.release_idle();
    assert!(keeper.names().is_empty());
    assert_eq!(keeper.counters().messages.get(), 44);
    assert_eq!(keeper.counters().delays.get(), 0);
    assert_eq!(counted.count(), (22, 22));
}

#[test]
fn new_descriptors_without_an_end_are_kept_at_a_steady_rate() {
    let (keeper, counted) = counting();
    let begun = Instant::now();
    let count = MAX_KEPT + 20;
    for _ in 0..count {
        let name = keeper.keep(pipe().as_fd()).expect("kept");
        keeper.release(&name);
    }
    // So many may pass in this time, and no more. A slow machine needs no delay for that.
    let passed = begun.elapsed().as_nanos() / REFILL.as_nanos();
    assert!(passed >= 19, "{passed}");
    let count = u64::try_from(count).expect("small");
    assert_eq!(counted.count(), (count, count));
}

#[test]
fn delays_are_counted() {
    let (keeper, _counted) = counting();
    for _ in 0..1000 {
        while keeper.files.lock().rate.take(Instant::now()).is_ok() {}
        let name = keeper.keep(pipe().as_fd()).expect("kept");
        keeper.release(&name);
        if keeper.counters().delays.get() > 0 {
            return;
        }
    }
    panic!("no delay");
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
    // The unit names no more.
    assert_eq!(keeper.with_room(usize::MAX).room, MAX_KEPT);
}

#[test]
fn a_file_without_a_usable_name_is_not_kept() {
    let (manager, keeper) = keeper();
    keeper
        .keep_as("a\nFDPOLL=1", pipe().as_fd())
        .expect_err("two lines");
    keeper.discard("a\nFDSTORE=1");
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
