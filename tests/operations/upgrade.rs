//! A newer package, and `systemctl reload`, while VMs run.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::common::guest::Guest;
use super::common::wire::{OK, RW};
use super::machine::{Vm, run, run_ok};
use super::{EP, guest};

const PACKAGE: &str = "/tmp/newer.deb";

/// Makes a package of the installed files with a higher version.
fn make_newer_package() {
    let old = fs::read_dir("/host").expect("the folder with the package");
    let mut old = old.map(|entry| entry.expect("an entry").path());
    let old = old
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .expect("the package");
    let old = old.to_str().expect("text");
    let script = format!(
        "rm -rf /tmp/newer && dpkg-deb -R {old} /tmp/newer \
         && version=$(dpkg-query -W -f '${{Version}}' vhost-device-iommu) \
         && sed -i \"s/^Version: .*/Version: $version+1/\" /tmp/newer/DEBIAN/control \
         && dpkg-deb -Znone --build /tmp/newer {PACKAGE}"
    );
    run_ok(&["sh", "-c", &script]);
}

/// Maps and unmaps a page until `done`. Returns how often.
fn drive(guest: &mut Guest, done: &AtomicBool) -> u64 {
    let mut count = 0;
    while !done.load(Ordering::Relaxed) {
        assert_eq!(guest.map(1, 0x1000, 0x1fff, 0x1000, RW), OK);
        assert_eq!(guest.unmap(1, 0x1000, 0x1fff), OK);
        count += 1;
    }
    count
}

/// Does something to the running system under a driver at work.
fn under_load<T>(guest: &mut Guest, act: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let driver = scope.spawn(|| drive(guest, &done));
        thread::sleep(Duration::from_millis(200));
        let result = act();
        thread::sleep(Duration::from_millis(200));
        done.store(true, Ordering::Relaxed);
        assert!(driver.join().expect("the driver goes on") > 0);
        result
    })
}

/// Whether the daemon runs the installed file.
fn is_present(vm: &Vm) -> bool {
    let link = fs::read_link(format!("/proc/{}/exe", vm.property("MainPID")));
    link.expect("a process") == Path::new("/usr/bin/vhost-device-iommu")
}

fn wait_for_life(vm: &Vm, number: u64) {
    vm.wait_for("ActiveState", "active");
    let life = &vm.status()["life"];
    assert_eq!(life["number"], number, "{life}");
    assert_ne!(life["state"], "refused", "{life}");
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn a_newer_package_takes_running_vms_over() {
    let (one, other, lazy) = (Vm::new("one", ""), Vm::new("two", ""), Vm::new("lazy", ""));
    one.start();
    other.start();
    run_ok(&["systemctl", "start", &lazy.socket_unit()]);
    let listens_since = || {
        let unit = lazy.socket_unit();
        run_ok(&[
            "systemctl",
            "show",
            "-P",
            "ActiveEnterTimestampMonotonic",
            &unit,
        ])
    };
    let before = listens_since();
    let (mut first, mut second) = (guest(&one), guest(&other));
    make_newer_package();
    // The other VM's daemon would refuse its state with this file.
    let file = fs::read_to_string(other.file()).expect("its file");
    fs::write(other.file(), format!("granule = \"64k\"\n{file}")).expect("written");
    let pid = other.property("MainPID");
    let printed = under_load(&mut first, || run_ok(&["dpkg", "-i", PACKAGE]));
    wait_for_life(&one, 2);
    assert!(is_present(&one));
    assert_eq!(first.detach(1, EP), OK);
    let status = one.status();
    println!("answered after {} ms", status["life"]["resumed_after_ms"]);

    let unit = other.service();
    assert!(
        printed.contains(&format!("the old daemon of {unit} goes on")),
        "{printed}"
    );
    assert!(!printed.contains(&one.service()), "{printed}");
    assert_eq!(other.property("MainPID"), pid);
    assert!(!is_present(&other));
    assert!(
        printed.contains("the running daemon goes on: the guest was offered \"page sizes\""),
        "{printed}"
    );
    assert_eq!(second.map(1, 0x1000, 0x1fff, 0x1000, RW), OK);
    // With its file as it was, the new program takes over.
    fs::write(other.file(), file).expect("written");
    run_ok(&["systemctl", "reload", &unit]);
    assert_eq!(second.map(1, 0x2000, 0x2fff, 0x1000, RW), OK);
    wait_for_life(&other, 2);
    assert!(is_present(&other));

    assert_eq!(lazy.property("ActiveState"), "inactive");
    assert_eq!(listens_since(), before, "the socket stays");
    assert_eq!(guest(&lazy).detach(1, EP), OK);
}

/// A unit for the VMM may be bound to that of its IOMMU.
#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn a_bound_unit_goes_on_over_deaths_and_reloads() {
    let vm = Vm::new("bound", "");
    let unit = "/run/systemd/system/viommu-test-vmm.service";
    let service = vm.service();
    fs::write(
        unit,
        format!(
            "[Unit]\nBindsTo={service}\nAfter={service}\n[Service]\nExecStart=sleep infinity\n"
        ),
    )
    .expect("a unit");
    run_ok(&["systemctl", "daemon-reload"]);
    run_ok(&["systemctl", "start", "viommu-test-vmm"]);
    let pid = || run_ok(&["systemctl", "show", "-P", "MainPID", "viommu-test-vmm"]);
    let before = pid();
    let mut guest = guest(&vm);
    run_ok(&["systemctl", "kill", "-s", "KILL", &service]);
    assert_eq!(guest.map(1, 0x2000, 0x2fff, 0x1000, RW), OK);
    wait_for_life(&vm, 2);
    under_load(&mut guest, || run_ok(&["systemctl", "reload", &service]));
    wait_for_life(&vm, 3);
    // The command of the operator waits for the next daemon itself.
    let file = vm.file();
    let printed = under_load(&mut guest, || {
        run_ok(&[
            "vhost-device-iommu",
            "upgrade",
            file.to_str().expect("text"),
        ])
    });
    assert!(printed.contains("bound: a daemon of version "), "{printed}");
    assert!(printed.contains("goes on (life 4)"), "{printed}");
    assert_eq!(pid(), before);
    run(&["systemctl", "stop", "viommu-test-vmm"]);
    let _ = fs::remove_file(unit);
}
