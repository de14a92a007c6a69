//! Checks the host as a whole: nodes, interrupt remapping, limits. The file is long because each check has its tests beside
//! it.

use std::collections::BTreeSet;
use std::fs::File;

use super::{Finding, device::node_finding};
use crate::config::{Config, HostIommu, Pin};
use crate::host::sysfs::{HostFacts, HostRoot};

/// `CAP_IPC_LOCK` in a set of capabilities: memory may be locked without limit.
const CAP_IPC_LOCK: u64 = 1 << 14;
/// The user IDs of the first user namespace, the only one whose capabilities lift the limit.
const ALL_USERS: [&str; 3] = ["0", "0", "4294967295"];

/// The findings that concern all devices.
pub(super) fn findings(root: &HostRoot, facts: &HostFacts, config: &Config) -> Vec<Finding> {
    let mut found = Vec::new();
    found.extend(match config.host_iommu {
        HostIommu::Iommufd => iommufd(root),
        HostIommu::Type1 => type1(root),
    });
    found.extend(interrupts(root, config.host_iommu));
    found.extend(locked_memory(root, facts, config));
    if config.host_iommu == HostIommu::Type1 {
        found.extend(mappings(root, config));
    }
    found
}

fn iommufd(root: &HostRoot) -> Option<Finding> {
    let node = "dev/iommu";
    if !root.path(node).exists() {
        return Some(
            Finding::missing(
                "there is no /dev/iommu",
                "load iommufd; if the kernel has none (CONFIG_IOMMUFD), set \
                 host-iommu = \"type1\"",
            )
            .with_commands(vec!["modprobe iommufd".to_owned()]),
        );
    }
    // Only opening the node shows whether a container's device filter allows it. An opened node is an empty
    // context, which is harmless.
    let open = || File::options().read(true).write(true).open(root.path(node));
    node_finding(root, node, "KERNEL==\"iommu\"").or_else(|| {
        let cause = open().err()?;
        Some(Finding::missing(
            format!("/dev/iommu cannot be opened: {cause}"),
            "allow the device in the container, or set host-iommu = \"type1\"",
        ))
    })
}

fn type1(root: &HostRoot) -> Option<Finding> {
    if !root.path("sys/module/vfio_iommu_type1").exists() {
        return Some(
            Finding::missing(
                "the kernel has no VFIO IOMMU driver of type 1",
                "load vfio_iommu_type1; if the kernel has none (CONFIG_VFIO_IOMMU_TYPE1), set \
                 host-iommu = \"iommufd\"",
            )
            .with_commands(vec!["modprobe vfio_iommu_type1".to_owned()]),
        );
    }
    node_finding(
        root,
        "dev/vfio/vfio",
        "KERNEL==\"vfio\", SUBSYSTEM==\"misc\"",
    )
}

/// Whether the host keeps devices from raising interrupts of others; `None` if that is unknown.
///
/// The kernel reports it only when VFIO takes a device. The names of the interrupt controllers in use are
/// the next best source: they start with `IR-` if x86 remaps interrupts, and with `ITS-` if an Arm GIC's
/// translation service does.
fn isolates_interrupts(interrupts: &str) -> Option<bool> {
    let is_count = |word: &&str| word.bytes().all(|byte| byte.is_ascii_digit());
    let controllers = interrupts
        .lines()
        .filter_map(|line| line.split_whitespace().skip(1).find(|word| !is_count(word)));
    let mut plain = false;
    for name in controllers {
        if name.starts_with("IR-") || name.starts_with("ITS-") {
            return Some(true);
        }
        plain |= name.starts_with("IO-APIC") || name.starts_with("PCI-MSI");
    }
    plain.then_some(false)
}

