//! Readers that stall, die or attack.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Gpa, GpaRange, IovaRange};
use vhost_device_iommu::backends::MemorySlot;
use vhost_device_iommu::iommu::{Dma, RequestError};
use vhost_device_iommu::shadow::wire::{FRAME_LEN, Frame, MAGIC, Refusal, VERSION, kind};
use vhost_device_iommu::shadow::{ConnectError, Limits, ShadowReader};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bed::{A, B, Bed, D1, D2, LONG, OTHER, PAGE, RAM, Role, eventually, mapping, slot};

/// Attaches endpoint `A` and maps its first page.
fn map_first_page(bed: &mut Bed) {
    bed.iommu.attach(A, D1, false).expect("attached");
    let page = mapping(0, PAGE, 0, Access::READ_WRITE);
    bed.iommu.map(D1, &page).expect("mapped");
}

#[test]
fn a_reader_that_stalls_is_killed_before_unmap_reports_success() {
    let mut bed = Bed::new();
    map_first_page(&mut bed);
    let good = bed.reader(A);
    let mut stalled = bed.process("stall");
    stalled.wait_for("inside");
    bed.wait_for_readers(2);
    let begun = Instant::now();
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(500), "{took:?}");
    let ended = stalled.child.try_wait().expect("its own child");
    assert!(
        ended.is_some_and(|status| !status.success()),
        "UNMAP must not succeed before the reader is dead"
    );
    assert_eq!(bed.registry.counters().killed.get(), 1);
    // The other reader and the endpoint continue.
    bed.wait_for_readers(1);
    let page = mapping(0, PAGE, 0, Access::READ_WRITE);
    bed.iommu.map(D1, &page).expect("mapped");
    good.memory()
        .read_obj::<u8>(GuestAddress(0))
        .expect("mapped");
    let state = bed.iommu.endpoint(A).expect("an endpoint");
    assert_eq!((state.dma, state.quarantined), (Dma::Translated, false));
}

#[test]
fn a_reader_that_died_inside_an_access_does_not_delay_unmap() {
    let mut bed = Bed::patient();
    map_first_page(&mut bed);
    let mut stalled = bed.process("stall");
    stalled.wait_for("inside");
    stalled.kill();
    let begun = Instant::now();
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    assert!(begun.elapsed() < LONG / 2);
    bed.wait_for_readers(0);
    assert_eq!(bed.registry.counters().killed.get(), 0);
}

/// The patience of the test below. Its reader is inside each access for half of it.
pub const SLOW_PATIENCE: Duration = Duration::from_secs(4);
/// Many times what the reader may keep requests waiting in all.
const HANG: Duration = Duration::from_secs(100);

#[test]
fn a_reader_that_is_always_slow_uses_its_budget_up_and_is_killed() {
    let mut bed = Bed::with(Limits {
        patience: SLOW_PATIENCE,
        ..Limits::default()
    });
    map_first_page(&mut bed);
    let mut slow = bed.process("hold-long");
    slow.wait_for("inside");
    let page = mapping(0, PAGE, 0, Access::READ_WRITE);
    // No single wait is long enough to kill it. On a busy machine it may be outside when UNMAP comes, so that some
    // requests do not wait.
    let begun = Instant::now();
    while slow.child.try_wait().expect("its own child").is_none() {
        assert!(begun.elapsed() < HANG, "it keeps every UNMAP waiting");
        bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
        bed.iommu.map(D1, &page).expect("mapped");
    }
    let counters = bed.registry.counters();
    assert_eq!((counters.killed.get(), counters.killed_slow.get()), (1, 1));
    bed.wait_for_readers(0);
    // The endpoint continues, and so does the daemon.
    assert!(!bed.iommu.endpoint(A).expect("an endpoint").quarantined);
    bed.reader(A)
        .memory()
        .read_obj::<u8>(GuestAddress(0))
        .expect("mapped");
}

/// Between two looks of the daemon at it.
#[test]
fn a_reader_that_has_just_died_counts_as_gone_and_not_as_stuck() {
    let bed = Bed::new();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("own");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    let mut process = Role::start_as("stop-reading", &path, None);
    let (mut stream, _) = listener.accept().expect("connected");
    let mut greeting = [0; FRAME_LEN];
    stream.read_exact(&mut greeting).expect("a greeting");
    let greeting = Frame::from_wire(&greeting);
    let reader = bed.registry.register(stream, &greeting, &[A]);
    let reader = reader.expect("admitted");
    process.wait_for("ready");
    // Dead, and its parent has waited for it: a signal finds no process.
    process.kill();
    process.child.wait().expect("its own child");
    let killed = bed.registry.kill(&reader, "is slow");
    assert_eq!(killed, Ok(()));
    assert_eq!(bed.registry.counters().killed.get(), 0);
    assert_eq!(bed.registry.reader_count(), 0);
}

