//! The client gets each reply exactly once, and the device has executed each message exactly once, wherever processes die.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::KeptEnd;
use super::Steps;
use super::bed::{Ended, IDLE, Pace, Sent, live, run_client};
use crate::process::keeper_testing::Manager;
use crate::vfio_user::message::Command;

/// All that the script writes.
const SUM: u64 = 5 + 7 + 300;

fn script() -> Vec<Sent> {
    vec![
        Sent::version(),
        Sent::new(Command::DeviceGetInfo, &[0; 16]),
        Sent::read(0, 8),
        Sent::write(0, &[2, 3]),
        Sent::map(0x1000, true),
        Sent::write(0, &[7]).posted(),
        Sent::read(0, 8),
        Sent::map(0x2000, false),
        Sent::map(0x3000, true),
        Sent::read(9, 8),
        Sent::unmap(0x1000),
        // The same message twice: each must count.
        Sent::write(0, &[100, 50]),
        Sent::write(0, &[100, 50]),
        Sent::unmap(0x1000),
        Sent::read(0, 40),
    ]
}

/// The lives that serve one client. Life number `n` dies at the step `deaths[n]`. Returns the client's replies, and the last
/// life.
fn lives(deaths: &[usize], pace: Pace) -> (Vec<Vec<u8>>, Ended, usize) {
    let mut manager = Manager::new();
    let writes = Arc::new(AtomicUsize::new(0));
    let (client, socket) = UnixStream::pair().expect("sockets");
    let client = std::thread::spawn(move || run_client(&client, &script(), pace));
    let mut socket = Some(socket);
    let mut died = 0;
    let last = loop {
        let step = deaths.get(died).copied().unwrap_or(0);
        let ended = live(&mut manager, socket.take(), Steps::until(step), &writes);
        let ended = ended.expect("a client is left");
        if !ended.lost.is_empty() {
            // Two deaths in one message, by the script.
            assert!(
                ended.lost[0].contains("2 daemons have ended"),
                "{:?}",
                ended.lost
            );
            break ended;
        }
        if !matches!(ended.end, Ok(KeptEnd::Died)) {
            break ended;
        }
        died += 1;
    };
    let replies = client.join().expect("the client");
    // A connection that is refused takes its record along.
    if last.lost.is_empty() {
        assert_eq!(manager.names(), IDLE);
    }
    (replies, last, died)
}

fn expected() -> Vec<Vec<u8>> {
    let (replies, last, _) = lives(&[], Pace::OneByOne);
    assert!(matches!(last.end, Ok(KeptEnd::HungUp)), "{:?}", last.end);
    assert_eq!(last.sum, SUM);
    assert_eq!(replies.len(), script().len() - 1);
    replies
}

#[test]
fn every_reply_comes_once_wherever_the_process_dies() {
    let expected = expected();
    for pace in [Pace::OneByOne, Pace::AllAtOnce, Pace::Bytewise] {
        for step in 1.. {
            let (replies, last, died) = lives(&[step], pace);
            assert_eq!(last.lost, [""; 0]);
            assert_eq!(replies, expected, "step {step}, {pace:?}");
            assert_eq!(last.sum, SUM, "step {step}, {pace:?}");
            if died == 0 {
                assert!(step > 90, "{step} steps");
                break;
            }
        }
    }
}

#[test]
fn every_reply_comes_once_if_many_processes_die() {
    let expected = expected();
    let (mut whole, mut cut_off) = (0, 0);
    for first in 1..20 {
        for second in 1..12 {
            let deaths = [first, second, 1, second, first, 3];
            for pace in [Pace::OneByOne, Pace::AllAtOnce] {
                let (replies, last, died) = lives(&deaths, pace);
                if last.lost.is_empty() {
                    whole += 1;
                    assert_eq!(replies, expected, "{deaths:?}");
                    assert_eq!((last.sum, died), (SUM, 6), "{deaths:?}");
                } else {
                    cut_off += 1;
                    assert!(expected.starts_with(&replies), "{deaths:?}");
                }
            }
        }
    }
    assert!(whole > 50 && cut_off > 20, "{whole} {cut_off}");
}

/// A process that dies while it executes a message may die of it.
#[test]
fn a_message_that_ends_two_processes_is_not_executed_again() {
    for (steps, is_cut_off) in [
        ([3, 3], true),
        ([2, 4], true),
        ([3, 1], false),
        ([1, 3], false),
    ] {
        let mut manager = Manager::new();
        let writes = Arc::new(AtomicUsize::new(0));
        let (client, socket) = UnixStream::pair().expect("sockets");
        let script = || vec![Sent::version(), Sent::read(0, 8)];
        let client = std::thread::spawn(move || run_client(&client, &script(), Pace::OneByOne));
        let first = live(&mut manager, Some(socket), Steps::until(steps[0]), &writes);
        assert!(matches!(first.expect("a client").end, Ok(KeptEnd::Died)));
        let second = live(&mut manager, None, Steps::until(steps[1]), &writes);
        assert!(matches!(second.expect("a client").end, Ok(KeptEnd::Died)));
        let third = live(&mut manager, None, Steps::default(), &writes).expect("a client");
        let replies = client.join().expect("the client");
        if is_cut_off {
            assert!(
                third.lost[0].contains("2 daemons have ended"),
                "{:?}",
                third.lost
            );
            assert_eq!(replies.len(), 0);
        } else {
            assert_eq!((third.lost.len(), replies.len()), (0, 2), "{steps:?}");
        }
    }
}

