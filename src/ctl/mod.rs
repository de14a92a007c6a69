//! `ctl`, the client of the control socket: queries a running daemon and renders its answer as text.

mod ask;
mod fields;
mod hotplug;
mod places;
mod render;
mod watch;

pub use self::ask::{CtlError, ask, send};
pub use self::render::render;
pub use self::watch::watch;