fn interrupts(root: &HostRoot, iommu: HostIommu) -> Option<Finding> {
    let module = match iommu {
        HostIommu::Iommufd => "iommufd",
        HostIommu::Type1 => "vfio_iommu_type1",
    };
    let parameter = format!("sys/module/{module}/parameters/allow_unsafe_interrupts");
    let allowed = root.value(&parameter);
    let text = root.text("proc/interrupts").unwrap_or_default();
    let unsafe_allowed = matches!(allowed.as_deref(), Some("Y" | "y" | "1"));
    match (isolates_interrupts(&text), unsafe_allowed) {
        (Some(true), _) => None,
        (Some(false), false) => Some(Finding::missing(
            "interrupt remapping is off: a device could raise any interrupt of the host",
            "turn it on in the firmware, and boot without intremap=off, nointremap or noapic",
        )),
        (Some(false), true) => Some(Finding::advice(
            "interrupt remapping is off, and allow_unsafe_interrupts makes VFIO accept that: a \
             guest can raise any interrupt of the host",
            "turn it on in the firmware, and take allow_unsafe_interrupts back",
        )),
        (None, _) => Some(Finding::advice(
            "/proc/interrupts does not show whether interrupts are remapped",
            "read the kernel's log after VFIO has taken the device",
        )),
    }
}

fn locked_memory(root: &HostRoot, facts: &HostFacts, config: &Config) -> Option<Finding> {
    if may_lock_everything(root) {
        return None;
    }
    let limits = root.text("proc/self/limits").unwrap_or_default();
    let vmm_locks_none = config.devices.passthrough.iter().all(|device| {
        let export = config.devices.exported_at(device.endpoint);
        export.is_some()
    });
    // The daemon raises its soft limit to the hard one; a VMM does not.
    let column = if vmm_locks_none || config.host_iommu == HostIommu::Type1 {
        Column::Hard
    } else {
        Column::Soft
    };
    let limit = match limit_of(&limits, "Max locked memory", column) {
        Some(Limit::None) => return None,
        Some(Limit::Bytes(bytes)) => bytes,
        None => {
            return Some(Finding::advice(
                "the limit on locked memory (RLIMIT_MEMLOCK) cannot be read",
                "compare `ulimit -l` with the guest's RAM, all of which is locked",
            ));
        }
    };
    let cure = "raise it where the daemon and the VMM are started: LimitMEMLOCK=infinity in a \
                systemd unit, `USER - memlock unlimited` in /etc/security/limits.conf, or in the \
                shell";
    let command = vec!["ulimit -l unlimited".to_owned()];
    let limit_mib = limit >> 20;
    let Some(memory) = config.memory else {
        let problem = format!(
            "at most {limit_mib} MiB of memory may be locked (RLIMIT_MEMLOCK); `memory` is not \
             given, so that the need is unknown"
        );
        return Some(Finding::advice(problem, cure).with_commands(command));
    };
    let need = LockedMemory::of(facts, config);
    let mib = |times: u64| memory.saturating_mul(times) >> 20;
    if limit < memory.saturating_mul(need.least) {
        let problem = format!(
            "at most {limit_mib} MiB of memory may be locked (RLIMIT_MEMLOCK), {} MiB are needed: {}",
            mib(need.least),
            need.reason
        );
        return Some(Finding::missing(problem, cure).with_commands(command));
    }
    // VFIO's type1 counts each process for itself.
    (config.host_iommu == HostIommu::Iommufd).then(|| {
        let problem = format!(
            "all processes of this user together may lock {limit_mib} MiB of memory (RLIMIT_MEMLOCK, as iommufd counts \
             it): this VM may lock {} MiB, depending on its guest, and other VMs of the user lock more",
            mib(need.most)
        );
        Finding::advice(problem, cure).with_commands(command)
    })
}

/// How often the guest's RAM counts as locked, as long as no domain maps a page twice.
struct LockedMemory {
    /// While all devices are in bypass mode, or all are in domains that share the pins of bypass mode.
    least: u64,
    /// While each group's address space pins all of RAM for itself.
    most: u64,
    /// The reason for the least number.
    reason: &'static str,
}

impl LockedMemory {
    fn of(facts: &HostFacts, config: &Config) -> Self {
        let mut devices = config.devices.passthrough.iter();
        let vmm_has_none =
            devices.all(|device| config.devices.exported_at(device.endpoint).is_some());
        // A group has one address space at a time. Domains share the pins of bypass mode only with `pin = "all"`, and
        // only if they were filled while no device was in bypass mode.
        let spaces = containers(facts, config);
        let (least, reason) = match (config.host_iommu, config.pin) {
            (HostIommu::Iommufd, Pin::All | Pin::Mapped) if vmm_has_none => {
                (1, "the guest's RAM for the daemon")
            }
            (HostIommu::Iommufd, Pin::All) => (
                2,
                "the guest's RAM for the VMM, and again for the daemon of the same user",
            ),
            (HostIommu::Iommufd, Pin::Mapped) => (
                1,
                "the guest's RAM for the VMM, and the memory that the guest maps on top",
            ),
            (HostIommu::Type1, Pin::All | Pin::Mapped) => {
                (spaces, "the guest's RAM for each host group")
            }
        };
        let most = match config.host_iommu {
            HostIommu::Iommufd => spaces.saturating_add(u64::from(!vmm_has_none)),
            HostIommu::Type1 => spaces,
        };
        Self {
            least,
            most,
            reason,
        }
    }
}

