//! The record after each step, after damage, and with any text.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::config::Config;
use crate::process::keeper_testing::Manager;

fn range(text: &str) -> PciRange {
    text.parse().expect("a range")
}

/// The record of a next process, with what that process finds.
fn next(record: &ChangeRecord) -> (ChangeRecord, LeftChanges) {
    let file = record.file().expect("kept").try_clone_to_owned();
    ChangeRecord::adopt(file.expect("a copy")).expect("whole")
}

fn record() -> (Manager, ChangeRecord) {
    let mut manager = Manager::new();
    let keeper = manager.keeper();
    let (record, left) = ChangeRecord::find(&keeper).expect("a record");
    assert_eq!(left, LeftChanges::default());
    (manager, record)
}

fn keys(left: &LeftChanges) -> Vec<PciRange> {
    left.changes.added().iter().map(|a| a.range()).collect()
}

const ONE: &str = "address = '01:00.0'";

#[test]
fn changes_outlive_the_process() {
    let (mut manager, mut record) = record();
    record.begin_addition(ONE, range("01:00.0")).expect("room");
    record.finish_addition();
    record.begin_removal(range("00:06.0")).expect("room");
    record.finish_removal(range("00:06.0"));
    let (_, left) = ChangeRecord::find(&manager.keeper()).expect("kept");
    assert_eq!(&left.changes, record.changes());
    assert_eq!((left.half_removed, left.given_up), (None, None));
    assert_eq!(keys(&left), [range("01:00.0")]);
    assert!(left.changes.has_removals());
}

/// The step after which a process dies, and what the next one finds: the endpoints that were added, those that are half
/// removed, and those that are given up.
#[test]
fn a_death_between_two_steps_leaves_a_state_that_the_next_process_knows() {
    type Step = fn(&mut ChangeRecord);
    let at = || range("01:00.0");
    let steps: [(Step, &[&str], Option<&str>); 8] = [
        (
            |r| r.begin_addition(ONE, range("01:00.0")).expect("room"),
            &["01:00.0"],
            None,
        ),
        (|r| r.abandon_addition(range("01:00.0")), &[], None),
        (
            |r| r.begin_addition(ONE, range("01:00.0")).expect("room"),
            &["01:00.0"],
            None,
        ),
        (ChangeRecord::finish_addition, &["01:00.0"], None),
        (
            |r| r.begin_removal(range("01:00.0")).expect("room"),
            &["01:00.0"],
            Some("01:00.0"),
        ),
        (ChangeRecord::abandon_removal, &["01:00.0"], None),
        (
            |r| r.begin_removal(range("01:00.0")).expect("room"),
            &["01:00.0"],
            Some("01:00.0"),
        ),
        (|r| r.finish_removal(range("01:00.0")), &[], None),
    ];
    for deaths in 0..steps.len() {
        let (_manager, mut record) = record();
        for (step, _, _) in &steps[..=deaths] {
            step(&mut record);
        }
        let (_, added, half) = steps[deaths];
        let (mut second, left) = next(&record);
        assert_eq!(
            keys(&left),
            added.iter().copied().map(range).collect::<Vec<_>>()
        );
        assert_eq!(left.half_removed, half.map(range), "step {deaths}");
        assert_eq!(left.given_up, None);
        let in_addition = [0, 2].contains(&deaths);
        if in_addition {
            // The next one dies of the endpoint, too.
            let (third, left) = next(&second);
            assert_eq!((keys(&left), left.given_up), (vec![], Some(at())));
            assert_eq!(next(&third).1.given_up, None);
            second = next(&record).0;
        }
        let (offer, blocked) = (offer(), left.half_removed.as_slice());
        second
            .settled(left.changes.clone(), blocked, offer)
            .expect("written");
        let (mut third, again) = next(&second);
        assert_eq!((again.changes, again.offer), (left.changes, Some(offer)));
        // Blocked until the core has noted that.
        assert_eq!((again.half_removed, &*again.blocked), (None, blocked));
        third.blocked();
        assert_eq!(next(&third).1.blocked, []);
    }
}

