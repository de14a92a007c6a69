//! Writes a systemd drop-in with the limits and permissions that one VM's configuration needs beyond the shared unit.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::config::{Config, default_helper};
use crate::endpoints::kind::Resources;
use crate::endpoints::kinds;
use crate::process::keeper::MAX_KEPT;

/// `WatchdogSec` of the shared unit.
const WATCHDOG: Duration = Duration::from_secs(60);
/// The part of the shared unit's `TimeoutStartSec=30` beyond the time of a daemon without devices: a host that boots starts
/// the daemons of all its VMs at once.
const START_MARGIN: Duration = Duration::from_secs(20);
/// Bytes that the daemon needs besides its page tables: 32 MiB for code, stacks, socket buffers; 12 MiB for its journal and
/// its records of endpoints (`store`), and for those that the daemon before has left.
const BASE_MEMORY: u64 = 44 << 20;
/// Bytes for each device that is served over a socket: a stack, and messages of up to 2 MiB both ways.
const MEMORY_PER_DEVICE: u64 = 8 << 20;
/// Threads that every daemon can have, times two.
const BASE_TASKS: usize = 32;
/// Descriptors that every daemon can have, including those of memory slots, and as many as the service manager keeps.
const BASE_FILES: usize = 1024 + MAX_KEPT;
/// Descriptors for each device: sockets, its file, interrupts.
const FILES_PER_DEVICE: usize = 64;

/// The drop-in for the service that runs with `config`, which was read from `file`.
///
/// It limits memory to the arena and the daemon's own needs, so that a faulty daemon is killed before it harms other
/// processes. Only with endpoints with `vfio` does it allow device nodes, and locked memory up to that limit.
pub fn drop_in(file: &Path, config: &Config) -> String {
    let granted: Vec<_> = kinds::all().map(|kind| kind.resources(config)).collect();
    // One device may be plugged in behind each port.
    let devices = config.topology.expected().len() + total(&granted, |kind| kind.devices);
    let more_memory = granted.iter().map(|kind| kind.memory);
    // The kernel charges a guest page to the process that touches the page first. With DMA, this may be the daemon.
    let guest = if devices > 0 { config.memory } else { Some(0) };
    let memory = guest.map_or("infinity".into(), |guest| {
        let arena = config.arena_limit;
        let own = [
            BASE_MEMORY,
            arena,
            // A daemon that takes over copies the page tables of the one before, which may be charged to it, too.
            arena,
            // The records of domains in both stores: a 16th of what they take of the arena.
            arena / 8,
            MEMORY_PER_DEVICE.saturating_mul(u64::try_from(devices).unwrap_or(u64::MAX)),
            guest,
        ];
        own.into_iter()
            .chain(more_memory)
            .fold(0, u64::saturating_add)
            .to_string()
    });
    let files = BASE_FILES + FILES_PER_DEVICE * devices + total(&granted, |kind| kind.files);
    let lines = [
        format!("# For the configuration {}.", printable(file)),
        "[Service]".into(),
        format!("MemoryMax={memory}"),
        format!("LimitNOFILE={files}"),
        format!("TasksMax={}", BASE_TASKS + 2 * devices),
    ];
    let mut text = lines.join("\n") + "\n";
    let mut helper = String::new();
    text.extend(granted.iter().map(|kind| kind.directives.as_str()));
    if !config.devices.passthrough.is_empty() {
        let seconds = config.start_limit().saturating_add(START_MARGIN).as_secs();
        // `writeln!` to a String cannot fail, here and below.
        let _ = writeln!(text, "TimeoutStartSec={seconds}");
    }
    let wait: Duration = granted.iter().map(|kind| kind.wait).sum();
    if wait > Duration::ZERO {
        // Add four thirds of the worker's longest wait for peers. The watchdog asks four times in `WatchdogSec`, so a
        // quarter of `WatchdogSec` can pass between the end of the wait and the next question.
        let seconds = WATCHDOG.saturating_add(wait / 3 * 4).as_secs();
        let _ = writeln!(text, "WatchdogSec={seconds}");
    }
    if let Some(priority) = config.realtime_priority {
        let _ = writeln!(
            text,
            "LimitRTPRIO={priority}\nRestrictRealtime=no\nSystemCallFilter=sched_setscheduler"
        );
    }
    if let Some(textfile) = &config.metrics.textfile
        && let Some(folder) = textfile.path.parent()
        && folder.is_absolute()
    {
        // `-`: without the folder the daemon runs without the metrics file.
        let folder = folder.display().to_string();
        let folder = folder.replace('\\', "\\\\").replace('"', "\\\"");
        let folder = folder.replace('%', "%%");
        let _ = writeln!(text, "ReadWritePaths=\"-{folder}\"");
    }
    if config.takes_vmm_files() && config.vfio_helper == default_helper(file) {
        let vm = file.file_stem().unwrap_or_default().to_string_lossy();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if vm.chars().all(is_plain) {
            let socket = format!("vhost-device-iommu-adopt@{vm}.socket");
            // After it: its folder must be there when the daemon gets its own view of the files.
            helper = format!("[Unit]\nWants={socket}\nAfter={socket}\n");
        }
    }
    if !config.readers.users.is_empty() {
        // The daemon must identify readers of other users, and kill one that holds up the guest.
        text.push_str(
            "PrivateUsers=no\nCapabilityBoundingSet=CAP_KILL\nAmbientCapabilities=CAP_KILL\n",
        );
    }
    text + &helper
}

