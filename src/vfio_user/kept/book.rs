//! The record of the connections: how far each of them is, and what waits for replies.
//!
//! A commit makes all changes of one handled message count in one store. It writes the positions into the slot of the commit
//! before the last, with the next number, and then stores that number in the header. The commands and regions have the
//! numbers of the commits that have added and ended them, so they change in the same store.
//!
//! The record is read like any hostile bytes. Its checks protect against damage, not against a process that writes on
//! purpose: only the daemon and its keeper have the memfd.

use std::io;
use std::sync::Arc;

use super::layout::{
    AT_COMMIT, AT_MAGIC, AT_VERSION, COMMAND_WORDS, COMMANDS, MAGIC, MAX_KEPT_COMMANDS,
    MAX_REGIONS, REGION_WORDS, REGIONS, SLOT_WORDS, SLOTS, TERMS, TERMS_WORDS, VERSION,
};
use super::memory::Words;
use super::positions::{KeptCommand, KeptTerms, Positions};

/// The place of a command in the record.
pub(in crate::vfio_user) type Place = u8;

/// The record and its present contents.
pub(in crate::vfio_user) struct Book {
    words: Arc<Words>,
    /// What the next commit writes.
    pub now: Positions,
    /// The number of the last commit.
    number: u64,
    /// The places without a command, as bits.
    free: u128,
}

/// What an earlier process has recorded.
#[derive(Debug)]
pub(in crate::vfio_user) struct Recorded {
    pub positions: Positions,
    pub terms: Option<KeptTerms>,
    pub commands: Vec<(Place, KeptCommand)>,
    pub regions: Vec<u64>,
}

impl Book {
    /// Begins an empty record in words that are all 0.
    pub(super) fn new(words: Arc<Words>) -> Self {
        words.set(AT_VERSION, VERSION);
        let mut book = Self {
            words,
            now: Positions::default(),
            number: 0,
            free: u128::MAX,
        };
        book.commit();
        book.words.set(AT_MAGIC, MAGIC);
        book
    }

    /// Reads the record that an earlier process has left, and goes on with it.
    ///
    /// # Errors
    /// It does not add up. It is then refused as a whole.
    pub(super) fn adopt(words: Arc<Words>) -> io::Result<(Self, Recorded)> {
        let refused = |why: &'static str| io::Error::new(io::ErrorKind::InvalidData, why);
        if words.get(AT_MAGIC) != MAGIC {
            return Err(refused("it is not a record"));
        }
        if words.get(AT_VERSION) != VERSION {
            return Err(refused("another version of the daemon has written it"));
        }
        let number = words.get(AT_COMMIT);
        let positions = read_slot(&words, number).ok_or_else(|| refused("its slot is damaged"))?;
        let terms = match positions.terms {
            Some(second) => {
                let terms = read_terms(&words, second);
                Some(terms.ok_or_else(|| refused("its terms are damaged"))?)
            }
            None => None,
        };
        let mut book = Self {
            words,
            now: positions,
            number,
            free: u128::MAX,
        };
        let commands = book.read_commands();
        let commands = commands.ok_or_else(|| refused("a command in it is damaged"))?;
        let regions = book.read_regions();
        let regions = regions.ok_or_else(|| refused("a region in it is damaged"))?;
        let recorded = Recorded {
            positions,
            terms,
            commands,
            regions,
        };
        Ok((book, recorded))
    }

    /// Makes everything that was noted since the last commit count.
    pub(in crate::vfio_user) fn commit(&mut self) {
        let number = self.number + 1;
        let slot = slot_at(number);
        let words = self.now.encode();
        for (index, word) in words.iter().enumerate() {
            self.words.prepare(slot + index, *word);
        }
        self.words
            .prepare(slot + words.len(), check(number, &words));
        self.words.set(AT_COMMIT, number);
        self.number = number;
    }

    /// Notes a command. Returns its place, or `None` if there are too many.
    pub(in crate::vfio_user) fn add_command(&mut self, command: &KeptCommand) -> Option<Place> {
        let place = self.free.trailing_zeros();
        if place as usize >= MAX_KEPT_COMMANDS {
            return None;
        }
        self.free &= !(1 << place);
        let at = COMMANDS + COMMAND_WORDS * place as usize;
        let words = command.encode();
        // It counts no more from here on, and not yet.
        self.words.set(at, 0);
        self.words.prepare(at + 1, 0);
        for (index, word) in words.iter().enumerate() {
            self.words.prepare(at + 2 + index, *word);
        }
        self.words
            .prepare(at + 2 + words.len(), check(self.number + 1, &words));
        self.words.set(at, self.number + 1);
        Place::try_from(place).ok()
    }

    /// Notes that commands have their replies. The next commit must follow at once.
    pub(in crate::vfio_user) fn end_commands(&mut self, places: impl IntoIterator<Item = Place>) {
        for place in places {
            let at = COMMANDS + COMMAND_WORDS * usize::from(place);
            self.words.prepare(at + 1, self.number + 1);
            self.free |= 1 << place;
        }
    }

    /// Notes that no command waits for a reply any more.
    pub(in crate::vfio_user) fn end_all_commands(&mut self) {
        let places = 0..MAX_KEPT_COMMANDS;
        let used = places.filter(|place| self.free & (1 << place) == 0);
        let used: Vec<_> = used
            .filter_map(|place| Place::try_from(place).ok())
            .collect();
        self.end_commands(used);
    }

