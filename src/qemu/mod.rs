//! QEMU only: its arguments, starting it together with the daemon, and its monitor protocol.

pub mod args;
pub mod launch;
#[cfg(not(miri))]
pub mod qmp;
