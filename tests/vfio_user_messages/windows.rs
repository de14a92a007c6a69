//! The windows of a server are those of the page table: at its connection, while they are announced, and after changes of
//! guest RAM. They cost no memory.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vhost_device_iommu::address::Access;
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::ids::DomainId;

use crate::bed::{Bed, CLIENT_TEXT, RAM, eventually, start_scripted_server};
use crate::common::daemon::{Daemon, EP};
use crate::common::guest::{Guest, Layout, Setup};
use crate::common::wire::{self, RW, TAIL};
use crate::connection::{Connection, DMA_MAP, DMA_UNMAP, RESET, VERSION, version_body};

const IOVA: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;

/// Private memory of the daemon that files do not back, in KiB: its heap and its stacks.
fn anonymous_kib(daemon: &Daemon) -> u64 {
    let path = format!("/proc/{}/status", daemon.pid());
    let status = std::fs::read_to_string(path).expect("proc");
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let words = line.expect("RssAnon").split_whitespace().nth(1);
    words.expect("a size").parse().expect("a number")
}

#[test]
fn mappings_cost_emulated_endpoints_no_memory() {
    const ENDPOINTS: u32 = 8;
    const MAPPINGS: u64 = 200_000;
    const BATCH: u64 = 100;
    let folder = tempfile::tempdir().expect("a folder");
    let socket = |n: u32, end: &str| folder.path().join(format!("{end}{n}"));
    let listener = UnixListener::bind(socket(0, "server")).expect("a socket");
    let mut config = String::from("address = '00:05.0'\nbypass = false\n");
    for n in 0..ENDPOINTS {
        let (listen, connect) = (socket(n, "client"), socket(n, "server"));
        config += &format!(
            "[[endpoint]]\naddress = '00:{:02x}.0'\nvfio-user = {{ listen = {listen:?}, \
             connect = {connect:?}, announce = 'exact', deadline-ms = 60000 }}\n",
            6 + n
        );
    }
    let daemon = Daemon::with_config(&config);
    let mut guest = Guest::boot_with(&daemon, Setup::default());
    for n in 0..ENDPOINTS {
        assert_eq!(guest.attach(1, EP + 8 * n), 0);
    }
    assert_eq!(guest.map_page(1, 0, 0), 0);
    let before = anonymous_kib(&daemon);
    let grown = |when: &str| {
        let grown = anonymous_kib(&daemon).saturating_sub(before);
        println!("{when}: {grown} KiB more than before {MAPPINGS} mappings");
        // 16 bytes for each mapping and endpoint would be 25 MiB.
        assert!(grown < 8 << 10, "{when}: {grown} KiB");
    };
    let layout = Layout::plain(36, TAIL);
    for batch in 0..MAPPINGS / BATCH {
        for n in 0..BATCH {
            let iova = IOVA + (batch * BATCH + n) * PAGE;
            let map = wire::map(1, iova, iova + PAGE - 1, n * PAGE, RW);
            guest.submit(&map, &layout);
        }
        guest.kick();
        for _ in 0..BATCH {
            assert_eq!(guest.complete().1.status(), 0);
        }
    }
    assert_eq!(
        daemon.status()["emulated"][7]["windows"],
        MAPPINGS + 1,
        "each endpoint has all windows"
    );
    grown("mapped");

    // A server gets all windows.
    let scripted = start_scripted_server(listener, |server, msg| {
        if msg.cmd == VERSION {
            let text = r#"{"capabilities":{"max_dma_maps":1000000}}"#;
            server.reply(msg, &version_body(text), &[]);
        }
        msg.cmd == VERSION
    });
    let stream = UnixStream::connect(socket(0, "client")).expect("connected");
    let mut client = Connection::new(stream);
    let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
    assert_eq!(answer.errno(), 0);
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(
        scripted.each(DMA_MAP, |_| ()).len() as u64,
        MAPPINGS + 1,
        "the server has all windows"
    );
    grown("announced");

    assert_eq!(guest.unmap(1, 0, u64::MAX), 0);
    assert_eq!(scripted.each(DMA_UNMAP, |_| ()).len() as u64, MAPPINGS + 1);
    assert_eq!(daemon.status()["emulated"][0]["windows"], 0);
    grown("unmapped");
}

