//! Uses in fake trees.

use super::super::HostFacts;
use super::super::fake::{FakeHost, Function};
use super::uses;

const DEVICE: &str = "sys/devices/pci0000:00/0000:01:00.0";

/// A host with a device of this class, bound to `driver`.
fn host(class: &str, driver: Option<&str>) -> FakeHost {
    let host = FakeHost::new();
    host.function(&Function {
        class,
        ..Function::bound("0000:01:00.0", 7, driver)
    });
    host
}

fn found(host: &FakeHost) -> Vec<String> {
    let address = "0000:01:00.0".parse().expect("an address");
    let facts = HostFacts::read(&host.root(), [address]);
    uses(&host.root(), facts.device(address).expect("a device"))
}

/// A block device in the folder `at`.
fn disk(host: &FakeHost, at: &str, number: &str) {
    let name = at.rsplit('/').next().expect("a name");
    host.file(&format!("{at}/dev"), format!("{number}\n"));
    host.link(at, &format!("sys/class/block/{name}"));
}

/// A disk with two partitions behind the device.
fn host_with_disk() -> FakeHost {
    let host = host("0x010601", Some("ahci"));
    let sda = format!("{DEVICE}/ata1/host0/target0:0:0/0:0:0:0/block/sda");
    disk(&host, &sda, "8:0");
    disk(&host, &format!("{sda}/sda1"), "8:1");
    disk(&host, &format!("{sda}/sda2"), "8:2");
    disk(&host, "sys/devices/virtual/block/dm-0", "253:0");
    host
}

fn mount(host: &FakeHost, process: &str, number: &str, source: &str) {
    host.file(
        &format!("proc/{process}/mountinfo"),
        format!(
            "22 1 0:21 / /proc rw - proc proc rw\n\
             29 1 {number} / /data rw,noatime shared:1 - ext4 {source} rw\n"
        ),
    );
}

#[test]
fn an_idle_device_has_no_use() {
    assert_eq!(found(&host("0x040300", Some("snd_hda_intel"))), [""; 0]);
    let idle = host_with_disk();
    mount(&idle, "self", "8:16", "/dev/sdb");
    idle.file(
        "proc/swaps",
        "Filename Type Size Used Priority\n/dev/sdb2 partition 1 0 -2\n",
    );
    assert_eq!(found(&idle), [""; 0]);
}

#[test]
fn mounted_partitions_are_uses() {
    for process in ["self", "1"] {
        let host = host_with_disk();
        mount(&host, process, "8:2", "/dev/root");
        assert_eq!(found(&host), ["sda2 is mounted at /data"]);
        mount(&host, process, "0:45", "/dev/sda2");
        assert_eq!(found(&host), ["sda2 is mounted at /data"]);
    }
}

#[test]
fn swap_is_a_use() {
    let host = host_with_disk();
    host.file(
        "proc/swaps",
        "Filename Type Size Used Priority\n/dev/sda1 partition 1 0 -2\n",
    );
    assert_eq!(found(&host), ["the host swaps to sda1"]);
}

#[test]
fn volumes_and_raids_on_a_disk_are_uses() {
    let host = host_with_disk();
    host.link(
        "sys/devices/virtual/block/dm-0",
        &format!("{DEVICE}/ata1/host0/target0:0:0/0:0:0:0/block/sda/sda2/holders/dm-0"),
    );
    assert_eq!(found(&host), ["dm-0 is built on sda2"]);
    host.file("sys/devices/virtual/block/dm-0/dm/name", "vg-root\n");
    for (number, source) in [("253:0", "/dev/dm-0"), ("0:45", "/dev/mapper/vg-root")] {
        mount(&host, "self", number, source);
        let uses = ["dm-0 is mounted at /data", "dm-0 is built on sda2"];
        assert_eq!(found(&host), uses);
    }
    host.file("proc/swaps", "Filename\n/dev/dm-0 partition 1 0 -2\n");
    assert!(found(&host).contains(&"the host swaps to dm-0".to_owned()));
    // A partition of a RAID over a volume.
    let md = "sys/devices/virtual/block/md0";
    disk(&host, md, "9:0");
    disk(&host, &format!("{md}/md0p1"), "259:0");
    host.link(md, "sys/devices/virtual/block/dm-0/holders/md0");
    mount(&host, "self", "259:0", "/dev/md0p1");
    assert_eq!(found(&host)[0], "md0p1 is mounted at /data");
}

#[test]
fn disks_outside_the_devices_own_folder_are_found() {
    let host = host("0x010802", Some("nvme"));
    let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0";
    disk(&host, &format!("{subsystem}/nvme0n1"), "259:1");
    disk(&host, &format!("{subsystem}/nvme0n1/nvme0n1p1"), "259:2");
    host.link(subsystem, "sys/class/nvme-subsystem/nvme-subsys0");
    mount(&host, "self", "259:2", "/dev/nvme0n1p1");
    assert_eq!(found(&host), [""; 0]);
    host.file(&format!("{DEVICE}/nvme/nvme0/state"), "live\n");
    host.link(
        &format!("{DEVICE}/nvme/nvme0"),
        &format!("{subsystem}/nvme0"),
    );
    assert_eq!(found(&host), ["nvme0n1p1 is mounted at /data"]);
}

