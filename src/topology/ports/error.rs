//! Contradictions between ports, and between ports and endpoints.

use thiserror::Error;

use super::{PortKind, PortPath};
use crate::topology::{PciAddress, PciRange};

/// The ports contradict each other, or the endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PortError {
    /// Two ports have the same place.
    #[error("port {path} is given twice; remove one of the two")]
    Duplicate {
        /// The port.
        path: PortPath,
    },
    /// A kind of port that cannot be at its place.
    #[error(
        "port {path} of kind {kind} is behind {above}, where none can be: root ports are on bus 00, upstream ports and \
         pcie-pci-bridges behind root ports and downstream ports, and downstream ports behind upstream ports; \
         correct `kind` or the way to the port"
    )]
    Place {
        /// The port.
        path: PortPath,
        /// Its kind.
        kind: PortKind,
        /// What is before it.
        above: String,
    },
    /// A port at another place of a link than the first.
    #[error(
        "port {path} cannot be there: a link of PCI Express leads to one device, which has number 0, and an upstream \
         port is its function 0; write 00.0 for that part of the way"
    )]
    NotFirst {
        /// The port.
        path: PortPath,
    },
    /// A guest does not find the port.
    #[error(
        "no port is at {zero}, function 0 of the slot of port {path}, and a guest looks for other functions only \
         where it finds function 0; give the port function 0 of a slot, or add the port {zero}"
    )]
    Hidden {
        /// The port.
        path: PortPath,
        /// The port that is missing.
        zero: PortPath,
    },
    /// There are not enough bus numbers.
    #[error(
        "port {path} gets no bus number, because a segment has 255 for buses behind ports; leave ports out, or \
         reserve fewer numbers"
    )]
    TooMany {
        /// The port.
        path: PortPath,
    },
    /// Fewer numbers are reserved than are in use already.
    #[error(
        "port {path} reserves no more bus numbers than the {taken} that the ports behind it take, and SeaBIOS then \
         gives numbers twice; reserve at least one more, or leave `reserve-buses` out"
    )]
    ReserveTooSmall {
        /// The port.
        path: PortPath,
        /// The buses behind the ports behind it.
        taken: u8,
    },
    /// Numbers are reserved behind a port that cannot ask for them.
    #[error(
        "port {path} is of kind {kind}, and firmware reserves bus numbers behind root ports only; give `reserve-buses` to \
         the root port that leads to it"
    )]
    ReserveElsewhere {
        /// The port.
        path: PortPath,
        /// Its kind.
        kind: PortKind,
    },
    /// A link is described at a port without that setting.
    #[error(
        "port {path} is of kind {kind}, and QEMU has `speed` and `width` for root ports only; leave them out"
    )]
    LinkElsewhere {
        /// The port.
        path: PortPath,
        /// Its kind.
        kind: PortKind,
    },
    /// Devices cannot come behind an upstream port.
    #[error(
        "port {path} is an upstream port, behind which only downstream ports are; give `hotplug` to a downstream port \
         of the switch"
    )]
    HotplugUpstream {
        /// The port.
        path: PortPath,
    },
    /// The IOMMU has the address of a port.
    #[error("port {path} has the address of the IOMMU itself; move one of the two")]
    IsIommu {
        /// The port.
        path: PortPath,
    },
    /// The IOMMU is behind a port.
    #[error(
        "the IOMMU {iommu} is behind port {path}, and its own bus must not depend on firmware; give it an address on \
         bus 00, such as 00:05.0"
    )]
    BeforeIommu {
        /// The port.
        path: PortPath,
        /// The address of the IOMMU.
        iommu: PciAddress,
    },
    /// An endpoint has the address of a port.
    #[error(
        "endpoint {range} contains {address}, which is the port {path} itself, and a port is no endpoint; leave that \
         function out: move the endpoint, or split the range around it"
    )]
    IsEndpoint {
        /// The port.
        path: PortPath,
        /// Its own address.
        address: PciAddress,
        /// The endpoint.
        range: PciRange,
    },
    /// A range for later endpoints contains the address of a port.
    #[error(
        "the range {range} of `hotplug` contains {address}, which is the port {path} itself, and a port is no \
         endpoint; split the range around it"
    )]
    IsExpected {
        /// The port.
        path: PortPath,
        /// Its own address.
        address: PciAddress,
        /// The range.
        range: PciRange,
    },
    /// A device behind a link has another number than 0.
    #[error(
        "no device can be at {range} behind port {path}: a port of PCI Express leads to one device, which has number \
         0; give it 00.0 to 00.7, or a port of its own"
    )]
    OneDevice {
        /// The port.
        path: PortPath,
        /// The functions.
        range: PciRange,
    },
    /// A device behind an upstream port.
    #[error(
        "no device can be at {range}: port {path} is an upstream port, behind which only downstream ports are; put the \
         device behind a downstream port, such as {path}/00.0, or make the port a \"pcie-pci-bridge\""
    )]
    BehindUpstream {
        /// The port.
        path: PortPath,
        /// The functions.
        range: PciRange,
    },
    /// A device has number 0 behind a bridge to conventional PCI.
    #[error(
        "no device can be at {range} behind port {path}: number 0 has no place behind a pcie-pci-bridge, and all accesses \
         from there carry its ID; give the device a number from 01.0 on, with `address = \"01.0\"`"
    )]
    SlotZero {
        /// The port.
        path: PortPath,
        /// The functions.
        range: PciRange,
    },
}

impl PortError {
    /// The port at fault.
    pub fn path(&self) -> &PortPath {
        match self {
            Self::Duplicate { path }
            | Self::Place { path, .. }
            | Self::NotFirst { path }
            | Self::Hidden { path, .. }
            | Self::TooMany { path }
            | Self::ReserveTooSmall { path, .. }
            | Self::ReserveElsewhere { path, .. }
            | Self::LinkElsewhere { path, .. }
            | Self::HotplugUpstream { path }
            | Self::IsIommu { path }
            | Self::BeforeIommu { path, .. }
            | Self::IsEndpoint { path, .. }
            | Self::IsExpected { path, .. }
            | Self::OneDevice { path, .. }
            | Self::BehindUpstream { path, .. }
            | Self::SlotZero { path, .. } => path,
        }
    }

    /// The endpoint at fault, or the range in which endpoints may come later.
    pub fn range(&self) -> Option<PciRange> {
        match *self {
            Self::IsEndpoint { range, .. }
            | Self::IsExpected { range, .. }
            | Self::OneDevice { range, .. }
            | Self::BehindUpstream { range, .. }
            | Self::SlotZero { range, .. } => Some(range),
            _ => None,
        }
    }
}
