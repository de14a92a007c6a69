//! What the processes do until they are killed.

use std::path::PathBuf;

use vhost_device_iommu::address::{Access, Iova};
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::{AccessError, ShadowReader};
use vm_memory::{Bytes, GuestAddress};

use crate::common::daemon::EP3;
use crate::server::{Manner, serve};
use crate::stamps::{SCRIBBLE, check, iova};
use crate::vmm;

#[test]
#[ignore = "a part of other tests"]
fn play() {
    let Ok(role) = std::env::var("KILLS_ROLE") else {
        return;
    };
    match role.as_str() {
        "server by messages" => serve(&told("KILLS_SOCKET"), Manner::Messages),
        "server by mappings" => serve(&told("KILLS_SOCKET"), Manner::Mappings),
        "server of a PCI device" => serve(&told("KILLS_SOCKET"), Manner::Reads),
        "reader" => read(),
        "VMM" => vmm::run(),
        other => panic!("no such role: {other}"),
    }
}

/// A path this process was told.
pub fn told(name: &str) -> PathBuf {
    std::env::var_os(name).expect("told").into()
}

/// Tells the test.
pub fn say(word: &str) {
    println!("{word}");
}

/// Follows the page tables, reads and writes.
fn read() -> ! {
    let endpoint = EndpointId(EP3);
    let reader = ShadowReader::connect(&told("KILLS_SOCKET"), endpoint).expect("let in");
    let mut done = 0u64;
    let mut memory = reader.memory();
    for number in 0u64.. {
        assert!(reader.is_connected(), "the daemon is gone");
        let at = iova(number.wrapping_mul(7));
        if reader.has_changed(&memory) {
            memory = reader.memory();
            done = 0;
        }
        if number.is_multiple_of(3) {
            // As a device would, which finds what it has not asked for first.
            let Ok(found) = memory.read_obj::<u64>(GuestAddress(at)) else {
                continue;
            };
            check(found, at, "a reader");
        } else {
            let inside = reader.enter().expect("a word");
            // What was got before the access began is of no use where memory went since.
            if reader.has_changed(&memory) {
                continue;
            }
            let page = match inside.translate(Iova(at), Access::READ_WRITE) {
                Ok(page) => page.gpa.0,
                Err(AccessError::Fault { .. }) => continue,
                Err(other) => panic!("{other}"),
            };
            let ram = memory.get_backend();
            // A mapping may lead to memory that has not come yet, or has gone.
            let Ok(first) = ram.read_obj::<u64>(GuestAddress(page)) else {
                continue;
            };
            check(first, at, "a reader");
            let scribble = GuestAddress(page + SCRIBBLE);
            ram.write_obj(first, scribble).expect("the same page");
            let still = ram.read_obj::<u64>(GuestAddress(page));
            check(still.expect("the same page"), at, "a reader");
        }
        done += 1;
        if done == 10 {
            say("works");
        }
    }
    unreachable!("numbers do not end");
}
