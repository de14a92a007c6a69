//! Valid and invalid commands.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::Mutex;
use proptest::prelude::*;
use vhost_device_iommu::vfio_user::message::{DmaMapBody, DmaUnmapBody};
use zerocopy::FromBytes;

use super::driver::{BLOCKS, Driver, ENTRIES, Plain, command};
use crate::command::{Command, Failure, status_of};
use crate::memory::{DmaError, Gate, Memory, Segment};

const READ: u8 = 2;
const WRITE: u8 = 1;
const ZEROES: u8 = 8;
const DATA: u64 = 0x10_0000;
const LIST: u64 = 0x8000;

fn failure(failure: Failure) -> (u16, u32) {
    (status_of(Err(failure)), 0)
}

fn blocks(opcode: u8, first: u64, count: u32, prp1: u64, prp2: u64) -> Command {
    let mut command = command(opcode, 1);
    command.cdw10 = (first as u32).into();
    command.cdw11 = ((first >> 32) as u32).into();
    command.cdw12 = (count - 1).into();
    command.prp1 = prp1.into();
    command.prp2 = prp2.into();
    command
}

fn put_list(driver: &Driver, at: u64, entries: &[u64]) {
    let bytes: Vec<_> = entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    let at = at as usize;
    driver.memory.0.lock()[at..at + bytes.len()].copy_from_slice(&bytes);
}

#[test]
fn data_is_transferred_by_pages_and_lists_of_pages() {
    let mut driver = Driver::new();
    driver.make_queues();
    let data: Vec<u8> = (0..64u32 << 10).map(|n| (n * 7 % 251) as u8).collect();
    driver.memory.0.lock()[DATA as usize..][..data.len()].copy_from_slice(&data);
    // Data from the middle of a page, and a list that continues in another page.
    let pages: Vec<u64> = (1..=16).map(|n| DATA + n * 4096).collect();
    let last = LIST + 4096 - 16;
    put_list(&driver, last, &[pages[0], LIST + 4096]);
    put_list(&driver, LIST + 4096, &pages[1..]);
    let write = blocks(WRITE, 5, 127, DATA + 512, last);
    // More commands than the queues have entries.
    for _ in 0..3 * ENTRIES {
        assert_eq!(driver.run(1, write), (0, 0));
    }
    let back = 0x20_0000;
    let mut pages: Vec<u64> = (0..16).map(|n| back + n * 4096).collect();
    pages.swap(3, 9);
    put_list(&driver, LIST, &pages[1..]);
    assert_eq!(driver.run(1, blocks(READ, 5, 127, pages[0], LIST)), (0, 0));
    pages.truncate(16);
    let memory = driver.memory.0.lock();
    let found: Vec<u8> = pages
        .iter()
        .flat_map(|page| memory[*page as usize..][..4096].iter().copied())
        .take(127 * 512)
        .collect();
    assert!(found == data[512..][..127 * 512]);
}

#[test]
fn zeroes_are_written_to_their_blocks_alone() {
    let mut driver = Driver::new();
    driver.make_queues();
    driver.memory.0.lock()[DATA as usize..][..4096].fill(9);
    assert_eq!(driver.run(1, blocks(WRITE, 0, 8, DATA, 0)), (0, 0));
    assert_eq!(driver.run(1, blocks(ZEROES, 2, 3, 0, 0)), (0, 0));
    assert_eq!(driver.run(1, blocks(READ, 0, 8, DATA + 4096, 0)), (0, 0));
    let memory = driver.memory.0.lock();
    let found = memory[DATA as usize + 4096..][..4096].chunks(512);
    let found: Vec<_> = found
        .map(|block| block.iter().all(|byte| *byte == 0))
        .collect();
    assert_eq!(found, [false, false, true, true, true, false, false, false]);
}

