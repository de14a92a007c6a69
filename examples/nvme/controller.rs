//! The controller: a worker that executes the commands of the queues, and the registers that wake it.
//!
//! ```text
//! register write ---> State ---wakes---> worker: fetch a command, execute it, complete it
//!   (never waits)     (lock)                     (without the lock)
//! ```
//!
//! The controller gets a new [`Gate`] each time it is enabled, and every access to memory passes the
//! gate. Disabling or resetting the controller closes the gate, and does not wait for the worker. The
//! worker may still execute a command that started before, but that command touches no memory any more.
//!
//! The controller becomes ready after the worker has read the admin queue. If the worker cannot read
//! it, the status says so at once, and the driver need not wait for a command to time out.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use log::{debug, error};
use parking_lot::{Condvar, Mutex};
use vhost_device_iommu::process::peer_event::PeerEvent;
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
    /// The worker has to end. Set while the state is locked.
    ending: AtomicBool,
    work: Condvar,
    disk: Arc<Disk>,
    memory: Arc<dyn Memory>,
    /// The eventfd of each interrupt.
    interrupts: Mutex<Vec<Option<Arc<PeerEvent>>>>,
}

impl Controller {
    /// A controller after a reset.
    ///
    /// # Errors
    /// The worker cannot be started.
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

    /// Reads registers. A register that does not exist reads as zeros.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        let state = self.shared.state.lock();
        // Registers have 4 or 8 bytes; the driver reads them whole or in halves.
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

    /// Writes a register of 4 or 8 bytes, or rings a doorbell. Other writes have no effect.
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

    /// Sets whether the device may reach memory.
    pub fn set_bus_master(&self, may: bool) {
        self.shared.state.lock().set_bus_master(may);
        self.shared.work.notify_one();
    }

    /// Replaces the eventfds of the interrupts from `first` on, which must exist.
    pub fn set_interrupts(&self, first: usize, new: impl Iterator<Item = Option<PeerEvent>>) {
        let mut interrupts = self.shared.interrupts.lock();
        for (place, new) in interrupts.iter_mut().skip(first).zip(new) {
            *place = new.map(Arc::new);
        }
    }

    /// Signals an interrupt.
    pub fn interrupt(&self, vector: usize) {
        self.shared.interrupt(vector);
    }

    /// Resets the controller. The eventfds of interrupts stay.
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
                Task::CheckAdminQueue { gate, address } => self.begin(&gate, address),
                Task::Command(job) => {
                    if let Err(cause) = self.execute(&job) {
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
        if state.is_current(gate) {
            state.set_ready();
        }
    }

    /// Fetches, executes and completes a command.
    ///
    /// # Errors
    /// A queue cannot be reached.
    fn execute(&self, job: &Job) -> Result<(), DmaError> {
        let mut command = Command::new_zeroed();
        let at = Segment {
            address: job.address,
            len: COMMAND_BYTES,
        };
        self.memory.read(&job.gate, &[at], command.as_mut_bytes())?;
        let outcome = if job.queue == 0 {
            self.execute_admin(job, &command)
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

    /// Executes a command of the admin queue. Returns the result for its completion; `None` if it is not
    /// complete yet.
    fn execute_admin(&self, job: &Job, command: &Command) -> Result<Option<u32>, Failure> {
        if command.flags != 0 {
            return Err(Failure::InvalidField);
        }
        let Some(change) = admin::change_of(command) else {
            let (disk, memory) = (&self.disk, &*self.memory);
            return admin::execute(disk, memory, &job.gate, command).map(Some);
        };
        let mut state = self.state.lock();
        // The controller was reset: the command must not change the new queues.
        if !state.is_current(&job.gate) {
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
            if !state.is_current(&job.gate) {
                return Err(DmaError::Closed);
            }
            state.reserve_completion(job)
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
        let event = self.interrupts.lock().get(vector).cloned().flatten();
        if let Some(event) = event
            && let Err(cause) = event.signal()
        {
            warn_limited!("cannot signal interrupt {vector}: {cause}");
        }
    }

    /// A queue cannot be reached: stops the controller until the driver resets it.
    fn fail(&self, gate: &Arc<Gate>, queue: usize, cause: &DmaError) {
        let mut state = self.state.lock();
        if *cause == DmaError::Closed || !state.is_current(gate) {
            return;
        }
        warn_limited!("queue {queue} cannot be reached, and the controller stops: {cause}");
        state.set_fatal();
    }
}
