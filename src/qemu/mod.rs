//! Code for QEMU only: its arguments and its monitor protocol.

pub mod args;
#[cfg(not(miri))]
mod lines;
pub mod pci_tree;
#[cfg(not(miri))]
pub mod qmp;
#[cfg(not(miri))]
pub mod resolve;