#[test]
fn invalid_commands_are_refused_and_the_controller_continues() {
    let mut driver = Driver::new();
    driver.make_queues();
    let list = |driver: &Driver, entries: &[u64]| put_list(driver, LIST, entries);
    list(&driver, &[DATA, DATA + 1]);
    // A list of pages that each have the address of the next page and nothing else.
    let endless = LIST + 4096 - 8;
    put_list(&driver, endless, &[endless]);
    for (io, expected) in [
        (blocks(READ, BLOCKS, 1, DATA, 0), Failure::LbaOutOfRange),
        (blocks(READ, u64::MAX, 1, DATA, 0), Failure::LbaOutOfRange),
        (
            blocks(WRITE, BLOCKS - 1, 2, DATA, 0),
            Failure::LbaOutOfRange,
        ),
        (blocks(READ, 0, 1, DATA + 2, 0), Failure::InvalidPrpOffset),
        (
            blocks(READ, 0, 16, DATA, DATA + 512),
            Failure::InvalidPrpOffset,
        ),
        (
            blocks(READ, 0, 32, DATA, LIST + 4),
            Failure::InvalidPrpOffset,
        ),
        (blocks(READ, 0, 24, DATA, LIST), Failure::InvalidPrpOffset),
        (
            blocks(READ, 0, 32, DATA, endless),
            Failure::InvalidPrpOffset,
        ),
        (blocks(READ, 0, 2049, DATA, LIST), Failure::InvalidField),
        (blocks(READ, 0, 1, 1 << 40, 0), Failure::DataTransfer),
        (
            blocks(WRITE, 0, 1, u64::MAX - 511, 0),
            Failure::DataTransfer,
        ),
        (blocks(WRITE, 0, 32, DATA, 1 << 40), Failure::DataTransfer),
        (blocks(0x77, 0, 1, DATA, 0), Failure::InvalidOpcode),
        (
            Command {
                nsid: 2.into(),
                ..blocks(READ, 0, 1, DATA, 0)
            },
            Failure::InvalidNamespace,
        ),
        (
            Command {
                flags: 0x40,
                ..blocks(READ, 0, 1, DATA, 0)
            },
            Failure::InvalidField,
        ),
    ] {
        assert_eq!(driver.run(1, io), failure(expected), "{io:x?}");
    }
    let queue = |opcode, cdw10: u32, cdw11: u32| Command {
        cdw10: cdw10.into(),
        cdw11: cdw11.into(),
        prp1: DATA.into(),
        ..command(opcode, 0)
    };
    for (admin, expected) in [
        (queue(5, 3 << 16, 1), Failure::InvalidQueueIdentifier),
        (queue(5, 3 << 16 | 9, 1), Failure::InvalidQueueIdentifier),
        (queue(5, 3 << 16 | 1, 1), Failure::InvalidQueueIdentifier),
        (queue(5, 2, 1), Failure::InvalidQueueSize),
        (queue(5, 1024 << 16 | 2, 1), Failure::InvalidQueueSize),
        (queue(5, 0xffff << 16 | 2, 1), Failure::InvalidQueueSize),
        (queue(5, 3 << 16 | 2, 0), Failure::InvalidField),
        (
            queue(5, 3 << 16 | 2, 9 << 16 | 1),
            Failure::InvalidInterruptVector,
        ),
        (queue(1, 3 << 16 | 2, 1), Failure::CompletionQueueInvalid),
        (
            queue(1, 3 << 16 | 2, 2 << 16 | 1),
            Failure::CompletionQueueInvalid,
        ),
        (queue(0, 0, 0), Failure::InvalidQueueIdentifier),
        (queue(0, 7, 0), Failure::InvalidQueueIdentifier),
        (queue(4, 1, 0), Failure::InvalidQueueDeletion),
        (queue(6, 9, 0), Failure::InvalidField),
        (queue(2, 0xffff_0009, 0), Failure::InvalidLogPage),
        (queue(2, 0xffff_0002, 0xffff), Failure::InvalidField),
    ] {
        assert_eq!(driver.run(0, admin), failure(expected), "{admin:x?}");
    }
}

#[test]
fn a_fifth_request_for_events_is_too_many() {
    let mut driver = Driver::new();
    // One after the other: the queue has room for three.
    for _ in 0..4 {
        driver.submit(0, command(0x0c, 0));
        assert_eq!(
            driver.run(0, command(0x08, 0)).1,
            1,
            "an ABORT without effect"
        );
    }
    assert_eq!(
        driver.run(0, command(0x0c, 0)),
        failure(Failure::TooManyEventRequests)
    );
}

#[test]
fn a_queue_that_cannot_be_reached_stops_the_controller_until_it_is_reset() {
    let mut driver = Driver::new();
    driver.set(0x14, 0);
    assert_eq!(driver.get(0x1c), 0);
    driver.controller.write(0x28, &(1u64 << 40).to_le_bytes());
    driver.set(0x14, 0x0046_0001);
    driver.wait("stopped", |status| status == 2);
    driver.set(0x14, 0);
    driver.enable();
    assert_eq!(driver.run(0, command(0x08, 0)), (0, 1));
    driver.set(0x24, 0);
    driver.set(0x14, 0);
    driver.set(0x14, 0x0046_0001);
    assert_eq!(driver.get(0x1c), 2, "queues of one entry");
}

