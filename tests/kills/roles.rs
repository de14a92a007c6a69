//! The roles of the processes. Each runs until the test kills it.

use std::path::PathBuf;

use vhost_device_iommu::address::{Access, Iova};
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::{AccessError, ShadowReader};
use vm_memory::{Bytes, GuestAddress};

use crate::common::daemon::EP3;
use crate::server::{AccessMode, serve};
use crate::stamps::{WRITE_OFFSET, check_stamp, iova};
use crate::vmm;

#[test]
#[ignore = "a part of other tests"]
fn run_role() {
    let Ok(role) = std::env::var("KILLS_ROLE") else {
        return;
    };
    match role.as_str() {
        "server by messages" => serve(&path_from_env("KILLS_SOCKET"), AccessMode::Messages),
        "server by mappings" => serve(&path_from_env("KILLS_SOCKET"), AccessMode::Mappings),
        "server of a PCI device" => serve(&path_from_env("KILLS_SOCKET"), AccessMode::Reads),
        "reader" => read(),
        "VMM" => vmm::run(),
        other => panic!("no such role: {other}"),
    }
}

/// A path from the environment.
pub fn path_from_env(name: &str) -> PathBuf {
    std::env::var_os(name).expect("the test sets it").into()
}

/// Prints a word that the test waits for.
pub fn report(word: &str) {
    println!("{word}");
}

/// A shadow reader: translates addresses, reads and writes memory.
fn read() -> ! {
    let endpoint = EndpointId(EP3);
    let reader = ShadowReader::connect(&path_from_env("KILLS_SOCKET"), endpoint)
        .expect("the reader is accepted");
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
            // As a device reads: through the memory, which translates for each access.
            let Ok(found) = memory.read_obj::<u64>(GuestAddress(at)) else {
                continue;
            };
            check_stamp(found, at, "a reader");
        } else {
            let access = reader.enter().expect("a free epoch word");
            // `memory` is from before the access began: guest memory may have changed since.
            if reader.has_changed(&memory) {
                continue;
            }
            let page = match access.translate(Iova(at), Access::READ_WRITE) {
                Ok(page) => page.gpa.0,
                Err(AccessError::Fault { .. }) => continue,
                Err(other) => panic!("{other}"),
            };
            let ram = memory.get_backend();
            // A mapping may lead to memory that the reader does not have yet, or no longer has.
            let Ok(first) = ram.read_obj::<u64>(GuestAddress(page)) else {
                continue;
            };
            check_stamp(first, at, "a reader");
            let write_at = GuestAddress(page + WRITE_OFFSET);
            ram.write_obj(first, write_at).expect("the same page");
            let still = ram.read_obj::<u64>(GuestAddress(page));
            check_stamp(still.expect("the same page"), at, "a reader");
        }
        done += 1;
        if done == 10 {
            report("works");
        }
    }
    unreachable!("the loop has no end");
}
