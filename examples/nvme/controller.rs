//! The controller: its registers, and the worker that carries out what queues hold.
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
use std::thread::{self, JoinHandle};

use log::{debug, error, warn};
use parking_lot::{Condvar, Mutex};
use zerocopy::{FromZeros, IntoBytes};

use crate::admin;
use crate::command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Completion, Failure, status_of};
use crate::disk::Disk;
use crate::identify::{EVENT_LIMIT, VERSION};
use crate::io as io_commands;
use crate::memory::{DmaError, Gate, Memory, Segment};
use crate::pci::VECTORS;
use crate::prp::PAGE;
use crate::queues::{Completions, MAX_ENTRIES, QUEUES, Submission};

/// Where registers are in BAR 0 (base specification 1.4, section 3.1).
mod register {
    pub const CAPABILITIES: u64 = 0x00;
    pub const VERSION: u64 = 0x08;
    pub const CONFIGURATION: u64 = 0x14;
    pub const STATUS: u64 = 0x1c;
    pub const ADMIN_SIZES: u64 = 0x24;
    pub const ADMIN_SUBMISSION: u64 = 0x28;
    pub const ADMIN_COMPLETION: u64 = 0x30;
    pub const DOORBELLS: u64 = 0x1000;
}

/// Longest queue less one; queues lie together; ready within 10 s; the NVM command set.
const CAPABILITIES: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;
const ENABLE: u32 = 1 << 0;
const SHUTDOWN: u32 = 3 << 14;
const READY: u32 = 1 << 0;
const FATAL: u32 = 1 << 1;
const SHUTDOWN_DONE: u32 = 2 << 2;
/// Bits of CONFIGURATION that must have one value to be enabled: command set, page size,
/// arbitration; and the sizes of entries, which drivers set before there are I/O queues.
const CONFIGURATION_MODE: u32 = 0x3ff0;
const ENTRY_SIZES: u32 = 0x0046_0000;

/// A controller, and its worker.
pub struct Controller {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    disk: Arc<Disk>,
    memory: Arc<dyn Memory>,
    /// What to signal for each interrupt.
    interrupts: Mutex<Vec<Option<OwnedFd>>>,
}

struct State {
    ending: bool,
    /// Whether the device may reach memory at all.
    bus_master: bool,
    configuration: u32,
    status: u32,
    admin_sizes: u32,
    admin_submission: u64,
    admin_completion: u64,
    /// Open while the controller is enabled.
    gate: Arc<Gate>,
    /// Enabled, and not looked at by the worker.
    is_new: bool,
    submissions: [Option<Submission>; QUEUES],
    completions: [Option<Completions>; QUEUES],
    /// The queue whose turn it is.
    turn: usize,
    /// Requests that wait for an event. None ever happens.
    event_requests: u8,
}

/// What the worker is to do.
enum Task {
    /// Look at the admin queue, and be ready.
    Begin { gate: Arc<Gate>, address: u64 },
    /// Carry out a command.
    Command(Job),
}

/// A command that was taken from its queue.
struct Job {
    gate: Arc<Gate>,
    queue: usize,
    /// Where the command is.
    address: u64,
    /// How far its queue has been fetched with it.
    head: u16,
}

impl Controller {
    /// A controller after a reset.
    ///
    /// # Errors
    /// Where there can be no other thread.
    pub fn start(disk: Arc<Disk>, memory: Arc<dyn Memory>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new()),
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
        self.shared.state.lock().bus_master = may;
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
        let mut state = self.shared.state.lock();
        state.gate.close();
        *state = State::new();
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state.lock();
            state.gate.close();
            state.ending = true;
        }
        self.shared.work.notify_all();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            error!("the worker has panicked");
        }
    }
}

impl State {
    fn new() -> Self {
        let gate = Gate::new();
        gate.close();
        Self {
            ending: false,
            bus_master: false,
            configuration: 0,
            status: 0,
            admin_sizes: 0,
            admin_submission: 0,
            admin_completion: 0,
            gate: Arc::new(gate),
            is_new: false,
            submissions: [None; QUEUES],
            completions: [None; QUEUES],
            turn: 0,
            event_requests: 0,
        }
    }

