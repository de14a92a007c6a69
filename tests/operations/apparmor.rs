//! A VMM under AppArmor, with the rules of `docs/operations.md` for libvirt's QEMU.

use std::fs;
use std::io;
use std::thread;

use crate::EP;
use crate::common::guest::{Guest, Setup};
use crate::common::wire::OK;
use crate::machine::{Vm, run_ok};

const TABLE: &str = "/etc/vhost-device-iommu/vm1.viot";

/// Removes the table, also if the test fails: a later test removes the package and expects nothing to be left.
struct Table;

impl Drop for Table {
    fn drop(&mut self) {
        let _ = fs::remove_file(TABLE);
    }
}

/// The rules in the installed page.
fn rules() -> String {
    let page = fs::read_to_string("/usr/share/doc/vhost-device-iommu/operations.md");
    let page = page.expect("the page");
    let is_rule = |line: &&str| line.starts_with("    /") && line.ends_with(',');
    let rules: Vec<_> = page.lines().filter(is_rule).collect();
    assert_eq!(rules.len(), 2, "{rules:?}");
    rules.join("\n")
}

/// Loads a profile for the VMM: the rights that libvirt gives every QEMU, as far as they matter here, and `rules`.
fn load(name: &str, rules: &str) {
    let file = format!("/run/{name}");
    let all = "network unix stream,\n  unix,\n  capability dac_override,";
    let profile = format!("profile {name} flags=(attach_disconnected) {{\n  {all}\n{rules}\n}}\n");
    fs::write(&file, profile).expect("written");
    run_ok(&["apparmor_parser", "-r", "-K", &file]);
}

/// Runs `work` in a thread that has the profile from its start.
fn confined<T: Send>(profile: &str, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let change = format!("changeprofile {profile}");
            let file = "/proc/thread-self/attr/apparmor/current";
            fs::write(file, change).expect("the profile is loaded");
            work()
        });
        thread.join().expect("it ends")
    })
}

fn refused(path: &str) -> bool {
    let error = fs::read(path).expect_err("AppArmor refuses");
    error.kind() == io::ErrorKind::PermissionDenied
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn the_documented_apparmor_rules_admit_a_vmm() {
    let vm = Vm::new("vm1", "");
    let _table = Table;
    let file = vm.file();
    let file = file.to_str().expect("text");
    run_ok(&["vhost-device-iommu", "viot", file, "-o", TABLE]);
    vm.start();

    load("viommu-without", "");
    assert!(confined("viommu-without", || refused(TABLE)));

    load("viommu-with", &rules());
    let (table, status) = confined("viommu-with", || {
        let table = fs::read(TABLE).expect("the table");
        let mut guest = Guest::connect_to(vm.socket(), Setup::default());
        guest.driver_ok();
        // No other file of the daemon.
        assert!(refused("/etc/vhost-device-iommu/vm1.toml"));
        (table, guest.attach(1, EP))
    });
    assert_eq!(&table[..4], b"VIOT");
    assert_eq!(status, OK);
}
