//! Checks the host as a whole: nodes, page sizes, limits. The file is long because each check has its tests beside it.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use super::access::node_finding;
use super::{Finding, interrupts, kernel};
use crate::config::default_helper;
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
        HostIommu::Iommufd => iommufd(root, config),
        HostIommu::Type1 => type1(root),
    });
    found.extend(helper(root, config));
    found.extend(interrupts::finding(root, config.host_iommu));
    found.extend(small_pages(root, config));
    found.extend(locked_memory(root, facts, config));
    if config.host_iommu == HostIommu::Type1 {
        found.extend(mappings(root, config));
    }
    found
}

fn iommufd(root: &HostRoot, config: &Config) -> Option<Finding> {
    let node = "dev/iommu";
    if !root.path(node).exists() {
        // Debian's kernels for arm64 are built without it.
        if let Some(why) = kernel::lacking(root, "CONFIG_IOMMUFD") {
            return Some(Finding::missing(
                format!("there is no /dev/iommu: {why}"),
                format!("{}, or boot a kernel that has it", use_type1(config)),
            ));
        }
        return Some(
            Finding::missing(
                "there is no /dev/iommu",
                format!(
                    "load iommufd; if the kernel has none (CONFIG_IOMMUFD), {}{}",
                    use_type1(config),
                    kernel::signed_clause(root, node)
                ),
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
            format!(
                "allow the device in the container, or {}",
                use_type1(config)
            ),
        ))
    })
}

/// What an operator without iommufd changes in the file. Only an exported device can be the VMM's with type1.
fn use_type1(config: &Config) -> String {
    let mut devices = config.devices.passthrough.iter();
    let is_shared = devices.any(|device| config.devices.exported_at(device.endpoint).is_none());
    let export = if is_shared {
        " and give each device an `export` path"
    } else {
        ""
    };
    format!("set host-iommu = \"type1\"{export}")
}

/// The finding if nobody takes the devices out of the VMM's process.
fn helper(root: &HostRoot, config: &Config) -> Option<Finding> {
    let path = &config.vfio_helper;
    let below = path.strip_prefix("/").unwrap_or(path);
    if !config.takes_vmm_files() || root.path(below).exists() {
        return None;
    }
    // The unit's socket has a folder with the name of the VM. The service of the daemon starts it.
    let vm = path.parent().and_then(Path::file_name).unwrap_or_default();
    let vm = vm.display().to_string();
    let unit = root.path("usr/lib/systemd/system/vhost-device-iommu-adopt@.socket");
    let is_default = *path == default_helper(Path::new(&format!("{vm}.toml")));
    if is_default && unit.exists() {
        return None;
    }
    let path = path.display();
    Some(Finding::missing(
        format!("no helper listens at {path}, which takes the devices over from the VMM"),
        format!(
            "install the units of the package, or start a helper as root: vhost-device-iommu adopt --config FILE \
                 --socket-path {path}"
        ),
    ))
}