#[test]
fn a_child_of_a_reader_has_no_memory_and_its_connection_blocks_the_endpoint() {
    let mut bed = Bed::new();
    map_first_page(&mut bed);
    let mut parent = bed.process("fork");
    // The page tables, the epoch words and guest RAM.
    assert_eq!(parent.wait_for("parent maps").trim(), "parent maps 3");
    assert_eq!(parent.wait_for("child maps").trim(), "child maps 0");
    parent.wait_for("child dropped");
    parent.wait_for("parent reads");
    parent.wait_for("parent reads");
    assert_eq!(bed.registry.reader_count(), 1);
    parent.kill();
    parent.child.wait().expect("its own child");
    eventually("the connection has outlived the process", || {
        bed.registry.counters().inherited.get() == 1
    });
    let refused = bed.iommu.unmap(D1, IovaRange::ALL).expect_err("in use");
    assert!(
        refused
            .to_string()
            .contains("another process has its connection"),
        "{refused}"
    );
    assert!(bed.iommu.endpoint(A).expect("an endpoint").quarantined);
    // The child ends with its input.
    drop(parent);
    bed.wait_for_readers(0);
    bed.iommu.attach(A, D1, false).expect("attached");
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    assert_eq!(bed.registry.counters().killed.get(), 0);
}

/// The daemon cannot kill a reader in its own process.
#[test]
fn an_endpoint_is_quarantined_if_its_reader_cannot_be_killed() {
    let mut bed = Bed::new();
    map_first_page(&mut bed);
    let reader = bed.reader(A);
    let guard = reader.enter().expect("a word");
    let refused = bed.iommu.unmap(D1, IovaRange::ALL).expect_err("stuck");
    assert!(matches!(
        refused,
        RequestError::Quarantined { count: 1, .. }
    ));
    assert!(bed.iommu.endpoint(A).expect("an endpoint").quarantined);
    // The access may use each address that was mapped when it began.
    for _ in 0..3 {
        bed.iommu.unmap(D1, IovaRange::ALL).expect_err("stuck");
    }
    bed.iommu.attach(A, D2, false).expect_err("stuck");
    assert_eq!(bed.registry.reader_count(), 1);
    drop(guard);
    bed.iommu.unmap(D1, IovaRange::ALL).expect("it has ended");
    reader
        .memory()
        .read_obj::<u8>(GuestAddress(0))
        .expect_err("blocked");
}

#[test]
fn a_reader_that_keeps_removed_memory_is_killed() {
    let patience = Duration::from_secs(4);
    let mut bed = Bed::with(Limits {
        patience,
        ..Limits::default()
    });
    let mut silent = bed.process("stop-reading");
    silent.wait_for("ready");
    bed.wait_for_readers(1);
    // The daemon waits once for the acknowledgement of added memory; a missing one is no reason to
    // kill the reader.
    let mut memory = bed.ram.clone();
    let mut add = |number| {
        memory.push(slot(RAM + number * PAGE, PAGE));
        let begun = Instant::now();
        bed.iommu.set_memory(memory.clone());
        begun.elapsed()
    };
    let first = add(0);
    assert!(first >= patience / 2, "{first:?}");
    let others: Duration = (1..10).map(add).sum();
    assert!(others < 8 * patience, "{others:?}");
    assert_eq!(bed.registry.counters().killed.get(), 0);
    // The missing acknowledgement has used the budget up.
    bed.iommu.set_memory(Vec::new());
    let ended = silent.child.try_wait().expect("its own child");
    assert!(ended.is_some_and(|status| !status.success()));
    bed.wait_for_readers(0);
}