/// A path in one line, whatever its characters.
fn printable(path: &Path) -> String {
    let text = path.display().to_string();
    let escaped = text.chars().map(|c| match c {
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    });
    escaped.collect()
}

fn total(granted: &[Resources], of: impl Fn(&Resources) -> usize) -> usize {
    granted.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        let file = Path::new("/etc/vhost-device-iommu/vm1.toml");
        let config = Config::from_text(file, text).expect("a good file");
        drop_in(file, &config).lines().map(String::from).collect()
    }

    #[test]
    fn a_simple_vm_gets_memory_for_its_page_tables_and_no_devices() {
        let lines = lines("address = \"00:05.0\"\nmemory = \"4G\"\n");
        // 4G / 256 + 64M of arena, as much for a copy, an eighth for records, and 44M.
        assert_eq!(
            lines,
            [
                "# For the configuration /etc/vhost-device-iommu/vm1.toml.",
                "[Service]",
                "MemoryMax=224395264",
                "LimitNOFILE=2048",
                "TasksMax=32",
            ]
        );
    }

    #[test]
    fn the_socket_of_the_helper_is_started_for_devices_of_the_vmm() {
        let unit = |keys: &str| {
            let device = "[[endpoint]]\naddress = \"00:10.0\"\nvfio = \"0000:65:00.0\"\n";
            let lines = lines(&format!("address = \"00:05.0\"\n{keys}{device}"));
            let at = lines.iter().position(|line| line == "[Unit]");
            at.map(|at| lines[at..].to_vec())
        };
        let socket = "vhost-device-iommu-adopt@vm1.socket";
        let expected = [
            "[Unit]".to_owned(),
            format!("Wants={socket}"),
            format!("After={socket}"),
        ];
        assert_eq!(
            unit("vfio-from = \"vmm\"\n").as_deref(),
            Some(&expected[..])
        );
        assert_eq!(unit(""), None);
        let other = "vfio-from = \"vmm\"\nvfio-helper = \"/run/other.sock\"\n";
        assert_eq!(unit(other), None, "somebody else starts that one");
    }

    #[test]
    fn passthrough_devices_can_be_opened_and_guest_memory_pinned() {
        let file = "address = \"00:05.0\"\nmemory = \"4G\"\nhost-iommu = \"KIND\"\n\
                    [[endpoint]]\naddress = \"00:10.0\"\nvfio = \"0000:65:00.0\"\n\
                    [[endpoint]]\naddress = \"00:11.0\"\nvfio = \"0000:66:00.0\"\n";
        let has = |kind: &str, wanted: &[&str]| {
            let lines = lines(&file.replace("KIND", kind));
            for line in wanted {
                assert!(lines.iter().any(|l| l == line), "{line} in {lines:#?}");
            }
        };
        has(
            "iommufd",
            &[
                "LimitMEMLOCK=infinity",
                "DeviceAllow=/dev/iommu rw",
                "PrivateDevices=no",
            ],
        );
        has(
            "type1",
            &[
                "LimitMEMLOCK=infinity",
                "DeviceAllow=/dev/vfio/vfio rw",
                "TasksMax=36",
            ],
        );
        // Memory has a limit although locked memory has none: 4G, an arena of 4G / 256 + 64M, a copy and an eighth of it,
        // 44M, for each device 8M and tables of 4G / 256 and of the arena's size, and the kernel's records of mappings: an eighth of the arena's
        // bytes times 640, or 65535 of 160 bytes for each device.
        has("iommufd", &["MemoryMax=11448352768"]);
        has("type1", &["MemoryMax=4758437568"]);
    }

    /// A guest that fills the arena with mappings of single pages, or with tables of one mapping each, must not reach the
    /// limit.
    #[test]
    fn memory_has_room_for_all_mappings_that_the_arena_holds() {
        // The kernel's `iopt_area` and `iopt_pages` in its allocator's sizes, with a pointer each to account for them.
        const RECORDS: u64 = 192 + 256 + 2 * 8;
        let max = |arena: u64, device: &str| {
            let text = format!(
                "address = \"00:05.0\"\nmemory = \"1G\"\narena-limit = \"{arena}M\"\n\
                 host-iommu = \"iommufd\"\n{device}"
            );
            let lines = lines(&text);
            let max = lines.iter().find_map(|l| l.strip_prefix("MemoryMax="));
            max.expect("a limit").parse::<u64>().expect("a number")
        };
        let device = "[[endpoint]]\naddress = \"00:10.0\"\nvfio = \"0000:65:00.0\"\n";
        for arena in [1, 64, 1024] {
            let bytes = arena << 20;
            let room = max(arena, device) - max(arena, "") - (1 << 30);
            // An entry takes 8 bytes of the arena.
            assert!(room >= bytes / 8 * RECORDS, "{arena}M: {room}");
            assert!(room >= bytes, "{arena}M: {room}");
        }
    }

    /// `launch` waits this long, too.
    #[test]
    fn the_start_may_take_longer_with_each_device() {
        let seconds = |devices: u32| {
            let endpoint = |n| {
                format!("[[endpoint]]\naddress = \"01:{n:02x}.0\"\nvfio = \"0000:65:{n:02x}.0\"\n")
            };
            let endpoints: String = (0..devices).map(endpoint).collect();
            let lines = lines(&format!("address = \"00:05.0\"\n{endpoints}"));
            let line = lines
                .iter()
                .find_map(|l| l.strip_prefix("TimeoutStartSec="));
            line.map(|seconds| seconds.parse().expect("a number"))
        };
        assert_eq!(seconds(0), None, "the shared unit has 30 s");
        assert_eq!([1, 2, 16].map(seconds), [Some(35), Some(40), Some(110)]);
    }

    #[test]
    fn guest_memory_that_a_device_touches_counts() {
        let endpoint = "[[endpoint]]\naddress = \"00:10.0\"\n\
                        vfio-user = { listen = \"/run/l\", connect = \"/run/c\" }\n";
        let with = lines(&format!(
            "address = \"00:05.0\"\nmemory = \"4G\"\n{endpoint}"
        ));
        // 4G, 4G / 256 + 64M of arena, a copy and an eighth of it, 44M, and 8M.
        assert!(
            with.contains(&"MemoryMax=4527751168".to_string()),
            "{with:#?}"
        );
        assert!(with.contains(&"WatchdogSec=86".to_string()), "{with:#?}");
        let unknown = lines(&format!("address = \"00:05.0\"\n{endpoint}"));
        assert!(
            unknown.contains(&"MemoryMax=infinity".to_string()),
            "{unknown:#?}"
        );
    }

    #[test]
    fn paths_are_quoted() {
        let file = "address = \"00:05.0\"\n[metrics]\ntextfile = '/srv/a b/100%/\"q\\/vm.prom'\n";
        let lines = lines(file);
        let line = r#"ReadWritePaths="-/srv/a b/100%%/\"q\\""#;
        assert!(lines.contains(&line.to_string()), "{lines:#?}");
    }

    #[test]
    fn the_files_name_adds_no_lines() {
        let config = Config::from_text(Path::new("vm.toml"), "address = \"00:05.0\"\n");
        let config = config.expect("a good file");
        let usual = drop_in(Path::new("vm.toml"), &config).lines().count();
        for name in [
            "a\n[Service]\nUser=root\n.toml",
            "a\rb.toml",
            "a\u{85}b.toml",
            "a\0b",
        ] {
            let text = drop_in(Path::new(name), &config);
            assert_eq!(text.lines().count(), usual, "{text}");
            let odd = |c: char| c.is_control() && c != '\n';
            assert!(!text.contains(odd) && !text.contains("\nUser"), "{text}");
        }
    }

    #[test]
    fn the_configured_realtime_priority_is_allowed() {
        let lines = lines("address = \"00:05.0\"\nrealtime-priority = 10\n");
        for line in [
            "LimitRTPRIO=10",
            "RestrictRealtime=no",
            "SystemCallFilter=sched_setscheduler",
        ] {
            assert!(lines.contains(&line.to_string()), "{lines:#?}");
        }
    }

    #[test]
    fn hotplug_ports_are_counted_and_the_metrics_folder_is_writable() {
        let file = "address = \"00:05.0\"\nhotplug = [\"01:00.0-01:00.7\", \"02:00.0-02:00.7\"]\n\
                    [metrics]\ntextfile = \"/var/lib/metrics/vm1.prom\"\n";
        let lines = lines(file);
        for line in ["TasksMax=36", "ReadWritePaths=\"-/var/lib/metrics\""] {
            assert!(lines.contains(&line.to_string()), "{line} in {lines:#?}");
        }
    }

    #[test]
    fn readers_of_other_users_can_be_killed() {
        let file = "address = \"00:05.0\"\n[readers]\nusers = [1001]\nlimit = 4\n\
                    [[endpoint]]\naddress = \"00:10.0\"\nshadow = \"/run/x/disk.sock\"\n";
        let lines = lines(file);
        assert!(lines.contains(&"AmbientCapabilities=CAP_KILL".to_string()));
        assert!(
            lines.contains(&"LimitNOFILE=2076".to_string()),
            "{lines:#?}"
        );
    }
}
