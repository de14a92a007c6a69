//! A fake host for tests: a folder with `sys`, `proc` and `dev`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::HostRoot;

/// A configuration space to write.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FakeConfigSpace {
    /// The kind of port in the PCI Express capability.
    express: Option<u8>,
    bridge: bool,
    multi: bool,
    /// The services that are supported, and those that are enabled.
    acs: Option<(u16, u16)>,
}

impl FakeConfigSpace {
    pub fn express(kind: u8, acs: Option<(u16, u16)>) -> Self {
        Self {
            express: Some(kind),
            bridge: (4..=8).contains(&kind),
            multi: false,
            acs,
        }
    }

    pub fn conventional(bridge: bool) -> Self {
        Self {
            bridge,
            ..Self::default()
        }
    }

    pub fn multi(self) -> Self {
        Self {
            multi: true,
            ..self
        }
    }

    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; if self.express.is_some() { 4096 } else { 256 }];
        bytes[0x0e] = u8::from(self.bridge) | u8::from(self.multi) << 7;
        if let Some(kind) = self.express {
            // A power management capability comes first, so that the parser must walk the list.
            bytes[0x06] = 0x10;
            bytes[0x34] = 0x40;
            bytes[0x40..0x42].copy_from_slice(&[0x01, 0x60]);
            bytes[0x60..0x64].copy_from_slice(&[0x10, 0, kind << 4 | 2, 0]);
            // Advanced error reporting before ACS.
            bytes[0x100..0x104].copy_from_slice(&0x1481_0001u32.to_le_bytes());
        }
        if let Some((supported, enabled)) = self.acs {
            bytes[0x148..0x14c].copy_from_slice(&0x0001_000du32.to_le_bytes());
            bytes[0x14c..0x14e].copy_from_slice(&supported.to_le_bytes());
            bytes[0x14e..0x150].copy_from_slice(&enabled.to_le_bytes());
        }
        bytes
    }
}

/// A PCI function to write.
#[derive(Clone, Debug)]
pub(crate) struct Function<'a> {
    /// Below `pci0000:00`, such as `0000:00:1c.0/0000:01:00.0`.
    pub path: &'a str,
    pub driver: Option<&'a str>,
    pub group: Option<u32>,
    pub class: &'a str,
    pub config: FakeConfigSpace,
    /// Its name as a VFIO device, and whether that has a character device.
    pub vfio: Option<(&'a str, bool)>,
}

impl<'a> Function<'a> {
    /// A network card bound to vfio-pci as `vfio0`, in `group`.
    pub fn ready(path: &'a str, group: u32) -> Self {
        Self {
            path,
            driver: Some("vfio-pci"),
            group: Some(group),
            class: "0x020000",
            config: FakeConfigSpace::express(0, None),
            vfio: Some(("vfio0", true)),
        }
    }

    /// A sound card bound to `driver`, without VFIO.
    pub fn bound(path: &'a str, group: u32, driver: Option<&'a str>) -> Self {
        Self {
            driver,
            class: "0x040300",
            vfio: None,
            ..Self::ready(path, group)
        }
    }

    /// A bridge.
    pub fn bridge(path: &'a str, group: u32, config: FakeConfigSpace) -> Self {
        Self {
            class: "0x060400",
            config,
            ..Self::bound(path, group, Some("pcieport"))
        }
    }
}

/// A fake host.
pub(crate) struct FakeHost {
    folder: TempDir,
}

impl FakeHost {
    /// A host without devices, but with the files that VFIO and iommufd need.
    pub fn new() -> Self {
        let made = Self {
            folder: tempfile::tempdir().expect("a folder"),
        };
        for file in ["dev/iommu", "dev/vfio/vfio"] {
            made.file(file, "");
        }
        made.file("proc/interrupts", " 1: 0 IR-IO-APIC 1-edge i8042\n");
        made.file(
            "proc/self/limits",
            "Max locked memory         unlimited            unlimited            bytes     \n",
        );
        made.file("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\n");
        made.file("sys/bus/pci/drivers/vfio-pci/new_id", "");
        made.file(
            "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
            "65535\n",
        );
        for module in ["iommufd", "vfio_iommu_type1"] {
            made.file(
                &format!("sys/module/{module}/parameters/allow_unsafe_interrupts"),
                "N\n",
            );
        }
        made
    }

