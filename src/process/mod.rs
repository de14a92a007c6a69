//! The process of the daemon: sandbox, service manager, watchdog, sockets, connections, inherited descriptors, budgets of peers. Nothing
//! here depends on the virtio device.

pub mod closer;
pub mod connector;
pub mod event_loop;
pub mod fatal;
pub mod handover;
pub mod inherited;
pub mod keeper;
pub mod keeper_message;
#[cfg(test)]
pub(crate) mod keeper_testing;
pub mod left_connection;
pub mod life;
#[cfg(not(miri))]
pub mod peek;
pub mod peer_event;
pub mod rate_limit;
pub mod ready;
pub mod realtime;
#[cfg(not(miri))]
pub mod record;
#[cfg(not(miri))]
pub mod reply_pipe;
pub mod sandbox;
#[cfg(not(miri))]
pub mod service;
pub mod socket;
#[cfg(not(miri))]
pub mod supervisor;
pub mod unkept;
#[cfg(not(miri))]
pub mod unread;
pub mod wait_budget;
#[cfg(not(miri))]
pub mod watchdog;