    fn register(&self, at: u64) -> u32 {
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        match at {
            register::CAPABILITIES => low(CAPABILITIES),
            0x04 => low(CAPABILITIES >> 32),
            register::VERSION => VERSION,
            register::CONFIGURATION => self.configuration,
            register::STATUS => self.status,
            register::ADMIN_SIZES => self.admin_sizes,
            register::ADMIN_SUBMISSION => low(self.admin_submission),
            0x2c => low(self.admin_submission >> 32),
            register::ADMIN_COMPLETION => low(self.admin_completion),
            0x34 => low(self.admin_completion >> 32),
            _ => 0,
        }
    }

    fn set_register(&mut self, at: u64, value: u32) {
        let wide = u64::from(value);
        let low = |old: u64| old >> 32 << 32 | wide & !(PAGE as u64 - 1);
        let high = |old: u64| old & 0xffff_ffff | wide << 32;
        match at {
            register::CONFIGURATION => self.configure(value),
            register::ADMIN_SIZES => self.admin_sizes = value & 0x0fff_0fff,
            register::ADMIN_SUBMISSION => self.admin_submission = low(self.admin_submission),
            0x2c => self.admin_submission = high(self.admin_submission),
            register::ADMIN_COMPLETION => self.admin_completion = low(self.admin_completion),
            0x34 => self.admin_completion = high(self.admin_completion),
            register::DOORBELLS.. => self.ring((at - register::DOORBELLS) / 4, value),
            _ => {}
        }
    }

    fn configure(&mut self, new: u32) {
        let old = std::mem::replace(&mut self.configuration, new);
        match (old & ENABLE, new & ENABLE) {
            (0, ENABLE) => self.enable(),
            (ENABLE, 0) => self.disable(),
            _ => {}
        }
        if new & SHUTDOWN == 0 {
            self.status &= !SHUTDOWN_DONE;
        } else {
            // What was completed is in the file; whoever wants more than that sends FLUSH first.
            self.status |= SHUTDOWN_DONE;
        }
    }

    fn enable(&mut self) {
        let size = |field: u32| u16::try_from(field & 0xfff).unwrap_or(0) + 1;
        let (submissions, completions) = (size(self.admin_sizes), size(self.admin_sizes >> 16));
        let lengths = 2..=MAX_ENTRIES;
        if self.configuration & CONFIGURATION_MODE != 0
            || !lengths.contains(&submissions)
            || !lengths.contains(&completions)
        {
            warn!("the driver enables what is not possible");
            self.status |= FATAL;
            return;
        }
        self.gate = Arc::new(Gate::new());
        self.submissions[0] = Some(Submission {
            base: self.admin_submission,
            size: submissions,
            head: 0,
            tail: 0,
            completion: 0,
        });
        self.completions[0] = Some(Completions {
            base: self.admin_completion,
            size: completions,
            head: 0,
            tail: 0,
            phase: true,
            vector: Some(0),
        });
        self.is_new = true;
    }

    fn disable(&mut self) {
        self.gate.close();
        self.submissions = [None; QUEUES];
        self.completions = [None; QUEUES];
        self.event_requests = 0;
        self.is_new = false;
        self.status = 0;
    }

    /// What no driver rings, and what it says that cannot be, has no effect.
    fn ring(&mut self, doorbell: u64, value: u32) {
        let Ok(index) = usize::try_from(doorbell / 2) else {
            return;
        };
        let value = u16::try_from(value).unwrap_or(u16::MAX);
        if doorbell.is_multiple_of(2) {
            if let Some(Some(queue)) = self.submissions.get_mut(index)
                && value < queue.size
            {
                queue.tail = value;
            }
        } else if let Some(Some(queue)) = self.completions.get_mut(index)
            && value < queue.size
        {
            queue.head = value;
        }
    }

