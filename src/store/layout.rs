//! The layout of the store: the words of the header, the entries of the journal, the records.
//!
//! Words are 64 bits wide. A *sealed* word has a value in its low 48 bits and a check in its high 16 bits. The check
//! covers the value and the word's place, so that a damaged word is noticed: a flipped bit must not put an endpoint into
//! bypass mode.

use std::sync::atomic::{AtomicU64, Ordering};

/// First word of the store.
pub const MAGIC: u64 = u64::from_le_bytes(*b"iova\0sto");
/// The version of this layout. A reader refuses any other version.
pub const VERSION: u64 = 2;

/// Index of the word that holds [`MAGIC`].
pub const HEADER_MAGIC: usize = 0;
/// Index of the word that holds [`VERSION`].
pub const HEADER_VERSION: usize = 1;
/// Index of the word that holds the size of the memory in bytes.
pub const HEADER_BYTES: usize = 2;
/// Index of the word that holds the room for records.
pub const HEADER_RECORDS: usize = 3;
/// Index of the word that holds the room for journal entries, [`JOURNAL_ENTRIES`]; 0 if no journal is kept.
pub const HEADER_ENTRIES: usize = 4;
/// Index of the sealed word that holds the generation: 1 for a daemon that has taken nothing over, and one more for each
/// life after it.
pub const HEADER_GENERATION: usize = 5;
/// Index of the word that says whether the store is whole: [`COMPLETE`], [`SUPERSEDED`], or 0 while it is being written.
pub const HEADER_OWNER: usize = 6;
/// Index of the sealed word that holds the number of record places that were ever used.
pub const HEADER_RECORDS_USED: usize = 7;
/// Index of the sealed word that holds the state of the driver and of `bypass`, see [`GlobalState`](super::GlobalState).
pub const GLOBAL_STATE: usize = 8;
/// Index of the sealed word that holds the negotiated feature bits.
pub const GLOBAL_FEATURES: usize = 9;
/// Index of the first word of the offer, see [`OfferWords`](super::OfferWords).
pub const GLOBAL_OFFER: usize = 10;
/// Index of the sealed word that identifies guest memory: 0 while the mappings in backends are not those of any memory.
pub const GLOBAL_MEMORY: usize = 15;
/// Index of the sealed word that holds the batch: see [`RingBatch`](super::RingBatch).
pub const RING_BATCH: usize = 16;
/// Index of the sealed word that holds the number of entries of the batch whose answers the driver has had before the last
/// ones. The driver's used index has the rest.
pub const RING_PUBLISHED: usize = 17;

/// The store belongs to the latest life, and is whole.
pub const COMPLETE: u64 = u64::from_le_bytes(*b"complete");
/// A later life has taken the store over.
pub const SUPERSEDED: u64 = u64::from_le_bytes(*b"obsolete");

/// Words of the header, which is one page.
pub const HEADER_WORDS: usize = 512;
/// Entries of the journal: the most requests in a batch.
pub const JOURNAL_ENTRIES: usize = 1024;
/// Words of a journal entry: one cache line.
pub const ENTRY_WORDS: usize = 8;
/// Index of the sealed word of an entry that holds phase and status.
pub const ENTRY_PHASE: usize = 0;
/// Index of the word of an entry that holds the rest of its state.
pub const ENTRY_REST: usize = 1;
/// Index of the first word of an entry that holds bytes of the request.
pub const ENTRY_BYTES: usize = 2;
/// Index of the first word of the journal.
pub const JOURNAL_AT: usize = HEADER_WORDS;
/// Words of a record: one cache line.
pub const RECORD_WORDS: usize = 8;
/// Index of the first word of the records.
pub const RECORDS_AT: usize = JOURNAL_AT + JOURNAL_ENTRIES * ENTRY_WORDS;

/// Kind of a record that does not exist.
pub const NO_RECORD: u64 = 0;
/// Kind of a domain's record. Word 1: the ID. Word 2: the offset of the root in the arena, with the number of levels in
/// the low bits, or [`BYPASS_DOMAIN`]. Word 3: the [`check`] of the words 1 and 2.
pub const DOMAIN_RECORD: u64 = u64::from_le_bytes(*b"domain\0\0");
/// Kind of the record of an endpoint that is attached or quarantined. Word 1: the ID. Word 2, sealed: the state.
pub const ENDPOINT_RECORD: u64 = u64::from_le_bytes(*b"endpoint");
/// Kind of the record of a kernel object of a backend. Word 1: the owner. Word 2: the object. Word 3: the [`check`] of the
/// words 1 and 2. Word 4, sealed: the state.
pub const OBJECT_RECORD: u64 = u64::from_le_bytes(*b"backend\0");

/// Word 2 of a bypass domain's record. The offset of a root is never this small.
pub const BYPASS_DOMAIN: u64 = 1;
/// The bits of word 2 of a domain's record that hold the number of levels.
pub const LEVELS_BITS: u64 = 0xfff;

/// The bits of a sealed word that hold the value.
const VALUE_BITS: u32 = 48;
const VALUE: u64 = (1 << VALUE_BITS) - 1;

/// A sealed word with the low 48 bits of `value`. `salt` names the word's place and must not be 0.
#[inline(always)]
pub const fn seal(value: u64, salt: u64) -> u64 {
    let value = value & VALUE;
    value | (check(value, salt) >> VALUE_BITS) << VALUE_BITS
}

/// The value of a sealed word; `None` if the word is damaged.
#[inline(always)]
pub fn unseal(word: u64, salt: u64) -> Option<u64> {
    let value = word & VALUE;
    (seal(value, salt) == word).then_some(value)
}

/// A number that depends on every bit of two words. It protects against damage, not against a forger.
#[inline(always)]
pub const fn check(value: u64, salt: u64) -> u64 {
    // Odd constants, so that no bit of either word is lost.
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xd6e8_feb8_6659_fd93;
    (value ^ salt.wrapping_mul(A)).wrapping_mul(B)
}

/// The word at `index`; 0 outside of the memory.
pub fn load(words: &[AtomicU64], index: usize) -> u64 {
    words
        .get(index)
        .map_or(0, |word| word.load(Ordering::Acquire))
}

/// The salt of the sealed word of an endpoint's record.
pub fn endpoint_salt(id: u32) -> u64 {
    1 << 32 | u64::from(id)
}

/// The salt of the sealed word of an object's record, and its word 3.
pub fn object_check(owner: u64, object: u64) -> u64 {
    // Not 0, which no salt may be.
    check(object, owner) | 1
}

/// The salt of the sealed word of each journal entry: the same for all, so that the word is a constant.
pub const PHASE_SALT: u64 = 2 << 32;

/// The salt of the sealed word of the header at `index`.
#[inline(always)]
pub fn header_salt(index: usize) -> u64 {
    3 << 32 | index as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_word_shows_each_flipped_bit() {
        for value in [0, 1, 0x1234_5678_9abc, VALUE] {
            for salt in [1, endpoint_salt(0x30), header_salt(8)] {
                let word = seal(value, salt);
                assert_eq!(unseal(word, salt), Some(value));
                assert_eq!(unseal(word, salt + 1), None);
                for bit in 0..64 {
                    assert_eq!(unseal(word ^ 1 << bit, salt), None, "bit {bit}");
                }
                assert_eq!(unseal(!word, salt), None);
            }
        }
        assert_eq!(unseal(0, 1), None, "memory that was never written");
    }
}
