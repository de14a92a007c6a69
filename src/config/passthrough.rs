//! Passthrough devices: endpoints with `vfio`, and the descriptors that the daemon inherits for them.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::VmmTransport;
use super::checker::Checker;
use super::draft::{Draft, EndpointDraft, Located, Origin, Scalar};
use super::error::ProblemKind;
use super::kind::{ConfiguredDevice, DeviceKind};
use super::text::{shorten, shown};
use crate::args::{DescriptorArgs, RunArgs};
use crate::ids::{NoUuid, VfToken};
use crate::topology::{HostAddress, PciAddress, PciRange};

/// An endpoint whose device is a device of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Passthrough {
    /// The address of the device in the guest.
    pub endpoint: PciAddress,
    /// The address of the device on the host.
    pub host: HostAddress,
    /// The secret that VFIO asks for, if it asks for one. Only exported devices have one.
    pub token: Option<VfToken>,
}

impl ConfiguredDevice for Passthrough {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Passthrough
    }

    fn endpoint(&self) -> PciAddress {
        self.endpoint
    }

    fn listens_at(&self) -> Option<&PathBuf> {
        None
    }

    fn connects_to(&self) -> Option<&PathBuf> {
        None
    }

    fn summarize(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = if self.token.is_some() {
            " with a VF token"
        } else {
            ""
        };
        write!(f, " vfio {}{token}", self.host)
    }
}

/// The kernel interface through which the daemon programs the host's IOMMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostIommu {
    /// `/dev/iommu`: address spaces that the VMM's devices are attached to.
    #[default]
    Iommufd,
    /// VFIO containers of type 1, one for each endpoint.
    Type1,
}

impl HostIommu {
    /// The name in the configuration file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iommufd => "iommufd",
            Self::Type1 => "type1",
        }
    }
}

/// The part of guest memory that the daemon pins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pin {
    /// All guest memory, pinned once. The mappings of domains reuse these pins and pin nothing more.
    #[default]
    All,
    /// The memory that domains map, while they map it, and all guest memory while an endpoint is in bypass
    /// mode.
    Mapped,
}

impl Pin {
    /// The name in the configuration file.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Mapped => "mapped",
        }
    }
}

/// Where the daemon gets the open files of `/dev/iommu` and of passthrough devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VfioFrom {
    /// It inherits them, or opens them itself, when it starts.
    #[default]
    Start,
    /// It takes them over from the VMM that has connected.
    Vmm,
}

/// The folder with the sockets of the helpers, unless the configuration names another socket.
const HELPERS: &str = "/run/vhost-device-iommu-adopt";

/// The socket of the helper for the VM of `file`. The instance of the VM's services has the name of the file.
pub(crate) fn default_helper(file: &Path) -> PathBuf {
    let vm = file.file_stem().unwrap_or_default();
    Path::new(HELPERS).join(vm).join("adopt.sock")
}

/// Inherited descriptors of the host's IOMMU and devices. The daemon opens the missing ones by path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptors {
    /// `/dev/iommu`; present whenever `devices` has one and the host's IOMMU is
    /// [`HostIommu::Iommufd`].
    pub iommufd: Option<RawFd>,
    /// Descriptors of devices, by the address of the endpoint. For [`HostIommu::Iommufd`] each is open on
    /// `/dev/vfio/devices/vfioN`; for [`HostIommu::Type1`] it comes from the device's VFIO group.
    pub devices: BTreeMap<PciAddress, RawFd>,
    /// Containers whose IOMMU is set, by the address of their endpoint. Only for
    /// [`HostIommu::Type1`], where each of `devices` has one.
    pub containers: BTreeMap<PciAddress, RawFd>,
}

