//! A store and an arena with any contents: no panic, and no bypass mode where the guest had none.

use std::sync::atomic::Ordering;

use super::bed::{A, ALL, B, Bed, D1, D2, PAGE, Req, Step, settings};
use crate::address::Iova;
use crate::iommu::{Dma, Predecessor, RestoreError};
use crate::page_table::words::SharedWords;
#[cfg(not(miri))]
use crate::page_table::words::{MappedWords, sealed_size};
use crate::store::layout::{HEADER_VERSION, VERSION};
use crate::store::{Loaded, StoreError};

const NEVER: u64 = u64::MAX;

/// A process that has died in the middle of a batch: A is in D1, B in a bypass domain, and endpoints without a domain are
/// blocked.
fn dead() -> Bed {
    let mut bed = Bed::new(1, 0);
    let before = [
        Req::Attach(A, D1, false),
        Req::Map(D1, 1, 3, 7),
        Req::Map(D1, 600, 1, 7),
    ];
    bed.step(&Step::Batch(before.to_vec()), NEVER);
    bed.step(&Step::Batch(vec![Req::Attach(B, D2, true)]), NEVER);
    bed.step(&Step::Bypass(false), NEVER);
    let batch = [Req::Unmap(D1, 600, 1), Req::Map(D1, 9, 2, 7)];
    let (lived, _) = bed.step(&Step::Batch(batch.to_vec()), 24);
    assert!(!lived);
    bed
}

/// Takes over, and checks that nothing but B can be in bypass mode. Returns whether the ring is broken.
fn take_over(bed: &mut Bed) -> Result<bool, RestoreError> {
    let outcome = bed.take_over_damaged();
    for endpoint in ALL {
        let dma = bed.iommu().endpoint(endpoint).expect("an endpoint").dma;
        let had_bypass = endpoint == B;
        assert!(dma != Dma::Bypass || had_bypass, "{endpoint}: {outcome:?}");
        assert!(outcome.is_ok() || dma == Dma::Blocked);
    }
    outcome
}

/// Indices of the words that are not zero.
fn written(memory: &SharedWords) -> Vec<usize> {
    let words = memory.words().iter().enumerate();
    let written = words.filter(|(_, word)| word.load(Ordering::Relaxed) != 0);
    written.map(|(index, _)| index).collect()
}

#[test]
fn each_damaged_word_of_the_store_is_refused_or_harmless() {
    assert!(matches!(take_over(&mut dead()), Ok(false)));
    let words = written(&dead().left[0].1);
    assert!(words.len() > 40, "{} words", words.len());
    let (mut refused, mut taken) = (0, 0);
    for index in words {
        for mask in [u64::MAX, 1, 2, 1 << 8, 1 << 31, 1 << 32, 1 << 47, 1 << 63] {
            let mut bed = dead();
            let store = bed.left[0].1.clone();
            let word = &store.words()[index];
            SharedWords::set(word, word.load(Ordering::Relaxed) ^ mask);
            let last = bed.left.len() - 1;
            assert_eq!(last, 0);
            match crate::store::newest(&[store.words()]) {
                // The supervisor has no complete store: the daemon starts anew.
                None => refused += 1,
                Some(_) => match take_over(&mut bed) {
                    Ok(false) => taken += 1,
                    // The chain differs from the journal.
                    Ok(true) | Err(_) => refused += 1,
                },
            }
        }
    }
    assert!(refused > 4 * taken, "{refused} refused, {taken} taken");
}

#[test]
fn each_damaged_entry_of_the_arena_is_refused_or_another_mapping() {
    let words = written(&dead().left[0].0);
    for index in words {
        for bit in 0..64 {
            let mut bed = dead();
            let arena = bed.left[0].0.clone();
            let word = &arena.words()[index];
            SharedWords::set(word, word.load(Ordering::Relaxed) ^ 1 << bit);
            let _ = take_over(&mut bed);
        }
    }
}

#[test]
fn a_store_of_another_version_or_size_is_refused() {
    let bed = dead();
    let store = &bed.left[0].1;
    let whole = store.words();
    assert!(Loaded::read(whole).is_ok());
    for len in [0, 1, 8, 511, 512, whole.len() / 2, whole.len() - 1] {
        assert!(Loaded::read(&whole[..len]).is_err(), "{len} words");
    }
    SharedWords::set(&whole[HEADER_VERSION], VERSION + 1);
    let found = VERSION + 1;
    assert_eq!(Loaded::read(whole), Err(StoreError::Version { found }));
    assert_eq!(settings().last_domain, 15);
}

#[test]
fn a_store_is_taken_over_once() {
    let mut bed = dead();
    let old = bed.left[0].clone();
    assert!(take_over(&mut bed).is_ok());
    assert_eq!(Loaded::read(old.1.words()), Err(StoreError::NotNewest));
}

/// The arena is sealed against further writable mappings, as it is once a reader has it.
#[cfg(not(miri))]
#[test]
fn a_process_that_has_the_descriptors_alone_goes_on() {
    let mut bed = dead();
    let (arena, store) = bed.left[0].clone();
    let seals = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
    arena.add_seals(seals).expect("sealed");
    let map = |memory: &SharedWords, protection| {
        let bytes = sealed_size(memory.fd()).expect("sealed");
        MappedWords::map(memory.fd(), bytes, protection)
    };
    let both = libc::PROT_READ | libc::PROT_WRITE;
    assert!(map(&arena, both).is_err(), "nobody can write to the arena");
    let arena = map(&arena, libc::PROT_READ).expect("mapped");
    let store = map(&store, both).expect("mapped");
    let restored = bed.take_over_from(Predecessor {
        arena: arena.as_slice(),
        store: store.as_slice(),
    });
    let restored = restored.expect("restored");
    assert_eq!((restored.generation, restored.domains), (2, 2));
    // The batch is finished: page 600 is unmapped, and page 9 is mapped.
    let mappings: Vec<_> = bed.iommu().mappings(D1, Iova(0)).collect();
    let first = mappings.iter().map(|m| m.range.first().0);
    assert_eq!(first.collect::<Vec<_>>(), [PAGE, 9 * PAGE]);
}
