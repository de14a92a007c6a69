//! A driver: memory, and the queues in it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vhost_device_iommu::vfio_user::message::{DmaMapBody, DmaUnmapBody};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::command::{Command, Completion};
use crate::controller::Controller;
use crate::disk::Disk;
use crate::memory::{DmaError, Gate, Memory, Segment};

/// Bytes of memory.
const BYTES: usize = 4 << 20;
/// The number of entries of each queue: few, so that the queues wrap.
pub const ENTRIES: u16 = 4;
/// The addresses of the queues: one page for queue 0, one for queue 1.
const SUBMISSIONS: u64 = 0x10000;
const COMPLETIONS: u64 = 0x20000;
pub const BLOCKS: u64 = 4096;

/// Memory that may be read and written.
pub struct Plain(pub Mutex<Vec<u8>>);

impl Plain {
    fn place(bytes: &mut [u8], segment: Segment) -> Result<&mut [u8], DmaError> {
        let first = usize::try_from(segment.address).ok();
        let end = first.and_then(|first| first.checked_add(segment.len));
        let place = first
            .zip(end)
            .and_then(|(first, end)| bytes.get_mut(first..end));
        place.ok_or_else(|| DmaError::Refused("no memory".into()))
    }
}

impl Memory for Plain {
    fn read(&self, gate: &Gate, from: &[Segment], into: &mut [u8]) -> Result<(), DmaError> {
        let _open = gate.enter()?;
        let (mut bytes, mut at) = (self.0.lock(), 0);
        for segment in from {
            let place = Self::place(&mut bytes, *segment)?;
            into[at..at + segment.len].copy_from_slice(place);
            at += segment.len;
        }
        Ok(())
    }

    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError> {
        let _open = gate.enter()?;
        let (mut bytes, mut at) = (self.0.lock(), 0);
        for segment in to {
            let place = Self::place(&mut bytes, *segment)?;
            place.copy_from_slice(&from[at..at + segment.len]);
            at += segment.len;
        }
        Ok(())
    }

    fn map(&self, _: &DmaMapBody, _: Option<OwnedFd>) -> Result<(), i32> {
        Ok(())
    }

    fn unmap(&self, _: &DmaUnmapBody) -> Result<(), i32> {
        Ok(())
    }
}

/// A driver of a controller: queue 0 exists, and queue 1 after [`Driver::make_queues`].
pub struct Driver {
    pub memory: Arc<Plain>,
    pub controller: Controller,
    /// For each queue: the tail of the submission queue, the head of the completion queue, its phase.
    queues: [(u16, u16, bool); 2],
}

impl Driver {
    /// A driver with an empty disk and an enabled controller.
    pub fn new() -> Self {
        let memory = Arc::new(Plain(Mutex::new(vec![0; BYTES])));
        Self::with_memory(memory.clone(), memory)
    }

    /// A driver as from [`Driver::new`]. The driver uses `memory`; the controller uses `device_memory`.
    pub fn with_memory(memory: Arc<Plain>, device_memory: Arc<dyn Memory>) -> Self {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(BLOCKS * 512).expect("its length");
        let disk = Arc::new(Disk::new(file).expect("a disk"));
        let controller = Controller::start(disk, device_memory).expect("a controller");
        let mut driver = Self {
            memory,
            controller,
            queues: [(0, 0, true); 2],
        };
        driver.controller.set_bus_master(true);
        driver.enable();
        driver
    }

    pub fn enable(&mut self) {
        self.queues = [(0, 0, true); 2];
        self.memory.0.lock()[COMPLETIONS as usize..][..0x2000].fill(0);
        let sizes = u32::from(ENTRIES - 1);
        self.set(0x24, sizes << 16 | sizes);
        self.controller.write(0x28, &SUBMISSIONS.to_le_bytes());
        self.controller.write(0x30, &COMPLETIONS.to_le_bytes());
        self.set(0x14, 0x0046_0001);
        self.wait("ready", |status| status & 1 == 1);
    }

    pub fn set(&self, register: u64, value: u32) {
        self.controller.write(register, &value.to_le_bytes());
    }

    pub fn get(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.controller.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Waits until `done` accepts the status register. `state` names the state in the panic message.
    pub fn wait(&self, state: &str, done: impl Fn(u32) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done(self.get(0x1c)) {
            assert!(Instant::now() < end, "not {state}: {:#x}", self.get(0x1c));
        }
    }

    /// Creates I/O queue 1.
    pub fn make_queues(&mut self) {
        for (opcode, base, flags) in [(5, COMPLETIONS, 1), (1, SUBMISSIONS, 1 << 16 | 1)] {
            let mut command = command(opcode, 0);
            command.prp1 = (base + 0x1000).into();
            command.cdw10 = (u32::from(ENTRIES - 1) << 16 | 1).into();
            command.cdw11 = flags.into();
            assert_eq!(self.run(0, command), (0, 0));
        }
    }

    /// Runs a command. Returns its status, without the phase, and its result.
    pub fn run(&mut self, queue: usize, command: Command) -> (u16, u32) {
        self.submit(queue, command);
        self.answer(queue).expect("an answer within 10 s")
    }

    pub fn submit(&mut self, queue: usize, command: Command) {
        let (tail, ..) = &mut self.queues[queue];
        let at = SUBMISSIONS as usize + queue * 0x1000 + usize::from(*tail) * 64;
        self.memory.0.lock()[at..at + 64].copy_from_slice(command.as_bytes());
        *tail = (*tail + 1) % ENTRIES;
        let tail = *tail;
        self.set(0x1000 + queue as u64 * 8, tail.into());
    }

    /// Waits for the next completion; `None` if the controller stops, or takes 10 s.
    pub fn answer(&mut self, queue: usize) -> Option<(u16, u32)> {
        let (_, head, phase) = &mut self.queues[queue];
        let at = COMPLETIONS as usize + queue * 0x1000 + usize::from(*head) * 16;
        let end = Instant::now() + Duration::from_secs(10);
        let found = loop {
            let bytes = self.memory.0.lock()[at..at + 16].to_vec();
            let found = Completion::read_from_bytes(&bytes).expect("16 bytes");
            if (found.status.get() & 1 == 1) == *phase {
                break found;
            }
            let mut status = [0; 4];
            self.controller.read(0x1c, &mut status);
            if Instant::now() > end || u32::from_le_bytes(status) & 2 == 2 {
                return None;
            }
        };
        *head = (*head + 1) % ENTRIES;
        if *head == 0 {
            *phase = !*phase;
        }
        let head = *head;
        self.set(0x1004 + queue as u64 * 8, head.into());
        assert_eq!(usize::from(found.sq_id.get()), queue);
        Some((found.status.get() & !1, found.result.get()))
    }
}

/// A command; its other fields are zeros.
pub fn command(opcode: u8, nsid: u32) -> Command {
    Command {
        opcode,
        nsid: nsid.into(),
        ..Command::new_zeroed()
    }
}
