//! The endpoints that were added to a running VM, and those that were removed from it: what a later process must change in
//! the file's configuration.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::{Config, ConfigError};
use crate::topology::{PciAddress, PciRange};

/// The most entries: additions, and ranges that were removed. Each one costs a later process time before it serves the guest.
pub const MAX_CHANGES: usize = 1024;

/// There are [`MAX_CHANGES`] changes already. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "the running VM differs from its file in {MAX_CHANGES} endpoints and parts of ranges already; remove whole endpoints \
     that were added, or put the endpoints into the file before the VM starts"
)]
pub struct TooManyChanges;

/// The endpoints that were added and removed since the file was read.
///
/// What is decoded is refused as a whole unless a daemon could have written it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedChanges")]
pub struct EndpointChanges {
    /// Endpoints of the file that were removed. In ascending order; they do not overlap.
    removed: Vec<TextRange>,
    /// In the order of their addition.
    added: Vec<AddedEndpoint>,
    /// Endpoints that `removed` had, and that the file has no more, were removed, too.
    #[serde(skip_serializing_if = "is_false")]
    had_more_removed: bool,
}

/// [`EndpointChanges`] as they are decoded.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UncheckedChanges {
    removed: Vec<TextRange>,
    added: Vec<AddedEndpoint>,
    #[serde(default)]
    had_more_removed: bool,
}

/// Changes that no daemon writes.
#[derive(Debug, Error)]
enum ImplausibleChanges {
    #[error(transparent)]
    TooMany(#[from] TooManyChanges),
    #[error("ranges that were removed overlap, or are in no order")]
    Order,
    #[error("an endpoint has the range {range}, and its keys name {keys}")]
    Keys { range: PciRange, keys: PciRange },
    #[error("parts of the endpoint {0} were removed that it does not have")]
    Parts(PciRange),
}

impl TryFrom<UncheckedChanges> for EndpointChanges {
    type Error = ImplausibleChanges;

    fn try_from(unchecked: UncheckedChanges) -> Result<Self, ImplausibleChanges> {
        let changes = Self {
            removed: unchecked.removed,
            added: unchecked.added,
            had_more_removed: unchecked.had_more_removed,
        };
        // First: it bounds the work of the others.
        changes.check_count()?;
        let in_order = |ranges: &[TextRange]| ranges.is_sorted_by(|a, b| a.0.last() < b.0.first());
        let removed = changes.added.iter().map(|added| &added.removed);
        if !removed
            .chain([&changes.removed])
            .all(|ranges| in_order(ranges))
        {
            return Err(ImplausibleChanges::Order);
        }
        for added in &changes.added {
            let range = added.range();
            // Keys that cannot be read are those of another version: the configuration will refuse this endpoint alone.
            if let Some(keys) = Config::range_of_addition(&added.keys).filter(|keys| *keys != range)
            {
                return Err(ImplausibleChanges::Keys { range, keys });
            }
            let has =
                |gone: &TextRange| range.contains(gone.0.first()) && range.contains(gone.0.last());
            if !added.removed.iter().all(has) || added.is_gone() {
                return Err(ImplausibleChanges::Parts(range));
            }
        }
        Ok(changes)
    }
}

/// An endpoint, or a range of them, that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedEndpoint {
    /// Its keys, see [`Config::with_endpoint`].
    keys: String,
    /// Its functions.
    range: TextRange,
    /// The functions of it that were removed since.
    removed: Vec<TextRange>,
}

// serde passes a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(flag: &bool) -> bool {
    !*flag
}

/// A range that is encoded as its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct TextRange(PciRange);

impl Serialize for TextRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TextRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

/// A configuration with [`EndpointChanges`].
#[derive(Debug)]
pub struct ChangedConfig {
    /// The file's configuration without the endpoints that were removed. It has none of those that were added.
    pub file: Config,
    /// The changes that still apply. [`Config::with_added`] adds their additions to `file`, one after the other.
    pub changes: EndpointChanges,
    /// The configuration with all of them.
    pub whole: Config,
    /// The additions that the file contradicts. Their endpoints must be blocked.
    pub contradictions: Vec<Contradiction>,
}

/// An endpoint that was added cannot be added to the present file's configuration.
#[derive(Debug, Error)]
#[error("endpoint {range}, which `ctl` has added, contradicts the file: {cause}")]
pub struct Contradiction {
    /// The endpoint.
    pub range: PciRange,
    /// Why it is refused.
    pub cause: ConfigError,
}

impl EndpointChanges {
    /// Whether the VM has what the file says.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// Whether endpoints of the start were removed: the guest's offer may be narrower than that of all that are left. True also
    /// if the file has none of these endpoints any more.
    pub fn has_removals(&self) -> bool {
        self.had_more_removed || !self.removed.is_empty()
    }

    /// The additions, in their order.
    pub fn added(&self) -> &[AddedEndpoint] {
        &self.added
    }

    /// Notes that an endpoint was added.
    ///
    /// # Errors
    /// There are too many changes.
    pub fn add(&mut self, keys: &str, range: PciRange) -> Result<(), TooManyChanges> {
        self.added.push(AddedEndpoint {
            keys: keys.to_owned(),
            range: TextRange(range),
            removed: Vec::new(),
        });
        self.check_count().inspect_err(|_| drop(self.added.pop()))
    }

    /// Notes that endpoints were removed, all of one range of the configuration.
    ///
    /// # Errors
    /// There are too many changes.
    pub fn remove(&mut self, range: PciRange) -> Result<(), TooManyChanges> {
        let before = self.clone();
        let first = range.first();
        match self.added.iter_mut().find(|added| added.has(first)) {
            Some(added) => insert(&mut added.removed, range),
            None => insert(&mut self.removed, range),
        }
        self.added.retain(|added| !added.is_gone());
        self.check_count().inspect_err(|_| *self = before)
    }