    fn next_task(&mut self) -> Option<Task> {
        if std::mem::take(&mut self.is_new) {
            return Some(Task::Begin {
                gate: self.gate.clone(),
                address: self.admin_submission,
            });
        }
        self.next_job().map(Task::Command)
    }

    /// The next command, if its completion has a place. Queues take turns.
    fn next_job(&mut self) -> Option<Job> {
        if self.status & (READY | FATAL) != READY || !self.bus_master {
            return None;
        }
        for step in 0..QUEUES {
            let index = (self.turn + step) % QUEUES;
            let Some(queue) = &mut self.submissions[index] else {
                continue;
            };
            let to = self.completions.get(usize::from(queue.completion));
            if !to.is_some_and(|to| to.as_ref().is_some_and(Completions::has_room)) {
                continue;
            }
            if let Some(address) = queue.take() {
                let head = queue.head;
                self.turn = index + 1;
                return Some(Job {
                    gate: self.gate.clone(),
                    queue: index,
                    address,
                    head,
                });
            }
        }
        None
    }

    /// CREATE I/O COMPLETION QUEUE.
    fn create_completions(&mut self, command: &Command) -> Result<(), Failure> {
        let (index, size) = self.new_queue(command)?;
        if self.completions[index].is_some() {
            return Err(Failure::InvalidQueueIdentifier);
        }
        let flags = command.cdw11.get();
        let vector = u16::try_from(flags >> 16).unwrap_or(u16::MAX);
        if vector >= VECTORS {
            return Err(Failure::InvalidInterruptVector);
        }
        self.completions[index] = Some(Completions {
            base: command.prp1.get(),
            size,
            head: 0,
            tail: 0,
            phase: true,
            vector: (flags & 2 != 0).then_some(vector),
        });
        Ok(())
    }

    /// CREATE I/O SUBMISSION QUEUE.
    fn create_submission(&mut self, command: &Command) -> Result<(), Failure> {
        let (index, size) = self.new_queue(command)?;
        if self.submissions[index].is_some() {
            return Err(Failure::InvalidQueueIdentifier);
        }
        let completion = u16::try_from(command.cdw11.get() >> 16).unwrap_or(u16::MAX);
        let to = self.completions.get(usize::from(completion));
        if completion == 0 || !to.is_some_and(Option::is_some) {
            return Err(Failure::CompletionQueueInvalid);
        }
        self.submissions[index] = Some(Submission {
            base: command.prp1.get(),
            size,
            head: 0,
            tail: 0,
            completion,
        });
        Ok(())
    }

    /// What both kinds have in common: number and length.
    fn new_queue(&self, command: &Command) -> Result<(usize, u16), Failure> {
        let cdw10 = command.cdw10.get();
        let index = usize::try_from(cdw10 & 0xffff).unwrap_or(QUEUES);
        if !(1..QUEUES).contains(&index) {
            return Err(Failure::InvalidQueueIdentifier);
        }
        let size = u16::try_from(cdw10 >> 16).unwrap_or(u16::MAX);
        let size = size
            .checked_add(1)
            .filter(|s| (2..=MAX_ENTRIES).contains(s));
        let size = size.ok_or(Failure::InvalidQueueSize)?;
        if self.configuration & 0x00ff_0000 != ENTRY_SIZES {
            return Err(Failure::InvalidQueueSize);
        }
        // Entries lie together, from the start of a page.
        if command.cdw11.get() & 1 == 0 {
            return Err(Failure::InvalidField);
        }
        if !command.prp1.get().is_multiple_of(PAGE as u64) {
            return Err(Failure::InvalidPrpOffset);
        }
        Ok((index, size))
    }

    fn delete_submission(&mut self, command: &Command) -> Result<(), Failure> {
        let queue = io_queue(&mut self.submissions, command)?;
        *queue = None;
        Ok(())
    }

    fn delete_completions(&mut self, command: &Command) -> Result<(), Failure> {
        let queue = io_queue(&mut self.completions, command)?;
        let index = command.cdw10.get() & 0xffff;
        let mut others = self.submissions.iter().flatten();
        if others.any(|s| u32::from(s.completion) == index) {
            return Err(Failure::InvalidQueueDeletion);
        }
        *queue = None;
        Ok(())
    }

