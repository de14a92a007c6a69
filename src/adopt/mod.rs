//! The helper that takes a VMM's open VFIO devices out of the VMM's process for the daemon of its VM.
//!
//! A VMM that shares its devices with the daemon must have the same open files of `/dev/iommu` and of the devices' nodes.
//! If no common parent has passed these on, the helper duplicates them with `pidfd_getfd`:
//!
//! ```text
//!   VMM ------ vhost-user ------> daemon
//!    ^                              | the VMM's socket, the wanted devices
//!    | pidfd_getfd                  v
//!    +---------------------------- helper (CAP_SYS_PTRACE)
//! ```
//!
//! The helper trusts neither of the two. It asks the kernel who is at the other end of its own connection, and lets this
//! daemon ask for the devices of its own VM's file alone (`policy`). It asks the kernel who is at the other end of the
//! VMM's socket (`peer`). It tells descriptors apart by the numbers of their devices in sysfs, on duplicates that the
//! VMM cannot change any more (`pick`). [`server`] puts this together, and [`message`] has the messages.
//!
//! A subcommand and not a program of its own: it uses the reader of configurations and of sysfs, and an installation has one
//! program to replace. A process that runs as the helper never is a daemon.

mod error;
pub mod message;
mod peer;
mod pick;
mod policy;
pub mod server;
#[cfg(test)]
mod tests;

pub use error::AdoptError;
pub use policy::Policy;

/// The most devices that a daemon can ask for at once.
pub const MAX_DEVICES: usize = 64;
