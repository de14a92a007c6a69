//! The thread between a client and a server. It waits for nobody: what cannot be sent is kept, and
//! where too much is kept nothing more is taken in from whoever caused it.

mod between;
mod client;
mod peers;
mod server;
mod thread;

pub use self::between::Settings;
pub use self::thread::Interposer;
