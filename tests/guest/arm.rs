//! Arm guests of QEMU's machine `virt`: the scenarios of the x86 guests, with each size of a page; and those that only these
//! guests have.

use super::tables::tables_by_grub;
use super::vm::{ANSWER, Daemon, Kernel, Setup, TestDir, wait_for};
use super::{
    ENDPOINTS, FIRST, Mode, SECOND, THIRD, Transport, bind_all, boot, config_of, launched,
    lives_of_a_vm, nothing_is_mapped, passthrough, probed_as_configured, start_mapper,
    tables_agree, traffic,
};

guest_tests! {
    short_newest_strict: short(newest, Strict, VhostUser);
    traffic_oldest_strict: traffic(oldest, Strict, VhostUser);
    traffic_oldest_lazy: traffic(oldest, Lazy, VhostUser);
    traffic_newest_strict: traffic(newest, Strict, VhostUser);
    traffic_newest_lazy: traffic(newest, Lazy, VhostUser);
    traffic_oldest_16k_strict: traffic(oldest_16k, Strict, VhostUser);
    traffic_oldest_16k_lazy: traffic(oldest_16k, Lazy, VhostUser);
    traffic_newest_16k_strict: traffic(newest_16k, Strict, VhostUser);
    traffic_newest_16k_lazy: traffic(newest_16k, Lazy, VhostUser);
    traffic_own_64k_strict: traffic(own_64k, Strict, VhostUser);
    traffic_own_64k_lazy: traffic(own_64k, Lazy, VhostUser);
    traffic_newest_strict_over_virtio_pci: traffic(newest, Strict, VirtioPci);
    traffic_oldest_16k_lazy_over_virtio_pci: traffic(oldest_16k, Lazy, VirtioPci);
    lives_of_a_vm_newest_strict: lives_of_a_vm(newest, Strict, VhostUser);
    lives_of_a_vm_oldest_16k_lazy: lives_of_a_vm(oldest_16k, Lazy, VhostUser);
    passthrough_newest_strict: passthrough(newest, Strict, VhostUser);
    passthrough_oldest_16k_lazy: passthrough(oldest_16k, Lazy, VhostUser);
    launched_newest_strict: launched(newest, Strict, VhostUser);
    launched_newest_lazy_over_virtio_pci: launched(newest, Lazy, VirtioPci);
    tables_by_grub_newest_strict: tables_by_grub(newest, Strict, VhostUser);
    tables_by_grub_oldest_lazy: tables_by_grub(oldest, Lazy, VhostUser);
    granule_of_16k_oldest_16k_strict: granule_of_the_guests_page(oldest_16k, Strict, VhostUser);
    granule_of_16k_newest_16k_lazy: granule_of_the_guests_page(newest_16k, Lazy, VhostUser);
    granule_of_64k_own_64k_strict: granule_of_the_guests_page(own_64k, Strict, VhostUser);
    granule_of_64k_newest_is_too_large: granule_is_too_large(newest, Strict, VhostUser);
}

/// A minute of [`traffic`]: the topology from the device tree, and traffic of one program.
fn short(setup: &Setup, kernel: &Kernel, mode: Mode, transport: Transport, test_dir: &TestDir) {
    let config = config_of(setup.machine, kernel);
    works(&config, setup, kernel, mode, transport, test_dir);
}

/// The daemon's smallest page is that of the guest.
fn granule_of_the_guests_page(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let granule = granule(kernel.page);
    let config = granule + &config_of(setup.machine, kernel);
    works(&config, setup, kernel, mode, transport, test_dir);
}

/// The driver of a guest whose pages are smaller than the granule attaches no endpoint.
fn granule_is_too_large(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let config =
        "bypass = false\n".to_owned() + &granule(64 << 10) + &config_of(setup.machine, kernel);
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config);
    let mut vm = boot(setup, kernel, mode, test_dir, &daemon, "vm", "");
    test_dir.note("up");
    let log = vm.run("dmesg | grep -i 'granule' || true").join("\n");
    assert!(
        log.contains("granule 0x10000 larger than system page size 0x1000"),
        "{log}"
    );
    let status = daemon.status();
    assert_eq!(status.0["connected"], true);
    for endpoint in ENDPOINTS {
        assert_eq!(status.endpoint(endpoint)["state"], "unattached");
        assert_eq!(status.dma_of(endpoint), "blocked");
    }
    assert_eq!(status.requests("attach", "ok"), 0);
    drop(vm);
    daemon.stop();
}

fn granule(bytes: u64) -> String {
    format!("granule = \"{}k\"\n", bytes >> 10)
}

/// With this configuration the guest has its groups and regions, before and after a reboot, and the daemon has the
/// mappings that the guest makes.
fn works(
    config: &str,
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let mut daemon = Daemon::start_over(transport.key(), test_dir, config);
    let mut vm = boot(setup, kernel, mode, test_dir, &daemon, "vm", "");
    test_dir.note("up");
    probed_as_configured(&mut vm, &mut daemon, setup, kernel, mode);
    start_mapper(&mut vm, "pair", 1, &[FIRST, SECOND]);
    start_mapper(&mut vm, "single", 2, &[THIRD]);
    vm.run_within("ask pair churn 5000", ANSWER);
    vm.run_within("ask single churn 2000", ANSWER);
    assert_eq!(daemon.status().refusals(), Vec::<String>::new());
    tables_agree(&mut vm, &mut daemon, &[("pair", FIRST), ("single", THIRD)]);
    test_dir.note("tables agree");
    vm.qmp("system_reset", serde_json::json!({}));
    vm.wait_until_up();
    test_dir.note("up again");
    nothing_is_mapped(&mut daemon);
    vm.run(&bind_all());
    wait_for("translated endpoints", ANSWER, || {
        let status = daemon.status();
        ENDPOINTS
            .iter()
            .all(|endpoint| status.dma_of(endpoint) == "translated")
            .then_some(())
    });
    nothing_is_mapped(&mut daemon);
    drop(vm);
    daemon.stop();
}
