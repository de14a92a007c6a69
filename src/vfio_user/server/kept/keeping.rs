//! The means of keeping the connections of one server.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::book::ClientBook;
use super::left::{LeftClient, find};
use crate::process::keeper::Keeper;
use crate::process::life::Life;

/// The means of keeping the connections of a server's clients, one after the other.
pub struct ClientKeeping {
    pub(in super::super) book: ClientBook,
    /// The client of an earlier process, until it is served.
    pub(in super::super) left: Option<LeftClient>,
    /// Where losses are noted.
    life: Arc<Life>,
    #[cfg(test)]
    pub(in super::super) steps: super::tests::Steps,
}

impl ClientKeeping {
    /// Keeps connections with `keeper` under names that begin with `name`.
    ///
    /// # Errors
    /// The system refuses the memfd of the record, or the pipe.
    pub fn new(keeper: Arc<Keeper>, name: &str, life: Arc<Life>) -> io::Result<Self> {
        Ok(Self {
            book: ClientBook::new(keeper, name)?,
            left: None,
            life,
            #[cfg(test)]
            steps: super::tests::Steps::default(),
        })
    }

    /// As [`Self::new`], and goes on with the client that an earlier process has left, if there is one. What cannot be
    /// gone on with is closed and noted in `life`.
    ///
    /// # Errors
    /// See [`Self::new`].
    pub fn find(keeper: Arc<Keeper>, name: &str, life: Arc<Life>) -> io::Result<Self> {
        let found = find(&keeper, name).unwrap_or_else(|cause| {
            log::error!("{cause}");
            life.lose(cause.to_string());
            None
        });
        let Some((book, left)) = found else {
            return Self::new(keeper, name, life);
        };
        Ok(Self {
            book,
            left: Some(left),
            life,
            #[cfg(test)]
            steps: super::tests::Steps::default(),
        })
    }

    /// Whether an earlier process has left a client that has negotiated: the device must go on with it.
    pub fn has_left_device(&self) -> bool {
        self.left.as_ref().is_some_and(|left| left.device.is_some())
    }

    /// Closes the connection that an earlier process has left: it is not gone on with after all.
    pub fn refuse_left(&mut self, why: &str) {
        if let Some(left) = self.left.take() {
            let text = format!(
                "the connection of a vfio-user client to the daemon before is closed, so the VM must be started anew: {why}"
            );
            log::error!("{text}");
            self.lose(text);
            self.close(&left.socket);
        }
    }

    /// A client has connected.
    pub(in super::super) fn open(&mut self, socket: &UnixStream) {
        self.book.open(socket);
    }

    /// Closes the connection of a client. The device must be released.
    pub(in super::super) fn close(&mut self, socket: &UnixStream) {
        // The keeper has the socket, too: to close it would not end the connection. Fails if the client has gone.
        let _ = socket.shutdown(Shutdown::Both);
        self.book.close();
    }

    /// Notes that a client was lost.
    pub(in super::super) fn lose(&self, what: String) {
        self.life.lose(what);
    }
}
