//! A client whose connection outlives this process: the next process goes on with the same socket, and the client notices
//! nothing.
//!
//! ```text
//! client <--socket--> serve_kept --> ServedDevice
//!            |            |
//!            +--- keeper: the socket, the record, the pipe of the replies, the client's descriptors
//! ```
//!
//! The server answers each message before it looks at the next one. So a message takes these steps:
//!
//! 1. The server looks at the message ([`lookahead`]), which stays in the socket, and notes that it begins.
//! 2. The device executes it, and has its descriptors kept.
//! 3. The reply goes into the pipe.
//! 4. The server records the device's state, if it has changed ([`book`]), and how many bytes it has executed
//!    ([`progress`]). The last is one store to shared memory.
//! 5. It moves the reply from the pipe into the socket.
//! 6. After some messages, it takes them out of the socket.
//!
//! If the process dies before the store of step 4, the next one makes a device of the state before ([`left`]), finds the
//! message in the socket, and executes it: so the device must bear that a message is executed twice. If the process dies
//! later, the next one goes on with step 5 or 6: the pipe has what is unsent of the reply, and if the process was taking
//! messages out, the socket's peek offset says how much of them is still there.
//!
//! A few messages cannot be executed twice ([`ServedDevice::can_repeat`](super::device::ServedDevice::can_repeat)), and a
//! descriptor does not pass through a pipe. If the process dies while it executes or sends one of those, the next one cuts
//! the client off, and says why.

/// In tests, the server may end here, as if the process had died.
macro_rules! step {
    ($server:expr) => {
        #[cfg(test)]
        if $server.steps.dies() {
            return Ok(Some(KeptEnd::Died));
        }
    };
}

mod book;
mod keeping;
mod left;
mod lookahead;
mod progress;
mod serve;
#[cfg(test)]
mod tests;

pub use self::book::VERSION;
pub use self::keeping::ClientKeeping;
pub(super) use self::left::LeftPlace;
pub(super) use self::serve::{KeptEnd, serve_kept};
