//! Exported devices on a host whose IOMMU cannot enforce cache coherency.

use std::fs;

use crate::common::daemon::Daemon;
use crate::program::run;
use crate::words;

#[test]
#[ignore = "needs the L1 machine with --iommu vtd-no-snoop; run qemu-scripts/test.sh passthrough"]
fn a_device_is_not_exported_without_snoop_control() {
    assert_eq!(words("VIOMMU_L1"), ["vtd-no-snoop"]);
    let device = &words("VIOMMU_EDU")[0];
    let folder = tempfile::tempdir().expect("a folder");
    let (file, socket) = (folder.path().join("vm.toml"), folder.path().join("edu"));
    for host_iommu in ["iommufd", "type1"] {
        let text = format!(
            "address = '00:05.0'\nhost-iommu = '{host_iommu}'\n\
             [[endpoint]]\naddress = '00:06.0'\nvfio = '{device}'\nexport = {socket:?}\n"
        );
        fs::write(&file, format!("socket = '{}.s'\n{text}", socket.display())).expect("written");
        let (checked, is_ready) = run(&["check"], &file);
        assert!(
            !is_ready && checked.contains("no snoop control"),
            "{checked}"
        );
        let (refusal, started) = run(&["--config"], &file);
        assert!(
            !started && refusal.contains("no snoop control"),
            "{refusal}"
        );

        let daemon = Daemon::with_config(&format!("{text}allow-no-snoop = true\n"));
        assert!(
            daemon.log().contains("`allow-no-snoop` says"),
            "{}",
            daemon.log()
        );
        daemon.terminate();
        daemon.wait_for_end();
    }
}
