//! Each reason for which the memory of an earlier process is refused. `docs/errors.md` lists their texts.

use std::sync::atomic::{AtomicU64, Ordering};

use super::bed::{A, Bed, D1, Req, Step, settings, topology};
use crate::iommu::{Iommu, Predecessor, RestoreError, Settings};
use crate::page_table::Format;
use crate::page_table::layout::{Entry, HEADER_MAGIC, x86};
use crate::page_table::words::SharedWords;
use crate::store::StoreError;
use crate::store::layout::{DOMAIN_RECORD, ENDPOINT_RECORD, RECORD_WORDS};

/// A process that has died between two batches: A is in D1, which has a mapping of three pages.
fn dead() -> Bed {
    let mut bed = Bed::new(0, 0);
    let batch = [Req::Attach(A, D1, false), Req::Map(D1, 1, 3, 7)];
    assert!(bed.step(&Step::Batch(batch.to_vec()), u64::MAX).0);
    bed
}

/// The refusal of the memory after `damage` of arena and store.
fn refusal(settings: Settings, damage: impl FnOnce(&[AtomicU64], &[AtomicU64])) -> RestoreError {
    let (arena, store) = dead().left[0].clone();
    damage(arena.words(), store.words());
    let mut iommu = Iommu::successor(settings, topology()).expect("memory");
    let outcome = iommu.restore(Predecessor {
        arena: arena.words(),
        store: store.words(),
    });
    let mut third = Iommu::successor(settings, topology()).expect("memory");
    let again = third.restore(Predecessor {
        arena: iommu.arena().memory().words(),
        store: iommu.store().memory().words(),
    });
    again.expect("the state of a daemon that has refused one");
    for iommu in [&iommu, &third] {
        assert!(iommu.is_driver_unknown(), "everything is blocked");
        assert!(iommu.is_next_driver_foreign(), "whatever its ring's index");
    }
    outcome.expect_err("refused")
}

fn position(words: &[AtomicU64], is: impl Fn(u64) -> bool) -> usize {
    let mut words = words.iter().map(|word| word.load(Ordering::Relaxed));
    words.position(is).expect("the word is there")
}

#[test]
fn a_store_with_two_records_of_an_endpoint_is_refused() {
    let refused = refusal(settings(), |_, store| {
        let domain = position(store, |word| word == DOMAIN_RECORD);
        let endpoint = position(store, |word| word == ENDPOINT_RECORD);
        for offset in 0..RECORD_WORDS {
            let word = store[endpoint + offset].load(Ordering::Relaxed);
            SharedWords::set(&store[domain + offset], word);
        }
    });
    let twice = matches!(refused, RestoreError::Store(StoreError::Twice(_)));
    assert!(twice, "{refused}");
}

#[test]
fn an_arena_without_its_header_is_refused() {
    let refused = refusal(settings(), |arena, _| {
        SharedWords::set(&arena[HEADER_MAGIC], 1);
    });
    assert!(matches!(refused, RestoreError::Arena(_)), "{refused}");
}

#[test]
fn a_mapping_without_one_of_its_pages_is_refused() {
    let refused = refusal(settings(), |arena, _| {
        let first = position(arena, |word| {
            let (entry, format) = (Entry::from_bits(word), Format::X86FirstStage);
            entry.has(x86::DIRTY) && entry.is_first(format) && !entry.is_last(format)
        });
        SharedWords::set(&arena[first + 1], 0);
    });
    let torn = matches!(refused, RestoreError::Torn { domain: D1, .. });
    assert!(torn, "{refused}");
}

#[test]
fn another_offer_is_refused() {
    let other = Settings {
        last_domain: 14,
        ..settings()
    };
    let refused = refusal(other, |_, _| {});
    assert!(matches!(refused, RestoreError::Offer), "{refused}");
}

/// The driver has read how long its buffer for PROBE must be.
#[test]
fn another_room_for_reserved_regions_is_refused() {
    let (arena, store) = dead().left[0].clone();
    let mut iommu = Iommu::successor(settings(), topology()).expect("memory");
    iommu.offer_probe_size(1024);
    let refused = iommu.restore(Predecessor {
        arena: arena.words(),
        store: store.words(),
    });
    let refused = refused.expect_err("another size");
    assert!(matches!(refused, RestoreError::Offer), "{refused}");
}

#[test]
fn an_arena_that_is_too_small_is_refused() {
    let small = Settings {
        // The header and a root.
        arena_limit: 8192,
        ..settings()
    };
    let refused = refusal(small, |_, _| {});
    assert!(matches!(refused, RestoreError::OutOfFrames(_)), "{refused}");
}

#[test]
fn a_core_that_is_in_use_restores_nothing() {
    let (arena, store) = dead().left[0].clone();
    let mut iommu = Iommu::new(settings(), topology()).expect("memory");
    let refused = iommu.restore(Predecessor {
        arena: arena.words(),
        store: store.words(),
    });
    assert!(matches!(refused, Err(RestoreError::NotNew)));
}