    /// Notes that the server is told the region that begins at `first`. Returns false if there is no room.
    pub(in crate::vfio_user) fn add_region(&mut self, first: u64) -> bool {
        let mut places = (0..MAX_REGIONS).map(|place| REGIONS + REGION_WORDS * place);
        let number = self.number;
        let is_free =
            |at: &usize| !counts(&self.words, *at, number) && !counts(&self.words, *at, number + 1);
        let Some(at) = places.find(is_free) else {
            return false;
        };
        self.words.set(at, 0);
        self.words.prepare(at + 1, 0);
        self.words.prepare(at + 2, first);
        self.words.prepare(at + 3, check(number + 1, &[first]));
        self.words.set(at, number + 1);
        true
    }

    /// Notes that the server is told no region.
    pub(in crate::vfio_user) fn remove_regions(&mut self) {
        for at in (0..MAX_REGIONS).map(|place| REGIONS + REGION_WORDS * place) {
            if counts(&self.words, at, self.number + 1) {
                self.words.prepare(at + 1, self.number + 1);
            }
        }
    }

    /// Notes what client and server have agreed on.
    ///
    /// # Errors
    /// It is too long.
    pub(in crate::vfio_user) fn set_terms(&mut self, terms: &KeptTerms) -> io::Result<()> {
        let second = self.now.terms != Some(true);
        let at = terms_at(second);
        let mut json = serde_json::to_vec(terms).map_err(io::Error::other)?;
        let len = json.len();
        json.resize(len.next_multiple_of(8), 0);
        let (chunks, _) = json.as_chunks::<8>();
        let words: Vec<_> = chunks
            .iter()
            .map(|word| u64::from_ne_bytes(*word))
            .collect();
        if words.len() + 2 > TERMS_WORDS {
            return Err(io::Error::other("the terms of its connection are too long"));
        }
        self.words.prepare(at, len as u64);
        self.words.prepare(at + 1, check(len as u64, &words));
        for (index, word) in words.iter().enumerate() {
            self.words.prepare(at + 2 + index, *word);
        }
        self.now.terms = Some(second);
        Ok(())
    }

    /// The commands that count. Removes all marks of commits that have not come.
    fn read_commands(&mut self) -> Option<Vec<(Place, KeptCommand)>> {
        let mut commands = Vec::new();
        for place in 0..MAX_KEPT_COMMANDS {
            let at = COMMANDS + COMMAND_WORDS * place;
            if !settle(&self.words, at, self.number) {
                continue;
            }
            let mut words = [0; KeptCommand::WORDS];
            for (index, word) in words.iter_mut().enumerate() {
                *word = self.words.get(at + 2 + index);
            }
            let sum = self.words.get(at + 2 + words.len());
            if sum != check(self.words.get(at), &words) {
                return None;
            }
            self.free &= !(1 << place);
            commands.push((Place::try_from(place).ok()?, KeptCommand::decode(&words)?));
        }
        Some(commands)
    }

    fn read_regions(&mut self) -> Option<Vec<u64>> {
        let mut regions = Vec::new();
        for at in (0..MAX_REGIONS).map(|place| REGIONS + REGION_WORDS * place) {
            if settle(&self.words, at, self.number) {
                let first = self.words.get(at + 2);
                if self.words.get(at + 3) != check(self.words.get(at), &[first]) {
                    return None;
                }
                regions.push(first);
            }
        }
        Some(regions)
    }
}

/// Whether the entry at `at` counts after the commit with this number.
fn counts(words: &Words, at: usize, number: u64) -> bool {
    let (added, ended) = (words.get(at), words.get(at + 1));
    added != 0 && added <= number && (ended == 0 || ended > number)
}

/// Whether the entry at `at` counts. Removes what a commit that has not come would have changed.
fn settle(words: &Words, at: usize, number: u64) -> bool {
    let is_there = counts(words, at, number);
    if !is_there {
        words.set(at, 0);
    }
    words.set(at + 1, 0);
    is_there
}

fn slot_at(number: u64) -> usize {
    SLOTS + if number & 1 == 0 { 0 } else { SLOT_WORDS }
}

fn terms_at(second: bool) -> usize {
    TERMS + if second { TERMS_WORDS } else { 0 }
}

fn read_slot(words: &Words, number: u64) -> Option<Positions> {
    let slot = slot_at(number);
    let mut encoded = [0; Positions::WORDS];
    for (index, word) in encoded.iter_mut().enumerate() {
        *word = words.get(slot + index);
    }
    let is_whole = words.get(slot + encoded.len()) == check(number, &encoded);
    (number > 0 && number < u64::MAX / 2 && is_whole)
        .then(|| Positions::decode(&encoded))
        .flatten()
}

fn read_terms(words: &Words, second: bool) -> Option<KeptTerms> {
    let at = terms_at(second);
    let len = usize::try_from(words.get(at)).ok()?;
    if len > (TERMS_WORDS - 2) * 8 {
        return None;
    }
    let json: Vec<u64> = (0..len.div_ceil(8))
        .map(|index| words.get(at + 2 + index))
        .collect();
    if words.get(at + 1) != check(len as u64, &json) {
        return None;
    }
    let bytes: Vec<u8> = json.iter().flat_map(|word| word.to_ne_bytes()).collect();
    serde_json::from_slice(bytes.get(..len)?).ok()
}

/// A check of words: it detects damage.
#[inline]
fn check(number: u64, words: &[u64]) -> u64 {
    let mix = |sum: u64, word: &u64| {
        (sum ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    };
    words.iter().fold(mix(!0, &number), mix)
}

impl std::fmt::Debug for Book {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut book = f.debug_struct("Book");
        book.field("now", &self.now).finish_non_exhaustive()
    }
}
