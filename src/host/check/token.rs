//! Checks the VF tokens of virtual functions and their physical functions: whether VFIO asks for one, and who can read it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{Finding, kernel};
use crate::config::{Config, HostIommu, Passthrough};
use crate::host::sysfs::{HostRoot, SysfsDevice};

/// The first kernel whose iommufd interface takes VF tokens, and asks for them.
const FIRST_WITH_IOMMUFD: (u32, u32) = (6, 17);

/// The finding if `vf-token` is missing, or is one that VFIO does not take.
pub(super) fn finding(
    root: &HostRoot,
    device: &SysfsDevice,
    passthrough: &Passthrough,
    iommu: HostIommu,
) -> Option<Finding> {
    let name = &device.name;
    let has_token = passthrough.token.is_some();
    let is_old = iommu == HostIommu::Iommufd
        && kernel::version(root).is_some_and(|version| version < FIRST_WITH_IOMMUFD);
    match (PhysicalFunction::read(root, device), has_token) {
        (Some(physical), false) if physical.is_held_by_vfio() => {
            let problem =
                format!("{name} is a virtual function of {physical}: VFIO asks for a VF token");
            let cure = format!(
                "set `vf-token` to the UUID of the process that drives {}, and `export`; or give {} to its own driver, and \
                 let that make the virtual functions",
                physical.name, physical.name
            );
            Some(if is_old {
                // A distribution may have changed its kernel, so this is no reason to stop.
                Finding::advice(format!("{problem} from Linux 6.17 on"), cure)
            } else {
                Finding::missing(problem, cure)
            })
        }
        (Some(physical), true) if !physical.is_held_by_vfio() => Some(Finding::missing(
            format!("{name} is a virtual function of {physical}: VFIO takes no VF token for it"),
            "remove `vf-token`",
        )),
        (None, true) if !has_virtual_functions(root, device) => Some(Finding::missing(
            format!(
                "{name} is neither a virtual function nor has any: VFIO takes no VF token for it"
            ),
            "remove `vf-token`",
        )),
        (_, true) if is_old => Some(Finding::advice(
            "this kernel is older than Linux 6.17, and perhaps takes no VF token through iommufd",
            "if the daemon cannot bind the device, remove `vf-token`, or set host-iommu = \"type1\"",
        )),
        _ => None,
    }
}

/// The function that a virtual function belongs to.
struct PhysicalFunction {
    /// Its name in sysfs.
    name: String,
    driver: Option<String>,
}

impl PhysicalFunction {
    /// That of `device`; `None` if `device` is no virtual function.
    fn read(root: &HostRoot, device: &SysfsDevice) -> Option<Self> {
        let link = root.path(format!("sys/bus/pci/devices/{}/physfn", device.name));
        let folder = fs::canonicalize(link).ok()?;
        let driver = fs::read_link(folder.join("driver")).ok();
        let name_of = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        Some(Self {
            name: name_of(&folder)?,
            driver: driver.and_then(|path| name_of(&path)),
        })
    }

    fn is_held_by_vfio(&self) -> bool {
        let driver = self.driver.as_deref();
        driver.is_some_and(|driver| driver.contains("vfio"))
    }
}

impl std::fmt::Display for PhysicalFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.driver {
            Some(driver) => write!(f, "{}, which has the driver {driver}", self.name),
            None => write!(f, "{}, which has no driver", self.name),
        }
    }
}

/// Whether `device` is a physical function that can have virtual functions.
fn has_virtual_functions(root: &HostRoot, device: &SysfsDevice) -> bool {
    let count = format!("sys/bus/pci/devices/{}/sriov_totalvfs", device.name);
    root.value(count).is_some_and(|count| count != "0")
}

/// The finding if every user of the host can read the tokens in `file`, the file of `config`.
pub(super) fn readable_file(file: &Path, config: &Config) -> Option<Finding> {
    /// Other users than the owner and the group may read.
    const READABLE_BY_OTHERS: u32 = 0o004;
    let mut devices = config.devices.passthrough.iter();
    devices.find(|device| device.token.is_some())?;
    let mode = fs::metadata(file).ok()?.permissions().mode();
    if mode & READABLE_BY_OTHERS == 0 {
        return None;
    }
    let name = file.display();
    let finding = Finding::advice(
        format!("every user can read {name}, which has a VF token"),
        "let only the daemon's user and group read the file",
    );
    let word = shell_word(&name.to_string());
    Some(finding.with_commands(vec![format!("chmod o-r -- {word}")]))
}

