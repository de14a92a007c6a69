//! A later process whose hardware wants page tables in another format.

use super::bed::{A, Bed, D1, Req, Step, settings, topology};
use crate::address::{Iova, Mapping};
use crate::iommu::{Iommu, Predecessor, RestoreError, Settings};
use crate::page_table::layout::FRAME_BYTES;
use crate::page_table::{ArenaError, Encoding, Format, MapRefusal};

const ARM: Encoding = Encoding {
    format: Format::Vmsav8Stage1,
    base: 1 << 40,
};

/// A process that has died between two batches: A is in D1, which has a mapping of three pages to page 7.
fn dead() -> Bed {
    let mut bed = Bed::new(0, 0);
    let batch = [Req::Attach(A, D1, false), Req::Map(D1, 1, 3, 7)];
    assert!(bed.step(&Step::Batch(batch.to_vec()), u64::MAX).0);
    bed
}

fn successor(encoding: Encoding) -> Iommu {
    let settings = Settings {
        encoding,
        ..settings()
    };
    Iommu::successor(settings, topology()).expect("memory")
}

fn mappings(iommu: &Iommu) -> Vec<Mapping> {
    iommu.mappings(D1, Iova(0)).collect()
}

#[test]
fn page_tables_of_another_format_are_taken_over() {
    let (arena, store) = dead().left[0].clone();
    let mut first = successor(Encoding::default());
    let restored = first.restore(Predecessor {
        arena: arena.words(),
        store: store.words(),
    });
    assert_eq!(restored.expect("the same format").mappings, 1);
    let expected = mappings(&first);
    assert_eq!(expected.len(), 1);
    // To Arm's format, to another place, and back.
    let moved = Encoding {
        base: 2 << 40,
        ..ARM
    };
    let mut lives = vec![first];
    for encoding in [ARM, moved, Encoding::default()] {
        let mut next = successor(encoding);
        let before = lives.last().expect("a life");
        let restored = next.restore(Predecessor {
            arena: before.arena().memory().words(),
            store: before.store().memory().words(),
        });
        assert_eq!(restored.expect("restored").mappings, 1, "{encoding:?}");
        assert_eq!(next.arena().encoding(), encoding);
        assert_eq!(mappings(&next), expected);
        lives.push(next);
    }
}

/// Hardware would let the device reach the tables.
#[test]
fn page_tables_that_would_lie_in_the_target_of_a_mapping_are_not_made() {
    let (arena, store) = dead().left[0].clone();
    let mut iommu = successor(Encoding {
        base: 8 * FRAME_BYTES,
        ..ARM
    });
    let refused = iommu.restore(Predecessor {
        arena: arena.words(),
        store: store.words(),
    });
    let cause = MapRefusal::TargetsTables;
    let expected =
        matches!(&refused, Err(RestoreError::Refused { domain: D1, cause: c }) if *c == cause);
    assert!(expected, "{refused:?}");
    assert!(iommu.is_driver_unknown(), "everything is blocked");
}

#[test]
fn a_format_without_the_offered_addresses_is_refused() {
    let settings = Settings {
        address_width: 49,
        encoding: ARM,
        ..settings()
    };
    let refused = Iommu::successor(settings, topology())
        .err()
        .expect("five levels");
    assert!(
        matches!(refused, ArenaError::TooWide { bits: 49, most: 48 }),
        "{refused}"
    );
}
