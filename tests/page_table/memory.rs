//! The arena's memory, and readers that find anything in it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::AtomicU64;

use vhost_device_iommu::address::{Access, Iova, IovaRange};
use vhost_device_iommu::page_table::layout::{FRAME_BYTES, FRAME_WORDS};
use vhost_device_iommu::page_table::{
    Arena, ArenaError, Encoding, Format, Levels, ReadOnlyArena, Table, TableOffset, Unmapped, View,
    reader,
};

use crate::audit::raw_words;
use crate::random::Random;
use crate::{GIB, MIB2, PAGE, encodings, map, mapping, new_table, range, unmap};

#[test]
fn the_memfd_is_sealed_and_costs_nothing_while_idle() {
    let mut arena = Arena::new(64 * GIB).expect("an arena");
    let table = Table::new(&mut arena, Levels::Four).expect("a root");
    assert_eq!(arena.limit_bytes(), 64 * GIB);
    let file = File::from(arena.fd().try_clone_to_owned().expect("a descriptor"));
    assert!(file.metadata().expect("readable").blocks() * 512 <= 2 * PAGE);
    assert!(file.set_len(64 * GIB - 1).is_err());
    assert!(file.set_len(64 * GIB + 1).is_err());
    assert_eq!(table.destroy(&mut arena), Unmapped::default());
}

/// Whether `fd` can be mapped with these rights; `then` are the rights that the mapping is changed
/// to.
#[expect(unsafe_code, reason = "tries what a hostile reader would")]
fn try_map(fd: &OwnedFd, protection: libc::c_int, then: libc::c_int) -> bool {
    // SAFETY:
    // - the address argument is null, so no existing mapping is replaced
    let at = unsafe {
        let fd = fd.as_raw_fd();
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return false;
    }
    // SAFETY:
    // - the page was just mapped, and there is no reference into it
    let allowed = unsafe { libc::mprotect(at, 4096, then) == 0 };
    // SAFETY:
    // - this function mapped the page and does not use it any more
    unsafe { libc::munmap(at, 4096) };
    allowed
}

#[test]
fn a_shared_arena_can_be_written_to_by_its_owner_only() {
    let (mut arena, mut table) = new_table(64, Levels::Four);
    let before = arena.fd().try_clone_to_owned().expect("a descriptor");
    assert!(try_map(&before, libc::PROT_WRITE, libc::PROT_WRITE));
    let shared = arena.share().expect("sealed");
    let again = arena.share().expect("sealed already");
    let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
    let reopened = File::options().read(true).write(true).open(path);
    let mut all = vec![before, shared, again];
    all.extend(reopened.map(OwnedFd::from));
    assert_eq!(all.len(), 4, "the file itself could be opened again");
    for fd in all {
        assert!(!try_map(&fd, libc::PROT_WRITE, libc::PROT_WRITE));
        let both = libc::PROT_READ | libc::PROT_WRITE;
        assert!(!try_map(&fd, both, both));
        assert!(!try_map(&fd, libc::PROT_READ, both), "made writable later");
        assert!(try_map(&fd, libc::PROT_READ, libc::PROT_READ));
        let file = File::from(fd);
        assert!(file.write_all_at(&[0; 8], 0).is_err());
        assert!(file.set_len(0).is_err());
    }
    // The owner can still change the table, and can still return memory to the system.
    let reader = ReadOnlyArena::map(arena.fd()).expect("an arena");
    for _ in 0..3 {
        let one = mapping(0, PAGE, PAGE, Access::READ);
        map(&mut table, &mut arena, &one).expect("free");
        assert!(reader::walk(reader.view(), table.root(), Levels::Four, Iova(0)).is_some());
        unmap(&mut table, &mut arena, IovaRange::ALL).expect("whole mappings");
        assert!(reader::walk(reader.view(), table.root(), Levels::Four, Iova(0)).is_none());
        arena.reclaim();
    }
}

