//! Roles of other processes. Each process is this test program, started again.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vhost_device_iommu::address::{Access, Iova};
use vhost_device_iommu::shadow::ShadowReader;
use vhost_device_iommu::shadow::wire::{FRAME_LEN, Frame, MAGIC, VERSION, kind};
use vm_memory::{Bytes, GuestAddress};

use crate::bed::A;
use crate::{hostile, stress};

#[test]
#[ignore = "a part of other tests"]
fn run_role() {
    let Ok(role) = std::env::var("SHADOW_ROLE") else {
        return;
    };
    let socket = PathBuf::from(std::env::var("SHADOW_SOCKET").expect("a socket"));
    match role.as_str() {
        "stall" => stall(&socket),
        "hold-long" => hold_long(&socket),
        "fork" => fork(&socket),
        "write-on-command" => write_on_command(&socket),
        "access" => {
            let reader = ShadowReader::connect(&socket, A).expect("accepted");
            let over = Arc::new(AtomicBool::new(false));
            let stop = over.clone();
            std::thread::spawn(move || {
                let mut line = String::new();
                std::io::stdin()
                    .read_line(&mut line)
                    .expect("a line or the end");
                stop.store(true, Ordering::Relaxed);
            });
            print_line("begun");
            let done = stress::access_until(&reader, &over);
            print_line(&format!("accesses {done}"));
        }
        "read-one-word" => read_one_word(&socket),
        "daemon-of-killed-readers" => {
            hostile::run_daemon_of_killed_readers();
            print_line("all is well");
        }
        "strict-seccomp" => access_under_strict_seccomp(&socket),
        "connect" => match ShadowReader::connect(&socket, A) {
            Ok(_) => print_line("accepted"),
            Err(cause) => print_line(&cause.to_string()),
        },
        "stop-reading" => stop_reading(&socket),
        "send-garbage" => send_garbage(&socket),
        other => panic!("no such role: {other}"),
    }
}

fn print_line(word: &str) {
    println!("{word}");
    std::io::stdout().flush().expect("an open pipe or socket");
}

fn sleep_for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Stays inside an access.
fn stall(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("accepted");
    let _inside = reader.enter().expect("a word");
    print_line("inside");
    sleep_for_ever();
}

/// Stays inside each access for half the patience of [`hostile::SLOW_PATIENCE`], one access after the other.
fn hold_long(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("accepted");
    loop {
        let inside = reader.enter().expect("a word");
        print_line("inside");
        std::thread::sleep(hostile::SLOW_PATIENCE / 2);
        drop(inside);
    }
}

/// Forks a child. The child drops its copy of the reader and lives until the end of its input. The parent goes on as a
/// reader.
#[expect(unsafe_code, reason = "fork")]
fn fork(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("accepted");
    let memory = reader.memory();
    let shared = |maps: &str| {
        maps.lines()
            .filter(|line| line.contains(" rw-s ") || line.contains(" r--s "))
            .count()
    };
    let maps = std::fs::read_to_string("/proc/self/maps").expect("there");
    print_line(&format!("parent maps {}", shared(&maps)));
    // SAFETY: the only other thread waits in `recv` and holds no lock.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("there");
        print_line(&format!("child maps {}", shared(&maps)));
        drop(memory);
        drop(reader);
        print_line("child dropped");
        let mut line = String::new();
        while std::io::stdin()
            .read_line(&mut line)
            .is_ok_and(|read| read > 0)
        {}
        std::process::exit(0);
    }
    loop {
        std::thread::sleep(Duration::from_millis(20));
        memory.read_obj::<u8>(GuestAddress(0)).expect("registered");
        print_line("parent reads");
    }
}

/// Accesses memory under strict seccomp: the kernel ends a thread that makes a system call other
/// than `read` and `write`. Pages 0 to 15 must be mapped.
#[expect(unsafe_code, reason = "system calls without a wrapper")]
fn access_under_strict_seccomp(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("accepted");
    let memory = reader.memory();
    let page = |number: u64| number * 7 % 16 * 4096;
    memory
        .write_slice(&[1; 16 * 4096], GuestAddress(0))
        .expect("mapped");
    // The kernel ends only the thread; the process must end as well, or the test would wait for
    // ever.
    std::thread::spawn(|| {
        // Longer than the accesses take on an emulated processor.
        std::thread::sleep(Duration::from_secs(120));
        std::process::exit(1);
    });
    // SAFETY: passes no pointer; it only forbids calls that this thread does not make any more.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECCOMP, 1) }, 0);
    let mut sum = 0u64;
    for number in 0..100_000 {
        let guard = reader.enter().expect("a word");
        let found = guard.translate(Iova(page(number)), Access::READ);
        sum += found.expect("mapped").gpa.0 & 1;
        drop(guard);
        let found: u8 = memory.read_obj(GuestAddress(page(number))).expect("mapped");
        sum += u64::from(found);
        // Across the end of one mapping.
        let across = GuestAddress(page(number % 15) / 2 + 4092);
        memory
            .write_obj(0x0101_0101_0101_0101_u64, across)
            .expect("mapped");
    }
    print_line(if sum == 100_000 {
        "no system call"
    } else {
        "wrong"
    });
    sleep_for_ever();
}

/// Reads one word over and over, whether it is mapped or not.
fn read_one_word(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("accepted");
    let memory = reader.memory();
    print_line("begun");
    loop {
        let _ = memory.read_obj::<u64>(GuestAddress(0));
    }
}

/// Writes 1, 2, ... to IOVA 0, once for each line of input.
fn write_on_command(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("accepted");
    print_line("ready");
    for (line, number) in std::io::stdin().lines().zip(1u64..) {
        line.expect("a line");
        let done = reader.memory().write_obj(number, GuestAddress(0));
        print_line(if done.is_ok() { "written" } else { "refused" });
    }
}

/// Receives the welcome and never reads again.
fn stop_reading(socket: &std::path::Path) {
    let stream = greet(socket);
    print_line("ready");
    std::mem::forget(stream);
    sleep_for_ever();
}

/// Receives the welcome and then sends garbage.
fn send_garbage(socket: &std::path::Path) {
    let mut stream = greet(socket);
    print_line("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a line");
    let nonsense = Frame::new(0x1234, 0, [u64::MAX; 4]);
    stream.write_all(&nonsense.to_wire()).expect("room");
    sleep_for_ever();
}

fn greet(socket: &std::path::Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("an open pipe or socket");
    let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, A.0.into(), 0, 0]);
    stream.write_all(&hello.to_wire()).expect("room");
    let mut frame = [0; FRAME_LEN];
    stream.read_exact(&mut frame).expect("an answer");
    assert_eq!(Frame::from_wire(&frame).kind, kind::WELCOME);
    stream
}
