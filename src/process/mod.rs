//! What a daemon process needs whatever it serves: sandbox, service manager, sockets, inherited descriptors.

pub mod event_loop;
pub mod inherited;
pub mod ready;
pub mod realtime;
pub mod sandbox;
#[cfg(not(miri))]
pub mod service;
pub mod socket;
#[cfg(not(miri))]
pub mod watchdog;