    /// ASYNCHRONOUS EVENT REQUEST: it waits for ever, as no event happens.
    fn take_event_request(&mut self) -> Result<(), Failure> {
        if self.event_requests > EVENT_LIMIT {
            return Err(Failure::TooManyEventRequests);
        }
        self.event_requests += 1;
        Ok(())
    }
}

/// The place of the I/O queue a command means, which exists.
fn io_queue<'a, T>(
    queues: &'a mut [Option<T>; QUEUES],
    command: &Command,
) -> Result<&'a mut Option<T>, Failure> {
    let index = usize::try_from(command.cdw10.get() & 0xffff).unwrap_or(QUEUES);
    let place = queues.get_mut(index).filter(|q| index > 0 && q.is_some());
    place.ok_or(Failure::InvalidQueueIdentifier)
}

impl Shared {
    fn work(&self) {
        loop {
            let task = {
                let mut state = self.state.lock();
                loop {
                    if state.ending {
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
        if Arc::ptr_eq(&state.gate, gate) {
            state.status |= READY;
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
        let change = match command.opcode {
            admin::CREATE_COMPLETION => State::create_completions,
            admin::CREATE_SUBMISSION => State::create_submission,
            admin::DELETE_SUBMISSION => State::delete_submission,
            admin::DELETE_COMPLETION => State::delete_completions,
            admin::EVENT_REQUEST => {
                return self.state.lock().take_event_request().map(|()| None);
            }
            _ => {
                let (disk, memory) = (&self.disk, &*self.memory);
                return admin::execute(disk, memory, &job.gate, command).map(Some);
            }
        };
        let mut state = self.state.lock();
        // Queues of another life are no affair of this command's.
        if !Arc::ptr_eq(&state.gate, &job.gate) {
            return Err(Failure::Internal);
        }
        change(&mut state, command).map(|()| Some(0))
    }

    fn complete(
        &self,
        job: &Job,
        command: &Command,
        outcome: Result<(), Failure>,
        result: u32,
    ) -> Result<(), DmaError> {
        let (address, phase, vector) = {
            let mut state = self.state.lock();
            if !Arc::ptr_eq(&state.gate, &job.gate) {
                return Err(DmaError::Closed);
            }
            let to = state.submissions[job.queue].map_or(0, |queue| queue.completion);
            let to = state.completions.get_mut(usize::from(to));
            // It had room when the command was taken, and only this thread fills it.
            let Some((queue, (address, phase))) = to
                .and_then(Option::as_mut)
                .and_then(|q| Some((q.vector, q.take()?)))
            else {
                return Ok(());
            };
            (address, phase, queue)
        };
        let completion = Completion {
            result: result.into(),
            reserved: 0.into(),
            sq_head: job.head.into(),
            sq_id: u16::try_from(job.queue).unwrap_or(0).into(),
            id: command.id,
            status: (status_of(outcome) | u16::from(phase)).into(),
        };
        let at = Segment {
            address,
            len: COMPLETION_BYTES,
        };
        self.memory.write(&job.gate, &[at], completion.as_bytes())?;
        if let Some(vector) = vector {
            self.interrupt(vector.into());
        }
        Ok(())
    }

    fn interrupt(&self, vector: usize) {
        if let Some(Some(fd)) = self.interrupts.lock().get(vector)
            && let Err(cause) = rustix::io::write(fd, &1u64.to_ne_bytes())
            && cause != rustix::io::Errno::AGAIN
        {
            warn!("cannot raise interrupt {vector}: {cause}");
        }
    }

    /// A queue cannot be reached: nothing goes on before the driver resets the controller.
    fn fail(&self, gate: &Arc<Gate>, queue: usize, cause: &DmaError) {
        let mut state = self.state.lock();
        if *cause == DmaError::Closed || !Arc::ptr_eq(&state.gate, gate) {
            return;
        }
        warn!("queue {queue} cannot be reached, the controller stops: {cause}");
        state.status |= FATAL;
    }
}
