//! Readers that outlive the daemon.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_device_iommu::address::{Access, Iova};
use vhost_device_iommu::shadow::wire::{FRAME_LEN, Frame};
use vhost_device_iommu::shadow::{AccessError, Limits, ShadowReader};
use vm_memory::{Bytes, GuestAddress};

use crate::bed::{A, Bed, D1, PAGE, RAM, eventually, mapping, slot};

/// Longer than an access that does not wait takes, even on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(8);
/// Time for something wrong to happen.
const A_WHILE: Duration = Duration::from_millis(50);

fn at(iova: u64) -> GuestAddress {
    GuestAddress(iova)
}

/// Attaches endpoint `A` and maps its first page to `gpa`.
fn map_first_page(bed: &mut Bed, gpa: u64) {
    bed.iommu.attach(A, D1, false).expect("attached");
    let page = mapping(0, PAGE, gpa, Access::READ_WRITE);
    bed.iommu.map(D1, &page).expect("mapped");
}

#[test]
fn a_handle_goes_on_with_the_next_daemon() {
    let mut bed = Bed::new();
    map_first_page(&mut bed, 0);
    bed.poke(0, 1);
    bed.poke(PAGE, 2);
    let reader = bed.reader(A);
    let memory = reader.memory();
    assert_eq!(memory.read_obj::<u64>(at(0)).expect("mapped"), 1);
    for round in 2..5u64 {
        let (folder, ram) = (bed.folder.clone(), bed.ram.clone());
        drop(bed);
        eventually("noticed", || !reader.is_connected());
        bed = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| memory.read_obj::<u64>(at(0)));
            std::thread::sleep(A_WHILE);
            assert!(!waiting.is_finished(), "it waits for the next daemon");
            let mut bed = Bed::before_serving(&folder, Limits::default(), ram);
            map_first_page(&mut bed, round % 2 * PAGE);
            bed.serve();
            let found = waiting.join().expect("no panic").expect("mapped");
            assert_eq!(found, 1 + round % 2, "of the new page table");
            bed
        });
        assert!(reader.is_connected());
        assert_eq!(reader.registrations(), round);
        assert!(!reader.has_changed(&memory), "the memory is the same");
        assert_eq!(bed.registry.reader_count(), 1);
        memory.read_obj::<u8>(at(PAGE)).expect_err("not mapped");
        assert_eq!(bed.fault().address, Iova(PAGE));
    }
}

/// A reader whose connection ends in the daemon's process is in this test's hands.
struct Connection {
    stream: UnixStream,
    listener: UnixListener,
}

impl Connection {
    /// A reader, and the daemon's end of its connection.
    fn new(bed: &Bed) -> (Self, ShadowReader) {
        let path = bed.folder.path().join("own");
        let listener = UnixListener::bind(&path).expect("a socket");
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| ShadowReader::connect(&path, A).expect("accepted"));
            let mut connection = Self {
                stream: UnixStream::pair().expect("sockets").0,
                listener,
            };
            connection.accept(bed);
            (connection, reader.join().expect("no panic"))
        })
    }

    fn accept(&mut self, bed: &Bed) {
        let (mut stream, _) = self.listener.accept().expect("connected");
        let mut greeting = [0; FRAME_LEN];
        stream.read_exact(&mut greeting).expect("a greeting");
        self.stream = stream.try_clone().expect("a copy");
        let greeting = Frame::from_wire(&greeting);
        let registered = bed.registry.register(stream, &greeting, &[A]);
        registered.expect("admitted");
        self.stream.set_nonblocking(true).expect("set");
    }

    fn has_ended(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }
}

#[test]
fn a_reader_hangs_up_after_its_last_access_has_ended() {
    let mut bed = Bed::new();
    map_first_page(&mut bed, 0);
    let (mut connection, reader) = Connection::new(&bed);
    let other = bed.reader(A);
    let memory = reader.memory();
    // Not in the lane that this thread tries first.
    let mut guards: Vec<_> = (0..40).map(|_| reader.enter().expect("a lane")).collect();
    let guard = guards.pop().expect("the last one");
    drop(guards);
    let over = connection.stream.shutdown(std::net::Shutdown::Write);
    over.expect("open");
    eventually("noticed", || !reader.is_connected());
    std::thread::sleep(A_WHILE);
    // The access goes on, and so do those within it: the daemon waits for it.
    guard.translate(Iova(0), Access::READ).expect("mapped");
    memory.read_obj::<u8>(at(0)).expect("within the guard");
    let second = reader.enter().expect("within the guard");
    drop(guard);
    let third = reader.enter().expect("within the second guard");
    drop(second);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| memory.read_obj::<u8>(at(0)));
        std::thread::sleep(A_WHILE);
        assert!(!connection.has_ended(), "an access is in progress");
        assert!(!waiting.is_finished());
        // Within an access of another handle only.
        let elsewhere = scope.spawn(|| {
            let _inside = other.enter().expect("a lane");
            let begun = Instant::now();
            let refused = reader.enter().expect_err("it must not wait");
            assert_eq!(refused, AccessError::Disconnected);
            assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        });
        elsewhere.join().expect("all was right");
        drop(third);
        eventually("it hangs up", || connection.has_ended());
        connection.accept(&bed);
        waiting.join().expect("no panic").expect("mapped");
    });
    assert_eq!(reader.registrations(), 2);
}

