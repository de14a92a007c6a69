//! Code for QEMU only: its arguments, a launcher for it and the daemon, and its monitor protocol.

pub mod args;
pub mod launch;
#[cfg(not(miri))]
pub mod qmp;