fn offer() -> GuestOffer {
    serde_json::from_str(r#"{"first":0,"last":65535,"page_sizes":4096,"probe_size":512}"#)
        .expect("an offer")
}

#[test]
fn a_change_without_room_is_refused_and_leaves_the_record() {
    let (_manager, mut record) = record();
    record.begin_addition(ONE, range("01:00.0")).expect("room");
    record.finish_addition();
    let before = next(&record).1;
    let long = "x".repeat(300 << 10);
    record
        .begin_addition(&long, range("01:01.0"))
        .expect_err("too long");
    assert_eq!(next(&record).1, before);
    record.begin_addition("", range("01:01.0")).expect("room");
}

#[test]
fn a_refusal_stays_until_the_core_has_noted_it() {
    let (mut manager, _) = record();
    let keeper = manager.keeper();
    ChangeRecord::replace_refused(&keeper).expect("kept");
    let (mut next, left) = ChangeRecord::find(&manager.keeper()).expect("kept");
    assert!(left.is_refused);
    next.settled(left.changes, &[], offer()).expect("written");
    let (mut third, left) = ChangeRecord::find(&manager.keeper()).expect("kept");
    assert!(left.is_refused);
    third.blocked();
    let (_, left) = ChangeRecord::find(&manager.keeper()).expect("kept");
    assert!(!left.is_refused);
}

/// A configuration that has everything the record can name.
fn file() -> Config {
    let text = "address = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\n";
    Config::from_text(Path::new("vm.toml"), text).expect("a configuration")
}

fn full() -> (Manager, ChangeRecord) {
    let (manager, mut record) = record();
    record.begin_removal(range("00:06.0")).expect("room");
    record.finish_removal(range("00:06.0"));
    record
        .settled(record.changes().clone(), &[range("00:07.0")], offer())
        .expect("written");
    record.begin_addition(ONE, range("01:00.0")).expect("room");
    (manager, record)
}

/// Reads a copy of the record's memfd after a change of its bytes.
fn damaged(record: &ChangeRecord, damage: impl FnOnce(&File)) -> io::Result<LeftChanges> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let whole = File::from(record.file().expect("kept").try_clone_to_owned()?);
    let copy = memfd_create("copy", MemfdFlags::ALLOW_SEALING)?;
    let copy = File::from(copy);
    let mut bytes = vec![0; usize::try_from(whole.metadata()?.len()).expect("a size")];
    whole.read_exact_at(&mut bytes, 0)?;
    copy.write_all_at(&bytes, 0)?;
    damage(&copy);
    fcntl_add_seals(&copy, SealFlags::SHRINK | SealFlags::GROW)?;
    ChangeRecord::adopt(copy.into()).map(|(_, left)| left)
}

#[test]
fn each_damaged_word_is_refused_or_leaves_what_was_recorded() {
    let (_manager, record) = full();
    let whole = damaged(&record, |_| ()).expect("whole");
    assert!(damaged(&record, |file| file.set_len(4096).expect("shorter")).is_err());
    let mut refusals = 0;
    // The header, and the beginning of both slots: all bytes that are not 0.
    let slots = [4096u64, 4096 + (256 << 10)];
    let places = (0..3).chain(slots.iter().flat_map(|slot| slot / 8..slot / 8 + 70));
    for word in places {
        for bits in [1u64, u64::MAX, 1 << 63] {
            let found = damaged(&record, |file| {
                let mut bytes = [0; 8];
                file.read_exact_at(&mut bytes, word * 8).expect("read");
                let flipped = u64::from_ne_bytes(bytes) ^ bits;
                file.write_all_at(&flipped.to_ne_bytes(), word * 8)
                    .expect("written");
            });
            match found {
                Ok(found) => assert_eq!(found, whole, "word {word}, {bits:#x}"),
                Err(_) => refusals += 1,
            }
        }
    }
    assert!(refusals > 100, "{refusals} refusals");
}

/// What a process makes of a record with this text.
fn read(text: &str) -> io::Result<LeftChanges> {
    let mut raw = Record::new(&FORMAT)?;
    raw.write(text.as_bytes())?;
    ChangeRecord::adopt(raw.file().try_clone_to_owned()?).map(|(_, left)| left)
}

