//! The order in which VMMs call, and clients that come and go.

use std::os::fd::AsFd;

use crate::bed::{CONFIG, Client, EVENTS, MSIX, SPACE, Vm};
use crate::common::daemon::{Daemon, EP};
use crate::common::memory::memfd;
use crate::common::wire::{self, OK};
use crate::connection::{
    Connection, DMA_MAP, GET_INFO, NO_REPLY, REGION_INFO, REGION_WRITE, RESET, SET_IRQS, VERSION,
    dma_map, irqs, region, version_body,
};
use rustix::event::{EventfdFlags, eventfd};

const GET_IRQ_INFO: u16 = 7;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// cloud-hypervisor's client reads replies of a fixed length and looks at no error: each reply must have that length.
#[test]
fn a_client_that_reads_fixed_lengths_is_served_over_reboots() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    for _ in 0..3 {
        let mut client = Connection::new(daemon.stream());
        let text = r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,
            "pgsizes":4096,"max_dma_maps":65535,"migration":{"pgsize":4096}}}"#;
        let version = client.call(VERSION, &version_body(text), &[]);
        assert_eq!(version.body.last(), Some(&0), "the text ends with a zero");
        // `argsz` counts the header there.
        let info = client.call(GET_INFO, &words(&[32, 0, 0, 0]), &[]);
        assert_eq!(
            (info.body.len(), info.u32_at(8), info.u32_at(12)),
            (16, 9, 5)
        );
        for index in 0..9 {
            let body = [words(&[32, 0, index, 0]), vec![0; 16]].concat();
            let reply = client.call(REGION_INFO, &body, &[]);
            assert_eq!((reply.body.len(), reply.fds.len()), (32, 0));
            assert_eq!(reply.u32_at(0), 32, "it is not asked a second time");
        }
        let mut client = Client { connection: client };
        // The capability list is followed for each access.
        let mut at = client.read(SPACE, 0x34, 1);
        assert_eq!(client.read(SPACE, at, 1), 0x11, "MSI-X ends the search");
        while at != 0 {
            at = client.read(SPACE, at + 1, 1);
        }
        for (index, count) in [(MSIX, 3), (0, 0)] {
            let body = words(&[16, 0, index, 0]);
            let reply = client.connection.call(GET_IRQ_INFO, &body, &[]);
            assert_eq!((reply.body.len(), reply.u32_at(12)), (16, count));
        }
        let ram = memfd(64 << 20);
        let map = dma_map(3, 0, 0, 64 << 20);
        let reply = client.connection.call(DMA_MAP, &map, &[ram.as_fd()]);
        assert_eq!((reply.errno(), reply.body.len()), (0, 0));
        for (bar, size) in [
            (0x10, 0xffff_8004),
            (0x14, 0xffff_ffff),
            (0x18, 0xffff_f000),
            (0x1c, 0),
        ] {
            client.write(SPACE, bar, &[0xff; 4]);
            assert_eq!(client.read(SPACE, bar, 4), size);
        }
        let reply = client.connection.call(RESET, &[], &[]);
        assert_eq!((reply.errno(), reply.body.len()), (0, 0));
        let events: Vec<_> = (0..3)
            .map(|_| eventfd(0, EventfdFlags::CLOEXEC).expect("made"))
            .collect();
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        let reply = client
            .connection
            .call(SET_IRQS, &irqs(EVENTS, MSIX, 0, 3), &fds);
        assert_eq!((reply.errno(), reply.body.len()), (0, 0));
        let reply = client
            .connection
            .call(SET_IRQS, &irqs(0x21, MSIX, 0, 0), &[]);
        assert_eq!(reply.errno(), 0);
        assert_eq!(daemon.status()["connected"], true);
        // A reboot is the end of the connection, and a new one.
        drop(client);
        daemon.wait_for("the end", || daemon.status()["connected"] == false);
    }
}

#[test]
fn posted_writes_get_no_reply_and_arrive_in_order() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::new(&daemon);
    for status in [1u8, 3] {
        let body = region(20, 0, 1, &[status]);
        vm.client
            .connection
            .send(1, REGION_WRITE, NO_REPLY, &body, &[]);
    }
    assert_eq!(vm.status(), 3);
}

#[test]
fn a_vmm_that_dies_leaves_nothing_and_the_next_starts_anew() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    for round in 0..20 {
        let mut vm = Vm::started(&daemon);
        assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
        let map = wire::map(1, 0, 0xfff, 0x3000, wire::RW);
        assert_eq!(vm.call(&daemon, &map), OK, "round {round}");
        for slot in 1..20 {
            let first = u64::from(slot) << 12;
            vm.publish(
                slot,
                &wire::map(1, first, first + 0xfff, 0x3000, wire::RW),
                wire::TAIL,
            );
        }
        drop(vm);
        daemon.wait_for("the end", || daemon.status()["connected"] == false);
        assert_eq!(daemon.domains(), Vec::<u64>::new());
        assert_ne!(daemon.translate(EP, 0)["backed"], true);
    }
}

#[test]
fn sigterm_ends_the_daemon_with_a_vmm_connected() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    daemon.terminate();
    assert!(daemon.wait_for_end().success());
    assert!(vm.client.connection.is_closed());
    assert!(!daemon.socket().exists());
}
