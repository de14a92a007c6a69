//! The client's windows.

use super::*;

#[test]
fn windows_become_memory_and_go() {
    let mut bed = Bed::new();
    let regions = |bed: &Bed| bed.device.memory().map_or(0, |memory| memory.num_regions());
    assert_eq!(bed.recorder.state().memory.len(), 1);
    bed.map(1 << 32, 0x1000, Some(ram(0x1000))).expect("mapped");
    assert_eq!(regions(&bed), 2);
    // Windows that are no memory exist all the same.
    bed.map(1 << 33, 0x1000, None).expect("recorded");
    bed.map_with(DMA_MAP_READ, 1 << 34, 0x1000, 0, Some(ram(0x1000)))
        .expect("recorded");
    let (pipe, _other) = std::io::pipe().expect("a pipe");
    bed.map(1 << 35, 0x1000, Some(pipe.into()))
        .expect("recorded");
    assert_eq!(regions(&bed), 2);
    assert_eq!(bed.device.metrics().windows_without_memory.get(), 2);
    for address in [1 << 32, 1 << 33, 1 << 34, 1 << 35] {
        assert_eq!(
            bed.map(address, 0x1000, Some(ram(0x1000))),
            Err(libc::EEXIST)
        );
        assert_eq!(bed.unmap(0, address, 0x2000), Err(libc::ENOENT));
        bed.unmap(0, address, 0x1000).expect("unmapped");
        assert_eq!(bed.unmap(0, address, 0x1000), Err(libc::ENOENT));
    }
    assert_eq!(regions(&bed), 1);
    assert_eq!(bed.recorder.state().memory.len(), 1);
    bed.unmap(DMA_UNMAP_ALL, 0, 0).expect("unmapped");
    assert_eq!((regions(&bed), bed.recorder.state().memory.len()), (0, 0));
}

#[test]
fn windows_that_lie_are_refused_and_forgotten() {
    let mut bed = Bed::new();
    let at = 1 << 32;
    for (size, offset) in [
        (0x2000, 0),
        (0x1000, 0x1000),
        (0x800, 0x800),
        (0x1000, u64::MAX - 0xfff),
        (1 << 60, 0),
    ] {
        let refused = bed.map_with(3, at, size, offset, Some(ram(0x1000)));
        assert_eq!(refused, Err(libc::EINVAL), "{size:#x} {offset:#x}");
    }
    assert_eq!(bed.device.metrics().windows_refused.get(), 5);
    // A file that cannot be written, though the client says so.
    let name = std::env::current_exe().expect("a program");
    let file = std::fs::File::open(name).expect("readable");
    assert!(bed.map(at, 0x1000, Some(file.into())).is_err());
    assert_eq!(bed.map(at, 0, None), Err(libc::EINVAL));
    assert_eq!(bed.map(u64::MAX, 2, None), Err(libc::EINVAL));
    bed.map(at, 0x1000, Some(ram(0x1000)))
        .expect("nothing was left behind");
    let memory = bed.device.memory().expect("guest memory");
    assert_eq!(memory.num_regions(), 2);
}

#[test]
fn the_number_of_slots_has_a_limit() {
    let mut bed = Bed::new();
    let file = ram(0x1000);
    let last = (1..).find(|n| {
        let file = file.try_clone().expect("a descriptor");
        bed.map(n << 32, 0x1000, Some(file)).is_err()
    });
    assert_eq!(last, Some(MAX_SLOTS as u64));
    bed.map(last.expect("some") << 32, 0x1000, None)
        .expect("not memory");
}