#[test]
fn accesses_fail_while_the_daemon_stays_away_and_succeed_later() {
    let mut bed = Bed::new();
    map_first_page(&mut bed, 0);
    let reader = bed.reader(A);
    let memory = reader.memory();
    let (folder, ram) = (bed.folder.clone(), bed.ram.clone());
    reader.set_patience(Duration::from_millis(400));
    drop(bed);
    eventually("noticed", || !reader.is_connected());
    let begun = Instant::now();
    let refused = reader.enter().expect_err("no daemon");
    assert_eq!(refused, AccessError::Disconnected);
    assert!(begun.elapsed() < AT_ONCE);
    // The wait counts from the loss, so a second access does not wait.
    let begun = Instant::now();
    let refused = memory.read_obj::<u8>(at(0)).expect_err("no daemon");
    assert!(refused.to_string().contains("start it"), "{refused}");
    assert!(
        begun.elapsed() < Duration::from_millis(200),
        "{:?}",
        begun.elapsed()
    );
    let mut bed = Bed::before_serving(&folder, Limits::default(), ram);
    map_first_page(&mut bed, 0);
    bed.serve();
    eventually("registered", || reader.is_connected());
    memory.read_obj::<u8>(at(0)).expect("mapped");
}

#[test]
fn views_follow_the_memory_of_the_next_daemon() {
    let more = slot(RAM, 4 * PAGE);
    let mut bed = Bed::new();
    bed.iommu.set_bypass(true);
    let reader = bed.reader(A);
    let first = reader.memory();
    let next = |bed: Bed, ram| {
        let folder = bed.folder.clone();
        drop(bed);
        eventually("noticed", || !reader.is_connected());
        let mut bed = Bed::before_serving(&folder, Limits::default(), ram);
        bed.iommu.set_bypass(true);
        bed.serve();
        eventually("registered", || reader.is_connected());
        bed
    };
    // A new slot: older views stay usable.
    let old = bed.ram.clone();
    let both = vec![bed.ram[0].clone(), more];
    let bed = next(bed, both);
    first.read_obj::<u8>(at(0)).expect("as before");
    first.read_obj::<u8>(at(RAM)).expect_err("not in this view");
    assert!(reader.has_changed(&first));
    let second = reader.memory();
    second.write_obj(7u64, at(RAM)).expect("there");
    // A slot less.
    let bed = next(bed, old);
    for view in [&first, &second] {
        let refused = view.read_obj::<u8>(at(0)).expect_err("outdated");
        assert!(refused.to_string().contains("changed"), "{refused}");
    }
    let third = reader.memory();
    third.read_obj::<u8>(at(0)).expect("as before");
    third.read_obj::<u8>(at(RAM)).expect_err("gone");
    // Other memory at the same place.
    let bed = next(bed, vec![slot(0, RAM)]);
    third.read_obj::<u8>(at(0)).expect_err("outdated");
    bed.poke(0, 9);
    let fourth = reader.memory();
    assert_eq!(fourth.read_obj::<u64>(at(0)).expect("there"), 9);
}

#[test]
fn a_handle_without_a_daemon_can_be_dropped() {
    let bed = Bed::new();
    let readers: Vec<_> = (0..4).map(|_| bed.reader(A)).collect();
    let (folder, path) = (bed.folder.clone(), bed.path());
    drop(bed);
    for reader in &readers {
        eventually("noticed", || !reader.is_connected());
    }
    let begun = Instant::now();
    let mut readers = readers.into_iter();
    drop(readers.next());
    // A listener that never accepts, and one that never answers.
    let silent = UnixListener::bind(&path).expect("a socket");
    drop(readers.next());
    let _accepted = silent.accept().expect("it tries to register");
    std::thread::sleep(A_WHILE);
    drop(readers);
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    drop(folder);
}

/// Threads that make accesses while one daemon after the other serves them.
#[test]
fn accesses_at_full_speed_go_on_over_many_daemons() {
    let mut bed = Bed::patient();
    let reader = bed.reader(A);
    let memory = reader.memory();
    map_first_page(&mut bed, PAGE);
    bed.poke(PAGE, 1);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let access = || {
            let mut done = 0u64;
            let mut last = 0;
            while !over.load(Ordering::Relaxed) {
                // Each life has a page of its own, with its number. Nothing is ever unmapped, so no access fails.
                let found = memory.read_obj::<u64>(at(0)).expect("mapped");
                assert!(found >= last, "{found} after {last}");
                last = found;
                done += 1;
            }
            done
        };
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(access)).collect();
        for life in 2..12 {
            std::thread::sleep(Duration::from_millis(20));
            let (folder, ram) = (bed.folder.clone(), bed.ram.clone());
            drop(bed);
            bed = Bed::before_serving(&folder, Limits::default(), ram);
            bed.poke(life * PAGE, life);
            map_first_page(&mut bed, life * PAGE);
            bed.serve();
            eventually("registered", || reader.registrations() == life);
        }
        over.store(true, Ordering::Relaxed);
        for thread in threads {
            assert!(thread.join().expect("all was right") > 10);
        }
    });
}
