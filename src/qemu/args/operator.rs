//! Understands the QEMU arguments that the operator gives to `launch`: which of ours they replace, where they put
//! devices, and which of them would undo the IOMMU.

use std::collections::BTreeSet;
use std::ffi::OsString;

use super::PREFIX;
use super::places::bus_number;
use super::ports::check_bridge;
use super::refused::VmmOptionError;
use super::vmm_options::{VmmOption, is_off, parse};
use crate::config::Machine;
use crate::topology::{PciAddress, Ports};

/// Devices that are IOMMUs.
const IOMMUS: [&str; 9] = [
    "amd-iommu",
    "arm-smmuv3",
    "intel-iommu",
    "riscv-iommu-pci",
    "riscv-iommu-sys",
    "virtio-iommu",
    "virtio-iommu-device",
    "virtio-iommu-pci",
    "virtio-iommu-pci-non-transitional",
];
/// Properties of machines that add an IOMMU.
const IOMMU_PROPERTIES: [&str; 3] = ["iommu", "iommu-sys", "x-iommu"];
/// The device of q35 that puts the machine to sleep.
pub(super) const Q35_SLEEP_CONTROLLER: &str = "ICH9-LPC";
/// Machines that make their ACPI tables without those of `-acpitable`.
const WITHOUT_TABLES: [&str; 1] = ["microvm"];
/// The virtio device ID of an IOMMU.
const VIRTIO_IOMMU: &str = "23";
/// Types of devices that `launch` adds and their base, whose properties `x-pci-...` change the IDs that the guest reads.
const VFIO_USER_TYPES: [&str; 2] = ["vfio-user-pci", "vfio-pci-device"];

/// The operator's options, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperatorOptions(Vec<VmmOption>);