#[test]
fn memory_is_returned_when_many_frames_are_freed() {
    let (mut arena, mut table) = new_table(16 << 10, Levels::Four);
    let file = File::from(arena.fd().try_clone_to_owned().expect("a descriptor"));
    let in_use = || file.metadata().expect("readable").blocks() * 512;
    let large = mapping(0, 16 * GIB, PAGE, Access::READ_WRITE);
    for _ in 0..3 {
        map(&mut table, &mut arena, &large).expect("free");
        assert!(in_use() > 8192 * FRAME_BYTES);
        unmap(&mut table, &mut arena, IovaRange::ALL).expect("whole mappings");
        arena.reclaim();
        assert!(in_use() < 1024 * FRAME_BYTES, "{} in use", in_use());
    }
    // Frames that are freed one by one are returned as well; the frames between them stay.
    let pages = || (0..8 * GIB).step_by(2 << 20);
    let page = |first| mapping(first, PAGE, first + PAGE, Access::READ);
    let stays = |first: &u64| first / MIB2 % 37 == 5;
    for first in pages() {
        map(&mut table, &mut arena, &page(first)).expect("free");
    }
    assert!(in_use() > 4096 * FRAME_BYTES);
    for first in pages().filter(|first| !stays(first)) {
        unmap(&mut table, &mut arena, range(first, first + PAGE - 1)).expect("whole");
        arena.reclaim();
    }
    assert!(in_use() < 1300 * FRAME_BYTES, "{} in use", in_use());
    let live = table.mappings(&arena, Iova(0));
    assert!(live.eq(pages().filter(stays).map(page)));
    unmap(&mut table, &mut arena, IovaRange::ALL).expect("whole mappings");
    arena.reclaim();
    assert_eq!(arena.frames_used(), 2);
}

#[expect(
    unsafe_code,
    reason = "memfd_create has no safe wrapper among our dependencies"
)]
fn memfd() -> File {
    // SAFETY: the name is a string with a final zero that outlives the call.
    let fd = unsafe { libc::memfd_create(c"not-an-arena".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a memfd");
    // SAFETY: the descriptor was just made and has no other owner.
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[test]
fn a_reader_refuses_files_that_are_no_arena() {
    let (arena, _table) = new_table(4, Levels::Four);
    // These files are right but for their seals: files on disk have none, and the memfd has others.
    for file in [tempfile::tempfile().expect("a file"), memfd()] {
        let bytes = raw_words(&arena).into_iter().flat_map(u64::to_le_bytes);
        let written = file.write_all_at(&bytes.collect::<Vec<u8>>(), 0);
        written.expect("writable");
        let refused = ReadOnlyArena::map(file.as_fd());
        assert!(matches!(refused, Err(ArenaError::NotAnArena(_))));
    }

    let copy = File::from(arena.fd().try_clone_to_owned().expect("a descriptor"));
    for (word, value) in [(0, 1u64), (1, 3), (3, 5)] {
        let mut good = [0; 8];
        copy.read_exact_at(&mut good, word * 8).expect("readable");
        let written = copy.write_all_at(&value.to_le_bytes(), word * 8);
        written.expect("writable");
        let refused = ReadOnlyArena::map(arena.fd());
        assert!(matches!(refused, Err(ArenaError::NotAnArena(_))), "{word}");
        copy.write_all_at(&good, word * 8).expect("writable");
    }
    ReadOnlyArena::map(arena.fd()).expect("an arena");
}

#[test]
fn a_reader_survives_any_contents() {
    let mut random = Random(0xfeed);
    let all = [Levels::Four, Levels::Five].map(|levels| encodings(levels, u64::MAX - 16 * GIB));
    for encoding in all.into_iter().flatten().cycle().take(300) {
        let Encoding { format, base } = encoding;
        let words: Vec<AtomicU64> = (0..8 * FRAME_WORDS)
            .map(|_| {
                let used = random.below(513);
                // Mostly table entries, so that walks form loops and leave the arena at both ends.
                let near = (base + random.below(10) * FRAME_BYTES).saturating_sub(PAGE);
                AtomicU64::new(match (random.below(4), format) {
                    (0, _) => random.next() << 8 | random.below(256),
                    (1, _) => (random.next() % (1 << 52)) & !0xfff | 0x27,
                    (_, Format::X86FirstStage) => near | 0x27 | used << 52,
                    (_, Format::Vmsav8Stage1) => near | 0x03 | used << 2,
                })
            })
            .collect();
        let view = View::new(&words, encoding);
        for levels in [Levels::Four, Levels::Five] {
            for _ in 0..500 {
                let root = TableOffset(random.below(12) * FRAME_BYTES + random.below(2) * 8);
                let iova = Iova(random.next() << random.below(20));
                if let Some(found) = reader::walk(view, root, levels, iova) {
                    assert!(found.gpa.0 < 1 << 52 && found.contiguous_last >= iova);
                }
            }
        }
    }
    let root = TableOffset(u64::MAX);
    assert_eq!(
        reader::walk(
            View::new(&[], Encoding::default()),
            root,
            Levels::Four,
            Iova(0)
        ),
        None
    );
}
