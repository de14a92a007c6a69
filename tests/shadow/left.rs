//! Readers that a daemon leaves, and the next one ends. The test is the keeper.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Iova, IovaRange};
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::iommu::RequestError;
use vhost_device_iommu::process::keeper::Keeper;
use vhost_device_iommu::process::keeper_message::KeeperMessage;
use vhost_device_iommu::shadow::left::{LeftReaders, end_readers};
use vhost_device_iommu::shadow::wire::{FRAME_LEN, Frame, MAGIC, Refusal, VERSION, kind};
use vhost_device_iommu::shadow::{ConnectError, EndedReaders, Limits, ShadowReader};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bed::{A, B, Bed, D1, D2, PAGE, RAM, eventually, mapping, range, slot};
use crate::stress::Model;

/// Time for something wrong to happen.
const A_WHILE: Duration = Duration::from_millis(50);
/// Longer than anything takes that does not wait, even on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(8);

fn at(iova: u64) -> GuestAddress {
    GuestAddress(iova)
}

/// What a service manager does.
struct Manager {
    socket: UnixDatagram,
    files: BTreeMap<String, OwnedFd>,
}

impl Manager {
    fn new() -> Self {
        Self {
            socket: UnixDatagram::pair().expect("sockets").0,
            files: BTreeMap::new(),
        }
    }

    /// Starts another life: its keeper has what the lives before have left.
    fn keeper(&mut self) -> Arc<Keeper> {
        self.receive();
        let (ours, theirs) = UnixDatagram::pair().expect("sockets");
        self.socket = ours;
        let copy = |file: &OwnedFd| file.try_clone().expect("a copy");
        let left = self.files.iter().map(|(n, f)| (n.clone(), copy(f)));
        Arc::new(Keeper::new(theirs, left).expect("a keeper"))
    }

    fn receive(&mut self) {
        self.socket.set_nonblocking(true).expect("set");
        let mut bytes = [0; 256];
        let mut fds = [-1; 2];
        loop {
            let mut part = [libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            }];
            let Ok((len, count)) = received(&self.socket, &mut part, &mut fds) else {
                return;
            };
            let message = KeeperMessage::parse(&bytes[..len]).expect("a message");
            match message {
                KeeperMessage::Store(name) => {
                    assert_eq!(count, 1);
                    self.files.insert(name.into(), adopted(fds[0]));
                }
                KeeperMessage::Remove(name) => {
                    self.files.remove(name).expect("it was kept");
                }
            }
        }
    }

    /// The number of kept files.
    fn count(&mut self) -> usize {
        self.receive();
        self.files.len()
    }
}

#[expect(unsafe_code, reason = "the crate's function is unsafe")]
fn received(
    socket: &UnixDatagram,
    part: &mut [libc::iovec],
    fds: &mut [i32],
) -> Result<(usize, usize), vmm_sys_util::errno::Error> {
    // SAFETY: the part describes a buffer that the caller borrows for the whole call.
    unsafe { socket.recv_with_fds(part, fds) }
}

#[expect(unsafe_code, reason = "adopts a descriptor")]
fn adopted(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has made the descriptor for the message just now.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}

fn limits() -> Limits {
    Limits {
        patience: Duration::from_millis(500),
        ..Limits::default()
    }
}

/// Limits that no test exhausts.
fn patient() -> Limits {
    Limits {
        patience: Duration::from_secs(60),
        ..Limits::default()
    }
}

fn first_life(manager: &mut Manager, limits: Limits) -> Bed {
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let ram = vec![slot(0, RAM)];
    let mut bed = Bed::kept(&folder, limits, ram, manager.keeper());
    bed.iommu.attach(A, D1, false).expect("attached");
    for page in 0..2 {
        let page = mapping(page * PAGE, PAGE, page * PAGE, Access::READ_WRITE);
        bed.iommu.map(D1, &page).expect("mapped");
    }
    bed.serve();
    bed
}

