//! The kept socket of a peer, and what a later process claims of the connection.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::net::Shutdown;

use super::keeper::Keeper;

/// The names of the kept sockets of one peer after the other: each has the number of its connection.
#[derive(Clone, Debug)]
pub struct SocketNames(String);

impl SocketNames {
    /// Names that begin with `prefix`, and the connection's number follows.
    pub fn new(prefix: impl Into<String>) -> Self {
        Self(prefix.into())
    }

    /// The name of the socket of the connection with this number.
    pub fn of(&self, connection: u64) -> String {
        format!("{}{connection}", self.0)
    }

    /// The highest number of a kept connection. There can be an earlier one: a process may die while it releases that.
    pub fn last(&self, keeper: &Keeper) -> Option<u64> {
        let names = keeper.names();
        let numbers = names
            .iter()
            .filter_map(|name| name.strip_prefix(&self.0)?.parse().ok());
        numbers.max()
    }
}

/// What this process has claimed of the connection that an earlier process has left.
#[derive(Debug)]
pub struct Claims<'a> {
    keeper: &'a Keeper,
    names: Vec<String>,
}

impl<'a> Claims<'a> {
    /// Nothing yet.
    pub fn new(keeper: &'a Keeper) -> Self {
        Self {
            keeper,
            names: Vec::new(),
        }
    }

    /// Claims the file with this name.
    ///
    /// # Errors
    /// The keeper does not have it.
    pub fn claim(&mut self, name: &str) -> io::Result<Arc<OwnedFd>> {
        let file = self.keeper.claim(name).ok_or_else(|| missing(name))?;
        self.names.push(name.to_owned());
        Ok(file)
    }

    /// Ends the connection with this socket, and releases everything: nobody goes on with it.
    pub fn refuse(self, socket: &impl AsFd) {
        // The keeper has the socket, too: to close it would not end the connection. Fails if the peer has gone.
        let _ = rustix::net::shutdown(socket, Shutdown::Both);
        self.keeper.release_all(&self.names);
    }
}

/// The keeper does not have a file.
pub fn missing(name: &str) -> io::Error {
    let text = format!(
        "the descriptor {name} was not kept; let the service manager keep more (FileDescriptorStoreMax=1024)"
    );
    io::Error::new(io::ErrorKind::NotFound, text)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn the_last_connection_is_claimed_and_refused_as_a_whole() {
        let (_manager, ours) = UnixDatagram::pair().expect("sockets");
        let (old, _) = UnixStream::pair().expect("sockets");
        let (socket, mut peer) = UnixStream::pair().expect("sockets");
        let (file, _) = UnixStream::pair().expect("sockets");
        let left = [
            ("peer.9".to_owned(), old.into()),
            ("peer.10".to_owned(), socket.into()),
            ("peer.x".to_owned(), file.into()),
        ];
        let keeper = Keeper::new(ours, left).expect("a keeper");
        let names = SocketNames::new("peer.");
        assert_eq!(names.last(&keeper), Some(10));
        assert_eq!(SocketNames::new("other.").last(&keeper), None);
        let mut claims = Claims::new(&keeper);
        let socket = claims.claim(&names.of(10)).expect("it is there");
        claims.claim("peer.x").expect("it is there");
        let refused = claims.claim("peer.11").expect_err("it is not there");
        assert!(refused.to_string().contains("peer.11 was not kept"));
        claims.refuse(&socket);
        let read = peer.read(&mut [0]);
        assert_eq!(read.expect("the connection has ended"), 0);
        assert_eq!(keeper.names(), ["peer.9"]);
    }
}