impl Checker<'_> {
    pub(super) fn host_iommu(&mut self, given: Option<&Located<Scalar>>) -> Option<HostIommu> {
        let Some(given) = given else {
            return Some(HostIommu::default());
        };
        let wanted = "\"iommufd\" or \"type1\"";
        match self.text(given, "host-iommu", wanted)? {
            "iommufd" => Some(HostIommu::Iommufd),
            "type1" => Some(HostIommu::Type1),
            _ => {
                let kind = ProblemKind::HostIommu(shown(&given.value));
                self.refuse(&given.origin, "host-iommu", kind);
                None
            }
        }
    }

    pub(super) fn pin(&mut self, given: Option<&Located<Scalar>>) -> Option<Pin> {
        let Some(given) = given else {
            return Some(Pin::default());
        };
        match self.text(given, "pin", "\"all\" or \"mapped\"")? {
            "all" => Some(Pin::All),
            "mapped" => Some(Pin::Mapped),
            _ => {
                self.refuse(&given.origin, "pin", ProblemKind::Pin(shown(&given.value)));
                None
            }
        }
    }

    pub(super) fn vfio_from(
        &mut self,
        draft: &Draft,
        transport: VmmTransport,
        host_iommu: Option<HostIommu>,
        has_exports: bool,
    ) -> Option<VfioFrom> {
        let Some(given) = &draft.vfio_from else {
            if let Some(helper) = &draft.vfio_helper {
                self.refuse(&helper.origin, "vfio-helper", ProblemKind::VfioHelperAlone);
            }
            return Some(VfioFrom::default());
        };
        let kind = match self.text(given, "vfio-from", "\"start\" or \"vmm\"")? {
            "start" => return Some(VfioFrom::Start),
            "vmm" if host_iommu == Some(HostIommu::Type1) => ProblemKind::VfioFromType1,
            "vmm" if transport == VmmTransport::VirtioPci => ProblemKind::VfioFromOverVfioUser,
            "vmm" if has_exports => ProblemKind::VfioFromWithExport,
            "vmm" => return Some(VfioFrom::Vmm),
            _ => ProblemKind::VfioFrom(shown(&given.value)),
        };
        self.refuse(&given.origin, "vfio-from", kind);
        None
    }

    pub(super) fn vfio_helper(&mut self, draft: &Draft) -> Option<PathBuf> {
        match &draft.vfio_helper {
            Some(_) => self.socket_path(draft.vfio_helper.as_ref(), "vfio-helper"),
            None => {
                let file = self.source.map(|source| source.path);
                Some(default_helper(file.unwrap_or(Path::new(""))))
            }
        }
    }

    /// The endpoints with `vfio`, in ascending order. The topology's check refuses bad addresses.
    pub(super) fn passthrough(&mut self, draft: &Draft) -> Option<Vec<Passthrough>> {
        let mut found = Vec::new();
        let mut hosts = HashMap::new();
        let mut whole = true;
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            let value = &endpoint.value;
            let token = self.vf_token(value, index);
            whole &= token.is_some();
            let Some(vfio) = &value.vfio else { continue };
            let token = token.flatten();
            let key = format!("endpoint[{index}].vfio");
            let host = self.host_address(vfio, &key);
            let range = value.address.as_ref().or(value.range.as_ref());
            let (Some(host), Some(range)) = (host, range.and_then(range_in)) else {
                whole = false;
                continue;
            };
            let kind = if range.count() > 1 {
                ProblemKind::VfioOnRange { range }
            } else if let Some(other) = hosts.insert(host, range.first()) {
                ProblemKind::HostTwice { host, other }
            } else {
                found.push(Passthrough {
                    endpoint: range.first(),
                    host,
                    token,
                });
                continue;
            };
            whole = false;
            self.refuse(&vfio.origin, &key, kind);
        }
        found.sort_by_key(|entry| entry.endpoint);
        whole.then_some(found)
    }

    /// The value of `vf-token`; `None` after a refusal. No refusal shows the value: it may be a mistyped secret.
    fn vf_token(&mut self, endpoint: &EndpointDraft, index: usize) -> Option<Option<VfToken>> {
        let Some(given) = &endpoint.vf_token else {
            return Some(None);
        };
        let key = format!("endpoint[{index}].vf-token");
        let text = self.text(given, &key, "a UUID as a text")?;
        let kind = match text.parse() {
            Ok(_) if endpoint.export.is_none() => ProblemKind::VfTokenWithoutExport,
            Ok(token) => return Some(Some(token)),
            Err(NoUuid) => ProblemKind::VfToken,
        };
        self.refuse(&given.origin, &key, kind);
        None
    }

    fn host_address(&mut self, given: &Located<Scalar>, key: &str) -> Option<HostAddress> {
        let text = self.text(
            given,
            key,
            "a PCI address of the host as a text, such as \"65:00.0\"",
        )?;
        match text.parse() {
            Ok(address) => Some(address),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::Host { value, source });
                None
            }
        }
    }

    /// The inherited descriptors. `passthrough` is in ascending order.
    pub(super) fn descriptors(
        &mut self,
        given: &DescriptorArgs,
        run: Option<&RunArgs>,
        host_iommu: HostIommu,
        passthrough: &[Passthrough],
    ) -> Descriptors {
        let mut claimed = Claimed::default();
        if let Some(fd) = run.and_then(|args| args.fd) {
            self.claim(&mut claimed, fd, "--fd");
        }
        if let Some(fd) = run.and_then(|args| args.ready_fd) {
            self.claim(&mut claimed, fd, "--ready-fd");
        }
        if let Some(fd) = given.iommufd_fd {
            self.claim(&mut claimed, fd, "--iommufd-fd");
            if host_iommu == HostIommu::Type1 {
                self.refuse_flag("--iommufd-fd", ProblemKind::IommufdWithType1);
            }
        }
        let devices = self.by_endpoint("--vfio-fd", &given.vfio_fd, passthrough, &mut claimed);
        let containers = run.map_or(&[][..], |args| &args.vfio_container_fd);
        let containers =
            self.by_endpoint("--vfio-container-fd", containers, passthrough, &mut claimed);
        match host_iommu {
            HostIommu::Iommufd => {
                if !devices.is_empty() && given.iommufd_fd.is_none() {
                    self.refuse_flag("--vfio-fd", ProblemKind::DeviceWithoutIommufd);
                }
                if !containers.is_empty() {
                    self.refuse_flag("--vfio-container-fd", ProblemKind::ContainerWithIommufd);
                }
            }
            HostIommu::Type1 => {
                let alone = devices.keys().find(|key| !containers.contains_key(key));
                if let Some(&endpoint) = alone {
                    self.refuse_flag(
                        "--vfio-fd",
                        ProblemKind::DeviceWithoutContainer { endpoint },
                    );
                }
            }
        }
        Descriptors {
            iommufd: given.iommufd_fd,
            devices,
            containers,
        }
    }

    /// Reads the texts `ADDRESS=N` of an option.
    fn by_endpoint(
        &mut self,
        flag: &'static str,
        texts: &[String],
        passthrough: &[Passthrough],
        claimed: &mut Claimed,
    ) -> BTreeMap<PciAddress, RawFd> {
        let mut found = BTreeMap::new();
        for text in texts {
            let Some((endpoint, fd)) = assignment(text) else {
                self.refuse_flag(flag, ProblemKind::DescriptorText(shorten(text)));
                continue;
            };
            let known = passthrough.binary_search_by_key(&endpoint, |entry| entry.endpoint);
            if known.is_err() {
                self.refuse_flag(flag, ProblemKind::NotPassthrough { endpoint });
            } else if found.insert(endpoint, fd).is_some() {
                self.refuse_flag(flag, ProblemKind::EndpointTwice { endpoint });
            } else {
                self.claim(claimed, fd, flag);
            }
        }
        found
    }

    /// Notes that the option `flag` gives the descriptor `fd`. Refuses `fd` if an option has given it before.
    fn claim(&mut self, claimed: &mut Claimed, fd: RawFd, flag: &'static str) {
        if let Some(other) = claimed.0.insert(fd, flag) {
            self.refuse_flag(flag, ProblemKind::DescriptorTwice { fd, other });
        }
    }

    fn refuse_flag(&mut self, flag: &'static str, kind: ProblemKind) {
        self.refuse(&Origin::Flag(flag), "", kind);
    }
}

/// Descriptors that an option has given, and the option.
#[derive(Default)]
struct Claimed(HashMap<RawFd, &'static str>);

/// The functions that a value names; `None` if the value is not a range.
pub(super) fn range_in(given: &Located<Scalar>) -> Option<PciRange> {
    match &given.value {
        Scalar::Text(text) => text.parse().ok(),
        Scalar::Integer(_) | Scalar::Bool(_) | Scalar::Other(_) => None,
    }
}

/// Splits `ADDRESS=N`.
fn assignment(text: &str) -> Option<(PciAddress, RawFd)> {
    let (endpoint, fd) = text.split_once('=')?;
    let plain = fd.bytes().all(|byte| byte.is_ascii_digit());
    Some((
        endpoint.parse().ok()?,
        plain.then(|| fd.parse::<RawFd>().ok())??,
    ))
}
