//! Interrupts: the client sets up, masks and removes events.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::bed::{Bed, INTX, MSI, MSIX, eventually};
use crate::connection::{Connection, RESET, SET_IRQS, irqs};

const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENT: u32 = 4;
const MASK: u32 = 8;
const UNMASK: u32 = 0x10;
const TRIGGER: u32 = 0x20;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an event")
}

/// Whether the event was raised since the last call.
fn was_raised(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

fn set(
    client: &mut Connection,
    flags: u32,
    kind: u32,
    start: u32,
    count: u32,
    fds: &[OwnedFd],
) -> i32 {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let body = irqs(flags, kind, start, count);
    client.call(SET_IRQS, &body, &fds).errno()
}

#[test]
fn intx_is_raised_masked_and_disabled() {
    let bed = Bed::new();
    let mut client = bed.client();
    let line = event();
    let events = std::slice::from_ref(&line);
    assert_eq!(set(&mut client, EVENT | TRIGGER, INTX, 0, 1, events), 0);
    assert!(!was_raised(&line));
    assert!(bed.device.raise(INTX, 0));
    assert!(was_raised(&line));
    assert_eq!(set(&mut client, NONE | UNMASK, INTX, 0, 1, &[]), 0);
    assert_eq!(set(&mut client, NONE | MASK, INTX, 0, 1, &[]), 0);
    let eoi = event();
    let unmask = std::slice::from_ref(&eoi);
    assert_eq!(set(&mut client, EVENT | UNMASK, INTX, 0, 1, unmask), 0);
    let body = [&irqs(BOOL | TRIGGER, INTX, 0, 1)[..], &[1]].concat();
    assert_eq!(client.call(SET_IRQS, &body, &[]).errno(), 0);
    assert_eq!(set(&mut client, NONE | TRIGGER, INTX, 0, 0, &[]), 0);
    assert!(!bed.device.raise(INTX, 0));
    assert_eq!(
        bed.device.changes(),
        [
            "kind 0 action 0x20 from 0: events e",
            "kind 0 action 0x10 from 0: all 1",
            "kind 0 action 0x8 from 0: all 1",
            "kind 0 action 0x10 from 0: events e",
            "kind 0 action 0x20 from 0: chosen [1]",
            "kind 0 action 0x20 from 0: all 0",
        ]
    );
}

#[test]
fn msi_is_set_up_by_messages_with_any_number_of_descriptors() {
    let bed = Bed::new();
    let mut client = bed.client();
    let events: Vec<_> = (0..32).map(|_| event()).collect();
    // The kernel allows no more MSIs than the first request had. Missing events come in messages of their own.
    assert_eq!(set(&mut client, EVENT | TRIGGER, MSI, 0, 3, &[]), 0);
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, MSI, 3, 13, &events[3..16]),
        0
    );
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, MSI, 16, 16, &events[16..]),
        0
    );
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, MSI, 1, 1, &events[1..2]),
        0
    );
    for (n, event) in events.iter().enumerate() {
        assert_eq!(bed.device.raise(MSI, n), ![0, 2].contains(&n), "{n}");
        assert_eq!(was_raised(event), ![0, 2].contains(&n), "{n}");
    }
    let present = "-".repeat(3) + &"e".repeat(13);
    let changes = bed.device.changes();
    assert_eq!(
        changes,
        [
            "kind 1 action 0x20 from 0: events ---".to_owned(),
            "kind 1 action 0x20 from 0: all 0".to_owned(),
            format!("kind 1 action 0x20 from 0: events {present}"),
            "kind 1 action 0x20 from 0: all 0".to_owned(),
            format!(
                "kind 1 action 0x20 from 0: events {present}{}",
                "e".repeat(16)
            ),
            "kind 1 action 0x20 from 1: events e".to_owned(),
        ]
    );
    assert_eq!(set(&mut client, NONE | TRIGGER, MSI, 0, 0, &[]), 0);
    // Set up again with fewer.
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, MSI, 0, 2, &events[..2]),
        0
    );
    assert!(bed.device.raise(MSI, 1) && !bed.device.raise(MSI, 2));
    assert_eq!(set(&mut client, NONE | TRIGGER, MSI, 0, 0, &[]), 0);
    bed.device.changes();
    // Unlike MSI, MSI-X can grow.
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, MSIX, 0, 8, &events[..8]),
        0
    );
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, MSIX, 40, 2, &events[8..10]),
        0
    );
    assert_eq!(bed.device.changes().len(), 2);
    assert!(bed.device.raise(MSIX, 41) && was_raised(&events[9]));
}