/// A reader whose queue is full gets no more messages, but it still maps the memory of earlier
/// ones.
#[test]
fn a_reader_that_gets_no_more_messages_is_still_waited_for() {
    let mut bed = Bed::new();
    let mut silent = bed.process("stop-reading");
    silent.wait_for("ready");
    bed.wait_for_readers(1);
    // More messages than the reader's socket holds.
    let mut memory = bed.ram.clone();
    let more = slot(RAM, 1000 * PAGE);
    memory.extend((0..1000).map(|number| MemorySlot {
        range: GpaRange::from_len(Gpa(RAM + number * PAGE), PAGE).expect("a page"),
        offset: number * PAGE,
        ..more.clone()
    }));
    bed.iommu.set_memory(memory);
    // Time for the server to notice, if it wrongly took the reader as disconnected.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(bed.registry.reader_count(), 1);
    bed.iommu.set_memory(Vec::new());
    let ended = silent.child.try_wait().expect("its own child");
    assert!(ended.is_some(), "it still maps memory that is removed");
    bed.wait_for_readers(0);
}

#[test]
fn a_reader_that_sends_garbage_is_killed_and_the_others_continue() {
    let mut bed = Bed::new();
    map_first_page(&mut bed);
    let good = bed.reader(A);
    let mut faulty = bed.process("send-garbage");
    faulty.wait_for("ready");
    bed.wait_for_readers(2);
    faulty.send_line("go");
    eventually("it ends", || {
        faulty.child.try_wait().expect("a child").is_some()
    });
    bed.wait_for_readers(1);
    good.memory()
        .read_obj::<u8>(GuestAddress(0))
        .expect("mapped");
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
}

#[test]
fn readers_killed_at_any_moment_leave_nothing_behind() {
    // A process of its own, without other tests, so that the test can count its descriptors.
    let bed = Bed::new();
    let mut daemon = bed.process("daemon-of-killed-readers");
    daemon.wait_for("all is well");
    assert!(daemon.ended_well());
}

/// The role `daemon-of-killed-readers`: kills readers and checks that nothing of them is left.
pub fn run_daemon_of_killed_readers() {
    let rounds = std::env::var("SHADOW_KILLS").ok();
    let rounds = rounds.and_then(|n| n.parse().ok()).unwrap_or(20u32);
    let mut bed = Bed::new();
    map_first_page(&mut bed);
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("there").count();
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("there");
        maps.lines().filter(|l| l.contains("memfd")).count()
    };
    let before = (descriptors(), mappings());
    for round in 0..rounds {
        let mut process = bed.process("read-one-word");
        if round % 4 != 0 {
            process.wait_for("begun");
        }
        std::thread::sleep(Duration::from_micros(u64::from(round * 7919 % 3000)));
        process.kill();
        bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
        bed.poke(0, 0);
        let page = mapping(0, PAGE, 0, Access::READ_WRITE);
        bed.iommu.map(D1, &page).expect("mapped");
        drop(process);
        bed.wait_for_readers(0);
        eventually("nothing is left", || (descriptors(), mappings()) == before);
    }
    assert_eq!(bed.registry.counters().killed.get(), 0);
    let mut process = bed.process("write-on-command");
    process.wait_for("ready");
    process.send_line("go");
    process.wait_for("written");
    assert_eq!(bed.peek(0), 1);
    bed.iommu.unmap(D1, IovaRange::ALL).expect("unmapped");
    process.send_line("go");
    process.wait_for("refused");
    assert_eq!(bed.peek(0), 1);
}

fn hello(version: u32, magic: u64, endpoint: u64) -> Frame {
    Frame::new(kind::HELLO, version, [magic, endpoint, 0, 0])
}

/// The daemon's answer to these bytes, up to the end of the stream.
fn answer(bed: &Bed, bytes: &[u8]) -> Option<(Refusal, u64)> {
    let mut stream = UnixStream::connect(bed.path()).expect("the socket accepts");
    // The daemon may have closed the connection in the middle.
    let _ = stream.write_all(bytes);
    if bytes.len() < FRAME_LEN {
        stream.shutdown(std::net::Shutdown::Write).expect("open");
    }
    let mut frame = [0; FRAME_LEN];
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("set");
    stream.read_exact(&mut frame).ok()?;
    let frame = Frame::from_wire(&frame);
    assert_eq!(frame.kind, kind::REFUSED);
    Some((Refusal::of(frame.value).expect("known"), frame.numbers[0]))
}