    /// As [`Self::new`], with a kernel whose pages have `bytes`.
    pub fn with_pages(bytes: u64) -> Self {
        let made = Self::new();
        // AT_PHDR, AT_PAGESZ, AT_NULL.
        let words = [3, 0x40, 6, bytes, 0, 0];
        let vector: Vec<_> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
        made.file("proc/self/auxv", vector);
        made
    }

    pub fn root(&self) -> HostRoot {
        HostRoot::new(self.folder.path())
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }

    pub fn file(&self, below: &str, content: impl AsRef<[u8]>) {
        let path = self.path(below);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, content).expect("written");
    }

    pub fn remove(&self, below: &str) {
        let path = self.path(below);
        if path.is_dir() {
            fs::remove_dir_all(path).expect("removed");
        } else {
            fs::remove_file(path).expect("removed");
        }
    }

    /// Makes a link at `at` that leads to `target`, both below the root.
    pub fn link(&self, target: &str, at: &str) {
        link(&self.path(target), &self.path(at));
    }

    /// Makes a link at `at` that leads to a path outside this host.
    pub fn dangling(&self, target: &str, at: &str) {
        link(Path::new(target), &self.path(at));
    }

    /// Makes the IOMMU `name`, which translates for the devices at `addresses`. They must exist.
    pub fn iommu(&self, name: &str, addresses: &[&str]) {
        let below = format!("sys/class/iommu/{name}");
        fs::create_dir_all(self.path(&below)).expect("a folder");
        for address in addresses {
            self.link(&below, &format!("sys/bus/pci/devices/{address}/iommu"));
        }
    }

    /// Writes the function, its links, its nodes and its membership in the group.
    pub fn function(&self, function: &Function<'_>) {
        let below = format!("sys/devices/pci0000:00/{}", function.path);
        let name = function.path.rsplit('/').next().expect("a name");
        for (file, content) in [
            ("vendor", "0x8086\n"),
            ("device", "0x10d3\n"),
            ("class", &format!("{}\n", function.class)),
            ("driver_override", "(null)\n"),
        ] {
            self.file(&format!("{below}/{file}"), content);
        }
        self.file(&format!("{below}/config"), function.config.bytes());
        let folder = self.path(&below);
        if let Some(driver) = function.driver {
            let driver = self.path(&format!("sys/bus/pci/drivers/{driver}"));
            link(&driver, &folder.join("driver"));
        }
        if let Some((vfio, node)) = function.vfio {
            self.file(&format!("{below}/vfio-dev/{vfio}/uevent"), "");
            if node {
                self.file(&format!("{below}/vfio-dev/{vfio}/dev"), "511:0\n");
                self.file(&format!("dev/vfio/devices/{vfio}"), "");
            }
        }
        if let Some(group) = function.group {
            let group_folder = format!("sys/kernel/iommu_groups/{group}");
            link(&self.path(&group_folder), &folder.join("iommu_group"));
            link(
                &folder,
                &self.path(&format!("{group_folder}/devices/{name}")),
            );
            self.file(
                &format!("{group_folder}/reserved_regions"),
                "0x00000000fee00000 0x00000000feefffff msi\n",
            );
            if function.vfio.is_some() {
                self.file(&format!("dev/vfio/{group}"), "");
            }
        }
        link(&folder, &self.path(&format!("sys/bus/pci/devices/{name}")));
    }
}

fn link(target: &Path, at: &Path) {
    fs::create_dir_all(at.parent().expect("a parent")).expect("a folder");
    symlink(target, at).expect("a link");
}
