//! The controller's registers and queues, and the worker's next task. Nothing here waits or touches
//! memory.

use std::sync::Arc;

use vhost_device_iommu::warn_limited;

use crate::command::{Command, Failure};
use crate::identify::{EVENT_LIMIT, VERSION};
use crate::memory::Gate;
use crate::pci::VECTORS;
use crate::prp::PAGE;
use crate::queues::{Completions, MAX_ENTRIES, QUEUES, Submission};

/// The offsets of registers in BAR 0 (base specification 1.4, section 3.1).
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

/// Maximum queue size less one; contiguous queues required; ready within 10 s; NVM command set.
const CAPABILITIES: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;
const ENABLE: u32 = 1 << 0;
const SHUTDOWN: u32 = 3 << 14;
const READY: u32 = 1 << 0;
const FATAL: u32 = 1 << 1;
const SHUTDOWN_DONE: u32 = 2 << 2;
/// The bits of CONFIGURATION for command set, page size and arbitration, which must be 0 when the
/// controller is enabled.
const CONFIGURATION_MODE: u32 = 0x3ff0;
/// The sizes of entries in CONFIGURATION, which the driver must set before it creates I/O queues.
const ENTRY_SIZES: u32 = 0x0046_0000;

/// Registers and queues.
pub struct State {
    /// Whether the device may reach memory.
    bus_master: bool,
    configuration: u32,
    status: u32,
    admin_sizes: u32,
    admin_submission: u64,
    admin_completion: u64,
    /// Open while the controller is enabled.
    gate: Arc<Gate>,
    /// The controller was enabled, and the worker has not checked the admin queue yet.
    is_new: bool,
    submissions: [Option<Submission>; QUEUES],
    completions: [Option<Completions>; QUEUES],
    /// The submission queue to fetch from next.
    turn: usize,
    /// Pending requests for events, which never happen.
    event_requests: u8,
}

/// A task of the worker.
pub enum Task {
    /// Read the admin queue, and set the controller ready.
    CheckAdminQueue {
        /// The controller's gate.
        gate: Arc<Gate>,
        /// The address of the queue.
        address: u64,
    },
    /// Execute a command.
    Command(Job),
}

/// A command that changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// CREATE I/O COMPLETION QUEUE.
    CreateCompletions,
    /// CREATE I/O SUBMISSION QUEUE.
    CreateSubmission,
    /// DELETE I/O SUBMISSION QUEUE.
    DeleteSubmission,
    /// DELETE I/O COMPLETION QUEUE.
    DeleteCompletions,
    /// ASYNCHRONOUS EVENT REQUEST: it stays pending, since no event happens.
    RequestEvent,
}

/// A command that was fetched from its queue.
pub struct Job {
    /// The controller's gate when the command was fetched.
    pub gate: Arc<Gate>,
    /// The submission queue.
    pub queue: usize,
    /// The address of the command.
    pub address: u64,
    /// The head of its queue after the command was fetched.
    pub head: u16,
}

/// The entry of a completion queue for one completion.
pub struct CompletionSlot {
    /// The address of the entry.
    pub address: u64,
    /// The phase tag: the lowest bit of the completion's status.
    pub phase: bool,
    /// The interrupt to signal afterwards.
    pub vector: Option<u16>,
}

impl State {
    /// The state after a reset.
    pub fn new() -> Self {
        let gate = Gate::new();
        gate.close();
        Self {
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

    /// Resets the state. Commands that have started touch no memory any more.
    pub fn reset(&mut self) {
        self.gate.close();
        *self = Self::new();
    }

    /// Sets whether the device may reach memory.
    pub fn set_bus_master(&mut self, may: bool) {
        self.bus_master = may;
    }

    /// A register of 4 bytes, or half of a register of 8 bytes; 0 if there is none.
    pub fn register(&self, at: u64) -> u32 {
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

    /// Sets a register of 4 bytes, or half of a register of 8 bytes. Read-only registers keep their
    /// value.
    pub fn set_register(&mut self, at: u64, value: u32) {
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
            register::DOORBELLS.. => self.ring_doorbell((at - register::DOORBELLS) / 4, value),
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
            // Completed writes are in the file. A driver that needs them on the medium sends FLUSH first.
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
            warn_limited!("the driver enables the controller with an invalid configuration");
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

    /// Sets a tail or a head. An unknown doorbell or an invalid value has no effect.
    fn ring_doorbell(&mut self, doorbell: u64, value: u32) {
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

    /// Takes the worker's next task; `None` if there is none.
    pub fn next_task(&mut self) -> Option<Task> {
        if std::mem::take(&mut self.is_new) {
            return Some(Task::CheckAdminQueue {
                gate: self.gate.clone(),
                address: self.admin_submission,
            });
        }
        self.next_job().map(Task::Command)
    }

    /// Fetches the next command whose completion has room. Queues take turns.
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

    /// Whether `gate` is the controller's present gate: it was neither disabled nor reset since.
    pub fn is_current(&self, gate: &Arc<Gate>) -> bool {
        Arc::ptr_eq(&self.gate, gate)
    }

    /// Sets the controller ready: the admin queue can be reached.
    pub fn set_ready(&mut self) {
        self.status |= READY;
    }

    /// Stops the controller until the driver resets it.
    pub fn set_fatal(&mut self) {
        self.status |= FATAL;
    }

    /// Reserves the entry for the completion of a command. `None` means that the driver has deleted the
    /// command's queue: there was room when the command was fetched.
    pub fn reserve_completion(&mut self, job: &Job) -> Option<CompletionSlot> {
        let to = self.submissions.get(job.queue)?.as_ref()?.completion;
        let queue = self.completions.get_mut(usize::from(to))?.as_mut()?;
        let (address, phase) = queue.take()?;
        Some(CompletionSlot {
            address,
            phase,
            vector: queue.vector,
        })
    }

    /// Executes a command that changes the state.
    ///
    /// # Errors
    /// The status to complete the command with.
    pub fn change(&mut self, change: Change, command: &Command) -> Result<(), Failure> {
        match change {
            Change::CreateCompletions => self.create_completions(command),
            Change::CreateSubmission => self.create_submission(command),
            Change::DeleteSubmission => self.delete_submission(command),
            Change::DeleteCompletions => self.delete_completions(command),
            Change::RequestEvent => self.take_event_request(),
        }
    }

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

    /// Checks the number and the size of a new queue of either kind.
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
        // Entries are contiguous, from the start of a page.
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

    fn take_event_request(&mut self) -> Result<(), Failure> {
        if self.event_requests > EVENT_LIMIT {
            return Err(Failure::TooManyEventRequests);
        }
        self.event_requests += 1;
        Ok(())
    }
}

/// The I/O queue that a command names, which must exist.
fn io_queue<'a, T>(
    queues: &'a mut [Option<T>; QUEUES],
    command: &Command,
) -> Result<&'a mut Option<T>, Failure> {
    let index = usize::try_from(command.cdw10.get() & 0xffff).unwrap_or(QUEUES);
    let place = queues.get_mut(index).filter(|q| index > 0 && q.is_some());
    place.ok_or(Failure::InvalidQueueIdentifier)
}