/// The life after `bed`, which has ended without a word. It has the same mappings, and admits nobody yet.
fn next_life(manager: &mut Manager, bed: Bed) -> (Bed, Arc<Keeper>) {
    let (folder, ram, limits) = (
        bed.folder.clone(),
        bed.ram.clone(),
        bed.registry.limits().clone(),
    );
    drop(bed);
    let keeper = manager.keeper();
    let mut bed = Bed::kept(&folder, limits, ram, keeper.clone());
    bed.iommu.attach(A, D1, false).expect("attached");
    for page in 0..2 {
        let page = mapping(page * PAGE, PAGE, page * PAGE, Access::READ_WRITE);
        bed.iommu.map(D1, &page).expect("mapped");
    }
    bed.serve_held();
    (bed, keeper)
}

fn first_page() -> IovaRange {
    range(0, PAGE - 1)
}

#[test]
fn the_next_daemon_waits_for_the_accesses_of_the_readers_before() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, patient());
    let reader = bed.reader(A);
    let memory = reader.memory();
    assert_eq!(manager.count(), 3);
    bed.poke(0, 1);
    bed.poke(PAGE, 2);
    let (mut bed, keeper) = next_life(&mut manager, bed);
    std::thread::sleep(A_WHILE);
    // No UNMAP is answered yet, so the old page tables are right.
    assert!(reader.is_connected());
    assert_eq!(memory.read_obj::<u64>(at(0)).expect("mapped"), 1);
    let guard = reader.enter().expect("a lane");
    std::thread::scope(|scope| {
        let ending = scope.spawn(|| end_readers(&keeper, &patient()));
        eventually("noticed", || !reader.is_connected());
        let waiting = scope.spawn(|| memory.read_obj::<u64>(at(PAGE)));
        std::thread::sleep(A_WHILE);
        assert!(!ending.is_finished(), "an access is in progress");
        assert!(!waiting.is_finished(), "no access begins");
        guard
            .translate(Iova(0), Access::READ)
            .expect("the old table");
        drop(guard);
        let ended = ending.join().expect("no panic");
        assert_eq!((ended.ended, ended.killed), (1, 0));
        assert!(ended.stuck.is_empty() && ended.lost.is_empty());
        bed.registry.take_over(ended);
        bed.iommu.unmap(D1, first_page()).expect("unmapped");
        std::thread::sleep(A_WHILE);
        assert!(!waiting.is_finished(), "nobody is admitted yet");
        bed.admit();
        assert_eq!(waiting.join().expect("no panic").expect("mapped"), 2);
    });
    memory.read_obj::<u64>(at(0)).expect_err("unmapped");
    assert_eq!(bed.fault().address, Iova(0));
    assert_eq!(reader.registrations(), 2);
    eventually("three new files", || manager.count() == 3);
    // The readers of this daemon are none that the one before has left.
    assert!(LeftReaders::claim(&keeper).is_empty());
    drop((memory, reader));
    eventually("they are released", || manager.count() == 0);
    assert_eq!(bed.registry.counters().killed.get(), 0);
}

#[expect(unsafe_code, reason = "sends a signal")]
fn signal(child: &std::process::Child, signal: i32) {
    // SAFETY: no pointer is passed; the process is this test's child, and was not waited for.
    let done = unsafe { libc::kill(child.id().cast_signed(), signal) };
    assert_eq!(done, 0);
}

fn ends_within(keeper: &Arc<Keeper>, limits: &Limits, most: Duration) -> EndedReaders {
    let begun = Instant::now();
    let ended = end_readers(keeper, limits);
    assert!(begun.elapsed() < most, "{:?}", begun.elapsed());
    ended
}