/// The number of containers: one for each host group. A device in no group counts as one.
fn containers(facts: &HostFacts, config: &Config) -> u64 {
    let group = |host| facts.device(host).and_then(|device| device.group);
    let devices = config.devices.passthrough.iter();
    let (in_groups, alone): (Vec<_>, Vec<_>) = devices
        .map(|device| group(device.host))
        .partition(Option::is_some);
    let groups: BTreeSet<_> = in_groups.into_iter().flatten().collect();
    (groups.len() + alone.len()) as u64
}

/// Whether this process has the capability that lifts the limit.
fn may_lock_everything(root: &HostRoot) -> bool {
    let status = root.text("proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    let users = root.text("proc/self/uid_map");
    let first_namespace = users.map_or(true, |map| map.split_whitespace().eq(ALL_USERS));
    first_namespace && effective.is_some_and(|bits| bits & CAP_IPC_LOCK != 0)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    None,
    Bytes(u64),
}

/// A column in a process's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Soft = 0,
    Hard = 1,
}

/// The limit in the line `name` of a process's limits.
fn limit_of(limits: &str, name: &str, column: Column) -> Option<Limit> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match line.split_whitespace().nth(column as usize)? {
        "unlimited" => Some(Limit::None),
        number => number.parse().ok().map(Limit::Bytes),
    }
}

