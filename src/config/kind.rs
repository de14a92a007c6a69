//! The kinds of devices behind endpoints, and the trait that the device of every kind implements.

use std::fmt;
use std::path::PathBuf;

use crate::topology::PciAddress;

/// Defines the enumeration and its list of all variants together, so that the list is always complete.
macro_rules! device_kinds {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A kind of device behind an endpoint.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum DeviceKind {
            $($(#[$doc])* $name,)*
        }

        impl DeviceKind {
            /// Every kind. QEMU's arguments and a unit's directives come in this order.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

device_kinds! {
    /// A device of the host whose DMA the host's IOMMU translates.
    Passthrough,
    /// A passthrough device that the daemon offers to the VMM over vfio-user.
    Exported,
    /// A device that another process emulates over vfio-user.
    Emulated,
    /// A device in a process that reads the page tables itself.
    ShadowReader,
}

/// A configured device of any kind.
pub trait ConfiguredDevice {
    /// Its kind.
    fn kind(&self) -> DeviceKind;
    /// The address of its endpoint in the guest.
    fn endpoint(&self) -> PciAddress;
    /// The socket at which the daemon listens for this device's peer: the VMM or shadow readers.
    fn listens_at(&self) -> Option<&PathBuf>;
    /// The socket of the device's server, to which the daemon connects.
    fn connects_to(&self) -> Option<&PathBuf>;
    /// Writes the device's words into its endpoint's line of the summary.
    ///
    /// # Errors
    /// The formatter fails.
    fn summarize(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;
}
