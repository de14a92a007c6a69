//! What other processes do; each is this test, started anew.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vhost_device_iommu::shadow::ShadowReader;
use vhost_device_iommu::shadow::wire::{FRAME_LEN, Frame, MAGIC, VERSION, kind};
use vm_memory::{Bytes, GuestAddress};

use crate::bed::A;
use crate::{hostile, stress};

#[test]
#[ignore = "a part of other tests"]
fn play() {
    let Ok(role) = std::env::var("SHADOW_ROLE") else {
        return;
    };
    let socket = PathBuf::from(std::env::var("SHADOW_SOCKET").expect("a socket"));
    match role.as_str() {
        "stall" => stall(&socket),
        "write-on-command" => write_on_command(&socket),
        "hammer" => {
            let reader = ShadowReader::connect(&socket, A).expect("let in");
            let over = Arc::new(AtomicBool::new(false));
            let ends = over.clone();
            std::thread::spawn(move || {
                let mut line = String::new();
                std::io::stdin()
                    .read_line(&mut line)
                    .expect("a line or the end");
                ends.store(true, Ordering::Relaxed);
            });
            say("begun");
            let done = stress::hammer(&reader, &over);
            say(&format!("accesses {done}"));
        }
        "hammer-one" => hammer_one(&socket),
        "daemon-of-killed" => {
            hostile::outlive_readers();
            say("all is well");
        }
        "deaf" => deaf(&socket),
        "babble" => babble(&socket),
        other => panic!("no such role: {other}"),
    }
}

fn say(word: &str) {
    println!("{word}");
    std::io::stdout().flush().expect("somebody listens");
}

fn for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Stays inside an access.
fn stall(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("let in");
    let _inside = reader.enter().expect("a word");
    say("inside");
    for_ever();
}

/// Reads one word all the time, mapped or not.
fn hammer_one(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("let in");
    let memory = reader.memory();
    say("begun");
    loop {
        let _ = memory.read_obj::<u64>(GuestAddress(0));
    }
}

/// Writes 1, 2, .. to I/O virtual 0, once for each line.
fn write_on_command(socket: &std::path::Path) {
    let reader = ShadowReader::connect(socket, A).expect("let in");
    say("ready");
    for (line, number) in std::io::stdin().lines().zip(1u64..) {
        line.expect("a line");
        let done = reader.memory().write_obj(number, GuestAddress(0));
        say(if done.is_ok() { "written" } else { "refused" });
    }
}

/// Takes its welcome and never listens again.
fn deaf(socket: &std::path::Path) {
    let stream = greet(socket);
    say("ready");
    std::mem::forget(stream);
    for_ever();
}

/// Takes its welcome and then talks nonsense.
fn babble(socket: &std::path::Path) {
    let mut stream = greet(socket);
    say("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a line");
    let nonsense = Frame::new(0x1234, 0, [u64::MAX; 4]);
    stream.write_all(&nonsense.to_wire()).expect("room");
    for_ever();
}

fn greet(socket: &std::path::Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("somebody listens");
    let hello = Frame::new(kind::HELLO, VERSION, [MAGIC, A.0.into(), 0, 0]);
    stream.write_all(&hello.to_wire()).expect("room");
    let mut frame = [0; FRAME_LEN];
    stream.read_exact(&mut frame).expect("an answer");
    assert_eq!(Frame::from_wire(&frame).kind, kind::WELCOME);
    stream
}
