//! Mapped windows, and requests to the client.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use vhost_device_iommu::vfio_user::message::{
    Command, DMA_UNMAP_ALL, DmaAccessBody, DmaMapBody, DmaUnmapBody, HEADER_BYTES, Header, take,
};
use zerocopy::IntoBytes;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::memory::{DmaError, Gate, Mapped, Memory, Messages, Outbound, Segment, widen};

const READ: u32 = 1;
const BOTH: u32 = 3;

/// Records the messages to the client.
#[derive(Clone, Default)]
struct Sent(Arc<Mutex<Vec<Vec<u8>>>>);

impl Outbound for Sent {
    fn send(&self, message: Vec<u8>) {
        self.0.lock().push(message);
    }
}

impl Sent {
    /// Waits for the next message: header and body.
    fn next(&self) -> (Header, Vec<u8>) {
        loop {
            let mut sent = self.0.lock();
            if sent.is_empty() {
                drop(sent);
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            let message = sent.remove(0);
            let (head, body) = message.split_at(HEADER_BYTES);
            let header = Header::decode(head.try_into().unwrap()).unwrap();
            return (header, body.to_vec());
        }
    }
}

fn file(bytes: u64) -> (File, OwnedFd) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    let other = file.try_clone().unwrap().into();
    (file, other)
}

fn window(address: u64, size: u64, offset: u64, flags: u32) -> DmaMapBody {
    DmaMapBody {
        argsz: 32.into(),
        flags: flags.into(),
        offset: offset.into(),
        address: address.into(),
        size: size.into(),
    }
}

fn removed(address: u64, size: u64, flags: u32) -> DmaUnmapBody {
    DmaUnmapBody {
        argsz: 24.into(),
        flags: flags.into(),
        address: address.into(),
        size: size.into(),
    }
}

fn at(address: u64, len: usize) -> [Segment; 1] {
    [Segment { address, len }]
}

#[test]
fn adjacent_windows_are_one_memory_and_other_accesses_are_requested() {
    let sent = Sent::default();
    let messages = Arc::new(Messages::new(Box::new(sent.clone())));
    let memory = Arc::new(Mapped::new(messages.clone()));
    let gate = Arc::new(Gate::new());
    let (kept, fd) = file(0x4000);
    memory
        .map(&window(0x1000, 0x1000, 0x2000, BOTH), Some(fd))
        .unwrap();
    memory
        .map(
            &window(0x2000, 0x1000, 0, BOTH),
            Some(kept.try_clone().unwrap().into()),
        )
        .unwrap();
    memory.write(&gate, &at(0x1ffe, 4), b"abcd").unwrap();
    let mut found = [0; 4];
    memory.read(&gate, &at(0x1ffe, 4), &mut found).unwrap();
    assert_eq!(&found, b"abcd");
    kept.read_exact_at(&mut found[..2], 0x2ffe).unwrap();
    kept.read_exact_at(&mut found[2..], 0).unwrap();
    assert_eq!(&found, b"abcd");
    assert!(sent.0.lock().is_empty());

    let (writing, passing) = (memory.clone(), gate.clone());
    let writer = thread::spawn(move || writing.write(&passing, &at(0x2ffe, 4), b"efgh"));
    let (header, body) = sent.next();
    let (access, data) = take::<DmaAccessBody>(Command::DmaWrite, &body).unwrap();
    assert_eq!((header.command, access.address.get()), (12, 0x3000));
    assert_eq!(data, b"gh");
    assert!(messages.handle_reply(&header.refusal_of(libc::EFAULT), &[]));
    assert!(matches!(writer.join().unwrap(), Err(DmaError::Refused(_))));

    memory
        .map(
            &window(0x3000, 0x1000, 0x3000, READ),
            Some(kept.try_clone().unwrap().into()),
        )
        .unwrap();
    memory.read(&gate, &at(0x3000, 4), &mut found).unwrap();
    let (writing, passing) = (memory.clone(), gate.clone());
    let writer = thread::spawn(move || writing.write(&passing, &at(0x3000, 4), b"ijkl"));
    let (header, _) = sent.next();
    messages.close();
    assert_eq!(writer.join().unwrap(), Err(DmaError::Closed));
    assert!(
        !messages.handle_reply(&header.reply_to(0), &[]),
        "no request is pending"
    );
    gate.close();
    assert_eq!(
        memory.write(&gate, &at(0x1000, 1), b"x"),
        Err(DmaError::Closed)
    );
}

#[test]
fn invalid_windows_are_refused_and_removed_windows_are_gone() {
    let sent = Sent::default();
    let memory = Mapped::new(Arc::new(Messages::new(Box::new(sent))));
    let fd = || Some(file(0x4000).1);
    for (bad, errno) in [
        (window(0x1000, 0, 0, BOTH), libc::EINVAL),
        (window(u64::MAX - 0xfff, 0x2000, 0, BOTH), libc::EINVAL),
        (window(0x1000, 0x5000, 0, BOTH), libc::EINVAL),
        (window(0x1000, 0x1000, u64::MAX, BOTH), libc::EINVAL),
        (window(0x1000, 0x1000, 0, 0), libc::EINVAL),
        (window(0x1000, 0x1000, 7, BOTH), libc::ENOMEM),
    ] {
        assert_eq!(memory.map(&bad, fd()), Err(errno), "{bad:?}");
    }
    assert_eq!(memory.map(&window(0x1000, 0x2000, 0, BOTH), fd()), Ok(()));
    for overlapping in [0, 0x1000, 0x2000] {
        assert_eq!(
            memory.map(&window(overlapping, 0x2000, 0, BOTH), fd()),
            Err(libc::EEXIST)
        );
    }
    for (bad, errno) in [
        (removed(0x1000, 0x1000, 0), libc::EINVAL),
        (removed(0x2000, 0x1000, 0), libc::EINVAL),
        (removed(0x1000, 0x2000, 1), libc::ENOTSUP),
        (removed(0x1000, 0x2000, DMA_UNMAP_ALL), libc::EINVAL),
    ] {
        assert_eq!(memory.unmap(&bad), Err(errno), "{bad:?}");
    }
    assert_eq!(memory.unmap(&removed(0x1000, 0x2000, 0)), Ok(()));
    assert_eq!(memory.map(&window(0x1000, 0x2000, 0, BOTH), fd()), Ok(()));
    assert_eq!(memory.unmap(&removed(0, 0, DMA_UNMAP_ALL)), Ok(()));
    assert_eq!(memory.map(&window(0, 0x4000, 0, BOTH), fd()), Ok(()));
}

