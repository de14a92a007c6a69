//! Readers that the daemon before has admitted: their registration must end before this daemon serves a request.
//!
//! They walk the page tables of the daemon before, which nobody changes any more. An UNMAP that this daemon answers would
//! not reach them.
//!
//! 1. [`LeftReaders::claim`] takes their descriptors from the keeper, revokes their epoch words and closes its side of their
//!    connections. The library then lets the page tables go and registers with this daemon.
//! 2. [`LeftReaders::end`] waits until none of them has an access in progress, for all together. It kills those that are
//!    not ready within the time that a reader has for an UNMAP.
//! 3. [`Registry::take_over`](super::Registry::take_over) gets those that cannot be killed: UNMAP fails for their endpoints
//!    while they live.
//!
//! A reader without an access in progress is ready at once, even if it is stopped: it looks at the revocation word before
//! its next access. One that was built with an earlier version of the library must hang up.

use std::collections::BTreeSet;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::info;

use super::kept::{KeptReader, Part, ReaderIdentity, has_let_go};
use super::process::{Process, peer_user};
use super::registry::{EndedReaders, Limits, Reader};
use super::wire::{EPOCH_BYTES, revoke};
use crate::error_limited;
use crate::page_table::words::SharedWords;
use crate::process::keeper::Keeper;

/// How often the readers are looked at before the thread lets other threads run.
const SPINS: u32 = 2000;
/// The sleep between two looks after that.
const NAP: Duration = Duration::from_micros(50);
/// How long a process that a killed reader was just starting may have the reader's connection.
const EXEC: Duration = Duration::from_millis(200);

/// The readers of the daemon before, which begin no access any more.
#[derive(Debug)]
pub struct LeftReaders {
    readers: Vec<LeftReader>,
}

/// Ends the registrations of all readers of the daemon before. Takes as long as the slowest reader, up to
/// [`Limits::patience`] and, if one must be killed, [`Limits::exit`] after that.
pub fn end_readers(keeper: &Arc<Keeper>, limits: &Limits) -> EndedReaders {
    LeftReaders::claim(keeper).end(limits)
}

impl LeftReaders {
    /// Claims the readers that the daemon before has left with the keeper. From now on they begin no access.
    pub fn claim(keeper: &Arc<Keeper>) -> Self {
        // Not those that this daemon has admitted meanwhile.
        let names = keeper.unclaimed();
        let identities = names.iter().filter_map(|name| ReaderIdentity::parse(name));
        let identities: BTreeSet<_> = identities.map(|(identity, _)| identity).collect();
        let readers = identities.into_iter();
        let readers = readers.map(|identity| LeftReader::claim(KeptReader::left(keeper, identity)));
        Self {
            readers: readers.collect(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.readers.is_empty()
    }

    /// Waits until the registrations have ended. Kills readers that are too slow.
    pub fn end(self, limits: &Limits) -> EndedReaders {
        let mut ended = EndedReaders::default();
        let mut left = self.readers;
        if left.is_empty() {
            return ended;
        }
        let begun = Instant::now();
        collect(&mut left, &mut ended, begun + limits.patience);
        for reader in &left {
            ended.killed += u64::from(reader.kill());
        }
        let exit = Instant::now() + limits.exit;
        while left.iter().any(LeftReader::is_running) && Instant::now() < exit {
            std::thread::sleep(NAP);
        }
        collect(&mut left, &mut ended, Instant::now() + EXEC);
        info!(
            "{} readers of the daemon before have let its page tables go, {} of them were killed; it took {:?}",
            ended.ended,
            ended.killed,
            begun.elapsed()
        );
        for reader in left {
            reader.become_stuck(&mut ended);
        }
        ended
    }
}

/// Waits until all readers have let go, but not beyond `until`. Removes those that have.
fn collect(left: &mut Vec<LeftReader>, ended: &mut EndedReaders, until: Instant) {
    for round in 0u32.. {
        left.retain(|reader| {
            let has_let_go = reader.has_let_go();
            if has_let_go {
                reader.kept.release();
                ended.ended += 1;
            }
            !has_let_go
        });
        if left.is_empty() || Instant::now() >= until {
            break;
        }
        if round < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

/// A reader of the daemon before, with the parts of it that were kept and are what their names say.
#[derive(Debug)]
struct LeftReader {
    kept: KeptReader,
    stream: Option<UnixStream>,
    epochs: Option<SharedWords>,
    process: Option<Process>,
}

impl LeftReader {
    fn claim(mut kept: KeptReader) -> Self {
        let mut file = |part| -> Option<OwnedFd> { kept.claim(part)?.try_clone().ok() };
        let epochs = file(Part::Epochs).and_then(|file| SharedWords::adopt(file, EPOCH_BYTES).ok());
        let stream = file(Part::Socket).map(UnixStream::from);
        let stream = stream.filter(|stream| peer_user(stream).is_ok());
        let process = file(Part::Process);
        let process = process.and_then(|file| Process::adopt(file, stream.as_ref()).ok());
        // The daemon may have died before it kept the pidfd.
        let process = process.or_else(|| Process::of_peer(stream.as_ref()?).ok());
        if let Some(epochs) = &epochs {
            revoke(epochs.words());
        }
        if let Some(stream) = &stream {
            // Only this direction: the other one shows when the reader hangs up. Fails if it has.
            let _ = stream.shutdown(Shutdown::Write);
        }
        Self {
            kept,
            stream,
            epochs,
            process,
        }
    }

    fn has_let_go(&self) -> bool {
        // The daemon died before the reader got the page tables.
        let was_never_registered = self.stream.is_none() && self.process.is_none();
        was_never_registered
            || has_let_go(
                self.kept.identity.is_revocable,
                self.stream.as_ref(),
                self.epochs.as_ref(),
                self.process.as_ref(),
            )
    }

    fn is_running(&self) -> bool {
        self.process.as_ref().is_some_and(|p| !p.is_gone())
    }

    /// Kills the process if it runs. Returns whether it was killed.
    fn kill(&self) -> bool {
        let ReaderIdentity {
            number, endpoint, ..
        } = self.kept.identity;
        let Some(process) = self.process.as_ref().filter(|p| !p.is_gone()) else {
            return false;
        };
        error_limited!(
            "reader {number} of endpoint {endpoint} does not let the page tables of the daemon before go: its process \
             is killed"
        );
        match process.kill() {
            Ok(()) => true,
            Err(cause) => {
                error_limited!("the process of reader {number} cannot be killed: {cause}");
                false
            }
        }
    }

    /// It may use the old page tables for ever.
    fn become_stuck(self, ended: &mut EndedReaders) {
        let ReaderIdentity {
            number, endpoint, ..
        } = self.kept.identity;
        error_limited!(
            "reader {number} of endpoint {endpoint} may still use the page tables of the daemon before: UNMAP fails for \
             the endpoint; end that process"
        );
        match (self.stream, self.epochs, self.process) {
            (Some(stream), Some(epochs), Some(process)) => {
                let reader = Reader::left(self.kept, stream, epochs, process);
                ended.stuck.push(Arc::new(reader));
            }
            _ => {
                ended.lost.insert(endpoint);
            }
        }
    }
}
