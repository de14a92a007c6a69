//! Checks what this host lacks for the passthrough devices of a configuration, and names the cures.
//!
//! The check changes nothing and opens no device, so that it does not disturb a running VM.

mod access;
mod coherency;
mod depends;
mod device;
mod interrupts;
mod kernel;
#[cfg(test)]
mod machines;
mod system;
mod token;

use std::fmt;
use std::path::Path;

use crate::config::{Config, Machine, Passthrough, SlotProblem};
use crate::host::sysfs::{HostFacts, HostRoot};
use crate::topology::{device_tree, viot};

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The VM does not run until the operator has cured the problem.
    Missing,
    /// The VM runs, but perhaps slowly or unsafely, or the check could not find out.
    Advice,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Advice => "advice",
        })
    }
}

/// One problem of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The severity.
    pub severity: Severity,
    /// The problem.
    pub problem: String,
    /// The cure.
    pub cure: String,
    /// Commands for the cure, for a shell of root.
    pub commands: Vec<String>,
}

impl Finding {
    fn missing(problem: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            severity: Severity::Missing,
            problem: problem.into(),
            cure: cure.into(),
            commands: Vec::new(),
        }
    }

    fn advice(problem: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            severity: Severity::Advice,
            ..Self::missing(problem, cure)
        }
    }

    fn with_commands(self, commands: Vec<String>) -> Self {
        Self { commands, ..self }
    }

    /// Takes the commands back: they would not help before another finding is cured.
    fn postpone(&mut self) {
        if !self.commands.is_empty() {
            self.commands.clear();
            self.cure += "; last of all: `check` prints the commands once they help";
        }
    }
}

/// The findings for a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Findings about addresses in the guest, which concern the file and not the host.
    pub addresses: Vec<Finding>,
    /// Findings that concern all endpoints.
    pub host: Vec<Finding>,
    /// Findings for each passthrough device, in the order of the configuration. Devices without findings
    /// are listed, too.
    pub endpoints: Vec<(Passthrough, Vec<Finding>)>,
}

impl Report {
    /// Checks the addresses of `config` in the guest, and nothing of the host.
    pub fn of_file(config: &Config) -> Self {
        let problems = config.slot_problems();
        let addresses = problems.iter().map(address_finding);
        Self {
            addresses: addresses.chain(description(config)).collect(),
            host: Vec::new(),
            endpoints: Vec::new(),
        }
    }

    /// Checks the addresses of `config`, and compares the host below `root` with its needs.
    pub fn new(root: &HostRoot, config: &Config) -> Self {
        let devices = config.devices.passthrough.iter();
        let facts = HostFacts::read(root, devices.clone().map(|device| device.host));
        let findings = |device: &Passthrough| {
            let mut found = device::findings(root, &facts, device, config.host_iommu);
            let export = config.devices.exported_at(device.endpoint);
            if export.is_some_and(|export| !export.allow_no_snoop) {
                found.extend(coherency::finding(root, device.host));
            }
            (*device, found)
        };
        Self {
            host: if config.devices.passthrough.is_empty() {
                Vec::new()
            } else {
                system::findings(root, &facts, config)
            },
            endpoints: devices.map(findings).collect(),
            ..Self::of_file(config)
        }
    }

    /// This report with what there is to say about `file`, the file of `config`.
    #[must_use]
    pub fn with_file(mut self, file: &Path, config: &Config) -> Self {
        self.host.extend(token::readable_file(file, config));
        self
    }

    /// The number of missing things.
    pub fn missing(&self) -> usize {
        let endpoints = self.endpoints.iter().flat_map(|(_, findings)| findings);
        self.missing_in_the_guest() + missing(self.host.iter().chain(endpoints))
    }

    /// The number of things that the guest would lack on any host: its IOMMU, or a device.
    pub fn missing_in_the_guest(&self) -> usize {
        missing(&self.addresses)
    }
}

/// Prints each heading with its findings; nothing about the host without passthrough devices.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.addresses.is_empty() {
            section(f, "addresses in the guest:", &self.addresses)?;
        }
        if self.endpoints.is_empty() {
            return Ok(());
        }
        section(f, "this host:", &self.host)?;
        for (device, findings) in &self.endpoints {
            let heading = format!("endpoint {}, device {}:", device.endpoint, device.host);
            section(f, &heading, findings)?;
        }
        Ok(())
    }
}

fn missing<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> usize {
    let is_missing = |finding: &&Finding| finding.severity == Severity::Missing;
    findings.into_iter().filter(is_missing).count()
}

/// A problem of an address as a finding.
fn address_finding(problem: &SlotProblem) -> Finding {
    let text = problem.to_string();
    let (what, cure) = text.split_once("; ").unwrap_or((&text, ""));
    if problem.is_fatal() {
        Finding::missing(what, cure)
    } else {
        Finding::advice(what, cure)
    }
}

/// The finding if no table can describe the IOMMU and all endpoints to the guest.
fn description(config: &Config) -> Option<Finding> {
    let refusal = match config.machine {
        Machine::Q35 => viot::table(&config.topology).err()?.to_string(),
        Machine::Virt => device_tree::check(&config.topology).err()?.to_string(),
    };
    let (what, cure) = refusal.split_once("; ").unwrap_or((&refusal, ""));
    Some(Finding::missing(what, cure))
}

