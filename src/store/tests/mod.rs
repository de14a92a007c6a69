//! The death of the daemon after each of its stores, and the life after it: from nothing but the bytes of both memfds, with
//! a guest and a kernel that have noticed nothing.
#![allow(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]

mod bed;
mod changed;
mod exhaustive;
mod formats;
mod host;
mod hostile;
mod kernel;
mod later;
mod model;
mod random;
mod refusals;