impl OperatorOptions {
    /// The options in `arguments`, with those of files that `-readconfig` names.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn new(arguments: &[OsString]) -> Result<Self, VmmOptionError> {
        Ok(Self(parse(arguments)?))
    }

    /// Refuses options with which the guest would have no working IOMMU.
    ///
    /// # Errors
    /// Names the first such option.
    pub fn check(&self, machine: Machine) -> Result<(), VmmOptionError> {
        if let Some(name) = self.machine_type()
            && WITHOUT_TABLES.contains(&name)
        {
            return Err(VmmOptionError::NoTables {
                machine: name.to_owned(),
            });
        }
        for option in &self.0 {
            match &*option.name {
                "daemonize" => return Err(VmmOptionError::Daemonize),
                "mem-path" => return Err(VmmOptionError::MemPath),
                "no-acpi" if machine == Machine::Q35 => {
                    return Err(VmmOptionError::NoAcpi { what: "-no-acpi" });
                }
                "memory" if option.get("mem-path").is_some() => {
                    return Err(VmmOptionError::MemPath);
                }
                _ => {}
            }
            if option.is_machine() {
                match (machine, option.get("acpi")) {
                    (Machine::Q35, Some(acpi)) if is_off(acpi) => {
                        return Err(VmmOptionError::NoAcpi {
                            what: "-machine acpi=off",
                        });
                    }
                    (Machine::Virt, Some(acpi)) if !is_off(acpi) && acpi != "auto" => {
                        return Err(VmmOptionError::AcpiOnVirt);
                    }
                    _ => {}
                }
                if machine == Machine::Virt && option.get("gic-version") == Some("2") {
                    return Err(VmmOptionError::Gic);
                }
                let iommu = |key: &&&str| option.get(key).is_some_and(|it| !is_off(it));
                if let Some(key) = IOMMU_PROPERTIES.iter().find(iommu) {
                    let what = format!("-machine {key}=...");
                    return Err(VmmOptionError::SecondIommu { what });
                }
            }
            if let Some(global) = option.global()
                && VFIO_USER_TYPES.contains(&global.driver)
                && global.property.starts_with("x-pci-")
            {
                let what = format!("-global {}.{}=...", global.driver, global.property);
                return Err(VmmOptionError::ChangedIds { what });
            }
            if option.is_iommu(self.virtio_id()) {
                let what = format!("-device {}", option.driver().unwrap_or_default());
                return Err(VmmOptionError::SecondIommu { what });
            }
            if let Some(id) = option.get("id")
                && id.starts_with(PREFIX)
            {
                return Err(VmmOptionError::TakenId {
                    option: option.name.clone(),
                    id: id.to_owned(),
                });
            }
        }
        self.check_memory()
    }

    /// The virtio device ID of vhost-user devices that have none of their own.
    fn virtio_id(&self) -> Option<&str> {
        let mut globals = self.0.iter().rev().filter_map(VmmOption::global);
        let of_vhost_user =
            globals.find(|it| it.property == "virtio-id" && it.driver.starts_with("vhost-user-"));
        of_vhost_user.map(|it| it.value)
    }

    /// Refuses memory of the guest that the daemon could not share. A backend that is missing is left to QEMU,
    /// which ends at once.
    fn check_memory(&self) -> Result<(), VmmOptionError> {
        let used: BTreeSet<_> = self
            .0
            .iter()
            .flat_map(|option| [option.get("memory-backend"), option.get("memdev")])
            .flatten()
            .collect();
        let objects = self.0.iter().filter(|option| option.name == "object");
        for object in objects {
            if let Some(id) = object.get("id")
                && used.contains(id)
                && !object.is_shared()
            {
                return Err(VmmOptionError::NotShared { id: id.to_owned() });
            }
        }
        Ok(())
    }

    /// The machine that the options choose, if it is one that this program knows.
    pub fn machine(&self) -> Option<Machine> {
        match self.machine_type()? {
            "virt" => Some(Machine::Virt),
            name if name.starts_with("virt-") => Some(Machine::Virt),
            name if name.contains("q35") => Some(Machine::Q35),
            _ => None,
        }
    }

    /// Whether the options choose the machine's type.
    pub fn has_machine(&self) -> bool {
        self.machine_type().is_some()
    }

    /// The name of the machine's type. The last option counts.
    fn machine_type(&self) -> Option<&str> {
        let mut machines = self.0.iter().filter(|option| option.is_machine()).rev();
        machines.find_map(|option| option.get("").or(option.get("type")))
    }

    /// Whether the options choose the interrupt controller of an Arm machine.
    pub fn has_gic_version(&self) -> bool {
        let mut machines = self.0.iter().filter(|option| option.is_machine());
        machines.any(|option| option.get("gic-version").is_some())
    }

    /// The device of the machine with the properties `disable_s3` and `disable_s4`, if it has one. A VM without
    /// a chosen machine is a q35.
    pub fn sleep_controller(&self) -> Option<&'static str> {
        match self.machine_type() {
            None => Some(Q35_SLEEP_CONTROLLER),
            Some(machine) if machine.contains("q35") => Some(Q35_SLEEP_CONTROLLER),
            Some("pc") => Some("PIIX4_PM"),
            Some(machine) if machine.starts_with("pc-i440fx-") => Some("PIIX4_PM"),
            Some(_) => None,
        }
    }

    /// Whether the options give the size of RAM.
    pub fn has_size(&self) -> bool {
        let mut options = self.0.iter();
        options.any(|option| option.name == "m" || option.name == "memory")
    }

    /// Whether the machine or a NUMA node has a memory backend.
    pub fn has_memory_backend(&self) -> bool {
        self.0.iter().any(|option| {
            option.is_machine() && option.get("memory-backend").is_some()
                || option.name == "numa" && option.get("memdev").is_some()
        })
    }

    /// Refuses bridges that would change the bus numbers behind `ports`.
    ///
    /// # Errors
    /// Names the first such bridge.
    pub fn check_bridges(&self, ports: &Ports) -> Result<(), VmmOptionError> {
        let mut devices = self.0.iter().filter(|option| option.name == "device");
        devices.try_for_each(|device| check_bridge(ports, device.driver(), device.get("bus")))
    }

    /// The functions on the root bus and behind `ports` at which the options put devices.
    pub fn functions(&self, ports: &Ports) -> BTreeSet<PciAddress> {
        let devices = self.0.iter().filter(|option| option.name == "device");
        devices
            .filter_map(|device| {
                let bus = bus_number(ports, device.get("bus"))?;
                device.function_on(bus)
            })
            .collect()
    }
}