/// Memory whose writes of data wait for the test.
struct Slow {
    plain: Arc<Plain>,
    started: Mutex<Sender<()>>,
    resume: Mutex<Receiver<()>>,
}

impl Memory for Slow {
    fn read(&self, gate: &Gate, from: &[Segment], into: &mut [u8]) -> Result<(), DmaError> {
        self.plain.read(gate, from, into)
    }

    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError> {
        if to[0].address >= DATA {
            self.started.lock().send(()).unwrap();
            self.resume.lock().recv().unwrap();
        }
        self.plain.write(gate, to, from)
    }

    fn map(&self, _: &DmaMapBody, _: Option<OwnedFd>) -> Result<(), i32> {
        Ok(())
    }

    fn unmap(&self, _: &DmaUnmapBody) -> Result<(), i32> {
        Ok(())
    }
}

#[test]
fn a_command_from_before_a_reset_touches_nothing_after_it() {
    let (started, has_started) = channel();
    let (resume, resumed) = channel();
    let plain = Arc::new(Plain(Mutex::new(vec![0; 4 << 20])));
    let slow = Slow {
        plain: plain.clone(),
        started: Mutex::new(started),
        resume: Mutex::new(resumed),
    };
    let mut driver = Driver::with_memory(plain, Arc::new(slow));
    driver.make_queues();
    for reset in [
        |driver: &Driver| driver.set(0x14, 0),
        |driver: &Driver| driver.controller.reset(),
    ] {
        driver.memory.0.lock()[DATA as usize..][..4096].fill(0x5a);
        driver.submit(1, blocks(READ, 0, 8, DATA, 0));
        has_started.recv().unwrap();
        // Does not wait for the command.
        reset(&driver);
        let before = driver.memory.0.lock().clone();
        resume.send(()).unwrap();
        driver.controller.set_bus_master(true);
        driver.enable();
        driver.make_queues();
        let after = driver.memory.0.lock();
        assert!(before[DATA as usize..] == after[DATA as usize..]);
        // The completion of the new command, not that of the old one.
        drop(after);
        driver.submit(1, command(0, 1));
        assert_eq!(driver.answer(1), Some((0, 0)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_command_is_answered(
        commands in proptest::collection::vec(
            (0..2usize, proptest::collection::vec(any::<u8>(), 64), 0..16u8, any::<bool>()),
            1..12,
        ),
    ) {
        let mut driver = Driver::new();
        driver.make_queues();
        let mut waiting = 0;
        for (queue, bytes, opcode, plausible) in commands {
            let mut command = Command::read_from_bytes(&bytes).unwrap();
            command.opcode = opcode;
            if plausible {
                // Existing memory and blocks, and valid counts.
                command.flags = 0;
                command.nsid = 1.into();
                command.prp1 = ((command.prp1.get() % (3 << 20)) & !0xfff).into();
                command.prp2 = ((command.prp2.get() % (3 << 20)) & !0x7).into();
                command.cdw10 = (command.cdw10.get() & 0xff_00ff).into();
                command.cdw11 = (command.cdw11.get() & 0x1_0001).into();
            }
            // The command must neither delete nor overwrite the queues of the test.
            let writes = matches!((queue, opcode), (1, 2) | (0, 2 | 6));
            if writes || queue == 0 && matches!(opcode, 0 | 4) {
                continue;
            }
            if queue == 0 && opcode == 0x0c && command.flags == 0 {
                waiting += 1;
                if waiting <= 4 {
                    driver.submit(queue, command);
                    prop_assert_eq!(driver.run(0, super::driver::command(8, 0)), (0, 1));
                    continue;
                }
            }
            driver.submit(queue, command);
            prop_assert!(driver.answer(queue).is_some(), "{:x?}", command);
        }
    }

    #[test]
    fn any_register_can_be_written(
        writes in proptest::collection::vec((0..0x1080u64, any::<u32>(), 1..12usize), 1..100),
    ) {
        let driver = Driver::new();
        for (at, value, len) in writes {
            let bytes = [value.to_le_bytes(); 3].concat();
            driver.controller.write(at, &bytes[..len]);
            driver.controller.read(at, &mut [0; 16][..len]);
        }
        driver.controller.write(u64::MAX, &[0; 8]);
        driver.controller.read(u64::MAX - 3, &mut [0; 16]);
        driver.controller.reset();
        driver.set(0x14, 0);
        prop_assert_eq!(driver.get(0x1c), 0);
    }
}
