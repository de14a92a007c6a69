//! The record of the endpoints that `ctl` has added and removed, which outlives the process.
//!
//! An addition is recorded before the guest can use the endpoint, a removal when nobody can use it any more. While either
//! is in progress, the record says so:
//!
//! | a death in an | leaves | the next process |
//! |---|---|---|
//! | addition, before the record has it | nothing | has no such endpoint |
//! | addition, after that | the addition, in progress | has the endpoint; the one after it has not, if it dies of it |
//! | removal, before its end is recorded | the removal, in progress | has the endpoint, blocked, until it is removed again |
//!
//! The record is read like any hostile bytes; see [`process::record`](crate::process::record).

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{EndpointChanges, MAX_CHANGES, TooManyChanges};
use crate::iommu::GuestOffer;
use crate::process::keeper::Keeper;
use crate::process::record::{Record, RecordFormat, refused};
use crate::topology::PciRange;

/// The version of the contents. Version 1 could not say that removals were forgotten
/// ([`EndpointChanges::has_removals`]); it is read, too.
pub const VERSION: u64 = 2;
/// The record's name at the keeper.
pub const NAME: &str = "hotplug";
const FORMAT: RecordFormat = RecordFormat {
    magic: *b"iovaplug",
    version: VERSION,
    oldest: 1,
    name: "viommu-hotplug",
};
/// The mark of each record that was written.
const WRITTEN: u8 = 1;
/// The most ranges that must be blocked: a few for each change.
const MAX_BLOCKED: usize = 4 * MAX_CHANGES;
/// So many processes may die while they take over an endpoint that was being added.
const MAX_ATTEMPTS: u32 = 1;

/// The change was not recorded. It is refused, and nothing has changed.
#[derive(Debug, Error)]
pub enum RecordError {
    /// There is no room for it.
    #[error(transparent)]
    TooMany(#[from] TooManyChanges),
    /// The system refuses.
    #[error("the change cannot be recorded for a later daemon: {0}; try again")]
    System(#[from] io::Error),
}

/// What is recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordedChanges {
    /// What differs from the file. Includes an addition in progress, and no removal in progress.
    changes: EndpointChanges,
    /// The change in progress.
    pending: Option<PendingChange>,
    /// Endpoints that a process had to block, and whose state in the core does not say so yet.
    blocked: Vec<String>,
    /// The record before was refused, and the core's state does not say so yet.
    is_refused: bool,
    /// The guest's offer; `None` before the first one.
    offer: Option<GuestOffer>,
}

/// A change in progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum PendingChange {
    /// An addition, and how many later processes have begun to take the endpoint over.
    Add { range: String, attempts: u32 },
    /// A removal.
    Remove { range: String },
}

/// The changes of an earlier process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftChanges {
    /// What differs from the file.
    pub changes: EndpointChanges,
    /// The endpoints whose removal was in progress: they must be blocked.
    pub half_removed: Option<PciRange>,
    /// More endpoints that must be blocked: the process before had to, too, and may have died before it did.
    pub blocked: Vec<PciRange>,
    /// That process had refused the record before this one, and with it the whole state.
    pub is_refused: bool,
    /// The endpoints that are not added after all: processes have died of it.
    pub given_up: Option<PciRange>,
    /// The guest's offer.
    pub offer: Option<GuestOffer>,
}

/// The record of this process.
#[derive(Debug, Default)]
pub struct ChangeRecord {
    /// `None` if nothing outlives this process.
    record: Option<Record>,
    now: RecordedChanges,
}

impl ChangeRecord {
    /// A record that ends with this process.
    pub fn unkept() -> Self {
        Self::default()
    }

    /// Goes on with the record that an earlier process has left with the keeper, or has a new one kept.
    ///
    /// # Errors
    /// The record cannot be kept, or the one that was left is refused as a whole: see [`LeftRecordError`].
    pub fn find(keeper: &Keeper) -> Result<(Self, LeftChanges), LeftRecordError> {
        let Some(file) = keeper.claim(NAME) else {
            let new = Self::keep_new(keeper, RecordedChanges::default())?;
            return Ok((new, LeftChanges::default()));
        };
        let adopted = file.try_clone().and_then(Self::adopt);
        adopted.map_err(LeftRecordError::Refused)
    }

    /// Has a new record kept in place of one that is refused.
    ///
    /// # Errors
    /// The system or the keeper refuses.
    pub fn replace_refused(keeper: &Keeper) -> Result<Self, LeftRecordError> {
        let now = RecordedChanges {
            is_refused: true,
            ..RecordedChanges::default()
        };
        Self::keep_new(keeper, now)
    }

    fn keep_new(keeper: &Keeper, now: RecordedChanges) -> Result<Self, LeftRecordError> {
        let made = || -> io::Result<Self> {
            let mut made = Self {
                record: Some(Record::new(&FORMAT)?),
                now,
            };
            made.write()?;
            if let Some(file) = made.file() {
                keeper.keep_as(NAME, file)?;
            }
            Ok(made)
        };
        made().map_err(LeftRecordError::Unkept)
    }

    fn adopt(file: OwnedFd) -> io::Result<(Self, LeftChanges)> {
        let (record, left) = Record::adopt(&FORMAT, file)?;
        let now: RecordedChanges = match left {
            Some(left) => serde_json::from_slice(&left.bytes)
                .map_err(|cause| refused(&format!("it cannot be decoded: {cause}")))?,
            None => RecordedChanges::default(),
        };
        let mut adopted = Self {
            record: Some(record),
            now,
        };
        let left = adopted.settle()?;
        Ok((adopted, left))
    }

