//! The devices behind the endpoints, in a list for each kind, and the trait [`ConfiguredDevice`] of every
//! kind.
//!
//! A new kind is a variant of [`DeviceKind`], a list in [`DeviceLists`] and an implementation of
//! [`ConfiguredDevice`]. The compiler names every place that has to handle it.

use super::emulated::Emulated;
use super::exported::Exported;
use super::kind::{ConfiguredDevice, DeviceKind};
use super::passthrough::Passthrough;
use super::shadow::ShadowListener;
use crate::topology::{PciAddress, PciRange};

/// The devices behind the endpoints. Each list is in ascending order of the endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceLists {
    /// Devices of the host; no host device twice.
    pub passthrough: Vec<Passthrough>,
    /// The devices of `passthrough` that the daemon exports to the VMM over vfio-user.
    pub exported: Vec<Exported>,
    /// Devices that other processes emulate.
    pub emulated: Vec<Emulated>,
    /// Endpoints whose devices read the page tables themselves.
    pub shadow: Vec<ShadowListener>,
}

impl DeviceLists {
    /// Every device of every kind. An exported device comes twice: as a passthrough device first.
    pub fn iter(&self) -> impl Iterator<Item = &dyn ConfiguredDevice> {
        let Self {
            passthrough,
            exported,
            emulated,
            shadow,
        } = self;
        as_devices(passthrough)
            .chain(as_devices(exported))
            .chain(as_devices(emulated))
            .chain(as_devices(shadow))
    }

    /// The kind of the device behind `endpoint`; `None` if the endpoint has no device.
    /// An exported device counts as exported.
    pub fn kind_of(&self, endpoint: PciAddress) -> Option<DeviceKind> {
        let found = self.iter().filter(|device| device.endpoint() == endpoint);
        found.map(ConfiguredDevice::kind).last()
    }

    /// The passthrough device behind `endpoint`.
    pub fn passthrough_at(&self, endpoint: PciAddress) -> Option<&Passthrough> {
        find(&self.passthrough, endpoint)
    }

    /// The export of the passthrough device behind `endpoint`, if it is exported.
    pub fn exported_at(&self, endpoint: PciAddress) -> Option<&Exported> {
        find(&self.exported, endpoint)
    }

    /// The emulated device behind `endpoint`.
    pub fn emulated_at(&self, endpoint: PciAddress) -> Option<&Emulated> {
        find(&self.emulated, endpoint)
    }

    /// Removes the devices whose endpoints are in `range`.
    pub(super) fn remove(&mut self, range: PciRange) {
        let Self {
            passthrough,
            exported,
            emulated,
            shadow,
        } = self;
        remove(passthrough, range);
        remove(exported, range);
        remove(emulated, range);
        remove(shadow, range);
    }

    /// Takes in the devices of `more`, whose endpoints are not in these lists.
    pub(super) fn add(&mut self, more: Self) {
        let Self {
            passthrough,
            exported,
            emulated,
            shadow,
        } = more;
        add(&mut self.passthrough, passthrough);
        add(&mut self.exported, exported);
        add(&mut self.emulated, emulated);
        add(&mut self.shadow, shadow);
    }
}

fn as_devices<T: ConfiguredDevice>(list: &[T]) -> impl Iterator<Item = &dyn ConfiguredDevice> {
    list.iter().map(|device| device as &dyn ConfiguredDevice)
}

fn find<T: ConfiguredDevice>(list: &[T], endpoint: PciAddress) -> Option<&T> {
    let at = list.binary_search_by_key(&endpoint, T::endpoint);
    list.get(at.ok()?)
}

fn remove<T: ConfiguredDevice>(list: &mut Vec<T>, range: PciRange) {
    list.retain(|device| !range.contains(device.endpoint()));
}

fn add<T: ConfiguredDevice>(list: &mut Vec<T>, more: Vec<T>) {
    list.extend(more);
    list.sort_by_key(T::endpoint);
}
