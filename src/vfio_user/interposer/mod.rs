//! The thread between a client and a server. It waits for nobody: what cannot be sent is kept, and
//! where too much is kept nothing more is taken in from whoever caused it.

mod client;
mod peers;
mod proxy;
mod server;
mod thread;

pub use self::proxy::InterposerSettings;
pub use self::thread::Interposer;