/// More windows than are announced at a time, each before a free page.
fn map_many(bed: &Bed, count: u64) {
    bed.attach();
    for n in 0..count {
        let iova = IOVA + 2 * n * PAGE;
        bed.map(iova, n % 1024 * PAGE, PAGE, Access::READ)
            .expect("mapped");
    }
}

/// Changes of mappings while a server that has just connected gets its windows.
#[test]
fn requests_during_the_announcement_change_each_window_once() {
    const COUNT: u64 = 4000;
    let window = |n: u64| IOVA + 2 * n * PAGE;
    let bed = Bed::with_deadline(Isolation::Mappings, Duration::from_secs(20));
    map_many(&bed, COUNT);
    let (open, gate) = mpsc::channel::<()>();
    let (mut client, scripted) = bed.pair(move |_, msg| {
        // The log would keep them open.
        msg.fds.clear();
        if msg.cmd == DMA_MAP {
            // Waits for the first window, and returns at once when the test has dropped the other end.
            let _ = gate.recv();
        }
        false
    });
    // The server has answered no window yet, so it does not have this one, and UNMAP waits for nobody.
    bed.unmap(window(COUNT - 1), PAGE).expect("unmapped");
    // Between windows that are announced, and between windows that are not. MAP waits for nobody either.
    for iova in [window(5), window(COUNT - 5)] {
        bed.map(iova + PAGE, 0, PAGE, Access::READ).expect("mapped");
    }
    std::thread::scope(|scope| {
        let unmapped = scope.spawn(|| bed.unmap(window(0), PAGE).expect("unmapped"));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!unmapped.is_finished(), "UNMAP waits for the server");
        drop(open);
        unmapped.join().expect("unmapped");
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let mut expected: Vec<_> = (0..COUNT - 1).map(window).collect();
    expected.extend([window(5), window(COUNT - 5)].map(|iova| iova + PAGE));
    expected.sort_unstable();
    let mut announced = scripted.each(DMA_MAP, |m| m.u64_at(16));
    announced.sort_unstable();
    assert_eq!(announced, expected);
    assert_eq!(scripted.each(DMA_UNMAP, |m| m.u64_at(8)), [window(0)]);
    bed.unmap(0, u64::MAX).expect("unmapped");
    assert!(scripted.windows().is_empty());
}

#[test]
fn a_server_without_room_for_all_windows_gets_the_others_later() {
    let bed = Bed::new(Isolation::ExactMessages);
    map_many(&bed, 4);
    let (mut client, scripted) = bed.pair(|server, msg| {
        if msg.cmd == VERSION {
            let text = r#"{"capabilities":{"max_dma_maps":2}}"#;
            server.reply(msg, &version_body(text), &[]);
        }
        msg.cmd == VERSION
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let window = |n: u64| IOVA + 2 * n * PAGE;
    assert_eq!(scripted.windows(), [window(0), window(1)]);
    // The server has never had the last one.
    bed.unmap(window(3), PAGE).expect("unmapped");
    bed.unmap(window(0), PAGE).expect("unmapped");
    eventually("the third window", || {
        scripted.windows() == [window(1), window(2)]
    });
    let full = bed.map(window(3), 0, PAGE, Access::READ);
    assert!(full.is_err(), "there is no room");
    // No window is on its way, so that UNMAP waits.
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    bed.unmap(0, u64::MAX).expect("unmapped");
    assert_eq!(
        scripted.each(DMA_UNMAP, |m| m.u64_at(8)),
        [window(0), window(1), window(2)]
    );
    bed.map(window(3), 0, PAGE, Access::READ).expect("room");
}

#[test]
fn windows_follow_guest_ram_while_a_domain_has_mappings() {
    let bed = Bed::new(Isolation::ExactMessages);
    map_many(&bed, 3);
    let refuses = Arc::new(AtomicBool::new(false));
    let refusing = refuses.clone();
    let (mut client, scripted) = bed.pair(move |server, msg| {
        let refused = msg.cmd == DMA_MAP && refusing.load(Ordering::Relaxed);
        if refused {
            server.refuse(msg, libc::ENOMEM.unsigned_abs());
        }
        refused
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let quarantined = || {
        let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
        endpoint.quarantined
    };
    let all = [IOVA, IOVA + 2 * PAGE, IOVA + 4 * PAGE];
    assert_eq!(scripted.windows(), all);
    bed.iommu().set_memory(Vec::new());
    assert!(scripted.windows().is_empty());
    bed.iommu().set_memory(vec![bed.slot.clone()]);
    assert_eq!(scripted.windows(), all);
    assert!(!quarantined());
    // A mapping whose memory the device cannot reach blocks the device.
    bed.iommu().set_memory(Vec::new());
    refuses.store(true, Ordering::Relaxed);
    bed.iommu().set_memory(vec![bed.slot.clone()]);
    assert!(quarantined());
}

#[test]
fn bypass_mode_and_a_domain_replace_each_other_s_windows_or_none() {
    let bed = Bed::new(Isolation::ExactMessages);
    map_many(&bed, 3);
    let refuses = Arc::new(AtomicBool::new(false));
    let refusing = refuses.clone();
    let (mut client, scripted) = bed.pair(move |server, msg| {
        let refused = msg.cmd == DMA_MAP && refusing.load(Ordering::Relaxed);
        let refused = refused && msg.u64_at(16) == RAM;
        if refused {
            server.refuse(msg, libc::ENOSPC.unsigned_abs());
        }
        refused
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    let all = [IOVA, IOVA + 2 * PAGE, IOVA + 4 * PAGE];
    refuses.store(true, Ordering::Relaxed);
    let attach = |domain, bypass| {
        let endpoint = bed.endpoint();
        bed.iommu().attach(endpoint, DomainId(domain), bypass)
    };
    let refused = attach(2, true).expect_err("the server refuses RAM");
    assert!(
        refused.to_string().contains("cannot be switched"),
        "{refused}"
    );
    // The script's list has the refused window, too.
    assert_eq!(
        scripted.windows(),
        [&[RAM], &all[..]].concat(),
        "the endpoint stays in its domain"
    );
    bed.map(IOVA + PAGE, 0, PAGE, Access::READ).expect("mapped");
    refuses.store(false, Ordering::Relaxed);
    attach(2, true).expect("attached");
    assert_eq!(scripted.windows(), [RAM, RAM]);
    attach(3, false).expect("attached");
    assert!(scripted.windows().is_empty());
}

/// What a server refuses is remembered, up to a limit. The announcement waits there, and the server stays.
#[test]
fn a_server_that_refuses_very_many_windows_stays() {
    const COUNT: u64 = 66_000;
    const REFUSED: usize = 65_535;
    let window = |n: u64| IOVA + 2 * n * PAGE;
    let bed = Bed::with_deadline(Isolation::ExactMessages, Duration::from_secs(20));
    map_many(&bed, COUNT);
    let refuses = Arc::new(AtomicBool::new(true));
    let told = Arc::new(AtomicUsize::new(0));
    let (refusing, counter) = (refuses.clone(), told.clone());
    let (mut client, scripted) = bed.pair(move |server, msg| {
        let refused = msg.cmd == DMA_MAP && refusing.load(Ordering::Relaxed);
        if refused {
            server.refuse(msg, libc::EBUSY.unsigned_abs());
        }
        counter.fetch_add(usize::from(msg.cmd == DMA_MAP), Ordering::Relaxed);
        refused
    });
    eventually("very many are refused", || {
        told.load(Ordering::Relaxed) >= REFUSED
    });
    eventually("the announcement waits", || {
        bed.watch.state().limits.missing == COUNT
    });
    assert_eq!(client.call(RESET, &[], &[]).errno(), 0);
    assert_eq!(told.load(Ordering::Relaxed), REFUSED);
    // The announcement has not reached the first of these, and nobody remembers the other one.
    for iova in [window(COUNT), IOVA - PAGE] {
        let refused = bed.map(iova, 0, PAGE, Access::READ);
        assert!(refused.is_err(), "the server has no room");
    }
    refuses.store(false, Ordering::Relaxed);
    bed.unmap(IOVA, 2 * 100 * PAGE).expect("unmapped");
    eventually("the server is told the others", || {
        bed.watch.state().limits.missing == REFUSED as u64 - 100
    });
    bed.unmap(0, u64::MAX).expect("unmapped");
    let removed = scripted.each(DMA_UNMAP, |_| ()).len();
    assert_eq!(removed, COUNT as usize - REFUSED);
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
}