/// A write that must not be repeated, and a reply that does not fit into the pipe: the client gets all replies up to it, and
/// then either the rest or the end.
#[test]
fn what_cannot_be_done_twice_is_done_at_most_once() {
    let scripts: [fn() -> Vec<Sent>; 2] = [
        || vec![Sent::version(), Sent::write(1, &[9]), Sent::read(0, 8)],
        || vec![Sent::version(), Sent::read(2, 200_000), Sent::read(0, 8)],
    ];
    for script in scripts {
        let (mut cut_off, mut whole) = (0, 0);
        for step in 1.. {
            let mut manager = Manager::new();
            let writes = Arc::new(AtomicUsize::new(0));
            let (client, socket) = UnixStream::pair().expect("sockets");
            let client = std::thread::spawn(move || run_client(&client, &script(), Pace::OneByOne));
            let first = live(&mut manager, Some(socket), Steps::until(step), &writes);
            let has_died = matches!(first.expect("a client").end, Ok(KeptEnd::Died));
            let mut lost = Vec::new();
            if has_died {
                let second = live(&mut manager, None, Steps::default(), &writes);
                lost = second.expect("a client").lost;
            }
            let replies = client.join().expect("the client");
            assert!(writes.load(Ordering::Relaxed) <= 1, "step {step}");
            assert_eq!(manager.names().len(), if lost.is_empty() { 3 } else { 2 });
            if lost.is_empty() {
                whole += 1;
                assert_eq!(replies.len(), 3, "step {step}");
            } else {
                cut_off += 1;
                assert!(lost[0].contains("must not be executed twice"), "{lost:?}");
                assert!((1..3).contains(&replies.len()), "step {step}");
            }
            if !has_died {
                break;
            }
        }
        assert!((1..8).contains(&cut_off) && whole > 15, "{cut_off} {whole}");
    }
}

#[test]
fn a_client_that_has_gone_meanwhile_is_released() {
    let mut manager = Manager::new();
    let writes = Arc::default();
    let (client, socket) = UnixStream::pair().expect("sockets");
    let thread = std::thread::spawn(move || {
        run_client(
            &client,
            &[Sent::version(), Sent::map(0, true)],
            Pace::AllAtOnce,
        );
    });
    // In the middle of the second message.
    let first = live(&mut manager, Some(socket), Steps::until(11), &writes);
    assert!(matches!(first.expect("a client").end, Ok(KeptEnd::Died)));
    assert!(manager.names().iter().any(|name| name == "file.0"));
    drop(thread);
    let second = live(&mut manager, None, Steps::default(), &writes);
    // It has left its replies unread, or has hung up.
    assert!(second.is_some());
    assert_eq!(manager.names(), IDLE);
    assert!(live(&mut manager, None, Steps::default(), &writes).is_none());
}

#[test]
fn damaged_words_are_refused() {
    // No word counts so many bytes. A number that could be one does no harm as the mark of a message that must not be
    // repeated, unless it is that of the message that has begun.
    let cases = (0..6usize).map(|word| (word, (1u64 << 62) + 1));
    for (word, value) in cases.chain([(1, 0xee_eeee), (2, 0xee_eeee), (5, 0xee_eeee)]) {
        let mut manager = Manager::new();
        let writes = Arc::default();
        let (client, socket) = UnixStream::pair().expect("sockets");
        let client = std::thread::spawn(move || run_client(&client, &script(), Pace::OneByOne));
        live(&mut manager, Some(socket), Steps::until(40), &writes).expect("a client");
        manager.with_files(|files| {
            let record = files["test-record"].try_clone().expect("a copy");
            let record = std::fs::File::from(record);
            let at = 64 + 8 * word as u64;
            std::os::unix::fs::FileExt::write_all_at(&record, &value.to_ne_bytes(), at)
                .expect("written");
        });
        let next = live(&mut manager, None, Steps::default(), &writes).expect("a client");
        let is_accepted = (word, value) == (2, 0xee_eeee);
        assert_eq!(next.lost.is_empty(), is_accepted, "word {word}");
        let replies = client.join().expect("the client");
        let all = script().len() - 1;
        assert_eq!(replies.len() == all, next.lost.is_empty(), "word {word}");
    }
}
