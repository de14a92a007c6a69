//! The machines that QEMU emulates for the guests, one for each architecture.

#![allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]

use std::path::Path;
use std::process::Command;

/// QEMU's machine for the guests of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// x86: the guest learns its endpoints from an ACPI table.
    Q35,
    /// Arm: the guest learns them from the device tree.
    Virt,
}

impl Machine {
    /// The machine for `VIOMMU_ARCH`, which qemu-scripts/setup.sh writes.
    pub fn from_environment() -> Self {
        match std::env::var("VIOMMU_ARCH").as_deref() {
            Ok("arm64") => Self::Virt,
            Ok("amd64") | Err(_) => Self::Q35,
            Ok(other) => panic!("VIOMMU_ARCH is `{other}`, not amd64 or arm64"),
        }
    }

    /// The first serial port, as the guest's kernel names it.
    pub fn console(self) -> &'static str {
        match self {
            Self::Q35 => "ttyS0",
            Self::Virt => "ttyAMA0",
        }
    }

    /// QEMU's arguments for an emulated processor. The default one of `virt` has 32 bits.
    pub fn accel(self) -> &'static [&'static str] {
        match self {
            Self::Q35 => &["-accel", "tcg"],
            Self::Virt => &["-accel", "tcg", "-cpu", "max"],
        }
    }

    /// The name of a boot loader on a disk that UEFI starts.
    pub fn boot_loader(self) -> &'static str {
        match self {
            Self::Q35 => "BOOTX64.EFI",
            Self::Virt => "BOOTAA64.EFI",
        }
    }

    /// The daemon's configuration of the machine.
    pub fn config(self) -> &'static str {
        match self {
            Self::Q35 => "",
            Self::Virt => "machine = \"virt\"\n",
        }
    }

    /// Lets `qemu` write the device tree of a machine like those of [`Vm`](super::Vm): one processor, two serial ports.
    pub fn dump_tree(self, qemu: &Path, tree: &Path) {
        let output = Command::new(qemu)
            .args(self.accel())
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-S"])
            .args(["-smp", "1", "-serial", "null", "-serial", "null"])
            .args(["-machine", "virt,gic-version=3"])
            .args(["-machine", &format!("dumpdtb={}", tree.display())])
            .output()
            .expect("QEMU runs");
        assert!(
            tree.exists(),
            "QEMU has written no device tree: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