    /// Settles the change that was in progress.
    fn settle(&mut self) -> io::Result<LeftChanges> {
        if self.now.blocked.len() > MAX_BLOCKED {
            let count = self.now.blocked.len();
            return Err(refused(&format!(
                "it names {count} blocked ranges, more than {MAX_BLOCKED}"
            )));
        }
        let parsed = |range: &str| {
            let range = range.parse::<PciRange>();
            range.map_err(|cause| refused(&format!("a range cannot be decoded: {cause}")))
        };
        let (mut half_removed, mut given_up) = (None, None);
        match self.now.pending.clone() {
            None => {}
            Some(PendingChange::Remove { range }) => half_removed = Some(parsed(&range)?),
            Some(PendingChange::Add { range, attempts }) => {
                let added = parsed(&range)?;
                let mut additions = self.now.changes.added().iter();
                if !additions.any(|addition| addition.range() == added) {
                    return Err(refused("it lacks the endpoint that was being added"));
                }
                if attempts >= MAX_ATTEMPTS {
                    given_up = Some(added);
                    self.now.changes.forget(added);
                    self.now.pending = None;
                } else {
                    let attempts = attempts.saturating_add(1);
                    self.now.pending = Some(PendingChange::Add { range, attempts });
                }
                self.write()?;
            }
        }
        let blocked = self.now.blocked.iter().map(|range| parsed(range));
        Ok(LeftChanges {
            changes: self.now.changes.clone(),
            half_removed,
            blocked: blocked.collect::<io::Result<_>>()?,
            is_refused: self.now.is_refused,
            given_up,
            offer: self.now.offer,
        })
    }

    /// The memfd; `None` if nothing outlives this process.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.record.as_ref().map(Record::file)
    }

    /// What differs from the file.
    pub fn changes(&self) -> &EndpointChanges {
        &self.now.changes
    }

    /// Notes what this process has taken over, what it must block, and what it offers the guest.
    ///
    /// # Errors
    /// The system refuses, or too much must be blocked. A later process finds the record as it was.
    pub fn settled(
        &mut self,
        changes: EndpointChanges,
        blocked: &[PciRange],
        offer: GuestOffer,
    ) -> io::Result<()> {
        // A process that has died meanwhile has left what this one finds again.
        let blocked: BTreeSet<_> = blocked.iter().map(PciRange::to_string).collect();
        if blocked.len() > MAX_BLOCKED {
            return Err(io::Error::other("too many endpoints must be blocked"));
        }
        self.now.changes = changes;
        self.now.offer = Some(offer);
        self.now.blocked = blocked.into_iter().collect();
        self.now.pending = None;
        self.write()
    }

    /// Notes that the core has blocked what must be blocked, and that its state says so.
    pub fn blocked(&mut self) {
        if !self.now.blocked.is_empty() || self.now.is_refused {
            self.now.blocked.clear();
            self.now.is_refused = false;
            self.write_or_warn("endpoints that must be blocked");
        }
    }

    /// Notes that an endpoint is about to be added. The guest must not be able to use it before.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn begin_addition(&mut self, keys: &str, range: PciRange) -> Result<(), RecordError> {
        let before = self.now.clone();
        self.now.changes.add(keys, range)?;
        self.now.pending = Some(PendingChange::Add {
            range: range.to_string(),
            attempts: 0,
        });
        self.write_or_restore(before)
    }

    /// Notes that the endpoint is added.
    pub fn finish_addition(&mut self) {
        self.now.pending = None;
        self.write_or_warn("the addition of an endpoint");
    }

    /// Notes that the endpoint was not added after all.
    pub fn abandon_addition(&mut self, range: PciRange) {
        self.now.changes.forget(range);
        self.now.pending = None;
        self.write_or_warn("the failed addition of an endpoint");
    }

    /// Notes that endpoints are about to be removed.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn begin_removal(&mut self, range: PciRange) -> Result<(), RecordError> {
        let before = self.now.clone();
        // So that the end of the removal cannot fail for want of room.
        let mut without = self.now.changes.clone();
        without.remove(range)?;
        self.now.pending = Some(PendingChange::Remove {
            range: range.to_string(),
        });
        self.write_or_restore(before)
    }

    /// Notes that the endpoints are removed: nobody can use them any more.
    pub fn finish_removal(&mut self, range: PciRange) {
        // Cannot fail: `begin_removal` has tried it.
        let _ = self.now.changes.remove(range);
        self.now.pending = None;
        self.write_or_warn("the removal of an endpoint");
    }

    /// Notes that the endpoints were not removed after all.
    pub fn abandon_removal(&mut self) {
        self.now.pending = None;
        self.write_or_warn("the failed removal of an endpoint");
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(record) = &mut self.record else {
            return Ok(());
        };
        let json = serde_json::to_vec(&self.now).map_err(io::Error::other)?;
        record.write(&json)?;
        // Otherwise a damaged slot would pass for one that was never written, and the one before it for the newest.
        record.mark(WRITTEN)
    }

    fn write_or_restore(&mut self, before: RecordedChanges) -> Result<(), RecordError> {
        self.write().inspect_err(|_| self.now = before)?;
        Ok(())
    }

    fn write_or_warn(&mut self, what: &str) {
        if let Err(cause) = self.write() {
            log::warn!("a later daemon will find {what} unfinished: {cause}");
        }
    }
}

/// There is no record to go on with.
#[derive(Debug, Error)]
pub enum LeftRecordError {
    /// The record of the process before does not add up.
    #[error(
        "the record of the endpoints that `ctl` has added and removed is refused: {0}; reset the VM, and add and remove the \
         endpoints again"
    )]
    Refused(io::Error),
    /// A new one cannot be kept.
    #[error("the endpoints that `ctl` adds and removes cannot be recorded: {0}")]
    Unkept(io::Error),
}
