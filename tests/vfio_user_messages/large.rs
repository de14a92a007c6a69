//! Large mappings through a whole daemon: each is one window at the server, aligned and with an aligned offset, so that a
//! server with huge pages can register it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::common::daemon::EP;
use crate::common::guest::{Guest, Setup};
use crate::common::memory::Region;
use crate::common::wire;
use crate::connection::{REGION_READ, region};
use crate::daemon::DaemonBed;
use crate::library::{Library, Version};

const PAGE: u64 = 0x1000;
const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// Guest-physical address of the large memory slot.
const RAM: u64 = 64 * GIB;
/// Bytes of the large memory slot.
const RAM_LEN: u64 = 2 * GIB;
/// The slot's first byte in its file.
const RAM_OFFSET: u64 = GIB;

/// A file for guest RAM. Nobody touches the memory, so it takes none, and no huge pages either.
fn sparse(flags: MemfdFlags) -> Option<File> {
    let file = memfd_create("large-ram", MemfdFlags::CLOEXEC | flags).ok()?;
    let file = File::from(file);
    file.set_len(RAM_OFFSET + RAM_LEN).ok()?;
    Some(file)
}

/// A window at the server: its first address, its length, and its offset in the file.
type Window = (u64, u64, u64);

/// Maps `len` bytes at `iova` to the large slot from its offset `at`. Returns the window that the server should get.
fn map(guest: &mut Guest, (iova, len, at): Window) -> Window {
    let last = iova + len - 1;
    assert_eq!(guest.map(1, iova, last, RAM + at, wire::RW), 0);
    (iova, len, RAM_OFFSET + at)
}

fn windows(library: &Library) -> Vec<Window> {
    let state = library.state();
    let regions = state.regions.iter();
    regions
        .map(|region| {
            let mapped = region.mapped.as_ref().expect("a descriptor");
            assert_eq!(mapped.missing, 0, "the server would use other memory");
            (region.first, region.last - region.first + 1, region.offset)
        })
        .collect()
}

#[test]
fn a_large_mapping_is_one_aligned_window_at_the_server() {
    let huge = sparse(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    if huge.is_none() {
        println!("this kernel has no huge pages of 2 MiB");
    }
    for file in huge.into_iter().chain(sparse(MemfdFlags::empty())) {
        large_mappings(file);
    }
}

fn large_mappings(file: File) {
    let block = file.metadata().expect("metadata").blksize();
    println!("pages of {block:#x} bytes");
    let bed = DaemonBed::new("mappings");
    let mut guest = Guest::boot_with(&bed.daemon, Setup::default());
    assert_eq!(guest.attach(1, EP), 0);
    guest.add_region(Region::of_file(RAM, RAM_LEN, Arc::new(file), RAM_OFFSET));
    // The server finds these when it connects.
    let mut expected: Vec<_> = [(GIB, GIB, 0), (4 * GIB, MIB2, GIB + 3 * MIB2)]
        .map(|window| map(&mut guest, window))
        .into();
    let listener = bed.listener.try_clone().expect("cloned");
    let library = Library::start(listener, Version::OF_2026);
    let mut client = bed.negotiated_client();
    let reply = client.call(REGION_READ, &region(0x10, 0, 4, &[]), &[]);
    assert_eq!(reply.errno(), 0);
    assert_eq!(windows(&library), expected);
    // And it is told these.
    expected.extend(
        [(8 * GIB, GIB, GIB), (12 * GIB + MIB2, MIB2, 5 * MIB2)]
            .map(|window| map(&mut guest, window)),
    );
    assert_eq!(windows(&library), expected);
    for (first, len, offset) in windows(&library) {
        assert!(first.is_multiple_of(len) && offset.is_multiple_of(len));
    }
    // Within one huge page; and from the last 4 KiB of a huge page to the end of the next one but 4 KiB, which a server of
    // the library maps whole in two pieces only.
    expected.push(map(&mut guest, (16 * GIB, PAGE, 7 * MIB2 - PAGE)));
    let (iova, len, offset) = map(&mut guest, (20 * GIB, MIB2, 9 * MIB2 - PAGE));
    if block == MIB2 {
        let rest = (iova + PAGE, len - PAGE, offset + PAGE);
        expected.extend([(iova, PAGE, offset), rest]);
    } else {
        expected.push((iova, len, offset));
    }
    assert_eq!(windows(&library), expected);
    assert_eq!(guest.unmap(1, 0, u64::MAX), 0);
    assert_eq!(windows(&library), []);
    assert_eq!(library.state().refused, 0);
    assert!(!bed.daemon.log().contains("cut off"));
}
