//! The daemon with shadow endpoints. This test is the VMM, the guest and the device's process.
#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test ends with a panic"
)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, EP, EP2, EP3};
use common::guest::{Guest, Setup};
use common::kept::Keeper;
use common::memory::Region;
use common::wire;
use tempfile::TempDir;
use vhost_device_iommu::args::{Question, RunArgs};
use vhost_device_iommu::config::Config;
use vhost_device_iommu::ctl;
use vhost_device_iommu::daemon::Daemon as InProcess;
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::process::keeper::Keeper as KeptFiles;
use vhost_device_iommu::shadow::ShadowReader;
use vhost_device_iommu::shadow::wire::{FRAME_LEN, Frame, MAGIC, VERSION, kind};
use vm_memory::{Bytes, GuestAddress};

const SOON: Duration = Duration::from_secs(30);
/// Only a daemon that hangs takes longer.
const HANG: Duration = Duration::from_secs(60);
/// Guest-physical address of a page that the guest does not use otherwise.
const GPA: u64 = 0xf0_0000;

fn daemon(folder: &Path) -> (Daemon, PathBuf) {
    let path = folder.join("disk.sock");
    let config = format!(
        "address = '00:05.0'\nbypass = false\n\
         [[endpoint]]\naddress = '00:06.0'\nshadow = '{0}'\n\
         [[endpoint]]\naddress = '00:07.0'\nshadow = '{0}'\n\
         [[endpoint]]\naddress = '00:08.0'\n",
        path.display()
    );
    (Daemon::with_config(&config), path)
}

fn reader(path: &Path, endpoint: u32) -> ShadowReader {
    ShadowReader::connect(path, EndpointId(endpoint)).expect("accepted")
}

#[test]
fn a_reader_follows_the_guests_mappings_and_its_faults_reach_the_guest() {
    let folder = TempDir::new().expect("a folder");
    let (daemon, path) = daemon(folder.path());
    // One reader connects before the VMM, one after it.
    let early = reader(&path, EP);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map_page(1, 0x5000, GPA), 0);
    let late = reader(&path, EP);
    ShadowReader::connect(&path, EndpointId(EP3)).expect_err("no shadow endpoint");
    guest.memory.write(GPA, &[7; 16]);
    for reader in [&early, &late] {
        let memory = reader.memory();
        let found: u64 = memory.read_obj(GuestAddress(0x5008)).expect("mapped");
        assert_eq!(found, 0x0707_0707_0707_0707);
    }
    let memory = early.memory();
    memory
        .write_obj(0x1122_3344_u32, GuestAddress(0x5000))
        .expect("mapped");
    assert_eq!(guest.memory.read_u32(GPA), 0x1122_3344);

    guest.post_event_buffer(24);
    memory
        .write_obj(0u8, GuestAddress(0x6123))
        .expect_err("not mapped");
    let fault = guest.take_event(SOON).expect("a fault");
    let fault = wire::Fault::parse(&fault.bytes);
    assert_eq!((fault.reason, fault.flags), (2, 0x102));
    assert_eq!((fault.endpoint, fault.address), (EP, 0x6123));

    assert_eq!(guest.unmap(1, 0x5000, 0x5fff), 0);
    guest.post_event_buffer(24);
    memory
        .read_obj::<u8>(GuestAddress(0x5000))
        .expect_err("unmapped");
    let fault = guest.take_event(SOON).expect("a fault");
    assert_eq!(wire::Fault::parse(&fault.bytes).endpoint, EP);
    guest.post_event_buffer(24);
    let other = reader(&path, EP2);
    other
        .memory()
        .read_obj::<u8>(GuestAddress(0x5000))
        .expect_err("in no domain");
    let fault = guest.take_event(SOON).expect("a fault");
    let fault = wire::Fault::parse(&fault.bytes);
    assert_eq!((fault.reason, fault.flags), (1, 0x101));
    assert_eq!((fault.endpoint, fault.address), (EP2, 0x5000));

    let status = daemon.status();
    assert_eq!(status["readers"]["now"], 3);
    assert_eq!(status["readers"]["registered"], 3);
    assert_eq!(status["readers"]["refused"], 1);
    assert_eq!(status["readers"]["killed"], 0);
    let text = ctl::render(&Question::Status, &status);
    let line = "shadow readers: 3 now, 3 in all, 1 refused, 0 killed";
    assert!(text.contains(line), "{text}");
}

