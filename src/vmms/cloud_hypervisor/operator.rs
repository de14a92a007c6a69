//! Understands the cloud-hypervisor arguments that the operator gives to `launch`: which of ours they replace, which
//! devices come before the IOMMU, and which of them would undo it.

use std::ffi::OsString;

use thiserror::Error;

use crate::topology::HostAddress;

/// cloud-hypervisor arguments with which the guest would have no working IOMMU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OwnArgumentError {
    /// Memory of the guest that the daemon could not share.
    #[error(
        "guest RAM of {what} is not shared, so the daemon and the devices of other processes would not see it; \
         add shared=on to it"
    )]
    PrivateMemory {
        /// The option, with the ID of a zone.
        what: String,
    },
    /// Memory of the guest that is encrypted for other processes.
    #[error(
        "{what} encrypts guest RAM, so the daemon could not read the guest's requests; leave it out"
    )]
    EncryptedMemory {
        /// The option.
        what: String,
    },
    /// The VMM's own virtio-iommu.
    #[error(
        "{what} adds the VMM's own IOMMU, and the VMM writes the guest's table for that one; leave it out: the \
         configuration names the endpoints"
    )]
    OwnIommu {
        /// The option.
        what: String,
    },
    /// A key of `--platform` that `launch` gives.
    #[error(
        "--platform {key}= is what `launch` gives for the devices of the host, which the daemon must share; leave it out"
    )]
    TakenPlatformKey {
        /// The key.
        key: &'static str,
    },
    /// Fewer PCI segments than the configuration has.
    #[error(
        "--platform num_pci_segments={given:?} is not enough or no number: the configuration has devices on {needed} \
         segments; leave it out, or give at least {needed}"
    )]
    TooFewSegments {
        /// The operator's value.
        given: String,
        /// The number of segments with devices, from segment 0 on.
        needed: u16,
    },
    /// The apertures of PCI segments differ.
    #[error(
        "--pci-segment mmio32_aperture_weight= moves the BAR through which the guest learns its endpoints to an address \
         that this program does not compute; leave it out"
    )]
    WeightedAperture,
}

/// The operator's arguments, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnArguments(Vec<OwnOption>);

/// An option with its values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct OwnOption {
    /// The name without dashes; empty for arguments before the first option.
    name: String,
    values: Vec<String>,
    /// The option as it was given.
    words: Vec<OsString>,
}

/// The device of the host behind a `--device` of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OwnDevice {
    /// Named by its path in sysfs.
    Named(HostAddress),
    /// A descriptor, or a path that names no PCI device.
    Unknown,
}

impl OwnArguments {
    /// Splits arguments as that VMM does: an option has all words up to the next one that begins with a dash.
    pub fn new(arguments: &[OsString]) -> Self {
        let mut options: Vec<OwnOption> = Vec::new();
        for word in arguments {
            let text = word.to_string_lossy();
            let is_option = text.len() > 1 && text.starts_with('-');
            if is_option || options.is_empty() {
                options.push(OwnOption::default());
            }
            let Some(option) = options.last_mut() else {
                continue;
            };
            option.words.push(word.clone());
            if !is_option {
                option.values.push(text.into_owned());
                continue;
            }
            let text = text.trim_start_matches('-');
            match text.split_once('=') {
                Some((name, value)) => {
                    option.name = name.to_owned();
                    option.values.push(value.to_owned());
                }
                None => option.name = text.to_owned(),
            }
        }
        Self(options)
    }

    /// Refuses arguments with which the guest would have no working IOMMU. `shares_devices` says whether `launch` gives
    /// the VMM devices of the host.
    ///
    /// # Errors
    /// Names the first such argument.
    pub fn check(&self, shares_devices: bool) -> Result<(), OwnArgumentError> {
        for option in &self.0 {
            let name = &option.name;
            for properties in option.all_properties() {
                if properties.is_on("iommu") {
                    let what = format!("--{name} iommu=on");
                    return Err(OwnArgumentError::OwnIommu { what });
                }
                match name.as_str() {
                    "platform" => properties.check_platform(shares_devices)?,
                    "pci-segment" if properties.get("mmio32_aperture_weight").is_some() => {
                        return Err(OwnArgumentError::WeightedAperture);
                    }
                    _ => {}
                }
            }
        }
        self.check_memory()
    }

    /// With zones the VMM makes RAM of the zones alone.
    fn check_memory(&self) -> Result<(), OwnArgumentError> {
        let name = if self.has("memory-zone") {
            "memory-zone"
        } else {
            "memory"
        };
        for properties in self.properties_of(name) {
            if !properties.is_shared_memory() {
                let id = properties.get("id").unwrap_or_default();
                let what = format!("--{name} {id}").trim_end().to_owned();
                return Err(OwnArgumentError::PrivateMemory { what });
            }
        }
        Ok(())
    }

