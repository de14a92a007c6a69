//! Exported devices: endpoints with `export`.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use super::checker::Checker;
use super::draft::{Draft, EndpointDraft, Scalar};
use super::error::ProblemKind;
use super::kind::{ConfiguredDevice, DeviceKind};
use super::passthrough::range_in;
use super::text::shown;
use crate::topology::PciAddress;

/// A passthrough device that only the daemon opens. The VMM reaches it over vfio-user.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Exported {
    /// The address of the device in the guest. The same endpoint has a
    /// [`Passthrough`](super::Passthrough).
    pub endpoint: PciAddress,
    /// Where the daemon listens for the VMM's vfio-user client.
    pub path: PathBuf,
    /// How the client reaches the registers.
    pub registers: RegisterAccess,
    /// The operator answers for the coherency of the device's DMA if the host's IOMMU does not enforce it.
    pub allow_no_snoop: bool,
}

/// How the client of an exported device reaches its registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RegisterAccess {
    /// By messages, unless the kernel has a file of a BAR alone that can be mapped.
    #[default]
    Trapped,
    /// The client maps BARs through the device's own descriptor.
    Mapped,
}

impl ConfiguredDevice for Exported {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Exported
    }

    fn endpoint(&self) -> PciAddress {
        self.endpoint
    }

    fn listens_at(&self) -> Option<&PathBuf> {
        Some(&self.path)
    }

    fn connects_to(&self) -> Option<&PathBuf> {
        None
    }

    fn summarize(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, ", exported at {}", self.path.display())?;
        match self.registers {
            RegisterAccess::Trapped => Ok(()),
            RegisterAccess::Mapped => f.write_str(" with mapped registers"),
        }
    }
}

