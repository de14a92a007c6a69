//! The client that cloud-hypervisor uses, the crate `vfio_user`, in the order of that VMM's calls.
//!
//! The crate's versions 0.1.5, which that VMM has, and 0.1.7 send the same bytes and read the same lengths; they differ
//! in the capabilities of regions, and this device has none. Cargo takes only one of them into a build.

use std::os::fd::AsRawFd;

use vfio_user::Client;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bed::{CONFIG, MSIX, SPACE};
use crate::common::daemon::Daemon;
use crate::common::memory::memfd;
use crate::connection::RESET;

const RAM: u64 = 512 << 20;

fn read(client: &mut Client, index: u32, at: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    let read = client.region_read(index, at, &mut bytes[..len]);
    read.expect("an answer");
    u64::from_le_bytes(bytes)
}

/// The client has no time-out, so a missing answer hangs the test, which the daemon's watcher then ends.
#[test]
fn cloud_hypervisors_client_drives_the_device_over_reboots() {
    assert_eq!(RESET, 13);
    let daemon = Daemon::over_vfio_user(CONFIG);
    for _ in 0..2 {
        let mut client = Client::new(&daemon.socket()).expect("connected");
        let sizes: Vec<_> = (0..9)
            .map(|index| client.region(index).expect("a region").size)
            .collect();
        assert_eq!(sizes, [0x8000, 0, 0x1000, 0, 0, 0, 0, 256, 0]);
        // Its test of the flag is inverted.
        assert!(!client.resettable());
        client.reset().expect("an answer");
        let mut at = read(&mut client, SPACE, 0x34, 1);
        let mut kinds = Vec::new();
        while at != 0 {
            kinds.push(read(&mut client, SPACE, at, 1));
            at = read(&mut client, SPACE, at + 1, 1);
        }
        assert_eq!(kinds, [0x11, 9, 9, 9, 9, 9]);
        let count = |client: &mut Client, index| client.get_irq_info(index).expect("known").count;
        assert_eq!((count(&mut client, MSIX), count(&mut client, 0)), (3, 0));
        let ram = memfd(RAM);
        client.dma_map(0, 0, RAM, ram.as_raw_fd()).expect("mapped");
        for bar in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
            let write = client.region_write(SPACE, bar, &[0xff; 4]);
            write.expect("an answer");
            read(&mut client, SPACE, bar, 4);
        }
        // Beyond the regions: its replies have no room for an error.
        assert_eq!(read(&mut client, SPACE, 0x100, 4), 0xffff_ffff);
        client.region_write(5, 0, &[1; 4]).expect("an answer");
        let events: Vec<_> = (0..3)
            .map(|_| EventFd::new(EFD_NONBLOCK).expect("made"))
            .collect();
        let fds: Vec<_> = events.iter().map(AsRawFd::as_raw_fd).collect();
        client.set_irqs(MSIX, 0x24, 0, 3, &fds).expect("set");
        client.region_write(0, 20, &[1]).expect("an answer");
        assert_eq!(read(&mut client, 0, 20, 1), 1);
        client.set_irqs(MSIX, 0x21, 0, 0, &[]).expect("disabled");
        // An answer although there is no such window.
        client.dma_unmap(1 << 40, 0x1000).expect("an answer");
        client.dma_unmap(0, RAM).expect("unmapped");
        client.shutdown().expect("the end");
        daemon.wait_for("the end", || daemon.status()["connected"] == false);
    }
}