#[test]
fn garbage_is_refused_and_affects_no_reader() {
    let mut bed = Bed::new();
    map_first_page(&mut bed);
    let good = bed.reader(A);
    let a = u64::from(A.0);
    for (frame, refusal, number) in [
        (hello(VERSION + 1, MAGIC, a), Refusal::Version, 1),
        (hello(VERSION, 0, a), Refusal::NoGreeting, 0),
        (
            hello(VERSION, MAGIC, OTHER.0.into()),
            Refusal::Endpoint,
            0x28,
        ),
        (
            hello(VERSION, MAGIC, 1 << 32 | a),
            Refusal::Endpoint,
            1 << 32 | a,
        ),
        (Frame::new(kind::FAULT, 1, [0; 4]), Refusal::NoGreeting, 0),
        (
            Frame::new(u32::MAX, u32::MAX, [u64::MAX; 4]),
            Refusal::NoGreeting,
            0,
        ),
    ] {
        assert_eq!(
            answer(&bed, &frame.to_wire()),
            Some((refusal, number)),
            "{frame:?}"
        );
    }
    // Less than a frame, far more than a frame, and no byte at all.
    assert_eq!(answer(&bed, &[1; 7]), Some((Refusal::NoGreeting, 0)));
    answer(&bed, &vec![0xff; 1 << 20]);
    assert_eq!(answer(&bed, &[]), None);
    // Descriptors beside a greeting, where none are allowed.
    let stream = UnixStream::connect(bed.path()).expect("the socket accepts");
    let greeting = hello(VERSION, MAGIC, a).to_wire();
    let file = bed.file().as_fd();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    stream.send_with_fds(&[&greeting[..]], &[fd]).expect("sent");
    let mut frame = [0; FRAME_LEN];
    (&stream).read_exact(&mut frame).expect("an answer");
    assert_eq!(Frame::from_wire(&frame).kind, kind::REFUSED);

    assert_eq!(bed.registry.reader_count(), 1);
    good.memory()
        .read_obj::<u8>(GuestAddress(0))
        .expect("mapped");
    let refused = ShadowReader::connect(&bed.path(), OTHER).expect_err("not served");
    assert!(
        refused
            .to_string()
            .contains("does not serve endpoint 0000:00:05.0"),
        "{refused}"
    );
}

#[test]
fn silent_connections_are_closed_and_limited() {
    let bed = Bed::new();
    let mut silent: Vec<_> = (0..17)
        .map(|_| UnixStream::connect(bed.path()).expect("the socket accepts"))
        .collect();
    let refusal = |stream: &mut UnixStream| {
        let mut frame = [0; FRAME_LEN];
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("set");
        stream.read_exact(&mut frame).expect("an answer");
        Refusal::of(Frame::from_wire(&frame).value)
    };
    // The server refuses a connection that is silent for too long for another reason.
    assert_eq!(refusal(&mut silent[16]), Some(Refusal::Full));
    assert_eq!(refusal(&mut silent[0]), Some(Refusal::NoGreeting));
    assert_eq!(refusal(&mut silent[15]), Some(Refusal::NoGreeting));
    bed.reader(A);
}

#[test]
fn processes_of_allowed_users_are_accepted() {
    const NOBODY: u32 = 65534;
    let able = std::fs::metadata("/proc/self").expect("there").uid() == 0;
    if !able {
        println!("not run: only root can start a process of another user");
        return;
    }
    for users in [vec![], vec![NOBODY]] {
        let allowed = !users.is_empty();
        let bed = Bed::with(Limits {
            users,
            ..Limits::default()
        });
        let path = bed.path();
        for open in [path.as_path(), path.parent().expect("a folder")] {
            let all = std::fs::Permissions::from_mode(0o777);
            std::fs::set_permissions(open, all).expect("set");
        }
        let mut process = Role::start_as("connect", &path, Some(NOBODY));
        process.wait_for(if allowed {
            "accepted"
        } else {
            "processes of user 0"
        });
    }
}

#[test]
fn the_number_of_readers_of_an_endpoint_is_limited() {
    let bed = Bed::with(Limits {
        readers: 2,
        ..Limits::default()
    });
    let first = bed.reader(A);
    let second = bed.reader(A);
    let refused = ShadowReader::connect(&bed.path(), A).expect_err("full");
    let full = matches!(
        refused,
        ConnectError::Refused {
            refusal: Refusal::Full,
            number: 2
        }
    );
    assert!(full, "{refused}");
    bed.reader(B);
    drop(first);
    eventually("there is room", || {
        ShadowReader::connect(&bed.path(), A).is_ok()
    });
    drop(second);
}
