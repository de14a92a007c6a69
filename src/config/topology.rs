//! The topology: the IOMMU's address, endpoints with their groups, reserved regions.

use super::Machine;
use super::checker::Checker;
use super::draft::{Draft, EndpointDraft, Located, RegionDraft, Scalar};
use super::error::ProblemKind;

use super::limits::{SMALLEST_PAGE, whole_pages};
use super::text::{parse_number, shown};
use crate::address::{Iova, IovaRange};
use crate::topology::{
    EndpointSpec, GroupName, PciAddress, PciRange, Port, Ports, ReservedError, ReservedKind,
    ReservedRegion, ReservedRegions, Topology, TopologyError,
};

impl Checker<'_> {
    pub(super) fn topology(
        &mut self,
        draft: &Draft,
        ports: &Ports,
        machine: Machine,
    ) -> Option<Topology> {
        let iommu = self.iommu(draft.address.as_ref());
        let before = self.problems.len();
        if let Some(iommu) = iommu {
            self.check_iommu_port(draft, ports, iommu);
        }
        if self.problems.len() > before {
            return None;
        }
        let reserved = self.common_reserved(draft, machine);
        let mut specs = Vec::with_capacity(draft.endpoint.len());
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            specs.extend(self.endpoint(index, endpoint));
        }
        // If an endpoint was refused, `specs` has other indices than the file, and errors would name the
        // wrong place.
        if specs.len() != draft.endpoint.len() {
            return None;
        }
        let mut expected = self.expected(draft)?;
        expected.extend(ports.iter().filter_map(Port::expected));
        match Topology::new(iommu?, reserved?, &specs) {
            Ok(topology) => match topology.with_expected(expected) {
                Ok(topology) => self.with_aliases(draft, ports, topology),
                Err(error) => {
                    let list = draft.hotplug.as_ref().map(|list| &list.value);
                    if let Some(given) = list.and_then(|list| list.get(error.index())) {
                        let key = format!("hotplug[{}]", error.index());
                        self.refuse(&given.origin, &key, ProblemKind::Topology(error));
                    }
                    None
                }
            },
            Err(error) => {
                self.refuse_topology(draft, error, machine);
                None
            }
        }
    }

    /// The ranges in which endpoints may be plugged in later.
    fn expected(&mut self, draft: &Draft) -> Option<Vec<PciRange>> {
        let list = draft.hotplug.as_ref().map(|list| list.value.as_slice());
        let list = list.unwrap_or_default();
        let mut ranges = Vec::with_capacity(list.len());
        for (index, given) in list.iter().enumerate() {
            ranges.extend(self.pci_range(given, &format!("hotplug[{index}]")));
        }
        (ranges.len() == list.len()).then_some(ranges)
    }

    pub(super) fn refuse_topology(
        &mut self,
        draft: &Draft,
        error: TopologyError,
        machine: Machine,
    ) {
        let index = error.index();
        let Some(endpoint) = draft.endpoint.get(index) else {
            return;
        };
        let value = &endpoint.value;
        let (key, origin) = if let TopologyError::Reserved { .. } = error {
            ("reserved", value.reserved.as_ref().map(|list| &list.origin))
        } else {
            let given = value.address.as_ref().or(value.range.as_ref());
            (value.place_key(), given.map(|given| &given.origin))
        };
        let kind = if draft.reserved.is_none() && names_default(&error, machine) {
            ProblemKind::BesideDefault {
                source: error,
                machine,
            }
        } else {
            ProblemKind::Topology(error)
        };
        let origin = origin.unwrap_or(&endpoint.origin);
        self.refuse(origin, &format!("endpoint[{index}].{key}"), kind);
    }

    fn iommu(&mut self, given: Option<&Located<Scalar>>) -> Option<PciAddress> {
        let Some(given) = given else {
            self.refuse_missing(
                "address",
                "--iommu",
                "give the PCI address the IOMMU itself has in the guest: \
                 `address = \"00:05.0\"` in the file, or --iommu 00:05.0",
            );
            return None;
        };
        self.pci_address(given, "address")
    }

    pub(super) fn pci_address(&mut self, given: &Located<Scalar>, key: &str) -> Option<PciAddress> {
        let text = self.text(given, key, "a PCI address as a text, such as \"00:05.0\"")?;
        match text.parse() {
            Ok(address) => Some(address),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::Pci { value, source });
                None
            }
        }
    }

    fn pci_range(&mut self, given: &Located<Scalar>, key: &str) -> Option<PciRange> {
        let wanted = "PCI addresses as a text, such as \"00:10.0-00:1f.7\"";
        let text = self.text(given, key, wanted)?;
        match text.parse() {
            Ok(range) => Some(range),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::PciRange { value, source });
                None
            }
        }
    }

    pub(super) fn endpoint(
        &mut self,
        index: usize,
        given: &Located<EndpointDraft>,
    ) -> Option<EndpointSpec> {
        let key = |name: &str| format!("endpoint[{index}].{name}");
        let value = &given.value;
        let range = match (&value.address, &value.range) {
            (Some(address), None) => self
                .pci_address(address, &key("address"))
                .map(PciRange::from),
            (None, Some(range)) => self.pci_range(range, &key("range")),
            (Some(_), Some(range)) => {
                self.refuse(&range.origin, &key("range"), ProblemKind::AddressAndRange);
                None
            }
            (None, None) => {
                match &value.device {
                    Some(device) => {
                        let kind = ProblemKind::DeviceWithoutAddress(shown(&device.value));
                        self.refuse(&device.origin, &key("device"), kind);
                    }
                    None => {
                        let key = format!("endpoint[{index}]");
                        self.refuse(&given.origin, &key, ProblemKind::NoAddress);
                    }
                }
                None
            }
        };
        let group = match &value.group {
            None => Some(None),
            Some(group) => self.group(group, &key("group")).map(Some),
        };
        let reserved = match &value.reserved {
            None => Some(Vec::new()),
            Some(list) => self.regions(&list.value, &key("reserved")),
        };
        Some(EndpointSpec {
            range: range?,
            group: group?,
            reserved: reserved?,
        })
    }

    fn group(&mut self, given: &Located<Scalar>, key: &str) -> Option<GroupName> {
        let text = self.text(given, key, "a name as a text, such as \"nic0\"")?;
        match GroupName::new(text) {
            Ok(name) => Some(name),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::Group { value, source });
                None
            }
        }
    }

    fn common_reserved(&mut self, draft: &Draft, machine: Machine) -> Option<ReservedRegions> {
        let Some(list) = &draft.reserved else {
            return ReservedRegions::new(vec![machine.msi()?]).ok();
        };
        let regions = self.regions(&list.value, "reserved")?;
        match ReservedRegions::new(regions) {
            Ok(set) => Some(set),
            Err(error) => {
                self.refuse(&list.origin, "reserved", error.into());
                None
            }
        }
    }

    fn regions(&mut self, list: &[Located<RegionDraft>], key: &str) -> Option<Vec<ReservedRegion>> {
        let mut regions = Vec::with_capacity(list.len());
        for (index, region) in list.iter().enumerate() {
            regions.extend(self.region(region, &format!("{key}[{index}]")));
        }
        (regions.len() == list.len()).then_some(regions)
    }

    fn region(&mut self, given: &Located<RegionDraft>, key: &str) -> Option<ReservedRegion> {
        let value = &given.value;
        let first = self.bound(given, value.first.as_ref(), &format!("{key}.first"));
        let last = self.bound(given, value.last.as_ref(), &format!("{key}.last"));
        let kind = match &value.kind {
            None => Some(ReservedKind::Reserved),
            Some(kind) => self.region_kind(kind, &format!("{key}.kind")),
        };
        let (first, last) = (first?, last?);
        let Some(range) = IovaRange::new(Iova(first), Iova(last)) else {
            self.refuse(
                &given.origin,
                key,
                ProblemKind::RegionBackwards { first, last },
            );
            return None;
        };
        // Pages of 4 KiB, not of the granule: a region need not fill a larger granule, as the MSI
        // window does not fill 2 MiB. Bounds inside a page of 4 KiB are an error, most often a length
        // or an exclusive end in place of `last`.
        let (whole_first, whole_last) = (whole_pages(first), last | (SMALLEST_PAGE - 1));
        if (first, last) != (whole_first, whole_last) {
            let kind = ProblemKind::RegionUnaligned {
                first,
                last,
                whole_first,
                whole_last,
            };
            self.refuse(&given.origin, key, kind);
            return None;
        }
        Some(ReservedRegion { range, kind: kind? })
    }

    fn bound(
        &mut self,
        region: &Located<RegionDraft>,
        given: Option<&Located<Scalar>>,
        key: &str,
    ) -> Option<u64> {
        let Some(given) = given else {
            let cure = "give `first` and `last`, the first and last address of the region";
            self.refuse(&region.origin, key, ProblemKind::Missing(cure));
            return None;
        };
        let address = match &given.value {
            Scalar::Integer(value) => u64::try_from(*value).ok(),
            Scalar::Text(text) => parse_number(text),
            other => {
                let wanted = "an address, such as 0xfee00000";
                self.wrong_type(given, key, other.found(), wanted);
                return None;
            }
        };
        if address.is_none() {
            self.refuse(&given.origin, key, ProblemKind::Iova(shown(&given.value)));
        }
        address
    }

    fn region_kind(&mut self, given: &Located<Scalar>, key: &str) -> Option<ReservedKind> {
        match self.text(given, key, "\"reserved\" or \"msi\"")? {
            "reserved" => Some(ReservedKind::Reserved),
            "msi" => Some(ReservedKind::Msi),
            _ => {
                self.refuse(
                    &given.origin,
                    key,
                    ProblemKind::RegionKind(shown(&given.value)),
                );
                None
            }
        }
    }
}

/// Whether one of two conflicting reserved regions is the default one.
fn names_default(error: &TopologyError, machine: Machine) -> bool {
    let TopologyError::Reserved { source, .. } = error else {
        return false;
    };
    match *source {
        ReservedError::Overlap { first, second } | ReservedError::TwoMsi { first, second } => {
            [Some(first), Some(second)].contains(&machine.msi())
        }
        ReservedError::TooMany { .. } => false,
    }
}
