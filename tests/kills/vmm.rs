//! A VMM and its guest. The guest maps and unmaps, and the VMM reads and writes registers of the devices, until the
//! test kills them.

use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::common::daemon::{EP, EP2, EP3, connect};
use crate::common::guest::{Guest, HIGH_RAM, LOW_LEN, LOW_RAM, RING_LEN, RING_RAM, Setup};
use crate::common::memory::Region;
use crate::common::rng::Rng;
use crate::connection::{
    Connection, REGION_READ, REGION_WRITE, SET_IRQS, VERSION, irqs, region, version_body,
};
use crate::roles::{path_from_env, report};
use crate::stamps::{IOVAS, PAGE, PAGES, POISON, Pages, iova};

const DOMAIN: u32 = 1;
/// The domain to which endpoints move for a moment.
const OTHER: u32 = 2;
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
    drive(&mut guest, &file)
}

/// Runs the guest: it maps, unmaps and moves endpoints.
fn drive(guest: &mut Guest, file: &File) -> ! {
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
        if number == 50 {
            report("works");
        }
    }
    unreachable!("the loop has no end");
}

/// Runs the VMM's client of one device.
fn use_device(path: PathBuf) {
    let null = File::open("/dev/null").expect("opens");
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
            let fd = std::os::fd::AsFd::as_fd(&null);
            client.ask(SET_IRQS, &irqs(0x24, 2, 0, 1), &[fd]);
            let replies = (0..3).map_while(|_| client.recv());
            let errors: Vec<_> = replies.map(|reply| reply.errno()).collect();
            if errors.len() < 3 {
                break;
            }
            let known = |error: &i32| [0, libc::EIO].contains(error);
            assert!(errors.iter().all(known), "{errors:?}");
            if errors.contains(&libc::EIO) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}
