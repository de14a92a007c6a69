//! The VMM is a QEMU of an Arm machine: it writes its device tree first, and gets it back with the IOMMU in it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use dtoolkit::Node;
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};

use crate::{LaunchDir, Run, finish};

/// Writes the tree `base.dtb` where it is asked to. Otherwise keeps its arguments, and the tree that they end with.
const SCRIPT: &str = "case \"$*\" in
    *dumpdtb=*)
        printf '%s ' \"$@\" >dump
        for last; do :; done
        cp base.dtb \"${last#dumpdtb=}\"
        exit
    esac
    printf '%s ' \"$@\" >args
    for last; do :; done
    cat \"$last\" >tree";

fn base() -> Vec<u8> {
    let mut tree = DeviceTree::new();
    let mut bridge = DeviceTreeNode::new("pcie@10000000").expect("a name");
    let compatible = DeviceTreeProperty::new("compatible", "pci-host-ecam-generic");
    bridge.add_property(compatible.expect("a name"));
    tree.root.add_child(bridge);
    tree.to_dtb()
}

/// Launches `script` under the name of QEMU's program, behind a wrapper.
fn run(launch_dir: &LaunchDir, script: &str, others: &str) -> Run {
    let program = launch_dir.path("qemu-system-aarch64");
    fs::write(&program, format!("#!/bin/sh\n{script}")).expect("written");
    fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("set");
    let mut command = launch_dir.command();
    command.args(["--", "env", "A=B"]).arg(program);
    finish(command.args(others.split(' ')))
}

fn assert_has_iommu(tree: &[u8]) {
    let fdt = Fdt::new(tree).expect("a tree");
    let bridge = fdt.root().child("pcie@10000000").expect("kept");
    assert!(bridge.property("iommu-map").is_some());
    assert!(
        bridge
            .children()
            .any(|node| node.name().starts_with("iommu@"))
    );
}

#[test]
fn an_arm_guest_gets_qemus_tree_with_the_iommu_in_it() {
    let launch_dir = LaunchDir::new();
    fs::write(launch_dir.path("base.dtb"), base()).expect("written");
    let run = run(
        &launch_dir,
        &format!(
            "{SCRIPT}\n{} ctl control.sock status >status",
            crate::PROGRAM
        ),
        "-M virt -cpu max -device e1000e,addr=9",
    );
    assert_eq!(run.status.code(), Some(0), "{}", run.stderr);
    let dump = launch_dir.read("dump");
    assert!(
        dump.starts_with("-machine virt,gic-version=3 -M virt -cpu max"),
        "{dump}"
    );
    assert!(
        !dump.contains("-device") && !dump.contains("-chardev"),
        "{dump}"
    );
    let args = launch_dir.read("args");
    assert!(
        args.contains("-machine acpi=off,gic-version=3,memory-backend=viommu-ram"),
        "{args}"
    );
    assert!(
        args.contains("-dtb /proc/self/fd/") && !args.contains("-acpitable"),
        "{args}"
    );
    assert_has_iommu(&fs::read(launch_dir.path("tree")).expect("a tree"));
    launch_dir.assert_clean();
}

#[test]
fn the_operators_own_tree_is_extended() {
    let launch_dir = LaunchDir::new();
    fs::write(launch_dir.path("own.dtb"), base()).expect("written");
    let run = run(&launch_dir, SCRIPT, "-M virt -dtb own.dtb");
    assert_eq!(run.status.code(), Some(0), "{}", run.stderr);
    assert!(!launch_dir.path("dump").exists());
    assert_has_iommu(&fs::read(launch_dir.path("tree")).expect("a tree"));
}

/// Neither the daemon nor the VMM starts.
#[test]
fn trees_that_cannot_be_had_are_named() {
    for (script, others, message) in [
        (
            "echo no such CPU >&2; exit 1",
            "-M virt",
            "no such CPU; mend the -machine",
        ),
        ("exit 0", "-M virt", "wrote no device tree"),
        (
            SCRIPT,
            "-M virt -dtb missing.dtb",
            "cannot read the device tree missing.dtb",
        ),
        (SCRIPT, "-M virt -dtb vm.toml", "the file is no device tree"),
        (SCRIPT, "-M virt,iommu=smmuv3", "second IOMMU"),
    ] {
        let launch_dir = LaunchDir::new();
        fs::write(launch_dir.path("base.dtb"), base()).expect("written");
        let run = run(&launch_dir, script, others);
        assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
        assert!(run.stderr.contains(message), "{}", run.stderr);
        assert!(!launch_dir.path("args").exists());
        launch_dir.assert_clean();
    }
}