#[test]
fn a_stopped_reader_is_killed_only_if_it_is_inside_an_access() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, limits());
    let mut outside = bed.process("write-on-command");
    outside.wait_for("ready");
    let mut inside = bed.process("stall");
    inside.wait_for("inside");
    assert_eq!(manager.count(), 6);
    for child in [&outside.child, &inside.child] {
        signal(child, libc::SIGSTOP);
    }
    let (mut bed, keeper) = next_life(&mut manager, bed);
    let begun = Instant::now();
    let ended = ends_within(&keeper, &limits(), AT_ONCE);
    assert!(begun.elapsed() >= limits().patience);
    assert_eq!((ended.ended, ended.killed), (2, 1));
    let killed = inside.child.try_wait().expect("its own child");
    assert!(killed.is_some_and(|status| !status.success()));
    bed.registry.take_over(ended);
    assert_eq!(bed.registry.counters().killed.get(), 1);
    bed.iommu.unmap(D1, first_page()).expect("unmapped");
    bed.admit();
    // It was in the middle of nothing, and sees the new tables.
    signal(&outside.child, libc::SIGCONT);
    outside.send_line("go");
    outside.wait_for("refused");
    assert_eq!(bed.fault().address, Iova(0));
    let page = mapping(0, PAGE, 0, Access::READ_WRITE);
    bed.iommu.map(D1, &page).expect("mapped");
    outside.send_line("go");
    outside.wait_for("written");
}

/// The end of the connection is a hint only: the library may see it late.
#[test]
fn a_revoked_reader_begins_no_access_before_it_sees_the_end_of_the_connection() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, limits());
    let mut process = bed.process("write-on-command");
    process.wait_for("ready");
    manager.receive();
    let is_socket = |name: &&String| name.ends_with(".socket");
    let name = manager.files.keys().find(is_socket).expect("kept");
    let name = name.clone();
    let socket = manager.files.remove(&name);
    let (mut bed, keeper) = next_life(&mut manager, bed);
    let ended = ends_within(&keeper, &limits(), AT_ONCE);
    assert_eq!((ended.ended, ended.killed), (1, 0));
    bed.registry.take_over(ended);
    bed.iommu.unmap(D1, first_page()).expect("unmapped");
    bed.admit();
    process.send_line("go");
    std::thread::sleep(4 * A_WHILE);
    assert_eq!(bed.peek(0), 0, "through the old page tables");
    drop(socket);
    process.wait_for("refused");
    assert_eq!(bed.peek(0), 0);
}

#[test]
fn a_reader_of_an_earlier_version_must_hang_up() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, limits());
    // One process never does, and one connection of this process does.
    let mut silent = bed.process("stop-reading");
    silent.wait_for("ready");
    let stream = UnixStream::connect(bed.path()).expect("a socket");
    let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, A.0.into(), 0, 0]);
    io::Write::write_all(&mut &stream, &hello.to_wire()).expect("room");
    bed.wait_for_readers(2);
    let (bed, keeper) = next_life(&mut manager, bed);
    let left = LeftReaders::claim(&keeper);
    let over = std::thread::spawn(move || {
        // Reads up to the end of the stream, and closes its end.
        let mut all = Vec::new();
        io::Read::read_to_end(&mut &stream, &mut all).expect("an end");
        assert!(all.len() > FRAME_LEN);
    });
    let ended = left.end(&limits());
    over.join().expect("all was right");
    assert_eq!((ended.ended, ended.killed), (2, 1));
    let killed = silent.child.try_wait().expect("its own child");
    assert!(killed.is_some_and(|status| !status.success()));
    drop(bed);
    assert_eq!(manager.count(), 0);
}

/// A daemon cannot kill a reader in its own process.
#[test]
fn unmap_fails_while_a_reader_of_the_daemon_before_is_stuck() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, limits());
    let reader = bed.reader(A);
    let guard = reader.enter().expect("a lane");
    let (mut bed, keeper) = next_life(&mut manager, bed);
    let short = Limits {
        exit: Duration::from_millis(100),
        ..limits()
    };
    let ended = ends_within(&keeper, &short, AT_ONCE);
    assert_eq!((ended.ended, ended.killed, ended.stuck.len()), (0, 0, 1));
    bed.registry.take_over(ended);
    assert_eq!(bed.registry.reader_count(), 1);
    let refused = bed.iommu.unmap(D1, first_page()).expect_err("stuck");
    assert!(matches!(
        refused,
        RequestError::Quarantined { count: 1, .. }
    ));
    assert!(bed.iommu.endpoint(A).expect("an endpoint").quarantined);
    assert_eq!(manager.count(), 3, "the life after this one must end it");
    // It can use each page that was mapped at its admission, also those that are unmapped already.
    let second = range(PAGE, 2 * PAGE - 1);
    for page in [second, second, first_page()] {
        let begun = Instant::now();
        bed.iommu.unmap(D1, page).expect_err("still stuck");
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    }
    let mut outcomes = VecDeque::new();
    bed.iommu
        .unmap_all(D1, [first_page(), second], &mut outcomes);
    assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
    bed.iommu.attach(A, D1, false).expect_err("still stuck");
    bed.iommu.attach(A, D2, false).expect_err("still stuck");
    drop(guard);
    bed.iommu.unmap(D1, IovaRange::ALL).expect("over");
    bed.admit();
    eventually("registered", || reader.is_connected());
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    assert_eq!(bed.registry.reader_count(), 1);
    // The server lets the descriptors of the old registration go with its next event.
    reader.memory().read_obj::<u8>(at(0)).expect_err("unmapped");
    eventually("those of the new one are left", || manager.count() == 3);
}

