//! A VMM and its guest. The guest maps and unmaps, and the VMM reads and writes registers of the devices, until the
//! test kills them.

use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use crate::common::daemon::{EP, EP2, EP3, ask, connect, number};
use crate::common::guest::{Guest, HIGH_RAM, LOW_LEN, LOW_RAM, RING_LEN, RING_RAM, Setup};
use crate::common::memory::Region;
use crate::common::rng::Rng;
use crate::common::wire::{NOENT, OK};
use crate::connection::{
    Connection, REGION_READ, REGION_WRITE, SET_IRQS, VERSION, irqs, region, version_body,
};
use crate::roles::{path_from_env, report};
use crate::stamps::{IOVAS, PAGE, PAGES, POISON, Pages, iova};

const DOMAIN: u32 = 1;
/// The domain to which endpoints move for a moment.
const OTHER: u32 = 2;
/// An endpoint that the operator adds and removes in the soak.
const PLUGGED: u32 = 0x48;
/// The time between two comparisons of the daemon's state with the guest's.
const COMPARISON: Duration = Duration::from_millis(500);
const CLIENT: &str = r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}"#;

pub fn run() -> ! {
    let ram = path_from_env("KILLS_RAM");
    let file = OpenOptions::new().read(true).write(true).open(ram);
    let file = Arc::new(file.expect("the test's file"));
    for socket in ["KILLS_CLIENT_1", "KILLS_CLIENT_2"] {
        let path = path_from_env(socket);
        std::thread::spawn(move || use_device(path));
    }
    let regions = vec![
        Region::new(LOW_RAM, LOW_LEN),
        Region::new(RING_RAM, RING_LEN),
        Region::of_file(HIGH_RAM, PAGES * PAGE, file.clone(), 0),
    ];
    let stream = connect(&path_from_env("KILLS_VHOST"));
    let mut guest = Guest::connect_with(stream, Setup::default(), regions);
    guest.driver_ok();
    drive(&mut guest, &file, &path_from_env("KILLS_CONTROL"))
}

/// Compares the daemon's mappings and domains with those of the guest, which makes no request meanwhile.
fn compare(control: &Path, mapped_pages: &[Option<u64>]) {
    let answer = |request: &str| -> Value {
        let text = ask(control, request);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{request}: {e} in {text:?}"))
    };
    let mappings = answer(&format!("mappings {DOMAIN}"));
    let listed = mappings["domains"][0]["mappings"].as_array();
    let mut listed: Vec<_> = listed
        .expect("a domain")
        .iter()
        .map(|m| ["first", "last", "gpa"].map(|key| number(&m[key])))
        .collect();
    let mut expected: Vec<_> = (0u64..)
        .zip(mapped_pages)
        .filter_map(|(index, page)| {
            let at = iova(index);
            Some([at, at + PAGE - 1, HIGH_RAM + (*page)? * PAGE])
        })
        .collect();
    listed.sort_unstable();
    expected.sort_unstable();
    assert_eq!(listed, expected, "the daemon's mappings, and the guest's");
    let status = answer("status");
    for endpoint in [EP, EP2, EP3] {
        let list = status["endpoints"].as_array().expect("endpoints");
        let entry = list.iter().find(|e| e["id"] == endpoint);
        let entry = entry.expect("an endpoint");
        assert_eq!(entry["domain"], DOMAIN, "{entry}");
        assert_eq!(entry["state"], "attached", "{entry}");
    }
    report("compared");
}

/// Runs the guest: it maps, unmaps and moves endpoints.
fn drive(guest: &mut Guest, file: &File, control: &Path) -> ! {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut rng = Rng::new(u64::from(now.expect("a clock").subsec_nanos()) | 1);
    let pages = Pages(file);
    for page in 0..PAGES {
        pages.fill(page, POISON);
    }
    for endpoint in [EP, EP2, EP3] {
        assert_eq!(guest.attach(DOMAIN, endpoint), 0);
    }
    let mut free: Vec<u64> = (0..PAGES).collect();
    let mut mapped_pages = [None; IOVAS as usize];
    let mut compared_at = Instant::now();
    for number in 1u64.. {
        let index = rng.below(IOVAS);
        let at = iova(index);
        match mapped_pages[index as usize].take() {
            Some(page) => {
                assert_eq!(guest.unmap(DOMAIN, at, at + PAGE - 1), 0, "UNMAP");
                pages.fill(page, POISON);
                free.push(page);
            }
            None => {
                let page = free.swap_remove(rng.below(free.len() as u64) as usize);
                pages.check_untouched(page, POISON);
                pages.stamp(page, at);
                let gpa = HIGH_RAM + page * PAGE;
                assert_eq!(guest.map_page(DOMAIN, at, gpa), 0, "MAP");
                mapped_pages[index as usize] = Some(page);
            }
        }
        if rng.one_in(64) {
            // The endpoint leaves the domain and comes back. The others stay.
            let endpoint = rng.pick(&[EP, EP2, EP3]);
            assert_eq!(guest.attach(OTHER, endpoint), 0, "ATTACH");
            assert_eq!(guest.attach(DOMAIN, endpoint), 0, "ATTACH");
        }
        if rng.one_in(256) {
            // The operator may have removed it, or remove it between the two requests.
            for domain in [OTHER, DOMAIN] {
                let status = guest.attach(domain, PLUGGED);
                assert!([OK, NOENT].contains(&status), "ATTACH: {status}");
            }
        }
        if number == 50 {
            report("works");
        }
        if number == 60 || compared_at.elapsed() > COMPARISON {
            compare(control, &mapped_pages);
            compared_at = Instant::now();
        }
    }
    unreachable!("the loop has no end");
}

/// Runs the VMM's client of one device.
fn use_device(path: PathBuf) {
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    loop {
        let mut client = Connection::new(UnixStream::connect(&path).expect("the daemon listens"));
        client.ask(VERSION, &version_body(CLIENT), &[]);
        let Some(answer) = client.recv() else {
            // The server died during the negotiation.
            continue;
        };
        assert_eq!(answer.errno(), 0);
        loop {
            client.ask(REGION_WRITE, &region(8, 0, 4, b"word"), &[]);
            client.ask(REGION_READ, &region(0, 7, 64, &[]), &[]);
            let fd = std::os::fd::AsFd::as_fd(&event);
            client.ask(SET_IRQS, &irqs(0x24, 2, 0, 1), &[fd]);
            let replies = (0..3).map_while(|_| client.recv());
            let errors: Vec<_> = replies.map(|reply| reply.errno()).collect();
            if errors.len() < 3 {
                break;
            }
            let known = |error: &i32| [0, libc::EIO].contains(error);
            assert!(errors.iter().all(known), "{errors:?}");
            if errors.contains(&libc::EIO) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