#[test]
fn reconnecting_readers_do_not_fill_the_log() {
    let folder = TempDir::new().expect("a folder");
    let (daemon, path) = daemon(folder.path());
    for _ in 0..200 {
        reader(&path, EP);
    }
    let all_gone = || daemon.status()["readers"]["now"] == 0;
    daemon.wait_for("the last one is gone", all_gone);
    assert_eq!(daemon.status()["readers"]["registered"], 200);
    let count_of = |what| {
        let log = daemon.log();
        log.lines().filter(|line| line.contains(what)).count()
    };
    for what in ["is registered", "is gone"] {
        assert!((1..50).contains(&count_of(what)), "{}", daemon.log());
    }
}

#[test]
fn readers_outlive_the_vmm_and_not_the_daemon() {
    let folder = TempDir::new().expect("a folder");
    let (daemon, path) = daemon(folder.path());
    let reader = reader(&path, EP);
    for round in 0..3 {
        let mut guest = Guest::connect(&daemon, Setup::default());
        guest.driver_ok();
        assert_eq!(guest.attach(1, EP), 0);
        assert_eq!(guest.map_page(1, 0x5000, GPA), 0);
        let memory = reader.memory();
        memory
            .write_obj(round, GuestAddress(0x5000))
            .expect("mapped");
        assert_eq!(guest.memory.read_u32(GPA), round);
        drop(guest);
        daemon.wait_for("the VMM's end", || daemon.status()["connected"] == false);
        memory
            .write_obj(9u32, GuestAddress(0x5000))
            .expect_err("no guest");
    }
    assert_eq!(daemon.status()["readers"]["now"], 1);
    daemon.terminate();
    daemon.wait_for_end();
    let deadline = Instant::now() + SOON;
    while reader.is_connected() {
        assert!(
            Instant::now() < deadline,
            "the reader does not notice the end of the daemon"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!path.exists());
}

#[test]
fn allowed_users_and_the_unmap_deadline_are_configurable() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("disk.sock");
    let daemon = Daemon::with_config(&format!(
        "address = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\nshadow = '{}'\n\
         [readers]\npatience-ms = 20000\nlimit = 2\n",
        path.display()
    ));
    let readers = [reader(&path, EP), reader(&path, EP)];
    let refused = ShadowReader::connect(&path, EndpointId(EP)).expect_err("full");
    assert!(refused.to_string().contains("2 readers"), "{refused}");
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map_page(1, 0x5000, GPA), 0);
    // This process is the reader. With the default deadline, the daemon would kill it here.
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let (sender, inside) = channel();
        let reader = &readers[0];
        scope.spawn(move || {
            let _guard = reader.enter().expect("a word");
            sender.send(()).expect("a receiver");
            std::thread::sleep(Duration::from_millis(1300));
        });
        inside.recv().expect("a message");
        assert_eq!(guest.unmap(1, 0x5000, 0x5fff), 0);
    });
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1300), "{took:?}");
    assert_eq!(daemon.status()["readers"]["killed"], 0);
}