/// Texts that can be decoded, and that no daemon writes.
#[test]
fn a_record_that_does_not_add_up_is_refused_as_a_whole() {
    let addition = |keys: &str, range: &str, removed: &str| {
        format!(r#"{{"keys":"{keys}","range":"{range}","removed":[{removed}]}}"#)
    };
    let record = |removed: &str, added: &str, pending: &str, blocked: &str| {
        format!(
            r#"{{"changes":{{"removed":[{removed}],"added":[{added}]}},"pending":{pending},"blocked":[{blocked}],"is_refused":false,"offer":null}}"#
        )
    };
    let many = |count: usize| {
        let at = |n: usize| format!(r#""{:02x}:{:02x}.{}""#, n >> 8, n >> 3 & 31, n & 7);
        (0..count).map(at).collect::<Vec<_>>().join(",")
    };
    let one = addition(ONE, "01:00.0", "");
    let range = addition(
        "range = '01:00.0-01:00.7'",
        "01:00.0-01:00.7",
        r#""01:00.2""#,
    );
    let pending = r#"{"add":{"range":"01:00.0","attempts":0}}"#;
    let good = [
        record("", "", "null", ""),
        record(r#""00:06.0""#, &one, pending, r#""00:07.0""#),
        record("", &range, "null", ""),
        record(&many(MAX_CHANGES), "", "null", &many(MAX_BLOCKED)),
        // Another version's keys: the configuration refuses this endpoint alone.
        record("", &addition("colour = 'red'", "01:00.0", ""), "null", ""),
    ];
    for text in &good {
        read(text).unwrap_or_else(|cause| panic!("{cause}: {text:.200}"));
    }
    let whole = addition(ONE, "01:00.0", r#""01:00.0""#);
    let outside = addition(ONE, "01:00.0", r#""01:00.1""#);
    let disorder = addition(
        "range = '01:00.0-01:00.7'",
        "01:00.0-01:00.7",
        r#""01:00.2","01:00.1""#,
    );
    let parts = addition(
        "range = '00:00.0-ff:1f.7'",
        "00:00.0-ff:1f.7",
        &many(MAX_CHANGES),
    );
    for (text, why) in [
        (record(&many(MAX_CHANGES + 1), "", "null", ""), "1024"),
        (record("", &parts, "null", ""), "1024"),
        (record(&many(MAX_CHANGES), &one, "null", ""), "1024"),
        (
            record("", "", "null", &many(MAX_BLOCKED + 1)),
            "blocked ranges",
        ),
        (record(r#""00:07.0","00:06.0""#, "", "null", ""), "overlap"),
        (
            record(r#""00:06.0-00:06.3","00:06.3""#, "", "null", ""),
            "overlap",
        ),
        (record("", &disorder, "null", ""), "overlap"),
        (
            record("", &addition(ONE, "01:00.1", ""), "null", ""),
            "its keys name",
        ),
        (record("", &whole, "null", ""), "parts of the endpoint"),
        (record("", &outside, "null", ""), "parts of the endpoint"),
        (record("", "", pending, ""), "being added"),
    ] {
        let refusal = read(&text).expect_err(why).to_string();
        assert!(refusal.contains(why), "{refusal}: {text:.200}");
    }
}

#[test]
fn what_must_be_blocked_is_recorded_once() {
    let (_manager, mut record) = record();
    let twice = [range("00:07.0"), range("00:06.0"), range("00:07.0")];
    record
        .settled(EndpointChanges::default(), &twice, offer())
        .expect("written");
    assert_eq!(
        next(&record).1.blocked,
        [range("00:06.0"), range("00:07.0")]
    );
}

proptest! {
    /// Whatever is recorded, it is refused, or the configuration is one that `ctl` could have made.
    #[test]
    fn any_text_is_refused_or_applied(
        at in 0usize..400, bytes in prop::collection::vec(any::<u8>(), 1..60),
    ) {
        let (_manager, record) = full();
        let mut json = serde_json::to_vec(&record.now).expect("encoded");
        for (byte, new) in json.iter_mut().skip(at).zip(&bytes) {
            *byte = *new;
        }
        let mut raw = Record::new(&FORMAT).expect("a memfd");
        raw.write(&json).expect("room");
        let copy = raw.file().try_clone_to_owned().expect("a copy");
        if let Ok((_, left)) = ChangeRecord::adopt(copy) {
            let applied = left.changes.apply(&file());
            prop_assert!(applied.whole.topology.endpoint_count() <= 65536);
        }
    }
}
