//! The table of kinds: the only place that names an implementation for every [`DeviceKind`].

use super::emulated::EmulatedKind;
use super::exported::ExportedKind;
use super::kind::EndpointKind;
use super::passthrough::PassthroughKind;
use super::shadow::ShadowReaderKind;
use super::status::StatusNames;
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

/// The names of every kind whose devices report a status.
pub fn status_names() -> impl Iterator<Item = StatusNames> {
    all().filter_map(EndpointKind::status_names)
}

/// The implementations of all kinds.
pub fn all() -> impl Iterator<Item = &'static dyn EndpointKind> {
    DeviceKind::ALL.iter().copied().map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_kinds_are_reported_under_one_name() {
        let names: Vec<_> = status_names().collect();
        for (at, one) in names.iter().enumerate() {
            for other in &names[at + 1..] {
                assert_ne!(one.list, other.list);
                assert_ne!(one.flag, other.flag);
            }
        }
    }
}