    /// Whether there is an option of this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|option| option.name == name)
    }

    /// The kernel's command line.
    pub fn cmdline(&self) -> &str {
        self.only_value("cmdline").unwrap_or_default()
    }

    /// The value of `--platform`.
    pub fn platform(&self) -> Option<&str> {
        self.only_value("platform")
            .filter(|value| !value.is_empty())
    }

    /// The number of PCI segments in `--platform`.
    ///
    /// # Errors
    /// Fewer than `needed`, or no number.
    pub fn segments(&self, needed: u16) -> Result<u16, OwnArgumentError> {
        let platform = self.properties_of("platform").next().unwrap_or_default();
        let Some(given) = platform.get("num_pci_segments") else {
            return Ok(needed);
        };
        let number = given.parse().ok().filter(|&number: &u16| number >= needed);
        number.ok_or_else(|| OwnArgumentError::TooFewSegments {
            given: given.to_owned(),
            needed,
        })
    }

    /// Whether `--platform` has a value for this key.
    pub fn platform_has(&self, key: &str) -> bool {
        self.properties_of("platform")
            .any(|properties| properties.get(key).is_some())
    }

    /// The number of disks on segment 0.
    pub fn disks(&self) -> u16 {
        let disks = self.properties_of("disk");
        let on_segment_0 = disks.filter(|disk| disk.segment() == 0).count();
        u16::try_from(on_segment_0).unwrap_or(u16::MAX)
    }

    /// The devices of the host on a PCI segment.
    pub fn devices(&self, segment: u16) -> Vec<OwnDevice> {
        let devices = self.properties_of("device");
        let here = devices.filter(|device| device.segment() == segment);
        here.map(|device| device.host_device()).collect()
    }

    /// All words but the options of these names.
    pub fn words_without<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = &'a OsString> {
        let others = self.0.iter();
        others
            .filter(|option| !names.contains(&option.name.as_str()))
            .flat_map(|option| &option.words)
    }

    fn properties_of(&self, name: &str) -> impl Iterator<Item = Properties> {
        let options = self.0.iter().filter(move |option| option.name == name);
        options.flat_map(OwnOption::all_properties)
    }

    /// The value of an option that the VMM accepts once.
    fn only_value(&self, name: &str) -> Option<&str> {
        let option = self.0.iter().find(|option| option.name == name)?;
        option.values.first().map(String::as_str)
    }
}

impl OwnOption {
    fn all_properties(&self) -> impl Iterator<Item = Properties> {
        // The kernel's parameters are not the VMM's.
        let values = (self.name != "cmdline").then_some(&self.values);
        values
            .into_iter()
            .flatten()
            .map(|text| Properties::new(text))
    }
}

/// The keys and values of `key=value,...`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Properties(Vec<(String, String)>);

impl Properties {
    /// Splits at commas outside of quotes and brackets. Quotes are no part of the value.
    fn new(text: &str) -> Self {
        let mut parts = vec![String::new()];
        let mut is_quoted = false;
        let mut brackets = 0_usize;
        for c in text.trim().chars() {
            match c {
                '"' => {
                    is_quoted = !is_quoted;
                    continue;
                }
                '[' if !is_quoted => brackets = brackets.saturating_add(1),
                ']' if !is_quoted => brackets = brackets.saturating_sub(1),
                ',' if !is_quoted && brackets == 0 => {
                    parts.push(String::new());
                    continue;
                }
                _ => {}
            }
            if let Some(part) = parts.last_mut() {
                part.push(c);
            }
        }
        let property = |part: String| {
            let (key, value) = part.split_once('=')?;
            Some((key.to_owned(), value.trim().to_owned()))
        };
        Self(parts.into_iter().filter_map(property).collect())
    }

    /// The last value of a key: that VMM uses that one. An empty value counts as none.
    fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().rfind(|(name, _)| name == key);
        found
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    fn is_on(&self, key: &str) -> bool {
        self.get(key)
            .is_some_and(|value| matches!(value.to_lowercase().as_str(), "on" | "true"))
    }

    fn segment(&self) -> u16 {
        let segment = self.get("pci_segment").and_then(|text| text.parse().ok());
        segment.unwrap_or(0)
    }

    /// Whether other processes see this memory. The VMM maps huge pages shared, but a file's pages only if `shared`
    /// says so.
    fn is_shared_memory(&self) -> bool {
        self.is_on("shared") || self.is_on("hugepages") && self.get("file").is_none()
    }

    fn host_device(&self) -> OwnDevice {
        let path = self.get("path").unwrap_or_default().trim_end_matches('/');
        let name = path.rsplit('/').next().unwrap_or_default();
        name.parse().map_or(OwnDevice::Unknown, OwnDevice::Named)
    }