#[test]
fn faults_do_not_block_changes_of_guest_memory() {
    let folder = TempDir::new().expect("a folder");
    let (daemon, path) = daemon(folder.path());
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), 0);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (over, path) = (&over, &path);
        scope.spawn(move || {
            let reader = reader(path, EP);
            while !over.load(Ordering::Relaxed) {
                // The daemon takes the lock of the guest's memory to check these faults; changes of
                // the memory need the same lock.
                let memory = reader.memory();
                memory
                    .read_obj::<u8>(GuestAddress(0x9000))
                    .expect_err("not mapped");
            }
        });
        daemon.wait_for("the reader's faults", || {
            daemon.status()["readers"]["faults_suppressed"] != 0
        });
        let begun = Instant::now();
        for _ in 0..50 {
            guest.add_region(Region::new(0x8_0000_0000, 0x1000));
            guest.remove_region(0x8_0000_0000);
            let took = begun.elapsed();
            if took > HANG {
                over.store(true, Ordering::Relaxed);
                panic!("{took:?}");
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(daemon.status()["readers"]["killed"], 0);
}

/// Ends a thread of a test, also if the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_reader_goes_on_over_kills_and_restarts_of_the_daemon() {
    let kills = std::env::var("VIOMMU_KILLS").ok();
    let kills = kills.map_or(10u64, |text| text.parse().expect("a number"));
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("disk.sock");
    let file = folder.path().join("vm.toml");
    let config = format!(
        "address = '00:05.0'\nbypass = false\n\
         [[endpoint]]\naddress = '00:06.0'\nshadow = '{}'\n\
         [readers]\npatience-ms = 20000\n",
        path.display()
    );
    std::fs::write(&file, config).expect("written");
    let mut keeper = Keeper::empty();
    let config = ["--config", file.to_str().expect("UTF-8")];
    let mut daemon = Daemon::kept(&keeper, &config);
    let reader = reader(&path, EP);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map_page(1, 0x5000, GPA), 0);
    guest.memory.write(GPA, &[7; 16]);
    let memory = reader.memory();
    let read = |address| memory.read_obj::<u64>(GuestAddress(address));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&over);
        let working = scope.spawn(|| {
            let mut done = 0u64;
            while !over.load(Ordering::Relaxed) {
                assert_eq!(
                    read(0x5008).expect("mapped in every life"),
                    0x0707_0707_0707_0707
                );
                done += 1;
            }
            done
        });
        for life in 2..2 + kills {
            assert_eq!(guest.map_page(1, 0x6000, GPA), 0);
            read(0x6000).expect("mapped");
            if life % 3 == 0 {
                daemon.terminate();
                daemon.wait_for_end();
            } else {
                daemon.kill();
            }
            // No UNMAP is answered now.
            read(0x6000).expect("the old page tables");
            assert!(reader.is_connected());
            daemon.start_again(&mut keeper);
            assert_eq!(guest.unmap(1, 0x6000, 0x6fff), 0);
            read(0x6000).expect_err("unmapped");
            assert_eq!(reader.registrations(), life);
            assert!(!working.is_finished());
        }
        over.store(true, Ordering::Relaxed);
        assert!(working.join().expect("all was right") > kills);
    });
    let status = daemon.status();
    assert_eq!(status["readers"]["now"], 1, "{status}");
    assert_eq!(status["readers"]["killed"], 0, "{status}");
    assert!(!reader.has_changed(&memory));
}

/// The next daemon goes on with what the devices reach. A planned end must not take it away from them, as a stop does.
#[test]
fn a_planned_end_tears_down_no_backend_and_a_stop_does() {
    for is_planned in [true, false] {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("disk.sock");
        let file = folder.path().join("vm.toml");
        let text = format!(
            "address = '00:05.0'\nbypass = false\n[[endpoint]]\naddress = '00:06.0'\nshadow = '{}'\n",
            path.display()
        );
        std::fs::write(&file, text).expect("written");
        let socket = folder.path().join("vhost.sock");
        let config = Config::try_from(&RunArgs {
            config: Some(file),
            socket_path: Some(socket.clone()),
            ..RunArgs::default()
        });
        let keeper = if is_planned {
            let (manager, ours) = UnixDatagram::pair().expect("sockets");
            std::thread::spawn(move || while manager.recv(&mut [0; 512]).is_ok() {});
            KeptFiles::new(ours, []).expect("a keeper")
        } else {
            // With a keeper, a stop leaves the VMM to the next daemon, too.
            KeptFiles::none()
        };
        let daemon = InProcess::new(&config.expect("a configuration"), Arc::new(keeper));
        let mut daemon = daemon.expect("a daemon");
        let handle = daemon.stop_handle();
        let running = std::thread::spawn(move || {
            daemon.run().expect("an orderly end");
            daemon
        });
        let mut guest = Guest::connect_to(&socket, Setup::default());
        guest.driver_ok();
        assert_eq!(guest.attach(1, EP), 0);
        assert_eq!(guest.map_page(1, 0x5000, GPA), 0);
        let reader = reader(&path, EP);
        let memory = reader.memory();
        let read = || memory.read_obj::<u64>(GuestAddress(0x5000));
        read().expect("mapped");
        if is_planned {
            assert!(handle.leave(SOON), "the batch ends");
        } else {
            handle.stop();
        }
        // Its parts live on: otherwise the reader would notice the end of the connection.
        let stopped = (!is_planned).then(|| running.join().expect("no panic"));
        assert!(reader.is_connected());
        assert_eq!(read().is_ok(), is_planned);
        drop(stopped);
    }
}

