//! The descriptors of a reader that outlive this process, so that the next one can end the reader's registration.
//!
//! ```text
//! reader.NUMBER.ENDPOINT.REVOCABLE.epochs     the epoch memory
//! reader.NUMBER.ENDPOINT.REVOCABLE.socket     the daemon's end of the connection
//! reader.NUMBER.ENDPOINT.REVOCABLE.process    the pidfd
//! ```
//!
//! They are kept in this order before the reader gets the page tables, and released in reverse. So a process that dies in
//! between leaves no pidfd without a connection.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::process::{Process, has_hung_up};
use super::wire::epoch_words;
use crate::ids::EndpointId;
use crate::page_table::epoch::is_idle;
use crate::page_table::words::SharedWords;
use crate::process::keeper::Keeper;

/// What the names of a reader's descriptors begin with.
const PREFIX: &str = "reader.";

/// One of a reader's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The epoch memory.
    Epochs,
    /// The daemon's end of the connection.
    Socket,
    /// The pidfd.
    Process,
}

impl Part {
    fn word(self) -> &'static str {
        match self {
            Self::Epochs => "epochs",
            Self::Socket => "socket",
            Self::Process => "process",
        }
    }
}

/// What the names of a reader's descriptors tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReaderIdentity {
    /// The reader's number. The readers of later daemons have higher ones.
    pub number: u64,
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Whether it looks at the revocation words.
    pub is_revocable: bool,
}

impl ReaderIdentity {
    fn name(&self, part: Part) -> String {
        let (number, endpoint) = (self.number, self.endpoint.0);
        let revocable = u8::from(self.is_revocable);
        format!("{PREFIX}{number}.{endpoint}.{revocable}.{}", part.word())
    }

    /// The reader and the part that a name stands for, if any.
    pub fn parse(name: &str) -> Option<(Self, Part)> {
        let mut words = name.strip_prefix(PREFIX)?.split('.');
        let identity = Self {
            number: words.next()?.parse().ok()?,
            endpoint: EndpointId(words.next()?.parse().ok()?),
            is_revocable: words.next()? == "1",
        };
        let parts = [Part::Epochs, Part::Socket, Part::Process];
        let part = parts.into_iter().find(|p| name == identity.name(*p))?;
        Some((identity, part))
    }
}

/// A reader whose descriptors the keeper has.
#[derive(Clone, Debug)]
pub struct KeptReader {
    keeper: Arc<Keeper>,
    /// What their names tell.
    pub identity: ReaderIdentity,
    parts: Vec<Part>,
}

impl KeptReader {
    /// Keeps the descriptors of a reader that has not got the page tables yet.
    ///
    /// # Errors
    /// One of them is not kept, and then none.
    pub fn keep(
        keeper: &Arc<Keeper>,
        identity: ReaderIdentity,
        parts: [(Part, BorrowedFd<'_>); 3],
    ) -> io::Result<Self> {
        let mut kept = Self::left(keeper, identity);
        for (part, file) in parts {
            if let Err(cause) = keeper.keep_as(&identity.name(part), file) {
                kept.release();
                return Err(cause);
            }
            kept.parts.push(part);
        }
        Ok(kept)
    }

    /// A reader that the process before has left, without its parts.
    pub fn left(keeper: &Arc<Keeper>, identity: ReaderIdentity) -> Self {
        Self {
            keeper: keeper.clone(),
            identity,
            parts: Vec::new(),
        }
    }

    /// Claims a part that the process before has left. Call it in the order in which the parts are kept.
    pub fn claim(&mut self, part: Part) -> Option<Arc<OwnedFd>> {
        let file = self.keeper.claim(&self.identity.name(part))?;
        self.parts.push(part);
        Some(file)
    }

    /// Lets the keeper close the descriptors: the reader uses nothing of this daemon any more.
    pub fn release(&self) {
        for part in self.parts.iter().rev() {
            self.keeper.release(&self.identity.name(*part));
        }
    }
}

/// Whether a reader whose registration is being ended uses nothing of its daemon any more, and never will. Its epoch words
/// must be revoked, and the daemon's side of the connection closed for writing.
pub fn has_let_go(
    is_revocable: bool,
    stream: Option<&UnixStream>,
    epochs: Option<&SharedWords>,
    process: Option<&Process>,
) -> bool {
    let has_hung_up = stream.map(has_hung_up);
    if process.is_some_and(Process::is_gone) {
        // Another process may have the connection, and guest memory with it.
        return has_hung_up.unwrap_or(true);
    }
    // An earlier version of the library blocks accesses before it hangs up.
    let begins_none = has_hung_up == Some(true) || is_revocable && epochs.is_some();
    begins_none && epochs.is_none_or(|epochs| is_idle(epoch_words(epochs.words())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::keeper_message::is_name;

    #[test]
    fn a_name_tells_the_reader_and_the_part() {
        let identity = ReaderIdentity {
            number: u64::MAX,
            endpoint: EndpointId(u32::MAX),
            is_revocable: true,
        };
        for part in [Part::Epochs, Part::Socket, Part::Process] {
            let name = identity.name(part);
            assert!(is_name(&name), "{name}");
            assert_eq!(ReaderIdentity::parse(&name), Some((identity, part)));
        }
        for name in [
            "reader.1.2.1.socket.x",
            "reader.1.2.socket",
            "reader.+1.2.1.socket",
            "reader.01.2.1.socket",
            "reader.1.4294967296.1.socket",
            "reader.1.2.2.socket",
            "reader.1.2.1.",
            "arena.1",
        ] {
            assert_eq!(ReaderIdentity::parse(name), None, "{name}");
        }
    }
}