fn mappings(root: &HostRoot, config: &Config) -> Option<Finding> {
    let parameter = "sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    let limit: u64 = root.value(parameter)?.parse().ok()?;
    let pages = config
        .memory
        .map(|memory| memory / config.page_mask.granule());
    pages.is_none_or(|pages| limit < pages).then(|| {
        let pages = pages.map_or(String::new(), |pages| {
            format!(" of the guest's {pages} pages")
        });
        Finding::advice(
            format!(
                "a host group can have {limit} mappings at once{pages} (dma_entry_limit); further \
                 mappings of the guest are refused"
            ),
            "raise it before the VM starts if the guest maps single pages, or use iommufd, which \
             has no such limit",
        )
        .with_commands(vec![format!("echo 16777216 > /{parameter}")])
    })
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::super::tests::config;
    use super::*;
    use crate::host::sysfs::fake::{FakeHost, Function};
    use proptest::prelude::*;
    use std::fs;

    const TYPE1: &str = "host-iommu = \"type1\"";

    fn found(host: &FakeHost, keys: &str) -> Vec<Finding> {
        let config = config(keys);
        let devices = config.devices.passthrough.iter().map(|device| device.host);
        let facts = HostFacts::read(&host.root(), devices);
        findings(&host.root(), &facts, &config)
    }

    fn only(host: &FakeHost, keys: &str) -> Finding {
        let found = found(host, keys);
        assert_eq!(found.len(), 1, "{found:#?}");
        found.into_iter().next().expect("one")
    }

    fn limits(host: &FakeHost, both: &str) {
        soft_and_hard_limit(host, both, both);
    }

    fn soft_and_hard_limit(host: &FakeHost, soft: &str, hard: &str) {
        let line = format!("Max locked memory         {soft}              {hard}   bytes\n");
        let text = format!("Limit    Soft Limit   Hard Limit   Units\n{line}");
        host.file("proc/self/limits", text);
    }

    #[test]
    fn a_host_without_iommufd_is_reported() {
        let host = FakeHost::new();
        assert_eq!(found(&host, ""), []);
        host.remove("dev/iommu");
        let finding = only(&host, "");
        assert_eq!(finding.commands, ["modprobe iommufd"]);
        assert!(finding.cure.contains("type1"), "{}", finding.cure);
        // A folder in place of the node cannot be opened for writing.
        fs::create_dir(host.path("dev/iommu")).expect("a folder");
        let finding = only(&host, "");
        assert!(finding.problem.contains("cannot be opened"), "{finding:?}");
    }

    #[test]
    fn a_host_without_type1_is_reported() {
        let host = FakeHost::new();
        host.file(
            "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
            "16777216",
        );
        assert_eq!(found(&host, TYPE1), []);
        host.remove("dev/vfio/vfio");
        assert_eq!(only(&host, TYPE1).problem, "there is no /dev/vfio/vfio");
        host.remove("sys/module/vfio_iommu_type1");
        let finding = only(&host, TYPE1);
        assert_eq!(finding.commands, ["modprobe vfio_iommu_type1"]);
        assert_eq!(found(&host, ""), []);
    }

    #[test]
    fn interrupt_remapping_is_recognized_by_controller_names() {
        let remapped = "      CPU0 CPU1\n 0: 5 0 IR-IO-APIC 2-edge timer\n 24: 0 0 DMAR-MSI 0-edge";
        assert_eq!(isolates_interrupts(remapped), Some(true));
        let msi = "      CPU0\n 24: 0 IR-PCI-MSIX-0000:00:02.0 0-edge eth0";
        assert_eq!(isolates_interrupts(msi), Some(true));
        let arm = "      CPU0\n 24: 0 ITS-PCI-MSI-0000:00:02.0 0-edge eth0";
        assert_eq!(isolates_interrupts(arm), Some(true));
        let plain = "      CPU0 CPU1\n 0: 5 0 IO-APIC 2-edge timer\n 9: 0 0 PCI-MSI 5 IR-remote";
        assert_eq!(isolates_interrupts(plain), Some(false));
        assert_eq!(
            isolates_interrupts("      CPU0\nNMI: 0 Non-maskable interrupts\n"),
            None
        );
        assert_eq!(isolates_interrupts(""), None);
    }

    #[test]
    fn missing_interrupt_remapping_is_reported() {
        for (keys, module) in [("", "iommufd"), (TYPE1, "vfio_iommu_type1")] {
            let host = FakeHost::new();
            host.file(
                "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
                "16777216",
            );
            host.file("proc/interrupts", " 0: 5 IO-APIC 2-edge timer\n");
            let parameter = format!("sys/module/{module}/parameters/allow_unsafe_interrupts");
            let finding = only(&host, keys);
            assert_eq!(finding.severity, Severity::Missing);
            assert!(finding.cure.contains("in the firmware"), "{finding:?}");
            assert!(!finding.cure.contains("allow"), "{finding:?}");
            assert!(finding.commands.is_empty(), "{finding:?}");
            host.file(&parameter, "Y\n");
            assert_eq!(only(&host, keys).severity, Severity::Advice);
            host.remove(&parameter);
            assert!(only(&host, keys).commands.is_empty());
            host.remove("proc/interrupts");
            let finding = only(&host, keys);
            assert_eq!(finding.severity, Severity::Advice);
            assert!(finding.problem.contains("does not show"), "{finding:?}");
        }
    }

    #[test]
    fn a_low_limit_on_locked_memory_is_reported() {
        let host = FakeHost::new();
        host.file(
            "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
            "16777216",
        );
        // 2 GiB of RAM, and two devices.
        limits(&host, "4294967296");
        assert_eq!(only(&host, "").severity, Severity::Advice);
        assert_eq!(found(&host, TYPE1), []);
        limits(&host, "4294967295");
        for keys in ["", TYPE1] {
            let finding = only(&host, keys);
            assert_eq!(finding.severity, Severity::Missing);
            assert!(
                finding.problem.contains("4096 MiB are needed"),
                "{finding:?}"
            );
            assert_eq!(finding.commands, ["ulimit -l unlimited"]);
        }
        assert_eq!(only(&host, "pin = \"mapped\"").severity, Severity::Advice);
        // One container is enough for two devices of one group.
        host.function(&Function::ready("0000:01:00.0", 7));
        host.function(&Function::ready("0000:02:00.0", 7));
        limits(&host, "2147483648");
        assert_eq!(found(&host, TYPE1), []);
        limits(&host, "2147483647");
        assert!(only(&host, TYPE1).problem.contains("2048 MiB are needed"));
        assert_eq!(only(&host, "pin = \"mapped\"").severity, Severity::Missing);
        limits(&host, "odd");
        assert_eq!(only(&host, "").severity, Severity::Advice);
        limits(&host, "unlimited");
        assert_eq!(found(&host, ""), []);
    }

    #[test]
    fn guest_ram_is_locked_once_for_exported_devices() {
        let times = |second: &str| {
            let text = format!(
                "address = '00:05.0'\n\
                 [[endpoint]]\naddress = '00:10.0'\nvfio = '01:00.0'\nexport = '/a'\n\
                 [[endpoint]]\naddress = '00:11.0'\nvfio = '02:00.0'\n{second}\n"
            );
            let config = Config::from_text("vm.toml".as_ref(), &text).expect("a configuration");
            let hosts = config.devices.passthrough.iter().map(|device| device.host);
            let need = LockedMemory::of(&HostFacts::read(&FakeHost::new().root(), hosts), &config);
            (need.least, need.most)
        };
        // Twice if one of the devices is in bypass mode, or both are in different domains.
        assert_eq!(times("export = '/b'"), (1, 2));
        assert_eq!(times(""), (2, 3));
    }

    /// iommufd counts all VMs of a user together, so a limit that is enough for this VM may be too low for two.
    #[test]
    fn a_limit_for_one_vm_may_be_too_low_for_two() {
        let host = FakeHost::new();
        for limit in ["6442450944", "68719476736"] {
            limits(&host, limit);
            let finding = only(&host, "");
            assert_eq!(finding.severity, Severity::Advice);
            // 2 GiB of RAM for the VMM and for each of two devices.
            for part in ["all processes of this user together", "may lock 6144 MiB"] {
                assert!(finding.problem.contains(part), "{finding:?}");
            }
        }
        host.function(&Function::ready("0000:01:00.0", 7));
        host.function(&Function::ready("0000:02:00.0", 7));
        assert!(only(&host, "").problem.contains("may lock 4096 MiB"));
        limits(&host, "unlimited");
        assert_eq!(found(&host, ""), []);
    }

    /// The daemon uses the hard limit; a VMM that locks memory itself uses its soft limit.
    #[test]
    fn the_limit_of_the_process_that_locks_memory_counts() {
        let host = FakeHost::new();
        host.file(
            "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
            "16777216",
        );
        soft_and_hard_limit(&host, "65536", "unlimited");
        assert_eq!(only(&host, "").severity, Severity::Missing);
        assert_eq!(found(&host, TYPE1), []);
        soft_and_hard_limit(&host, "65536", "131072");
        let finding = only(&host, TYPE1);
        assert!(
            finding.problem.contains("4096 MiB are needed"),
            "{finding:?}"
        );
    }

    #[test]
    fn the_capability_lifts_the_limit_outside_user_namespaces() {
        let host = FakeHost::new();
        limits(&host, "65536");
        host.file(
            "proc/self/status",
            "CapPrm:\t0\nCapEff:\t0000000000004000\n",
        );
        assert_eq!(found(&host, ""), []);
        host.file("proc/self/uid_map", "         0          0 4294967295\n");
        assert_eq!(found(&host, ""), []);
        host.file("proc/self/uid_map", "         0       1000          1\n");
        assert_eq!(found(&host, "").len(), 1);
        host.remove("proc/self/uid_map");
        host.file("proc/self/status", "CapEff:\t0000000000003fff\n");
        assert_eq!(found(&host, "").len(), 1);
    }

    #[test]
    fn mappings_are_limited() {
        let host = FakeHost::new();
        let finding = only(&host, TYPE1);
        assert_eq!(finding.severity, Severity::Advice);
        assert!(finding.problem.contains("65535 mappings"), "{finding:?}");
        assert_eq!(found(&host, &format!("{TYPE1}\ngranule = \"2m\"")), []);
        let parameter = "sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
        host.file(parameter, "524288\n");
        assert_eq!(found(&host, TYPE1), []);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(\\PC|Max locked memory| |[0-9]|:|\n){0,60}") {
            let _ = limit_of(&text, "Max locked memory", Column::Soft);
            let _ = limit_of(&text, "Max locked memory", Column::Hard);
            let _ = isolates_interrupts(&text);
        }
    }
}