    fn check_platform(&self, shares_devices: bool) -> Result<(), OwnArgumentError> {
        if self.get("iommu_segments").is_some() {
            let what = "--platform iommu_segments=".to_owned();
            return Err(OwnArgumentError::OwnIommu { what });
        }
        if let Some(key) = ["sev_snp", "tdx"].into_iter().find(|key| self.is_on(key)) {
            let what = format!("--platform {key}=on");
            return Err(OwnArgumentError::EncryptedMemory { what });
        }
        let mut taken = ["iommufd", "iommufd_fd"].into_iter();
        match taken.find(|key| shares_devices && self.get(key).is_some()) {
            Some(key) => Err(OwnArgumentError::TakenPlatformKey { key }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(line: &str) -> OwnArguments {
        let words: Vec<_> = line.split_whitespace().map(OsString::from).collect();
        OwnArguments::new(&words)
    }

    #[test]
    fn arguments_that_undo_the_iommu_are_refused() {
        for (line, message) in [
            ("--memory size=1G", "of --memory is not shared"),
            ("--memory size=1G,shared=off", "add shared=on"),
            ("--memory=size=1G,shared=on,shared=off", "add shared=on"),
            // The VMM maps the file privately.
            (
                "--memory size=1G,hugepages=on,file=/dev/hugepages/f",
                "add shared=on",
            ),
            (
                "--memory size=0,shared=on --memory-zone id=a,size=1G,shared=on id=b,size=1G",
                "--memory-zone b is not shared",
            ),
            ("--disk path=d,iommu=on", "--disk iommu=on adds"),
            ("--disk path=d path=e,iommu=true", "--disk iommu=on adds"),
            ("--device path=/sys/x,iommu=ON", "--device iommu=on adds"),
            ("--console off,iommu=on", "--console iommu=on adds"),
            ("--rng=src=/dev/urandom,iommu=on", "--rng iommu=on adds"),
            (
                "--platform num_pci_segments=2,iommu_segments=[1]",
                "iommu_segments= adds",
            ),
            ("--platform sev_snp=on", "encrypts guest RAM"),
            ("--platform tdx=on", "encrypts guest RAM"),
            ("--platform iommufd_fd=7", "iommufd_fd= is what `launch`"),
            ("--platform iommufd=off", "iommufd= is what `launch`"),
            (
                "--pci-segment pci_segment=1,mmio32_aperture_weight=3",
                "moves the BAR",
            ),
        ] {
            let error = own(line).check(true).expect_err(line).to_string();
            assert!(error.contains(message), "{line}: {error}");
        }
        for line in [
            "",
            "-v --kernel vmlinuz --cpus boot=2",
            "--memory size=1G,shared=on",
            "--memory size=1G,hugepages=on,hugepage_size=2M",
            "--memory size=0 --memory-zone id=a,size=1G,shared=on id=b,size=1G,hugepages=on",
            "--disk path=d,iommu=off --net tap=t,iommu=false",
            "--disk path=\"iommu=on,iommu=on\"",
            "--cmdline iommu=on,iommu=on",
            "--platform serial_number=iommufd_fd,uuid=[iommufd_fd=7,8]",
        ] {
            assert_eq!(own(line).check(true), Ok(()), "{line}");
        }
        assert_eq!(own("--platform iommufd=on").check(false), Ok(()));
    }

    #[test]
    fn arguments_are_found_however_they_are_written() {
        let found = own(
            "-v --disk path=a path=b,pci_segment=1 --kernel k --disk=path=c --device fd=9 \
             path=/sys/bus/pci/devices/0000:65:00.0/ --device path=/sys/x,pci_segment=1 --cmdline=root=/dev/vda1 \
             --platform=uuid=u,num_pci_segments=3",
        );
        assert_eq!(found.disks(), 2);
        assert_eq!(found.cmdline(), "root=/dev/vda1");
        assert_eq!(found.platform(), Some("uuid=u,num_pci_segments=3"));
        assert_eq!(found.segments(2), Ok(3));
        assert!(found.segments(4).is_err());
        let host = "0000:65:00.0".parse().expect("an address");
        assert_eq!(
            found.devices(0),
            [OwnDevice::Unknown, OwnDevice::Named(host)]
        );
        assert_eq!(found.devices(1), [OwnDevice::Unknown]);
        let rest: Vec<_> = found
            .words_without(&["cmdline", "platform", "device"])
            .collect();
        assert_eq!(
            rest,
            [
                "-v",
                "--disk",
                "path=a",
                "path=b,pci_segment=1",
                "--kernel",
                "k",
                "--disk=path=c"
            ]
        );
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(--disk |--memory |--platform |[\"\\[\\],=. a-z0-9-]){0,40}") {
            let found = own(&text);
            let _ = (found.check(true), found.disks(), found.devices(0), found.segments(1));
        }
    }
}
