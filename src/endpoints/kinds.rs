//! The table of kinds: the only place that names an implementation for every [`DeviceKind`].

use super::emulated::EmulatedKind;
use super::exported::ExportedKind;
use super::kind::EndpointKind;
use super::passthrough::PassthroughKind;
use super::shadow::ShadowReaderKind;
use crate::config::DeviceKind;

/// The implementation of a kind.
pub fn of(kind: DeviceKind) -> &'static dyn EndpointKind {
    match kind {
        DeviceKind::Passthrough => &PassthroughKind,
        DeviceKind::Exported => &ExportedKind,
        DeviceKind::Emulated => &EmulatedKind,
        DeviceKind::ShadowReader => &ShadowReaderKind,
    }
}

/// The implementations of all kinds.
pub fn all() -> impl Iterator<Item = &'static dyn EndpointKind> {
    DeviceKind::ALL.iter().copied().map(of)
}
