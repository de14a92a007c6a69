use proptest::prelude::*;

use super::super::layout::AT_VERSION;
use super::super::{KeptCommand, KeptTerms};
use super::*;
use crate::vfio_user::version::{Terms, Version};

fn command(id: u16) -> KeptCommand {
    KeptCommand {
        id,
        header: Header::command(id + 1, Command::RegionRead, 16),
        accesses_nothing: id.is_multiple_of(2),
        body: vec![id as u8; 16],
    }
}

fn terms(windows: u64) -> KeptTerms {
    KeptTerms {
        version: Version::default(),
        answer: Version::default(),
        terms: Terms {
            server_descriptors: 8,
            client_descriptors: 8,
            server_data: 4096,
            windows,
            twin: None,
        },
    }
}

#[test]
fn a_commit_makes_everything_count_at_once() {
    let (kept, _peers) = connect();
    let mut book = Book::new(kept.words());
    let place = book.add_command(&command(1)).expect("room");
    assert!(book.add_region(8 << 43));
    book.set_terms(&terms(1)).expect("short");
    book.now.next_id = 7;
    let before = recorded(&kept).expect("a record");
    assert!(before.commands.is_empty() && before.regions.is_empty() && before.terms.is_none());
    // Reading has removed what did not count: the process before is dead.
    let (mut book, _) = Book::adopt(kept.words()).expect("a record");
    let again = book.add_command(&command(1)).expect("room");
    assert_eq!(again, place);
    assert!(book.add_region(8 << 43));
    book.set_terms(&terms(1)).expect("short");
    book.now.next_id = 7;
    book.commit();
    let after = recorded(&kept).expect("a record");
    assert_eq!(after.commands, [(place, command(1))]);
    assert_eq!(after.regions, [8 << 43]);
    assert_eq!(after.terms, Some(terms(1)));
    assert_eq!(after.positions.next_id, 7);
    let (mut book, _) = Book::adopt(kept.words()).expect("a record");
    book.end_commands([place]);
    book.remove_regions();
    book.set_terms(&terms(2)).expect("short");
    assert_eq!(recorded(&kept).expect("a record").terms, Some(terms(1)));
    let (mut book, left) = Book::adopt(kept.words()).expect("a record");
    assert_eq!((left.commands.len(), left.regions.len()), (1, 1));
    book.end_commands([place]);
    book.remove_regions();
    book.commit();
    let after = recorded(&kept).expect("a record");
    assert!(after.commands.is_empty() && after.regions.is_empty());
}

#[test]
fn places_of_commands_are_used_again_and_are_limited() {
    let (kept, _peers) = connect();
    let mut book = Book::new(kept.words());
    for round in 0..3 {
        let places: Vec<_> = (0..128)
            .map(|id| book.add_command(&command(id + round)).expect("room"))
            .collect();
        assert_eq!(book.add_command(&command(0)), None);
        book.commit();
        assert_eq!(recorded(&kept).expect("a record").commands.len(), 128);
        book.end_commands(places);
        book.commit();
        assert_eq!(recorded(&kept).expect("a record").commands.len(), 0);
    }
}

#[test]
fn other_versions_are_refused() {
    let (kept, _peers) = connect();
    let words = kept.words();
    recorded(&kept).expect_err("nothing");
    let _book = Book::new(words.clone());
    words.set(AT_VERSION, 2);
    let refused = recorded(&kept).expect_err("another version");
    assert!(refused.to_string().contains("version"), "{refused}");
}

proptest! {
    /// Damage of a word is noticed or has no meaning, and nothing panics.
    #[test]
    fn any_words_are_refused_or_adopted(
        damage in proptest::collection::vec((0..3072usize, any::<u64>()), 1..20)
    ) {
        let (kept, _peers) = connect();
        drop(Life::first(&kept));
        let words = kept.words();
        for (at, value) in damage {
            words.set(at, value);
        }
        if let Ok(recorded) = recorded(&kept) {
            prop_assert!(recorded.commands.iter().all(|(_, c)| c.body.len() <= 32));
            for (leg, socket) in [(Leg::Client, &kept.client), (Leg::Server, &kept.server)] {
                let positions = recorded.positions;
                let of = if leg == Leg::Client { positions.client } else { positions.server };
                let (words, socket) = (kept.words(), socket.as_fd());
                let ring = kept.rings[leg.index()].clone();
                let _ = SendRing::adopt(leg, words.clone(), ring, socket, of.committed);
                let record = kept.record.as_fd();
                let _ = KeptInput::adopt(leg, words, record, socket, of.handled);
            }
        }
    }
}