fn section(f: &mut fmt::Formatter<'_>, heading: &str, findings: &[Finding]) -> fmt::Result {
    if findings.is_empty() {
        return writeln!(f, "{heading} ok");
    }
    writeln!(f, "{heading}")?;
    let mut sorted: Vec<_> = findings.iter().collect();
    sorted.sort_by_key(|finding| finding.severity);
    for finding in sorted {
        writeln!(f, "  {}: {}", finding.severity, finding.problem)?;
        writeln!(f, "    {}", finding.cure)?;
        for command in &finding.commands {
            writeln!(f, "      {command}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sysfs::fake::{FakeHost, Function};
    use std::path::Path;

    /// A configuration with `keys` and two devices of the host.
    pub(super) fn config(keys: &str) -> Config {
        let text = format!(
            "address = \"00:05.0\"\nmemory = \"2G\"\n{keys}\n\
             [[endpoint]]\naddress = \"00:10.0\"\nvfio = \"0000:01:00.0\"\n\
             [[endpoint]]\naddress = \"00:11.0\"\nvfio = \"0000:02:00.0\"\n"
        );
        Config::from_text(Path::new("vm.toml"), &text).expect("a configuration")
    }

    #[test]
    fn a_complete_host_has_no_findings() {
        let host = FakeHost::new();
        for (path, vfio, group) in [("0000:01:00.0", "vfio0", 1), ("0000:02:00.0", "vfio1", 2)] {
            host.function(&Function {
                vfio: Some((vfio, true)),
                ..Function::ready(path, group)
            });
        }
        let config = config("");
        let report = Report::new(&host.root(), &config);
        assert_eq!(
            report.to_string(),
            "this host: ok\n\
             endpoint 0000:00:10.0, device 0000:01:00.0: ok\n\
             endpoint 0000:00:11.0, device 0000:02:00.0: ok\n"
        );
        assert_eq!(report.missing(), 0);
    }

    #[test]
    fn missing_things_are_reported_with_a_cure() {
        let host = FakeHost::new();
        host.function(&Function::bound("0000:01:00.0", 1, Some("e1000e")));
        host.remove("dev/iommu");
        let report = Report::new(&host.root(), &config(""));
        assert_eq!(report.missing(), 3, "{report}");
        let text = report.to_string();
        for line in [
            "this host:",
            "  missing: there is no /dev/iommu",
            "      modprobe iommufd",
            "endpoint 0000:00:10.0, device 0000:01:00.0:",
            "      echo 0000:01:00.0 > /sys/bus/pci/drivers_probe",
            "  missing: 0000:02:00.0: no such device on this host",
        ] {
            assert!(
                text.lines().any(|l| l.starts_with(line)),
                "{line} in\n{text}"
            );
        }
    }

    #[test]
    fn functions_that_the_guest_does_not_find_are_missing() {
        let text = "address = \"00:05.1\"\n[[endpoint]]\nrange = \"00:10.0-00:1f.7\"\n";
        let config = Config::from_text(Path::new("vm.toml"), text).expect("a configuration");
        let report = Report::new(&HostRoot::new("/nonexistent"), &config);
        assert_eq!(report.missing(), 1, "{report}");
        assert_eq!(report, Report::of_file(&config));
        let text = report.to_string();
        for line in [
            "addresses in the guest:",
            "  missing: nothing is configured at 0000:00:05.0",
            "    give the IOMMU function 0 of a slot",
            "  advice: endpoint 0000:00:10.0-0000:00:1f.7 contains 0000:00:1f.0",
            "    leave that function out",
        ] {
            assert!(
                text.lines().any(|l| l.starts_with(line)),
                "{line} in\n{text}"
            );
        }
    }

    /// QEMU's `virt` has one segment, and a device tree names the IOMMU on the root bus only.
    #[test]
    fn a_topology_that_no_device_tree_describes_is_missing() {
        let problem = |machine: &str, iommu: &str, endpoint: &str| {
            let text = format!(
                "machine = '{machine}'\naddress = '{iommu}'\n[[endpoint]]\naddress = '{endpoint}'\n"
            );
            let config = Config::from_text(Path::new("vm.toml"), &text).expect("good");
            let report = Report::of_file(&config);
            assert_eq!(report.missing(), report.missing_in_the_guest());
            let first = report.addresses.first();
            (
                report.missing(),
                first.map(|it| it.problem.clone()).unwrap_or_default(),
            )
        };
        let (count, text) = problem("virt", "00:05.0", "0001:00:06.0");
        assert!(
            count == 1 && text.contains("not on PCI segment 0"),
            "{count}: {text}"
        );
        let (count, text) = problem("virt", "01:00.0", "00:06.0");
        assert!(
            count == 1 && text.contains("not on bus 00"),
            "{count}: {text}"
        );
        assert_eq!(problem("q35", "01:00.0", "0001:00:06.0").0, 0);
        assert_eq!(problem("virt", "00:05.0", "01:06.0").0, 0);
    }

    #[test]
    fn a_configuration_without_passthrough_has_an_empty_report() {
        let text = "address = \"00:05.0\"\n";
        let config = Config::from_text(Path::new("vm.toml"), text).expect("a configuration");
        let report = Report::new(&HostRoot::new("/nonexistent"), &config);
        assert_eq!((report.missing(), report.to_string()), (0, String::new()));
    }
}