#[test]
fn invalid_interrupt_settings_are_refused() {
    let bed = Bed::new();
    let mut client = bed.client();
    let events: Vec<_> = (0..3).map(|_| event()).collect();
    for (flags, kind, start, count) in [
        (EVENT | TRIGGER, MSIX, 62, 3),
        (EVENT | TRIGGER, MSIX, u32::MAX, 3),
        (EVENT | TRIGGER, MSIX, 0, u32::MAX),
        (EVENT | TRIGGER, 4, 0, 3),
        (EVENT | TRIGGER, u32::MAX, 0, 3),
        (EVENT, MSIX, 0, 3),
        (EVENT | TRIGGER | MASK, MSIX, 0, 3),
        (EVENT | NONE | TRIGGER, MSIX, 0, 3),
        (EVENT | TRIGGER | 1 << 6, MSIX, 0, 3),
        (EVENT | TRIGGER, MSIX, 0, 4),
    ] {
        let errno = set(&mut client, flags, kind, start, count, &events);
        assert_eq!(errno, libc::EINVAL, "{flags:#x} {kind} {start} {count}");
    }
    for (flags, kind, start, count) in [
        (TRIGGER, MSIX, 0, 1),
        (EVENT | TRIGGER, MSIX, 0, 0),
        (NONE | MASK, INTX, 0, 0),
        (NONE | TRIGGER, INTX, 0, 2),
        (NONE | TRIGGER, INTX, 2, 0),
    ] {
        let errno = set(&mut client, flags, kind, start, count, &[]);
        assert_eq!(errno, libc::EINVAL, "{flags:#x} {kind} {start} {count}");
    }
    let null: OwnedFd = File::open("/dev/null").expect("open").into();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    for other in [null, reader.into(), writer.into()] {
        let errno = set(&mut client, EVENT | TRIGGER, MSIX, 0, 1, &[other]);
        assert_eq!(errno, libc::EINVAL, "a file that is no event");
    }
    assert!(bed.device.changes().is_empty(), "the server refuses all");
    assert_eq!(
        client.call(RESET, &[], &[]).errno(),
        0,
        "the connection stays open"
    );
}

#[test]
fn a_client_that_goes_leaves_no_interrupts() {
    let bed = Bed::new();
    let mut client = bed.client();
    let events: Vec<_> = (0..2).map(|_| event()).collect();
    assert_eq!(set(&mut client, EVENT | TRIGGER, MSI, 0, 2, &events), 0);
    assert_eq!(set(&mut client, EVENT | TRIGGER, 3, 0, 1, &events[..1]), 0);
    assert!(bed.device.raise(MSI, 1));
    bed.device.changes();
    drop(client);
    eventually("the server releases the device", || {
        bed.device.state().resets == 1
    });
    assert!(!bed.device.raise(MSI, 1) && !bed.device.raise(3, 0));
    assert_eq!(
        bed.device.changes(),
        [
            "kind 1 action 0x20 from 0: all 0",
            "kind 3 action 0x20 from 0: all 0"
        ]
    );
    // The next client does not inherit events.
    let mut client = bed.client();
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, MSI, 2, 1, &events[..1]),
        0
    );
    assert!(!bed.device.raise(MSI, 0) && !bed.device.raise(MSI, 1));
    assert!(bed.device.raise(MSI, 2));
}