/// A process that registers, and gives its connection to another process that never ends.
#[test]
#[ignore = "a role in other tests"]
fn register_and_fork() {
    let Some(path) = std::env::var_os("SHADOW_SOCKET") else {
        return;
    };
    let mut stream = UnixStream::connect(path).expect("a socket");
    let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, EP.into(), 0, 0]);
    stream.write_all(&hello.to_wire()).expect("room");
    let mut welcome = [0; FRAME_LEN];
    stream.read_exact(&mut welcome).expect("an answer");
    let copy = OwnedFd::from(stream.try_clone().expect("a copy"));
    let heir = Command::new("sleep").arg("600").stdin(copy).spawn();
    println!("heir {}", heir.expect("started").id());
    loop {
        std::thread::park();
    }
}

/// A process with the connection of a reader that has ended.
struct Heir(i32);

impl Heir {
    fn of_reader(socket: &Path) -> Self {
        let test = std::env::current_exe().expect("this test");
        let mut reader = Command::new(test)
            .args(["--ignored", "--exact", "register_and_fork", "--nocapture"])
            .env("SHADOW_SOCKET", socket)
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let lines = BufReader::new(reader.stdout.take().expect("piped")).lines();
        let heir = lines
            .map(|line| line.expect("readable"))
            .find_map(|line| line.strip_prefix("heir ")?.parse().ok());
        reader.kill().expect("a child");
        reader.wait().expect("a child");
        Self(heir.expect("a number"))
    }
}

impl Drop for Heir {
    #[expect(unsafe_code, reason = "sends a signal")]
    fn drop(&mut self) {
        // SAFETY: passes no pointer. The process has an hour to live, so the number is still its own.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

#[test]
fn unmap_fails_until_a_reader_of_the_daemon_before_has_ended() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("disk.sock");
    let file = folder.path().join("vm.toml");
    let write = |shadow: &str| {
        let text = format!(
            "address = '00:05.0'\nbypass = false\n[[endpoint]]\naddress = '00:06.0'\n{shadow}\n\
             [[endpoint]]\naddress = '00:07.0'\n[readers]\npatience-ms = 200\n"
        );
        std::fs::write(&file, text).expect("written");
    };
    write(&format!("shadow = '{}'", path.display()));
    let mut keeper = Keeper::empty();
    let config = ["--config", file.to_str().expect("UTF-8")];
    let mut daemon = Daemon::kept(&keeper, &config);
    let mut guest = Guest::boot(&daemon);
    for (domain, endpoint) in [(1, EP), (2, EP2)] {
        assert_eq!(guest.attach(domain, endpoint), 0);
        for page in 0..4 {
            assert_eq!(guest.map_page(domain, page << 12, GPA), 0);
        }
    }
    let heir = Heir::of_reader(&path);
    // The second life has another reader's end to wait for than the third.
    for page in [0, 1] {
        daemon.die(&mut keeper);
        let last = (page << 12) | 0xfff;
        assert_eq!(guest.unmap(2, page << 12, last), 0, "not its domain");
        for _ in 0..2 {
            assert_eq!(guest.unmap(1, page << 12, last), wire::DEVERR);
        }
        assert_eq!(guest.attach(1, EP), wire::DEVERR);
        assert_eq!(daemon.endpoint(EP)["state"], "quarantined");
        assert_eq!(daemon.status()["readers"]["now"], 1);
    }
    // No backend knows the reader any more.
    write("");
    daemon.die(&mut keeper);
    let lost = daemon.status()["life"]["lost"].to_string();
    assert!(
        lost.contains("shadow reader of endpoint 0000:00:06.0"),
        "{lost}"
    );
    assert!(daemon.log().contains("end that process"));
    write(&format!("shadow = '{}'", path.display()));
    daemon.die(&mut keeper);
    assert_eq!(guest.unmap(1, 0x2000, 0x2fff), wire::DEVERR);
    drop(heir);
    let ended = || guest.unmap(1, 0x3000, 0x3fff) == 0;
    daemon.wait_for("the end of the reader", ended);
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.unmap(1, 0, u64::MAX), 0);
}
