//! Devices of this machine that the daemon offers to the VMM over vfio-user.

use std::fs;

use crate::devices::FaultLog;
use crate::nested::{EDU, Nested};
use crate::vm::Setup;
use crate::words;

/// An unmodified QEMU with a stock kernel, and no access to VFIO.
fn a_stock_guest_drives_an_exported_device(host_iommu: &str) {
    let setup = Setup::from_environment();
    let host = words("VIOMMU_EDU")[0].clone();
    let keys = format!("host-iommu = \"{host_iommu}\"");
    let endpoint = format!("vfio = \"{host}\"\nexport = \"@/edu.sock\"");
    let mut nested = Nested::launch(&setup, host_iommu, &keys, &endpoint);
    nested.vm.wait_until_up();
    nested.place.note("up");
    nested.drive(&mut FaultLog::now());
    nested.place.note("driven");
    for kind in ["intx", "msi", "intx"] {
        let answer = nested.ask(&format!("irq {kind} 5"));
        assert_eq!(answer, ["ok 10 interrupts"], "{kind}");
    }
    nested.place.note("interrupted");

    let vmm = nested.process_with("vfio-user-pci");
    let daemon = nested.process_with("--ready-fd");
    assert_eq!(vfio_descriptors(vmm), Vec::<String>::new());
    assert!(!vfio_descriptors(daemon).is_empty(), "where the device is");
    let status = nested.control.status();
    assert_eq!(status.dma_of(EDU), "translated");

    nested.vm.begin("poweroff -f");
    assert_eq!(nested.vm.wait_for_end().code(), Some(0));
    nested.wait_for_end();
    assert!(!nested.place.path("edu.sock").exists());
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_stock_guest_drives_an_exported_device_iommufd() {
    a_stock_guest_drives_an_exported_device("iommufd");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_stock_guest_drives_an_exported_device_type1() {
    a_stock_guest_drives_an_exported_device("type1");
}

/// What a process has open of VFIO, iommufd, or DMA buffers.
fn vfio_descriptors(pid: u32) -> Vec<String> {
    let list = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process");
    let targets = list
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok());
    let targets: Vec<_> = targets.map(|t| t.display().to_string()).collect();
    assert!(targets.len() > 5, "{targets:?}");
    let parts = ["vfio", "/dev/iommu", "dmabuf"];
    targets
        .into_iter()
        .filter(|target| parts.iter().any(|part| target.contains(part)))
        .collect()
}