/// The text as one word for a POSIX shell.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::check::{Severity, device};
    use crate::host::sysfs::HostFacts;
    use crate::host::sysfs::fake::{FakeHost, Function};

    const TOKEN: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";

    fn config(has_token: bool) -> Config {
        let token = if has_token {
            format!("export = '/e'\nvf-token = '{TOKEN}'")
        } else {
            String::new()
        };
        let text = format!(
            "socket = '/s'\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '01:01.0'\n{token}"
        );
        Config::from_text(Path::new("vm.toml"), &text).expect("a configuration")
    }

    /// The findings for the configured device on `host`.
    fn found(host: &FakeHost, has_token: bool, iommu: HostIommu) -> Vec<Finding> {
        let passthrough = config(has_token).devices.passthrough[0];
        let facts = HostFacts::read(&host.root(), [passthrough.host]);
        device::findings(&host.root(), &facts, &passthrough, iommu)
    }

    /// A server with a network card that has a virtual function.
    fn host_with(driver: Option<&'static str>) -> FakeHost {
        let host = FakeHost::new();
        host.function(&Function {
            driver,
            ..Function::ready("0000:01:00.0", 7)
        });
        host.function(&Function {
            vfio: Some(("vfio1", true)),
            ..Function::ready("0000:01:01.0", 8)
        });
        host.file("dev/vfio/8", "");
        host.link(
            "sys/devices/pci0000:00/0000:01:00.0",
            "sys/devices/pci0000:00/0000:01:01.0/physfn",
        );
        host
    }

    #[test]
    fn a_virtual_function_needs_a_token_if_vfio_has_its_physical_function() {
        for (driver, has_token, part) in [
            (Some("ice"), false, None),
            (Some("ice"), true, Some("remove `vf-token`")),
            (None, true, Some("remove `vf-token`")),
            (Some("vfio-pci"), false, Some("set `vf-token` to the UUID")),
            (Some("vfio-pci"), true, None),
        ] {
            for iommu in [HostIommu::Iommufd, HostIommu::Type1] {
                let found = found(&host_with(driver), has_token, iommu);
                let cures: Vec<_> = found.iter().map(|finding| &finding.cure).collect();
                assert_eq!(found.len(), usize::from(part.is_some()), "{found:#?}");
                if let (Some(finding), Some(part)) = (found.first(), part) {
                    assert!(finding.cure.contains(part), "{cures:?}");
                    assert_eq!(finding.severity, Severity::Missing);
                    assert!(finding.problem.contains("VF token"), "{finding:?}");
                    assert_eq!(finding.commands, [""; 0]);
                }
            }
        }
    }

    /// Before Linux 6.17, iommufd neither asked for a token nor took one.
    #[test]
    fn an_older_kernel_may_neither_ask_for_a_token_nor_take_one() {
        for has_token in [false, true] {
            let host = host_with(Some("vfio-pci"));
            host.file("proc/sys/kernel/osrelease", "6.12.57+deb13-amd64\n");
            let found_by = |iommu| found(&host, has_token, iommu);
            let with_iommufd = found_by(HostIommu::Iommufd);
            assert_eq!(with_iommufd.len(), 1, "{with_iommufd:#?}");
            assert_eq!(with_iommufd[0].severity, Severity::Advice);
            assert!(with_iommufd[0].problem.contains("6.17"));
            let with_type1 = found_by(HostIommu::Type1);
            assert_eq!(with_type1.len(), usize::from(!has_token), "{with_type1:#?}");
        }
    }

    #[test]
    fn only_functions_with_virtual_functions_have_a_token_besides() {
        for (totalvfs, count) in [(None, 1), (Some("0\n"), 1), (Some("7\n"), 0)] {
            let host = FakeHost::new();
            host.function(&Function::ready("0000:01:01.0", 8));
            if let Some(totalvfs) = totalvfs {
                let file = "sys/devices/pci0000:00/0000:01:01.0/sriov_totalvfs";
                host.file(file, totalvfs);
            }
            let found = found(&host, true, HostIommu::Iommufd);
            assert_eq!(found.len(), count, "{found:#?}");
        }
    }

    #[test]
    fn a_file_that_every_user_can_read_should_have_no_token() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for (mode, has_token, is_reported) in [
            (0o644, true, true),
            (0o640, true, false),
            (0o644, false, false),
        ] {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).expect("changed");
            let finding = readable_file(file.path(), &config(has_token));
            assert_eq!(finding.is_some(), is_reported, "{mode:o}");
            let text = format!("{finding:?}");
            assert!(!text.contains(TOKEN), "{text}");
        }
    }

    /// The command works whatever the file's name is, and does nothing else.
    #[test]
    fn the_command_for_a_readable_file_is_a_line_for_a_shell() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in [
            "plain.toml",
            "-x",
            "two words",
            "it's",
            "$(touch made)",
            "a;touch made",
        ] {
            let file = Path::new(name);
            let path = folder.path().join(file);
            fs::write(&path, "").expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("changed");
            let word = shell_word(name);
            let done = std::process::Command::new("bash")
                .args(["-c", &format!("chmod o-r -- {word}")])
                .current_dir(folder.path())
                .status()
                .expect("bash");
            assert!(done.success(), "{name}");
            let mode = fs::metadata(&path).expect("the file").permissions().mode();
            assert_eq!(mode & 0o777, 0o640, "{name}");
        }
        assert!(!folder.path().join("made").exists());
        assert_eq!(shell_word("/etc/vm1.toml"), "/etc/vm1.toml");
    }
}