/// RAM of huge pages, of which a guest maps pages of 4 KiB.
#[test]
fn windows_within_huge_pages_are_mapped() {
    const HUGE: u64 = 2 << 20;
    assert_eq!(widen(0x3000, 0x1000, None), Some((0x3000, 0, 0x1000)));
    for (offset, size, expected) in [
        (0, 0x1000, (0, 0, HUGE as usize)),
        (0x3000, 0x1000, (0, 0x3000, HUGE as usize)),
        (
            HUGE + 0x1000,
            HUGE as usize,
            (HUGE, 0x1000, 2 * HUGE as usize),
        ),
        (
            HUGE - 0x1000,
            0x1000,
            (0, HUGE as usize - 0x1000, HUGE as usize),
        ),
    ] {
        assert_eq!(widen(offset, size, Some(HUGE)), Some(expected));
    }
    assert_eq!(widen(0x1000, usize::MAX, Some(HUGE)), None);

    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(kept) = memfd_create("huge-window", flags) else {
        // A kernel without huge pages.
        return;
    };
    let kept = File::from(kept);
    kept.set_len(2 * HUGE).unwrap();
    let memory = Mapped::new(Arc::new(Messages::new(Box::new(Sent::default()))));
    let fd = || Some(kept.try_clone().unwrap().into());
    for (address, size, offset) in [
        (0x1000, 0x1000, 0x5000),
        (0x2000, 0x1000, HUGE + 0x7000),
        (0x3000, 0x2000, HUGE - 0x1000),
    ] {
        assert_eq!(
            memory.map(&window(address, size, offset, BOTH), fd()),
            Ok(())
        );
    }
    let beyond = window(0x9000, 0x1000, 2 * HUGE, BOTH);
    assert_eq!(memory.map(&beyond, fd()), Err(libc::EINVAL));
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.is_ok_and(|free| free.trim().parse::<u32>().is_ok_and(|free| free >= 2)) {
        // An access without a free huge page would end this process.
        let gate = Gate::new();
        memory.write(&gate, &at(0x1ffe, 4), b"abcd").unwrap();
        memory.write(&gate, &at(0x3ffe, 4), b"efgh").unwrap();
        let mut found = [0; 2];
        for (offset, data) in [
            (0x5ffe, b"ab"),
            (HUGE + 0x7000, b"cd"),
            (HUGE - 2, b"ef"),
            (HUGE, b"gh"),
        ] {
            let whole = Mapped::new(Arc::new(Messages::new(Box::new(Sent::default()))));
            let around = window(0, 2 * HUGE, 0, READ);
            whole.map(&around, fd()).unwrap();
            whole.read(&gate, &at(offset, 2), &mut found).unwrap();
            assert_eq!(&found, data, "at {offset:#x}");
        }
    }
    for (address, size) in [(0x1000, 0x1000), (0x2000, 0x1000), (0x3000, 0x2000)] {
        assert_eq!(memory.unmap(&removed(address, size, 0)), Ok(()));
    }
    drop(memory);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("memfd:huge-window"), "a mapping is left");
}

#[test]
fn replies_may_come_in_any_order_and_must_have_the_right_length() {
    let sent = Sent::default();
    let messages = Arc::new(Messages::new(Box::new(sent.clone())));
    messages.set_max_data(64);
    for short in [false, true] {
        let (done, is_done) = mpsc::channel();
        let reading = messages.clone();
        let reader = thread::spawn(move || {
            let mut found = vec![0; 160];
            let two = [at(0x1000, 100), at(0x9000, 60)].concat();
            let outcome = reading.read(&Gate::new(), &two, &mut found);
            done.send((outcome, found)).unwrap();
        });
        let requests: Vec<_> = (0..3).map(|_| sent.next()).collect();
        for (index, (header, body)) in requests.iter().enumerate().rev() {
            let (access, _) = take::<DmaAccessBody>(Command::DmaRead, body).unwrap();
            let len = access.count.get() as usize - usize::from(short && index == 1);
            let reply = [access.as_bytes(), &vec![index as u8 + 1; len]].concat();
            assert!(messages.handle_reply(&header.reply_to(0), &reply));
            assert!(!messages.handle_reply(&header.reply_to(0), &reply), "once");
        }
        let (outcome, found) = is_done.recv_timeout(Duration::from_secs(10)).unwrap();
        reader.join().unwrap();
        if short {
            assert!(matches!(outcome, Err(DmaError::Refused(_))));
        } else {
            assert_eq!(outcome, Ok(()));
            assert_eq!(found, [vec![1; 64], vec![2; 36], vec![3; 60]].concat());
        }
    }
}
