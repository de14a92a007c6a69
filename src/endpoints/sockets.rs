//! The access rights of sockets, from the configuration to the system's terms.

use crate::config::SocketAccess;
use crate::process::socket::SocketRights;

/// The rights of a socket's file with the configured access.
pub fn rights(access: SocketAccess) -> SocketRights {
    SocketRights {
        mode: access.mode,
        group: access.group,
    }
}