    /// Forgets an addition: its device cannot be opened any more.
    pub fn forget(&mut self, range: PciRange) {
        self.added.retain(|added| added.range() != range);
    }

    /// The file's configuration with these changes. Changes that the file has made needless are left out: it does not have an
    /// endpoint that was removed any more.
    pub fn apply(&self, file: &Config) -> ChangedConfig {
        let mut removed = Vec::new();
        let mut without = file.clone();
        for TextRange(gone) in &self.removed {
            for part in parts_within(file, *gone) {
                if let Ok(smaller) = without.without_endpoints(part) {
                    without = smaller;
                    insert(&mut removed, part);
                }
            }
        }
        let mut applied = ChangedConfig {
            whole: without.clone(),
            file: without,
            changes: Self {
                had_more_removed: self.had_more_removed || removed != self.removed,
                removed,
                added: Vec::new(),
            },
            contradictions: Vec::new(),
        };
        for added in self.added.iter().take(MAX_CHANGES) {
            // The operator has added it to the file, too. It stays an addition, as which its device was opened.
            applied.leave_out(added);
            match applied.whole.with_added(added) {
                Ok(with) => {
                    applied.whole = with;
                    applied.changes.added.push(added.clone());
                }
                Err(cause) => applied.contradictions.push(Contradiction {
                    range: added.range(),
                    cause,
                }),
            }
        }
        applied
    }

    fn check_count(&self) -> Result<(), TooManyChanges> {
        let parts = self.added.iter().map(|added| 1 + added.removed.len());
        let count = self.removed.len() + parts.sum::<usize>();
        if count > MAX_CHANGES {
            return Err(TooManyChanges);
        }
        Ok(())
    }
}

impl AddedEndpoint {
    /// Its functions, with those that were removed since.
    pub fn range(&self) -> PciRange {
        self.range.0
    }

    /// Its functions that are endpoints: all that were not removed since.
    pub fn present(&self) -> Vec<PciRange> {
        let mut present = vec![self.range()];
        for TextRange(gone) in &self.removed {
            let rest = present.into_iter().flat_map(|range| {
                let is_here = range.contains(gone.first()) && range.contains(gone.last());
                let rest: Vec<_> = if is_here {
                    range.without(*gone).collect()
                } else {
                    vec![range]
                };
                rest
            });
            present = rest.collect();
        }
        present
    }

    fn has(&self, address: PciAddress) -> bool {
        let gone = self.removed.iter().any(|range| range.0.contains(address));
        self.range().contains(address) && !gone
    }

    fn is_gone(&self) -> bool {
        self.present().is_empty()
    }
}

impl ChangedConfig {
    /// Takes an endpoint out of the file's configuration if the file has the same one.
    fn leave_out(&mut self, added: &AddedEndpoint) {
        let Ok(without) = self.file.without_endpoints(added.range()) else {
            return;
        };
        let Ok((with, _)) = without.with_endpoint(&added.keys) else {
            return;
        };
        if is_same_endpoint(&self.file, &with, added.range())
            && let Ok(whole) = self.whole.without_endpoints(added.range())
        {
            self.file = without;
            self.whole = whole;
        }
    }
}

impl Config {
    /// This configuration with an endpoint that was added to a running VM.
    ///
    /// # Errors
    /// See [`Self::with_endpoint`].
    pub fn with_added(&self, added: &AddedEndpoint) -> Result<Self, ConfigError> {
        let (mut with, _) = self.with_endpoint(&added.keys)?;
        for TextRange(gone) in &added.removed {
            if let Ok(without) = with.without_endpoints(*gone) {
                with = without;
            }
        }
        Ok(with)
    }
}

/// Whether two configurations have the same endpoints in a range, with the same devices behind them.
fn is_same_endpoint(one: &Config, other: &Config, range: PciRange) -> bool {
    let described = |config: &Config| {
        let id = range.first().endpoint_id();
        let info = config.topology.endpoint(id)?;
        let group = info.group.and_then(|id| config.topology.group_name(id));
        let devices = &config.devices;
        let at = range.first();
        Some((
            group.cloned(),
            info.reserved.clone(),
            devices.passthrough_at(at).copied(),
            devices.exported_at(at).cloned(),
            devices.emulated_at(at).cloned(),
            devices.kind_of(at),
        ))
    };
    described(one) == described(other)
}

/// The parts of a range that are endpoints of a configuration, each within one of its ranges.
fn parts_within(config: &Config, range: PciRange) -> Vec<PciRange> {
    let parts = config.topology.ranges().filter_map(|entry| {
        let first = entry.range.first().max(range.first());
        let last = entry.range.last().min(range.last());
        PciRange::new(first, last).ok()
    });
    parts.collect()
}

/// Inserts a range, and joins it with those that adjoin or overlap it.
fn insert(ranges: &mut Vec<TextRange>, range: PciRange) {
    ranges.push(TextRange(range));
    ranges.sort_unstable();
    let mut joined: Vec<TextRange> = Vec::with_capacity(ranges.len());
    for &next in &*ranges {
        if let Some(before) = joined.last_mut()
            && let Some(both) = joined_range(before.0, next.0)
        {
            before.0 = both;
        } else {
            joined.push(next);
        }
    }
    *ranges = joined;
}

/// The range of both, if `next` begins within `before` or behind its end.
fn joined_range(before: PciRange, next: PciRange) -> Option<PciRange> {
    let end = u32::from(before.last().bdf()) + 1;
    if u32::from(next.first().bdf()) > end {
        return None;
    }
    PciRange::new(before.first(), before.last().max(next.last())).ok()
}
