//! System calls that no thread makes by itself.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

use libc::c_long;

use crate::bed::{Bed, IOVA, MEMORY, THREADS};
use crate::connection::{DMA_READ, dma};
use crate::intruder::{call, call_and_return};

fn assert_killed(bed: &Bed, what: &str) {
    let status = bed.daemon.wait_for_end();
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{what}: {status}");
    assert!(!status.core_dumped(), "{what}");
}

#[test]
fn a_forbidden_call_ends_the_process_whichever_thread_makes_it() {
    for name in THREADS.iter().chain(&["main"]) {
        let bed = Bed::new(&[]);
        call(bed.thread(name), libc::SYS_getppid, [0; 6], None);
        assert_killed(&bed, name);
    }
}

#[test]
fn arguments_of_calls_are_checked() {
    let bits = |flags: i32| u64::from(flags.cast_unsigned());
    let exec = bits(libc::PROT_READ | libc::PROT_EXEC);
    let anonymous = bits(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let no_file = u64::MAX;
    let refused: [(&str, c_long, [u64; 6]); 10] = [
        // Makes memory executable.
        (
            "control",
            libc::SYS_mmap,
            [0, 4096, exec, anonymous, no_file, 0],
        ),
        ("control", libc::SYS_mprotect, [0, 0, exec, 0, 0, 0]),
        // Opens a network socket.
        (
            "connector",
            libc::SYS_socket,
            [bits(libc::AF_INET), bits(libc::SOCK_STREAM), 0, 0, 0, 0],
        ),
        // Opens a socket that needs no connection.
        (
            "connector",
            libc::SYS_socket,
            [bits(libc::AF_UNIX), bits(libc::SOCK_DGRAM), 0, 0, 0, 0],
        ),
        // Sends a datagram to another socket than the connected one.
        ("vfio-user", libc::SYS_sendto, [2, 0, 0, 0, 1 << 32, 0]),
        // Takes a capability back.
        ("vfio-user", libc::SYS_capset, [0; 6]),
        // Makes a process.
        (
            "main",
            libc::SYS_clone,
            [bits(libc::SIGCHLD), 0, 0, 0, 0, 0],
        ),
        // Types into a terminal.
        ("control", libc::SYS_ioctl, [2, libc::TIOCSTI, 0, 0, 0, 0]),
        // Programs a passthrough device; the configuration has none.
        ("vring_worker", libc::SYS_ioctl, [2, 0x3b71, 0, 0, 0, 0]),
        // Sends a signal to another process.
        (
            "control",
            libc::SYS_tgkill,
            [
                u64::from(std::process::id()),
                u64::from(std::process::id()),
                0,
                0,
                0,
                0,
            ],
        ),
    ];
    for (thread, number, arguments) in refused {
        let bed = Bed::new(&[]);
        call(bed.thread(thread), number, arguments, None);
        assert_killed(&bed, &format!("{thread}, call {number}"));
    }
}

/// Only the thread `connector` can, and it reads nothing that a peer sends.
#[test]
fn threads_that_parse_messages_cannot_connect() {
    for thread in [
        "vfio-user",
        "control",
        "shadow",
        "vhost-user",
        "relay",
        "vring_worker",
        "main",
    ] {
        for number in [libc::SYS_connect, libc::SYS_socket] {
            let bed = Bed::new(&[]);
            let stream = [libc::AF_UNIX, libc::SOCK_STREAM].map(|n| u64::from(n.cast_unsigned()));
            call(
                bed.thread(thread),
                number,
                [stream[0], stream[1], 0, 0, 0, 0],
                None,
            );
            assert_killed(&bed, &format!("{thread}, call {number}"));
        }
    }
}

#[test]
fn no_file_can_be_opened() {
    for thread in ["main", "control", "vhost-user", "relay"] {
        let bed = Bed::new(&[]);
        let here = u64::from(libc::AT_FDCWD.cast_unsigned());
        let arguments = [here, 0, 0, 0, 0, 0];
        let path = Some((1, "/etc/passwd"));
        call(bed.thread(thread), libc::SYS_openat, arguments, path);
        assert_killed(&bed, thread);
    }
}

/// The main thread removes its sockets, so its filter allows the removal of files.
#[test]
fn only_files_beside_the_sockets_can_be_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    for (more, there_after) in [(&[][..], true), (&["--no-sandbox"][..], false)] {
        let bed = Bed::new(more);
        let other = folder.path().join("other");
        let beside = bed.daemon.socket().with_file_name("beside");
        for path in [&other, &beside] {
            fs::write(path, "").expect("a file");
            let path = Some((1, path.to_str().expect("text")));
            let arguments = [u64::from(libc::AT_FDCWD.cast_unsigned()), 0, 0, 0, 0, 0];
            let unlink = libc::SYS_unlinkat;
            let result = call_and_return(bed.daemon.pid(), unlink, arguments, path);
            println!("{more:?} {path:?}: {result}");
        }
        // The thread sleeps in its own call again.
        bed.daemon.assert_alive();
        bed.daemon.terminate();
        assert!(bed.daemon.wait_for_end().success());
        assert!(!beside.exists());
        assert_eq!(other.exists(), there_after, "{more:?}");
    }
}

#[test]
fn a_killed_daemon_leaves_the_device_without_memory() {
    let mut bed = Bed::new(&[]);
    bed.guest.memory.write(MEMORY, b"here");
    let read = |bed: &mut Bed| {
        bed.device.ask(DMA_READ, &dma(IOVA, 4, &[]), &[]);
        bed.device.recv()
    };
    let reply = read(&mut bed).expect("an answer");
    assert_eq!((reply.errno(), &reply.body[16..]), (0, &b"here"[..]));
    assert_eq!(bed.guest.memory.read(MEMORY, 4), b"here");

    call(bed.thread("vring_worker"), libc::SYS_getppid, [0; 6], None);
    assert_killed(&bed, "the worker");
    bed.device.ask(DMA_READ, &dma(IOVA, 4, &[]), &[]);
    // The guest cannot make its IOMMU allow an access, either.
    bed.guest.kick();
    // The keeper has the connection for the next daemon. No thread serves the device's accesses meanwhile.
    thread::sleep(Duration::from_millis(200));
    let stream = &mut bed.device.stream;
    stream.set_nonblocking(true).expect("set");
    let refused = stream.read(&mut [0]).expect_err("nobody is there");
    assert_eq!(refused.kind(), ErrorKind::WouldBlock);
    stream.set_nonblocking(false).expect("set");
    let Bed {
        daemon, mut device, ..
    } = bed;
    drop(daemon);
    assert!(device.is_closed());
}

#[test]
fn a_debugging_daemon_names_the_call() {
    let bed = Bed::new(&["--sandbox-report"]);
    call(bed.thread("control"), libc::SYS_getppid, [0; 6], None);
    assert_killed(&bed, "control");
    let log = bed.daemon.log();
    let message = format!("the thread control makes system call {}", libc::SYS_getppid);
    assert!(log.contains(&message), "{log}");
}