/// Its epoch words tell nothing: it does not know that they are revoked.
#[test]
fn unmap_fails_while_a_stuck_reader_of_an_earlier_version_is_connected() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, limits());
    let stream = UnixStream::connect(bed.path()).expect("a socket");
    let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, A.0.into(), 0, 0]);
    io::Write::write_all(&mut &stream, &hello.to_wire()).expect("room");
    bed.wait_for_readers(1);
    let (mut bed, keeper) = next_life(&mut manager, bed);
    let short = Limits {
        exit: A_WHILE,
        ..limits()
    };
    let ended = ends_within(&keeper, &short, AT_ONCE);
    assert_eq!((ended.ended, ended.stuck.len()), (0, 1));
    bed.registry.take_over(ended);
    bed.iommu.unmap(D1, first_page()).expect_err("connected");
    assert!(bed.iommu.endpoint(A).expect("an endpoint").quarantined);
    drop(stream);
    bed.wait_for_readers(0);
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
}

#[test]
fn a_reader_of_which_only_the_process_was_kept_is_killed() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, limits());
    let mut process = bed.process("write-on-command");
    process.wait_for("ready");
    manager.receive();
    manager.files.retain(|name, _| name.ends_with(".process"));
    let (_bed, keeper) = next_life(&mut manager, bed);
    let ended = ends_within(&keeper, &limits(), AT_ONCE);
    assert_eq!((ended.ended, ended.killed), (1, 1));
    assert!(!process.ended_well());
}

/// Each registration costs the process that keeps the descriptors six messages.
#[test]
fn a_device_that_registers_all_the_time_is_refused_and_the_others_are_not() {
    let mut manager = Manager::new();
    let bed = first_life(&mut manager, patient());
    let kept = bed.reader(A);
    let register = |endpoint: EndpointId| {
        let reader = ShadowReader::connect(&bed.path(), endpoint);
        manager.receive();
        reader.map(drop)
    };
    let mut register = register;
    let refused = (0..1000).find_map(|_| {
        let refused = register(A).err();
        eventually("it has gone", || bed.registry.reader_count() == 1);
        refused
    });
    let refused = refused.expect("too many");
    assert!(
        refused.to_string().contains("too many new ones"),
        "{refused}"
    );
    assert!(bed.registry.counters().refused_often.get() > 0);
    register(B).expect("another device");
    kept.memory().read_obj::<u8>(at(0)).expect("as before");
    eventually("one more after a while", || register(A).is_ok());
}

#[test]
fn unmap_fails_for_the_endpoint_of_a_lost_reader() {
    let mut bed = first_life(&mut Manager::new(), limits());
    let ended = EndedReaders {
        lost: [A].into(),
        ..EndedReaders::default()
    };
    assert_eq!(ended.unended(), [A].into());
    bed.registry.take_over(ended);
    for _ in 0..3 {
        bed.iommu.unmap(D1, first_page()).expect_err("lost");
    }
    // The readers of another endpoint have ended.
    bed.iommu.attach(B, D2, false).expect("attached");
    bed.iommu.unmap(D2, IovaRange::ALL).expect("empty");
    assert!(bed.iommu.endpoint(A).expect("an endpoint").quarantined);
}

