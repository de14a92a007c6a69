//! From the configuration to opened parts: one module for each kind of endpoint.

pub mod emulated;
pub mod exported;
#[cfg(not(miri))]
pub mod hotplug;
pub mod passthrough;
#[cfg(not(miri))]
pub mod shadow;
