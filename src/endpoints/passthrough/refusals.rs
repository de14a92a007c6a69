//! Tests of the refusals that need no device.

use std::path::Path;

use super::*;
use crate::host::sysfs::fake::{FakeHost, Function};

fn config(keys: &str) -> Config {
    let text = format!(
        "address = '00:05.0'\n{keys}\n[[endpoint]]\naddress = '00:06.0'\nvfio = '0000:01:00.0'\n"
    );
    Config::from_text(Path::new("vm.toml"), &text).expect("a configuration")
}

/// The group of the configured device on `host`.
fn group_on(host: &FakeHost) -> Result<u32, String> {
    let Passthrough {
        endpoint, host: at, ..
    } = config("").devices.passthrough[0];
    let facts = HostFacts::read(&host.root(), [at]);
    group_of(&facts, at, endpoint).map_err(|error| error.to_string())
}

/// VFIO's groups without an IOMMU have numbers and nodes as others have, and translate nothing.
#[test]
fn a_device_that_no_iommu_translates_for_is_refused() {
    let host = FakeHost::new();
    host.function(&Function::ready("0000:01:00.0", 7));
    assert_eq!(group_on(&host), Ok(7));
    host.file("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
    let refusal = group_on(&host).expect_err("no IOMMU");
    for part in [
        "no IOMMU translates for 0000:01:00.0 (endpoint 0000:00:06.0)",
        "its group is of VFIO's mode without an IOMMU",
        "turn the IOMMU on",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
    host.remove("sys/bus/pci/devices/0000:01:00.0/iommu_group");
    let refusal = group_on(&host).expect_err("no group");
    assert!(
        refusal.contains("the host's IOMMU is off; turn"),
        "{refusal}"
    );
    host.iommu("smmu3.0x0000000009050000", &[]);
    let refusal = group_on(&host).expect_err("no group");
    assert!(
        refusal.contains("do not translate for it (smmu3.0x0000000009050000)"),
        "{refusal}"
    );
}

/// An SMMU with pages of 64 KiB only, or type1 on a kernel with such pages.
#[test]
fn a_device_with_larger_pages_than_the_guest_is_refused() {
    let check = |keys: &str, smallest| {
        let config = config(keys);
        let checked = check_granule(&config, config.devices.passthrough[0], smallest);
        checked.map_err(|error| error.to_string())
    };
    for (keys, smallest) in [("", 4096), ("", 1), ("granule = '64k'", 65536)] {
        assert_eq!(check(keys, smallest), Ok(()), "{keys} {smallest}");
    }
    let refusal = check("granule = '16k'", 65536).expect_err("too large");
    for part in [
        "no pages smaller than 64 KiB for this device, and `granule` is 16 KiB",
        "set granule = \"64k\"",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
}