#[test]
fn what_only_resembles_a_left_reader_is_let_go() {
    let mut manager = Manager::new();
    let file = || OwnedFd::from(tempfile::tempfile().expect("a file"));
    // Epoch memory that is none, sockets that are none, an end without a process.
    for name in [
        "reader.1.24.1.epochs",
        "reader.2.24.1.socket",
        "reader.3.24.0.epochs",
    ] {
        manager.files.insert(name.into(), file());
    }
    let gone = UnixStream::pair().expect("sockets").0;
    manager
        .files
        .insert("reader.3.24.0.socket".into(), gone.into());
    manager.files.insert("reader.4.24.1.process".into(), file());
    manager.files.insert("reader.x.24.1.process".into(), file());
    let keeper = manager.keeper();
    let ended = ends_within(&keeper, &patient(), AT_ONCE);
    assert_eq!((ended.ended, ended.killed), (4, 0));
    assert!(ended.stuck.is_empty() && ended.lost.is_empty());
    assert_eq!(manager.count(), 1, "no name of a reader");
}

#[test]
fn a_reader_that_cannot_be_kept_is_not_admitted() {
    let mut manager = Manager::new();
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let (ours, theirs) = UnixDatagram::pair().expect("sockets");
    manager.socket = ours;
    let keeper = Keeper::new(theirs, []).expect("a keeper").with_room(5);
    let ram = vec![slot(0, RAM)];
    let mut bed = Bed::kept(&folder, limits(), ram, Arc::new(keeper));
    bed.serve();
    let first = bed.reader(A);
    let refused = ShadowReader::connect(&bed.path(), A).expect_err("no room");
    let lacking = matches!(
        refused,
        ConnectError::Refused {
            refusal: Refusal::Resources,
            ..
        }
    );
    assert!(lacking, "{refused}");
    assert_eq!(manager.count(), 3, "nothing of the refused one is left");
    drop(first);
    eventually("released", || manager.count() == 0);
    bed.reader(A);
}

/// Processes that access memory at full speed, while one daemon after the other serves a guest that maps and unmaps. Each
/// access checks the value that it reads, so an access through a mapping of an earlier daemon is detected.
#[test]
fn no_access_reaches_what_a_later_daemon_has_unmapped() {
    let lives = std::env::var("SHADOW_LIVES").ok();
    let lives = lives.and_then(|n| n.parse().ok()).unwrap_or(12u32);
    let mut manager = Manager::new();
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let ram = vec![slot(0, RAM)];
    let mut bed = Bed::kept(&folder, patient(), ram.clone(), manager.keeper());
    let mut model = Model::new(&mut bed);
    bed.serve();
    let over = AtomicBool::new(false);
    let reader = bed.reader(A);
    let mut processes: Vec<_> = (0..2).map(|_| bed.process("access")).collect();
    for process in &mut processes {
        process.wait_for("begun");
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| crate::stress::access_until(&reader, &over)))
            .collect();
        for life in 0..lives {
            model.change(&mut bed, Duration::from_millis(u64::from(life * 7919 % 40)));
            drop(bed);
            let keeper = manager.keeper();
            bed = Bed::kept(&folder, patient(), ram.clone(), keeper.clone());
            model.replay(&mut bed);
            bed.serve_held();
            let ended = end_readers(&keeper, &patient());
            assert_eq!((ended.killed, ended.stuck.len()), (0, 0));
            bed.registry.take_over(ended);
            // The first answers of the new daemon.
            model.change(&mut bed, Duration::from_millis(5));
            bed.admit();
        }
        eventually("registered", || reader.is_connected());
        model.finish(&mut bed);
        over.store(true, Ordering::Relaxed);
        for thread in threads {
            assert!(thread.join().expect("all was right") > 100);
        }
    });
    for process in &mut processes {
        process.send_line("over");
        process.wait_for("accesses");
        assert!(process.ended_well());
    }
    assert!(reader.registrations() > 1);
    assert!(ram[0].file.as_raw_fd() >= 0);
}
