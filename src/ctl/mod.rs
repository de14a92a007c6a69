//! The other end of the control socket: asks a running daemon and renders its answer for people.

mod ask;
mod fields;
mod hotplug;
mod render;
mod watch;

pub use self::ask::{CtlError, ask};
pub use self::render::render;
pub use self::watch::watch;