impl VmmOption {
    /// Whether this adds an IOMMU, if `virtio_id` is the ID of vhost-user devices without one of their own.
    fn is_iommu(&self, virtio_id: Option<&str>) -> bool {
        let driver = self.driver().unwrap_or_default();
        let id = self.get("virtio-id").or(virtio_id);
        let id = id.map(|id| id.trim_start_matches("0x"));
        self.name == "device"
            && (IOMMUS.contains(&driver)
                || driver.starts_with("vhost-user-") && matches!(id, Some(VIRTIO_IOMMU | "17")))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn options(line: &str) -> OperatorOptions {
        let arguments: Vec<_> = line.split_whitespace().map(OsString::from).collect();
        OperatorOptions::new(&arguments).expect(line)
    }

    #[test]
    fn options_are_found_however_they_are_written() {
        for (line, machine, size, backend) in [
            ("", false, false, false),
            (
                "-nodefaults -smp 4 -device pc-dimm,memdev=m",
                false,
                false,
                false,
            ),
            ("-M q35", true, false, false),
            ("--machine q35,accel=kvm -m 4G", true, true, false),
            ("-machine type=q35,memory-backend=ram", true, false, true),
            ("-numa node,nodeid=0,memdev=ram --m 1G", false, true, true),
            ("-numa node,nodeid=0,mem=1G", false, false, false),
            ("-M q35 -machine memory-backend=ram", true, false, true),
            (
                "-object memory-backend-memfd,id=memory-backend",
                false,
                false,
                false,
            ),
            ("-machine", false, false, false),
            ("-machine accel=kvm", false, false, false),
            ("m machine -mem-prealloc -", false, false, false),
            // Values that look like options.
            (
                "-append -daemonize -name -m -nographic -m 1G",
                false,
                true,
                false,
            ),
        ] {
            let found = options(line);
            assert_eq!(found.has_machine(), machine, "{line}");
            assert_eq!(found.has_size(), size, "{line}");
            assert_eq!(found.has_memory_backend(), backend, "{line}");
            assert_eq!(found.check(Machine::Q35), Ok(()), "{line}");
        }
    }

    #[test]
    fn the_machine_decides_which_device_puts_it_to_sleep() {
        for (line, controller) in [
            ("", Some("ICH9-LPC")),
            ("-machine memory-backend=ram", Some("ICH9-LPC")),
            ("-M pc-q35-11.0", Some("ICH9-LPC")),
            ("-M pc -M q35,accel=kvm", Some("ICH9-LPC")),
            ("-M pc", Some("PIIX4_PM")),
            ("-machine type=pc-i440fx-9.2", Some("PIIX4_PM")),
            ("-M microvm", None),
            ("-M virt", None),
        ] {
            assert_eq!(options(line).sleep_controller(), controller, "{line}");
        }
    }

    #[test]
    fn options_that_undo_the_iommu_are_refused() {
        for (line, message) in [
            ("-nographic -daemonize", "leave the option out"),
            ("-m 1G -mem-path /dev/hugepages", "share=on"),
            ("-no-acpi", "takes the ACPI tables"),
            (
                "-M microvm,pcie=on,acpi=on",
                "no table would describe the IOMMU",
            ),
            ("-M q35,acpi=off", "takes the ACPI tables"),
            ("-M q35,noacpi", "takes the ACPI tables"),
            (
                "-device intel-iommu,intremap=on",
                "-device intel-iommu is a second",
            ),
            ("-device amd-iommu", "second IOMMU"),
            ("-device virtio-iommu-pci,addr=4", "second IOMMU"),
            (
                "-device {\"driver\":\"virtio-iommu-pci\",\"addr\":\"4\"}",
                "second IOMMU",
            ),
            (
                "-device vhost-user-test-device-pci,virtio-id=23,chardev=c",
                "second IOMMU",
            ),
            ("-M virt,iommu=smmuv3", "-machine iommu=... is a second"),
            ("-M virt,iommu-sys=on", "second IOMMU"),
            (
                "-chardev socket,id=viommu-socket,path=/s",
                "give another ID",
            ),
            ("-object iommufd,id=viommu-iommufd", "give another ID"),
            (
                "-M q35,memory-backend=ram -object memory-backend-ram,id=ram,size=1G",
                "\"ram\" is not shared",
            ),
            (
                "-object memory-backend-file,id=ram,size=1G,mem-path=/f -numa node,memdev=ram",
                "add share=on",
            ),
            (
                "-object memory-backend-memfd,id=ram,size=1G,share=off -numa node,memdev=ram",
                "add share=on",
            ),
            (
                "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"d\",\"size\":1} -device pc-dimm,memdev=d",
                "\"d\" is not shared",
            ),
            // -set, before and after the option that it changes.
            (
                "-set object.ram.share=off -M q35,memory-backend=ram \
                 -object memory-backend-memfd,id=ram,size=1G",
                "\"ram\" is not shared",
            ),
            (
                "-device e1000e,id=nic -set device.nic.driver=intel-iommu",
                "second IOMMU",
            ),
            (
                "-device vhost-user-test-device-pci,id=v,chardev=c -set device.v.virtio-id=23",
                "second IOMMU",
            ),
            (
                "-set object.viommu-ram.share=off",
                "\"viommu-ram\" of -object begins",
            ),
            ("-set device.viommu-iommu.addr=0a.0", "begins with"),
            ("-set memory..mem-path=/f", "-mem-path"),
            // -global, before and after the option that it changes.
            (
                "-global vfio-user-pci.x-pci-device-id=0x1041",
                "-global vfio-user-pci.x-pci-device-id=... changes the IDs",
            ),
            (
                "-global driver=vfio-pci-device,property=x-pci-vendor-id,value=1",
                "leave it out",
            ),
            (
                "-device vhost-user-test-device-pci,chardev=c -global vhost-user-test-device.virtio-id=23",
                "second IOMMU",
            ),
            (
                "-global driver=vhost-user-base,property=virtio-id,value=0x17 \
                 -device vhost-user-test-device-pci,chardev=c",
                "second IOMMU",
            ),
        ] {
            let error = options(line)
                .check(Machine::Q35)
                .expect_err(line)
                .to_string();
            assert!(error.contains(message), "{line}: {error}");
        }
        for line in [
            "-M q35,iommu=off,acpi=on",
            "-M virt,iommu=none",
            "-chardev socket,id=viommu,path=/s -object iommufd,id=iommufd0",
            "-M q35,memory-backend=ram -object memory-backend-memfd,id=ram,size=1G",
            "-M q35,memory-backend=ram -object memory-backend-file,id=ram,mem-path=/f,share=on",
            "-M q35,memory-backend=ram -object memory-backend-ram,id=ram,share=on",
            "-object {\"qom-type\":\"memory-backend-file\",\"id\":\"d\",\"share\":true} \
             -device pc-dimm,memdev=d",
            // Not the guest's memory.
            "-object memory-backend-ram,id=unused,size=1G",
            "-device vhost-user-test-device-pci,virtio-id=26,chardev=c",
            "-object memory-backend-memfd,id=ram,share=off,size=1G -set object.ram.share=on -numa node,memdev=ram",
            "-set drive.disk.cache=none -set broken -set a.b",
            // QEMU ignores the first, and a -device has precedence over a -global.
            "-global memory-backend-memfd.share=off -M q35,memory-backend=ram \
             -object memory-backend-memfd,id=ram,size=1G",
            "-global vhost-user-test-device.virtio-id=23 -device vhost-user-test-device-pci,virtio-id=26,chardev=c",
            "-global vhost-user-test-device-pci.virtio-id=23 -global vhost-user-test-device-pci.virtio-id=26 \
             -device vhost-user-test-device-pci,chardev=c",
            "-global vhost-user-test-device.virtio-id=23",
            "-global vfio-user-pci.x-no-posted-writes=on -global vfio-pci.x-pci-sub-device-id=1",
            "-global ICH9-LPC.disable_s3=0 -global broken -global driver=a -global",
        ] {
            assert_eq!(options(line).check(Machine::Q35), Ok(()), "{line}");
        }
    }

    #[test]
    fn places_of_devices_are_found() {
        let found = options(
            "-device e1000e,addr=06.0 -device e1000e,bus=pcie.0,addr=0x7.1 -device e1000e,addr=1e \
             -device {\"driver\":\"nvme\",\"addr\":\"8.2\"} -device x,bus=port1,addr=09.0 \
             -device y -device z,addr=20.0 -net nic,addr=a.0",
        );
        let places: Vec<_> = found
            .functions(&Ports::default())
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            places,
            [
                "0000:00:06.0",
                "0000:00:07.1",
                "0000:00:08.2",
                "0000:00:1e.0"
            ]
        );
    }

