//! Received bytes, in memory that outlives the process.
//!
//! A read lowers the socket's peek offset by the bytes that it takes out of the socket, in the same step, and the kernel
//! keeps the offset with the socket. Nobody reads with `MSG_PEEK`. So the offset tells the next process how many bytes
//! were received in all, and these bytes are in the memfd: recvmsg(2) writes them there.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::crash;
use super::layout::{INPUT_BYTES, LEG_BASE, LEG_REBASE, LEG_SINCE, Leg};
use super::memory::{MappedBytes, Words};
use crate::process::peek::{peek_offset, set_peek_offset};

/// The peek offset before the first byte.
const PEEK_START: u32 = 1 << 30;
/// It is set anew after this many bytes.
const REBASE_AFTER: u64 = 1 << 29;

/// The received bytes of one peer.
pub(in crate::vfio_user) struct KeptInput {
    memory: MappedBytes,
    words: Arc<Words>,
    leg: Leg,
    /// The stream position of the first byte in the memory.
    base: u64,
    /// The stream position after the last received byte.
    received: u64,
    /// The stream position at which the peek offset was [`PEEK_START`].
    since: u64,
    /// The stream position up to which the record says that the messages were handled. Earlier bytes may go.
    handled: u64,
    /// Descriptors that came with bytes before this stream position have died with an earlier process.
    lost_before: u64,
    rebase_after: u64,
}

impl KeptInput {
    /// For a new connection. The record must not say yet that there is one, and nothing may be received before.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn new(
        leg: Leg,
        words: Arc<Words>,
        file: BorrowedFd<'_>,
        socket: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        for word in [LEG_BASE, LEG_SINCE, LEG_REBASE] {
            words.set(leg.word(word), 0);
        }
        set_peek_offset(socket, PEEK_START)?;
        Self::with(leg, words, file)
    }

    fn with(leg: Leg, words: Arc<Words>, file: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            memory: MappedBytes::map(file, leg.input_at(), INPUT_BYTES)?,
            words,
            leg,
            base: 0,
            received: 0,
            since: 0,
            handled: 0,
            lost_before: 0,
            rebase_after: REBASE_AFTER,
        })
    }

    /// The bytes that an earlier process has left, of which `handled` were handled.
    ///
    /// # Errors
    /// They do not add up, or the system refuses.
    pub(super) fn adopt(
        leg: Leg,
        words: Arc<Words>,
        file: BorrowedFd<'_>,
        socket: BorrowedFd<'_>,
        handled: u64,
    ) -> io::Result<Self> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its input is damaged");
        let offset = peek_offset(socket)?.ok_or_else(damaged)?;
        let since = words.get(leg.word(LEG_SINCE));
        let rebase = words.get(leg.word(LEG_REBASE));
        let taken = PEEK_START.checked_sub(offset).ok_or_else(damaged)?;
        let received = match rebase.checked_sub(1) {
            // It was set, and nothing was received since.
            Some(next) if taken == 0 => next,
            Some(next) if since.checked_add(taken.into()) == Some(next) => next,
            Some(_) => return Err(damaged()),
            None => since.checked_add(taken.into()).ok_or_else(damaged)?,
        };
        let mut input = Self::with(leg, words, file)?;
        input.since = since;
        input.base = input.words.get(leg.word(LEG_BASE));
        input.received = received;
        input.handled = handled;
        input.lost_before = received;
        let len = received.checked_sub(input.base).ok_or_else(damaged)?;
        if handled < input.base || handled > received || len > INPUT_BYTES as u64 {
            return Err(damaged());
        }
        if rebase != 0 {
            input.rebase(socket)?;
        }
        Ok(input)
    }

    /// The bytes.
    pub(in crate::vfio_user) fn memory(&self) -> &[u8] {
        self.memory.as_slice()
    }

    /// The same, to receive into.
    pub(in crate::vfio_user) fn memory_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut_slice()
    }

    /// Where the first byte that was not handled is in the memory, and where the last received byte ends.
    pub(in crate::vfio_user) fn unhandled(&self) -> (usize, usize) {
        let at = |position: u64| usize::try_from(position - self.base).unwrap_or(0);
        (at(self.handled), at(self.received))
    }

    /// The stream position of a place in the memory.
    pub(in crate::vfio_user) fn position(&self, at: usize) -> u64 {
        self.base + at as u64
    }

    /// Whether the descriptors of a message that begins at this place in the memory may have died with an earlier process.
    pub(in crate::vfio_user) fn is_before_death(&self, at: usize) -> bool {
        self.position(at) < self.lost_before
    }

    /// The record says that all messages up to this stream position were handled.
    pub(in crate::vfio_user) fn set_handled(&mut self, handled: u64) {
        self.handled = handled;
    }

    /// Counts bytes that were received at the end.
    ///
    /// # Errors
    /// The system refuses to set the peek offset.
    pub(in crate::vfio_user) fn count_in(
        &mut self,
        socket: BorrowedFd<'_>,
        count: usize,
    ) -> io::Result<()> {
        self.received += count as u64;
        if self.received - self.since >= self.rebase_after {
            self.rebase(socket)?;
        }
        crash::check()
    }

    /// Sets the peek offset anew. Nothing is received meanwhile.
    fn rebase(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let rebase = self.leg.word(LEG_REBASE);
        self.words.set(rebase, self.received + 1);
        crash::call()?;
        set_peek_offset(socket, PEEK_START)?;
        self.words.set(self.leg.word(LEG_SINCE), self.received);
        self.words.set(rebase, 0);
        self.since = self.received;
        Ok(())
    }

    /// Moves the bytes that were not handled to the front, unless they would overlap. Returns by how much they have moved.
    pub(in crate::vfio_user) fn make_room(&mut self) -> usize {
        let (first, end) = self.unhandled();
        let len = end - first;
        if first == 0 || len > first || crash::is_dead() {
            return 0;
        }
        self.memory.as_mut_slice().copy_within(first..end, 0);
        self.base += first as u64;
        self.words.set(self.leg.word(LEG_BASE), self.base);
        first
    }

    #[cfg(test)]
    pub(super) fn rebase_every(&mut self, bytes: u64) {
        self.rebase_after = bytes;
    }
}

impl std::fmt::Debug for KeptInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut input = f.debug_struct("KeptInput");
        input.field("leg", &self.leg).finish_non_exhaustive()
    }
}
