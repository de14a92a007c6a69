//! The daemon on a host with VFIO and an IOMMU. The host is an emulated machine (L1) with an emulated IOMMU.
//!
//! `qemu-scripts/l1.sh` runs this program in L1 as root and names the devices in its environment. All of them are
//! bound to vfio-pci.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod bed;
mod client;
mod coherency;
#[path = "../common/mod.rs"]
pub mod common;
#[path = "../vfio_user_messages/connection.rs"]
#[allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]
mod connection;
mod data;
mod devices;
mod edu_driver;
mod export;
mod export_mapped;
mod export_restarts;
mod faults;
mod hangs;
mod host;
mod igb;
mod locked;
mod mapped_bar;
mod mixed;
mod moves;
mod nested;
mod nesting;
mod program;
mod qtest;
mod records;
mod register_speed;
mod resets;
mod restarts;
mod server;
mod successor;
mod taken_over;
mod virtual_functions;
#[path = "../common/vm.rs"]
mod vm;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use host::{HostIommu, host_iommu};

/// The words of an environment variable that `l1.sh` sets.
fn words(name: &str) -> Vec<String> {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set; run `qemu-scripts/test.sh passthrough`"))
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

/// The path of an entry of a PCI function in sysfs.
fn sysfs_path(function: &str, entry: &str) -> String {
    format!("/sys/bus/pci/devices/{function}/{entry}")
}

/// The last component of a symbolic link's target.
fn link_name(path: &str) -> String {
    let target = fs::read_link(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    target.file_name().unwrap().to_string_lossy().into_owned()
}

/// The machine has the devices that the other tests need.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn the_machine_is_as_expected() {
    let alone = [
        words("VIOMMU_EDU"),
        words("VIOMMU_TESTDEV"),
        words("VIOMMU_IVSHMEM"),
    ]
    .concat();
    let pair = words("VIOMMU_EDU_PAIR");
    assert_eq!((words("VIOMMU_EDU").len(), pair.len()), (4, 2));

    for node in ["/dev/iommu", "/dev/vfio/vfio"] {
        assert!(Path::new(node).exists(), "{node}");
    }
    // The tests with nested guests need KVM, and have no form for Arm.
    let has_kvm = Path::new("/dev/kvm").exists();
    assert_ne!(has_kvm, host_iommu().is_smmu());
    for function in alone.iter().chain(&pair) {
        assert_eq!(
            link_name(&sysfs_path(function, "driver")),
            "vfio-pci",
            "{function}"
        );
        let group = link_name(&sysfs_path(function, "iommu_group"));
        assert!(Path::new("/dev/vfio").join(&group).exists(), "{function}");
        let nodes: Vec<_> = fs::read_dir(sysfs_path(function, "vfio-dev"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(nodes.len(), 1, "{function}");
        assert!(Path::new("/dev/vfio/devices").join(&nodes[0]).exists());
    }
    let group = |function: &String| link_name(&sysfs_path(function, "iommu_group"));
    assert_eq!(group(&pair[0]), group(&pair[1]));
    let cards = words("VIOMMU_E1000_PAIR");
    assert_eq!(cards.len(), 2);
    assert_eq!(group(&cards[0]), group(&cards[1]));
    let groups: BTreeSet<_> = alone.iter().chain(&pair[..1]).map(group).collect();
    assert_eq!(groups.len(), alone.len() + 1, "{groups:?}");

    let dmesg = std::process::Command::new("dmesg").output().unwrap();
    let messages = String::from_utf8_lossy(&dmesg.stdout).into_owned();
    // On Arm the interrupt controller isolates the devices' interrupts.
    let remapping = match host_iommu() {
        HostIommu::Vtd => "DMAR-IR: Enabled IRQ remapping",
        HostIommu::Amd => "AMD-Vi: Interrupt remapping enabled",
        HostIommu::Smmu | HostIommu::SmmuStage2 => "ITS@0x0000000008080000",
    };
    assert!(
        messages.contains(remapping),
        "no `{remapping}` in the kernel's log"
    );
}
