//! Resets between two clients of exported devices that cannot be reset alone: network cards behind one PCI bridge.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vhost_device_iommu::vfio::{BusReset, Cdev, Container, DeviceAccess, DeviceMark, Group};

use crate::client::{BAR, COMMAND, CONFIG, Client, MEMORY};
use crate::common::daemon::Daemon;
use crate::common::kept::Keeper;
use crate::devices::Function;
use crate::words;

/// The base of the transmit ring of an e1000, which is 0 after a reset.
const TDBAL: u64 = 0x3800;
const MARK: u32 = 0x1234_5670;

impl Client {
    fn mark(&mut self) {
        self.write(BAR, TDBAL, &MARK.to_le_bytes());
        assert_eq!(self.load(TDBAL), MARK);
    }
}

/// The field `name` of each exported device.
fn exports(daemon: &Daemon, name: &str) -> Vec<bool> {
    let stats = daemon.control("stats");
    let exports = stats["exports"].as_array().expect("exported devices");
    let field = |device: &serde_json::Value| device[name] == true;
    exports.iter().map(field).collect()
}

/// The configuration of a daemon that exports both cards.
fn configuration(host_iommu: &str, cards: &[String], paths: &[PathBuf]) -> String {
    let mut text = format!("address = '00:05.0'\nhost-iommu = '{host_iommu}'\n");
    for (n, (card, path)) in cards.iter().zip(paths).enumerate() {
        text += &format!(
            "[[endpoint]]\naddress = '00:0{}.0'\nvfio = '{card}'\nexport = {path:?}\n",
            n + 6
        );
    }
    text
}

fn wait_for_release(daemon: &Daemon, clients: &[bool]) {
    let until = Instant::now() + Duration::from_secs(60);
    while exports(daemon, "client") != clients {
        assert!(Instant::now() < until, "a client stays");
        sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_bus_is_reset_once_its_last_client_has_gone() {
    let cards = words("VIOMMU_E1000_PAIR");
    for host_iommu in ["iommufd", "type1"] {
        eprintln!("{host_iommu}");
        let sockets = tempfile::tempdir().expect("a folder");
        let paths = ["0", "1"].map(|name| sockets.path().join(name));
        let text = configuration(host_iommu, &cards, &paths);
        let daemon = Daemon::with_config(&text);
        let mut first = Client::connect(&paths[0]);
        let mut second = Client::connect(&paths[1]);
        first.mark();
        second.mark();
        drop(first);
        wait_for_release(&daemon, &[false, true]);
        assert_eq!(exports(&daemon, "leftover"), [true, false]);
        assert_eq!(second.load(TDBAL), MARK, "the other client goes on");
        let mut first = Client::connect(&paths[0]);
        assert_eq!(first.load(TDBAL), MARK, "not reset, as `leftover` says");
        drop((first, second));
        wait_for_release(&daemon, &[false, false]);
        assert_eq!(exports(&daemon, "leftover"), [false; 2], "{}", daemon.log());
        for path in &paths {
            assert_eq!(Client::connect(path).load(TDBAL), 0);
        }
        daemon.terminate();
        daemon.wait_for_end();
    }
}

/// Kept over two deaths of the daemon, with and without a client.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_bus_of_kept_devices_is_reset_once_its_last_client_has_gone() {
    let cards = words("VIOMMU_E1000_PAIR");
    for host_iommu in ["iommufd", "type1"] {
        eprintln!("{host_iommu}");
        let sockets = tempfile::tempdir().expect("a folder");
        let paths = ["0", "1"].map(|name| sockets.path().join(name));
        let text = configuration(host_iommu, &cards, &paths);
        let mut keeper = Keeper::empty();
        let mut daemon = Daemon::kept_with_config(&keeper, &text, &[]);
        let mut first = Client::connect(&paths[0]);
        let mut second = Client::connect(&paths[1]);
        first.mark();
        second.mark();
        daemon.die(&mut keeper);
        assert_eq!((first.load(TDBAL), second.load(TDBAL)), (MARK, MARK));
        drop(first);
        wait_for_release(&daemon, &[false, true]);
        daemon.die(&mut keeper);
        assert_eq!(second.load(TDBAL), MARK, "the other client goes on");
        assert_eq!(exports(&daemon, "leftover"), [true, false]);
        drop(second);
        wait_for_release(&daemon, &[false, false]);
        assert_eq!(exports(&daemon, "leftover"), [false; 2], "{}", daemon.log());
        for path in &paths {
            assert_eq!(Client::connect(path).load(TDBAL), 0);
        }
        daemon.terminate();
        daemon.wait_for_end();
    }
}

/// Without a hot reset: VFIO resets a bus when its last device is closed.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn closing_and_opening_a_device_of_a_group_resets_its_bus() {
    let card = &words("VIOMMU_E1000_PAIR")[0];
    let group = Function::new(card).group();
    let mut container = Container::open(Path::new("/dev/vfio/vfio")).expect("a container");
    let group = Group::open(&Path::new("/dev/vfio").join(group)).expect("a group");
    container.set_group(group).expect("set");
    let card = container
        .group()
        .expect("a group")
        .device(card, None)
        .expect("opened");
    let bar = card.region(BAR).expect("a BAR");
    let switch_on = |card: &Cdev| {
        let config = card.region(CONFIG).expect("a configuration space");
        card.write(&config, COMMAND, &MEMORY.to_le_bytes())
            .expect("written");
    };
    let load = |card: &Cdev| {
        let mut bytes = [0; 4];
        card.read(&bar, TDBAL, &mut bytes).expect("read");
        u32::from_le_bytes(bytes)
    };
    switch_on(&card);
    card.write(&bar, TDBAL, &MARK.to_le_bytes())
        .expect("written");
    assert_eq!(load(&card), MARK);
    // The clone stands for the backend's, and this one for another process's.
    let other = card.clone();
    let mut elsewhere = Some(card.duplicate().expect("a descriptor"));
    for (line, is_open) in [(0x5a, true), (0xa5, false)] {
        let mark = card.mark(line).expect("marked");
        assert!(matches!(mark, DeviceMark::Events(_)), "{mark:?}");
        elsewhere.take_if(|_| !is_open);
        card.close().expect("closed");
        assert!(other.info().is_err(), "closed for all of this process");
        card.open_again().expect("opened");
        assert_eq!(card.has_mark(&mark).expect("read"), is_open);
        switch_on(&other);
        assert_eq!(load(&other), if is_open { MARK } else { 0 });
    }
}
