//! The controller: the worker that carries out what queues hold, and who tells it to.
//!
//! ```text
//! register write ---> State ---wakes---> worker: take a command, carry it out, complete it
//!   (never waits)     (lock)                     (without the lock)
//! ```
//!
//! Each time it is enabled, the controller gets a new [`Gate`]. All accesses to memory pass it, and
//! whoever disables or resets the controller closes it: from then on no command that was begun
//! before touches memory, though it may not be done yet. So nobody waits for the worker.
//!
//! The controller is ready once the worker has looked at the admin queue. Where that cannot be
//! reached, the status says so at once, and the driver need not wait for a command to time out.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use log::{debug, error};
use parking_lot::{Condvar, Mutex};
use vhost_device_iommu::warn_limited;
use zerocopy::{FromZeros, IntoBytes};

use crate::admin;
use crate::command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Completion, Failure, status_of};
use crate::disk::Disk;
use crate::io as io_commands;
use crate::memory::{DmaError, Gate, Memory, Segment};
use crate::pci::VECTORS;
use crate::state::{Change, Job, State, Task};

/// A controller, and its worker.
pub struct Controller {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// The worker is to end. Set with the state locked.
    ending: AtomicBool,
    work: Condvar,
    disk: Arc<Disk>,
    memory: Arc<dyn Memory>,
    /// What to signal for each interrupt.
    interrupts: Mutex<Vec<Option<OwnedFd>>>,
}

impl Controller {
    /// A controller after a reset.
    ///
    /// # Errors
    /// Where there can be no other thread.
    pub fn start(disk: Arc<Disk>, memory: Arc<dyn Memory>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new()),
            ending: AtomicBool::new(false),
            work: Condvar::new(),
            disk,
            memory,
            interrupts: Mutex::new((0..VECTORS).map(|_| None).collect()),
        });
        let working = shared.clone();
        let worker = thread::Builder::new().name("worker".into());
        let worker = worker.spawn(move || working.work())?;
        Ok(Self {
            shared,
            worker: Some(worker),
        })
    }

    /// Reads registers. Those that are not there, and all that comes after, are zeros.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        let state = self.shared.state.lock();
        // Registers have 4 or 8 bytes, and are read whole or by halves.
        for (bytes, index) in into.chunks_mut(4).zip(0..) {
            let at = at.saturating_add(index * 4);
            let value = if at.is_multiple_of(4) {
                state.register(at)
            } else {
                0
            };
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
        }
    }

    /// Writes a register of 4 or 8 bytes, or rings a doorbell. Everything else has no effect.
    pub fn write(&self, at: u64, from: &[u8]) {
        let mut state = self.shared.state.lock();
        match *from {
            [a, b, c, d] => state.set_register(at, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                state.set_register(at, u32::from_le_bytes([a, b, c, d]));
                let later = at.saturating_add(4);
                state.set_register(later, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        drop(state);
        self.shared.work.notify_one();
    }

    /// Whether the device may reach memory.
    pub fn set_bus_master(&self, may: bool) {
        self.shared.state.lock().set_bus_master(may);
        self.shared.work.notify_one();
    }

    /// Replaces what is signalled for interrupts from `first` on. The numbers exist.
    pub fn set_interrupts(&self, first: usize, new: impl Iterator<Item = Option<OwnedFd>>) {
        let mut interrupts = self.shared.interrupts.lock();
        for (place, new) in interrupts.iter_mut().skip(first).zip(new) {
            *place = new;
        }
    }

    /// Raises an interrupt as if something had happened.
    pub fn interrupt(&self, vector: usize) {
        self.shared.interrupt(vector);
    }

    /// Everything as it was at first. The descriptors of interrupts stay.
    pub fn reset(&self) {
        self.shared.state.lock().reset();
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state.lock();
            state.reset();
            self.shared.ending.store(true, Ordering::Relaxed);
        }
        self.shared.work.notify_all();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            error!("the worker has panicked");
        }
    }
}

