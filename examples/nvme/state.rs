//! The controller's registers and queues: what a driver sets, and what is to be done then. Nothing
//! here waits or touches memory.

use std::sync::Arc;

use vhost_device_iommu::warn_limited;

use crate::command::{Command, Failure};
use crate::identify::{EVENT_LIMIT, VERSION};
use crate::memory::Gate;
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

/// Registers and queues.
pub struct State {
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
pub enum Task {
    /// Look at the admin queue, and be ready.
    Begin {
        /// That of the controller's life.
        gate: Arc<Gate>,
        /// Where the queue is.
        address: u64,
    },
    /// Carry out a command.
    Command(Job),
}

/// What commands change here.
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
    /// ASYNCHRONOUS EVENT REQUEST: it waits for ever, as no event happens.
    RequestEvent,
}

/// A command that was taken from its queue.
pub struct Job {
    /// That of the controller's life.
    pub gate: Arc<Gate>,
    /// The submission queue.
    pub queue: usize,
    /// Where the command is.
    pub address: u64,
    /// How far its queue has been fetched with it.
    pub head: u16,
}

/// Where a completion goes.
pub struct Place {
    /// Its address.
    pub address: u64,
    /// What it has in the lowest bit of its status.
    pub phase: bool,
    /// The interrupt to raise then.
    pub vector: Option<u16>,
}

impl State {
    /// As it is after a reset.
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

    /// Everything as it was at first. Commands that were begun touch no memory any more.
    pub fn reset(&mut self) {
        self.gate.close();
        *self = Self::new();
    }

    /// Whether the device may reach memory.
    pub fn set_bus_master(&mut self, may: bool) {
        self.bus_master = may;
    }

    /// A register of 4 bytes, or half of one of 8; zeros where there is none.
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

    /// Sets a register of 4 bytes, or half of one of 8. Others stay as they are.
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
            warn_limited!("the driver enables what is not possible");
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

    /// What is to be done next, if anything is. It is thereby taken.
    pub fn next_task(&mut self) -> Option<Task> {
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

    /// Whether the controller is in the life that `gate` belongs to.
    pub fn is_in_life_of(&self, gate: &Arc<Gate>) -> bool {
        Arc::ptr_eq(&self.gate, gate)
    }

    /// The admin queue can be reached.
    pub fn set_ready(&mut self) {
        self.status |= READY;
    }

    /// Nothing goes on before the driver resets the controller.
    pub fn set_fatal(&mut self) {
        self.status |= FATAL;
    }

    /// The place for the completion of a command, which is thereby taken. There is none where the
    /// command's queue is gone: there was room when the command was taken.
    pub fn take_place(&mut self, job: &Job) -> Option<Place> {
        let to = self.submissions.get(job.queue)?.as_ref()?.completion;
        let queue = self.completions.get_mut(usize::from(to))?.as_mut()?;
        let (address, phase) = queue.take()?;
        Some(Place {
            address,
            phase,
            vector: queue.vector,
        })
    }

    /// Carries out a command that changes queues, or waits for an event.
    ///
    /// # Errors
    /// What the command is completed with.
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
