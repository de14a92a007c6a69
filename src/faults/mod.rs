//! Refused accesses: the queue on their way to the guest, and the log of the latest ones.

pub mod log;
pub mod queue;