impl Shared {
    fn work(&self) {
        loop {
            let task = {
                let mut state = self.state.lock();
                loop {
                    if self.ending.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Some(task) = state.next_task() {
                        break task;
                    }
                    self.work.wait(&mut state);
                }
            };
            match task {
                Task::Begin { gate, address } => self.begin(&gate, address),
                Task::Command(job) => {
                    if let Err(cause) = self.carry_out(&job) {
                        self.fail(&job.gate, job.queue, &cause);
                    }
                }
            }
        }
    }

    fn begin(&self, gate: &Arc<Gate>, address: u64) {
        let first = Segment {
            address,
            len: COMMAND_BYTES,
        };
        if let Err(cause) = self.memory.read(gate, &[first], &mut [0; COMMAND_BYTES]) {
            return self.fail(gate, 0, &cause);
        }
        let mut state = self.state.lock();
        if state.is_in_life_of(gate) {
            state.set_ready();
        }
    }

    /// # Errors
    /// Where a queue cannot be reached.
    fn carry_out(&self, job: &Job) -> Result<(), DmaError> {
        let mut command = Command::new_zeroed();
        let at = Segment {
            address: job.address,
            len: COMMAND_BYTES,
        };
        self.memory.read(&job.gate, &[at], command.as_mut_bytes())?;
        let outcome = if job.queue == 0 {
            self.administer(job, &command)
        } else {
            let (disk, memory) = (&self.disk, &*self.memory);
            io_commands::execute(disk, memory, &job.gate, &command).map(|()| Some(0))
        };
        if let Err(failure) = outcome {
            let opcode = command.opcode;
            debug!(
                "queue {}: command {opcode:#x} fails: {failure:?}",
                job.queue
            );
        }
        let (outcome, result) = match outcome {
            Ok(None) => return Ok(()),
            Ok(Some(result)) => (Ok(()), result),
            Err(failure) => (Err(failure), 0),
        };
        self.complete(job, &command, outcome, result)
    }

    /// Carries out a command of the admin queue. It is not complete where there is no result.
    fn administer(&self, job: &Job, command: &Command) -> Result<Option<u32>, Failure> {
        if command.flags != 0 {
            return Err(Failure::InvalidField);
        }
        let Some(change) = admin::change_of(command) else {
            let (disk, memory) = (&self.disk, &*self.memory);
            return admin::execute(disk, memory, &job.gate, command).map(Some);
        };
        let mut state = self.state.lock();
        // Queues of another life are no affair of this command's.
        if !state.is_in_life_of(&job.gate) {
            return Err(Failure::Internal);
        }
        state.change(change, command)?;
        Ok((change != Change::RequestEvent).then_some(0))
    }

    fn complete(
        &self,
        job: &Job,
        command: &Command,
        outcome: Result<(), Failure>,
        result: u32,
    ) -> Result<(), DmaError> {
        let place = {
            let mut state = self.state.lock();
            if !state.is_in_life_of(&job.gate) {
                return Err(DmaError::Closed);
            }
            state.take_place(job)
        };
        let Some(place) = place else { return Ok(()) };
        let completion = Completion {
            result: result.into(),
            reserved: 0.into(),
            sq_head: job.head.into(),
            sq_id: u16::try_from(job.queue).unwrap_or(0).into(),
            id: command.id,
            status: (status_of(outcome) | u16::from(place.phase)).into(),
        };
        let at = Segment {
            address: place.address,
            len: COMPLETION_BYTES,
        };
        self.memory.write(&job.gate, &[at], completion.as_bytes())?;
        if let Some(vector) = place.vector {
            self.interrupt(vector.into());
        }
        Ok(())
    }

    fn interrupt(&self, vector: usize) {
        if let Some(Some(fd)) = self.interrupts.lock().get(vector)
            && let Err(cause) = rustix::io::write(fd, &1u64.to_ne_bytes())
            && cause != rustix::io::Errno::AGAIN
        {
            warn_limited!("cannot raise interrupt {vector}: {cause}");
        }
    }

    /// A queue cannot be reached: nothing goes on before the driver resets the controller.
    fn fail(&self, gate: &Arc<Gate>, queue: usize, cause: &DmaError) {
        let mut state = self.state.lock();
        if *cause == DmaError::Closed || !state.is_in_life_of(gate) {
            return;
        }
        warn_limited!("queue {queue} cannot be reached, the controller stops: {cause}");
        state.set_fatal();
    }
}