    #[test]
    fn files_of_options_are_checked_as_well() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vm.cfg");
        let line = format!("-readconfig {}", path.display());
        for (text, message) in [
            (
                "# A VM.\n[machine]\n  type = \"q35\"\n[device \"iommu\"]\n driver = \"intel-iommu\"\n",
                Some("second IOMMU"),
            ),
            ("[memory]\n  mem-path = \"/f\"\n", Some("-mem-path")),
            (
                "[machine]\nmemory-backend = \"m\"\n[object \"m\"]\nqom-type = \"memory-backend-ram\"\n",
                Some("add share=on"),
            ),
            ("[machine]\n type = \"q35\"\n", None),
        ] {
            fs::write(&path, text).expect("written");
            let checked = options(&line).check(Machine::Q35);
            match message {
                None => assert!(checked.is_ok() && options(&line).has_machine()),
                Some(message) => {
                    let error = checked.expect_err(text).to_string();
                    assert!(error.contains(message), "{text}: {error}");
                }
            }
        }
        for path in ["/nonexistent/vm.cfg", "/dev/null"] {
            let arguments = ["-readconfig", path].map(OsString::from);
            let error = OperatorOptions::new(&arguments)
                .expect_err(path)
                .to_string();
            assert!(error.contains("give them as arguments"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(-device |-object |-M |[{}\",=. a-z0-9]){0,40}") {
            let found = options(&text);
            let _ = (found.check(Machine::Q35), found.functions(&Ports::default()));
        }
    }
}