impl Checker<'_> {
    /// The endpoints with `export`, in ascending order. `taken` are the paths of other sockets.
    pub(super) fn exported(&mut self, draft: &Draft, taken: &[&PathBuf]) -> Option<Vec<Exported>> {
        let mut found = Vec::new();
        let mut taken: HashSet<PathBuf> = taken.iter().copied().cloned().collect();
        let mut whole = true;
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            let value = &endpoint.value;
            let allowed = self.allow_no_snoop(value, index);
            let registers = self.registers(value, index);
            let Some(given) = &value.export else {
                whole &= allowed.is_some() && registers.is_some();
                continue;
            };
            let (Some(allow_no_snoop), Some(registers)) = (allowed, registers) else {
                whole = false;
                continue;
            };
            let key = format!("endpoint[{index}].export");
            let path = self.socket_path(Some(given), &key);
            let range = value.address.as_ref().or(value.range.as_ref());
            let (Some(path), Some(range)) = (path, range.and_then(range_in)) else {
                whole = false;
                continue;
            };
            // The check of `vfio` refuses several functions.
            let kind = if value.vfio.is_none() {
                ProblemKind::ExportWithoutVfio
            } else if !taken.insert(path.clone()) {
                ProblemKind::ExportPath
            } else {
                found.push(Exported {
                    endpoint: range.first(),
                    path,
                    registers,
                    allow_no_snoop,
                });
                continue;
            };
            whole = false;
            self.refuse(&given.origin, &key, kind);
        }
        found.sort_by_key(|entry| entry.endpoint);
        whole.then_some(found)
    }

    /// The value of `allow-no-snoop`; `None` after a refusal.
    fn allow_no_snoop(&mut self, endpoint: &EndpointDraft, index: usize) -> Option<bool> {
        let Some(given) = &endpoint.allow_no_snoop else {
            return Some(false);
        };
        let key = format!("endpoint[{index}].allow-no-snoop");
        let Scalar::Bool(value) = given.value else {
            self.wrong_type(given, &key, given.value.found(), "true or false");
            return None;
        };
        if endpoint.export.is_none() {
            self.refuse(&given.origin, &key, ProblemKind::NoSnoopWithoutExport);
            return None;
        }
        Some(value)
    }

    /// The value of `registers`; `None` after a refusal.
    fn registers(&mut self, endpoint: &EndpointDraft, index: usize) -> Option<RegisterAccess> {
        let Some(given) = &endpoint.registers else {
            return Some(RegisterAccess::default());
        };
        let key = format!("endpoint[{index}].registers");
        let registers = match self.text(given, &key, "\"trapped\" or \"mapped\"")? {
            "trapped" => RegisterAccess::Trapped,
            "mapped" => RegisterAccess::Mapped,
            _ => {
                let kind = ProblemKind::Registers(shown(&given.value));
                self.refuse(&given.origin, &key, kind);
                return None;
            }
        };
        if endpoint.export.is_none() {
            self.refuse(&given.origin, &key, ProblemKind::RegistersWithoutExport);
            return None;
        }
        Some(registers)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::{Config, RegisterAccess};

    /// An IOMMU and these endpoints.
    fn parse(endpoints: &str) -> Result<Config, String> {
        let text = format!("socket = '/s'\ncontrol = '/c'\naddress = '00:05.0'\n{endpoints}");
        Config::from_text(Path::new("vm.toml"), &text).map_err(|e| e.to_string())
    }

    fn one(address: &str, keys: &str) -> String {
        format!("[[endpoint]]\naddress = '{address}'\n{keys}\n")
    }

    #[test]
    fn devices_of_the_host_can_be_exported() {
        let config = parse(
            &(one("00:08.0", "vfio = '65:00.1'\nexport = '/b'")
                + &one("00:07.0", "vfio = '66:00.0'")
                + &one("00:06.0", "vfio = '65:00.0'\nexport = '/a'")),
        )
        .expect("good");
        let paths: Vec<_> = config
            .devices
            .exported
            .iter()
            .map(|e| e.path.as_path())
            .collect();
        assert_eq!(paths, [Path::new("/a"), Path::new("/b")]);
        let path_of = |text: &str| {
            let address = text.parse().expect("an address");
            config
                .devices
                .exported_at(address)
                .map(|e| e.path.as_path())
        };
        assert_eq!(path_of("00:08.0"), Some(Path::new("/b")));
        assert_eq!(path_of("00:07.0"), None);
        let summary = config.summary().to_string();
        assert!(
            summary.contains("00:06.0 vfio 0000:65:00.0, exported at /a\n"),
            "{summary}"
        );
        assert!(summary.contains("00:07.0 vfio 0000:66:00.0\n"), "{summary}");
    }

    #[test]
    fn registers_are_mapped_only_on_demand() {
        let registers_with = |keys: &str| {
            let exported = format!("vfio = '65:00.0'\nexport = '/a'\n{keys}");
            let config = parse(&one("00:06.0", &exported)).expect("good");
            (
                config.devices.exported[0].registers,
                config.summary().to_string(),
            )
        };
        for keys in ["", "registers = 'trapped'"] {
            let (registers, summary) = registers_with(keys);
            assert_eq!(registers, RegisterAccess::Trapped);
            assert!(summary.contains("exported at /a\n"), "{summary}");
        }
        let (registers, summary) = registers_with("registers = 'mapped'");
        assert_eq!(registers, RegisterAccess::Mapped);
        assert!(
            summary.contains("exported at /a with mapped registers\n"),
            "{summary}"
        );
    }

    #[test]
    fn bad_exports_are_refused_with_a_cure() {
        let exported = |path: &str| format!("vfio = '65:00.0'\nexport = '{path}'");
        let emulated = "vfio-user = { listen = '/l', connect = '/k' }";
        let beside = |path: &str| {
            one("00:06.0", &exported(path))
                + &one("00:07.0", emulated)
                + &one("00:08.0", "shadow = '/h'")
                + &one("00:09.0", "vfio = '66:00.0'\nexport = '/e'")
        };
        assert!(parse(&beside("/a")).is_ok());
        for path in ["/s", "/c", "/l", "/k", "/h", "/e"] {
            let message = parse(&beside(path)).expect_err(path);
            assert!(
                message.contains("use another path in `export`"),
                "{message}"
            );
        }
        for (text, cure) in [
            (one("00:06.0", "export = '/a'"), "`vfio = "),
            (
                one(
                    "00:06.0",
                    "vfio = '65:00.0'\nvf-token = 'bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3'",
                ),
                "add `export`",
            ),
            (
                one("00:06.0", "vfio = '65:00.0'\nallow-no-snoop = true"),
                "remove `allow-no-snoop`",
            ),
            (
                one("00:06.0", &(exported("/a") + "\nallow-no-snoop = 1")),
                "true or false",
            ),
            (
                one("00:06.0", "vfio = '65:00.0'\nregisters = 'mapped'"),
                "remove `registers`",
            ),
            (
                one("00:06.0", &(exported("/a") + "\nregisters = 'direct'")),
                "use \"trapped\"",
            ),
            (
                one("00:06.0", &(exported("/a") + "\nregisters = true")),
                "\"trapped\" or \"mapped\"",
            ),
            (
                one("00:06.0", &format!("{emulated}\nexport = '/a'")),
                "`vfio = ",
            ),
            (one("00:06.0", &exported("")), "path"),
            (one("00:06.0", "vfio = '65:00.0'\nexport = 7"), "path"),
            (
                format!(
                    "[[endpoint]]\nrange = '00:06.0-00:06.7'\n{}\n",
                    exported("/a")
                ),
                "its own [[endpoint]]",
            ),
        ] {
            let message = parse(&text).expect_err(&text);
            assert!(message.contains(cure), "{text}: {message}");
        }
    }
}