fn type1(root: &HostRoot) -> Option<Finding> {
    if !root.path("sys/module/vfio_iommu_type1").exists() {
        if let Some(why) = kernel::lacking(root, "CONFIG_VFIO_IOMMU_TYPE1") {
            return Some(Finding::missing(
                format!("the kernel has no VFIO IOMMU driver of type 1: {why}"),
                "set host-iommu = \"iommufd\", or boot a kernel that has it",
            ));
        }
        return Some(
            Finding::missing(
                "the kernel has no VFIO IOMMU driver of type 1",
                format!(
                    "load vfio_iommu_type1; if the kernel has none (CONFIG_VFIO_IOMMU_TYPE1), set \
                     host-iommu = \"iommufd\"{}",
                    kernel::signed_clause(root, "sys/module/vfio_iommu_type1")
                ),
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

/// The finding if type1 cannot map pages as small as the guest's: it maps none smaller than those of the host's kernel.
/// iommufd maps what the IOMMU can.
fn small_pages(root: &HostRoot, config: &Config) -> Option<Finding> {
    let granule = config.page_mask.granule();
    let page = kernel::page_size(root).filter(|page| granule < *page)?;
    let (page, granule) = (page >> 10, granule >> 10);
    (config.host_iommu == HostIommu::Type1).then(|| {
        Finding::missing(
            format!(
                "the host's kernel has pages of {page} KiB, and type1 maps no smaller ones; `granule` is {granule} KiB"
            ),
            format!(
                "set host-iommu = \"iommufd\", boot the host with a kernel of smaller pages, or give the guest a kernel with \
                 pages of {page} KiB and set granule = \"{page}k\""
            ),
        )
    })
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
    fn a_helper_that_nobody_has_started_is_reported() {
        let host = FakeHost::new();
        let keys = "vfio-from = \"vmm\"";
        let finding = only(&host, keys);
        let path = config(keys).vfio_helper;
        let shown = path.display().to_string();
        assert!(finding.problem.contains(&shown), "{}", finding.problem);
        let path = path.strip_prefix("/").expect("absolute");
        host.file(path.to_str().expect("text"), "");
        assert_eq!(found(&host, keys), []);
        host.remove(path.to_str().expect("text"));
        assert_eq!(found(&host, keys).len(), 1);
        // The service of the daemon starts the helper's socket.
        host.file(
            "usr/lib/systemd/system/vhost-device-iommu-adopt@.socket",
            "",
        );
        assert_eq!(found(&host, keys), []);
        let keys = format!("{keys}\nvfio-helper = \"/run/other.sock\"");
        assert!(only(&host, &keys).problem.contains("/run/other.sock"));
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

    /// Debian's kernel for arm64: nothing can be loaded.
    #[test]
    fn a_kernel_without_iommufd_is_told_from_one_that_has_not_loaded_it() {
        let host = FakeHost::new();
        host.remove("dev/iommu");
        host.remove("sys/module/vfio_iommu_type1");
        host.file("proc/sys/kernel/osrelease", "6.12.117+deb13-arm64\n");
        let file = "boot/config-6.12.117+deb13-arm64";
        host.file(
            file,
            "#\nCONFIG_PCI=y\nCONFIG_VFIO=m\nCONFIG_VFIO_IOMMU_TYPE1=m\n# CONFIG_IOMMUFD is not set\n",
        );
        let finding = only(&host, "");
        assert!(
            finding.problem.contains("built without CONFIG_IOMMUFD"),
            "{finding:?}"
        );
        assert!(
            finding.cure.contains("type1") && finding.commands.is_empty(),
            "{finding:?}"
        );
        let of_type1 = || found(&host, TYPE1).swap_remove(0);
        assert_eq!(of_type1().commands, ["modprobe vfio_iommu_type1"]);
        host.file(file, "#\nCONFIG_PCI=y\nCONFIG_IOMMUFD=m\n");
        assert_eq!(only(&host, "").commands, ["modprobe iommufd"]);
        assert!(of_type1().commands.is_empty(), "{:?}", of_type1());
    }

    #[test]
    fn type1_maps_no_pages_smaller_than_the_hosts() {
        let limit = "sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
        for (pages, keys, is_missing) in [
            (4096, TYPE1, false),
            (16384, TYPE1, true),
            (65536, "host-iommu = \"type1\"\ngranule = \"16k\"", true),
            (65536, "host-iommu = \"type1\"\ngranule = \"64k\"", false),
            (65536, "", false),
        ] {
            let host = FakeHost::with_pages(pages);
            host.file(limit, "16777216");
            let found = found(&host, keys);
            assert_eq!(
                found.len(),
                usize::from(is_missing),
                "{pages} {keys}: {found:?}"
            );
            let size = format!("granule = \"{}k\"", pages >> 10);
            assert!(found.iter().all(|it| it.cure.contains(&size)), "{found:?}");
            assert!(
                found.iter().all(|it| it.severity == Severity::Missing),
                "{found:?}"
            );
        }
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
        }
    }
}