#[test]
fn file_systems_on_several_disks_are_uses() {
    let host = host_with_disk();
    host.file("sys/fs/btrfs/0f-1e/devices/sda1/dev", "");
    assert_eq!(found(&host), ["sda1 is part of a mounted btrfs"]);
    host.remove("sys/fs/btrfs");
    host.file("proc/spl/kstat/zfs/tank/state", "ONLINE\n");
    let pool = "a ZFS pool of this host may be on sda, sda1, sda2";
    assert_eq!(found(&host), [pool]);
}

#[test]
fn interfaces_are_uses() {
    let host = host("0x020000", Some("e1000e"));
    assert_eq!(
        found(&host),
        ["its interface may be in another network namespace"]
    );
    let eth0 = format!("{DEVICE}/net/eth0");
    host.file(&format!("{eth0}/flags"), "0x1002\n");
    host.link(&eth0, "sys/class/net/eth0");
    assert_eq!(found(&host), [""; 0]);
    host.file("proc/net/if_inet6", "fe80 02 40 20 80     eth0\n");
    assert_eq!(found(&host), ["eth0 has an address"]);
    host.remove("proc/net/if_inet6");
    host.file("proc/net/route", "Iface\tDestination\neth0\t0000000A\n");
    assert_eq!(found(&host), ["eth0 has an address"]);
    host.remove("proc/net/route");
    host.file(&format!("{eth0}/flags"), "0x1003\n");
    assert_eq!(found(&host), ["eth0 is up"]);
    host.file(&format!("{eth0}/flags"), "0x1002\n");
    for above in ["br0", "bond0", "eth0.7"] {
        host.file(&format!("sys/class/net/{above}/flags"), "0x1002\n");
        host.link(
            &format!("sys/class/net/{above}"),
            &format!("{eth0}/upper_{above}"),
        );
    }
    host.link("sys/class/net/br0", &format!("{eth0}/master"));
    let uses = [
        "bond0 is above eth0",
        "br0 is above eth0",
        "eth0.7 is above eth0",
    ];
    assert_eq!(found(&host), uses);
    host.file(&format!("{DEVICE}/sriov_numvfs"), "4\n");
    assert_eq!(found(&host)[0], "it has 4 virtual functions");
}

#[test]
fn displays_are_uses() {
    let host = host("0x030000", Some("amdgpu"));
    host.file(&format!("{DEVICE}/boot_vga"), "0\n");
    let output = format!("{DEVICE}/drm/card1/card1-DP-1");
    host.file(&format!("{output}/enabled"), "disabled\n");
    host.link(&output, "sys/class/drm/card1-DP-1");
    assert_eq!(found(&host), [""; 0]);
    host.file(&format!("{output}/enabled"), "enabled\n");
    assert_eq!(found(&host), ["the display card1-DP-1 is on"]);
    host.file(&format!("{DEVICE}/boot_vga"), "1\n");
    assert_eq!(found(&host)[0], "it is the boot display");
}

#[test]
fn consoles_and_keyboards_are_uses() {
    let host = host("0x0c0330", Some("xhci_hcd"));
    let jack = format!("{DEVICE}/sound/card0/input2");
    host.file(&format!("{jack}/name"), "Headphone\n");
    host.link(&jack, "sys/class/input/input2");
    assert_eq!(found(&host), [""; 0]);
    let keyboard = format!("{DEVICE}/usb1/1-1/input/input3");
    host.file(&format!("{keyboard}/name"), "Model\u{1b} M\n");
    host.link(&keyboard, "sys/class/input/input3");
    assert_eq!(found(&host), ["the input device Model? M is behind it"]);
    host.remove("sys/class/input/input3");
    host.file(&format!("{DEVICE}/tty/ttyS4/dev"), "4:68\n");
    host.link(&format!("{DEVICE}/tty/ttyS4"), "sys/class/tty/ttyS4");
    host.file("proc/consoles", "tty0 -WU (EC p  ) 4:1\n");
    assert_eq!(found(&host), [""; 0]);
    host.file("proc/consoles", "ttyS4 -W- (EC p a) 4:68\n");
    assert_eq!(found(&host), ["the kernel's console is ttyS4"]);
}

#[test]
fn open_nodes_and_mediated_devices_are_uses() {
    let host = host("0x040300", Some("snd_hda_intel"));
    let node = format!("{DEVICE}/sound/card0/controlC0");
    host.file(
        &format!("{node}/uevent"),
        "MAJOR=116\nDEVNAME=snd/controlC0\n",
    );
    host.link(&node, "sys/dev/char/116:0");
    host.file("proc/712/comm", "wireplumber\n");
    host.dangling("/dev/null", "proc/712/fd/0");
    assert_eq!(found(&host), [""; 0]);
    host.dangling("/dev/snd/controlC0", "proc/712/fd/9");
    host.dangling("/dev/snd/controlC0", "proc/712/fd/10");
    assert_eq!(
        found(&host),
        ["process 712 (wireplumber) has /dev/snd/controlC0 open"]
    );
    let device = format!("{DEVICE}/83b8f4f2");
    host.file(&format!("{device}/remove"), "");
    host.link(&device, "sys/bus/mdev/devices/83b8f4f2");
    assert_eq!(found(&host)[0], "it has the mediated device 83b8f4f2");
}

#[test]
fn many_uses_are_counted() {
    let host = host_with_disk();
    for number in 0..20 {
        let at = format!("{DEVICE}/ata2/block/sdb{number:02}");
        disk(&host, &at, &format!("8:{}", number + 32));
        host.file(&format!("{at}/holders/md1/dev"), "");
    }
    let uses = found(&host);
    assert_eq!((uses.len(), &*uses[6]), (7, "and 14 more"));
}
