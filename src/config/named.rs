//! Endpoints that name the device which must be at their address, by its ID in QEMU.

use std::collections::HashMap;

use super::checker::Checker;
use super::draft::Draft;
use super::error::ProblemKind;
use super::passthrough::range_in;
use super::text::shown;
use crate::topology::PciAddress;

/// The longest ID, in bytes.
const MAX_ID: usize = 128;

/// A device that must be at its endpoint's address in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedDevice {
    /// The endpoint.
    pub endpoint: PciAddress,
    /// The ID of the device in QEMU.
    pub id: String,
}

impl Checker<'_> {
    /// The endpoints with `device`, in ascending order.
    pub(super) fn named(&mut self, draft: &Draft) -> Option<Vec<NamedDevice>> {
        let mut found = Vec::new();
        let mut ids: HashMap<&str, PciAddress> = HashMap::new();
        let mut whole = true;
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            let value = &endpoint.value;
            let Some(given) = &value.device else { continue };
            let key = format!("endpoint[{index}].device");
            let id = self.text(
                given,
                &key,
                "the ID of a device in QEMU, such as \"hostdev0\"",
            );
            let range = value.address.as_ref().or(value.range.as_ref());
            let (Some(id), Some(range)) = (id, range.and_then(range_in)) else {
                whole = false;
                continue;
            };
            let kind = if !is_device_id(id) {
                ProblemKind::DeviceId(shown(&given.value))
            } else if range.count() > 1 {
                ProblemKind::DeviceOnRange { range }
            } else if draft.qmp.is_none() {
                ProblemKind::DeviceWithoutQmp
            } else if let Some(other) = ids.insert(id, range.first()) {
                ProblemKind::DeviceTwice { other }
            } else {
                found.push(NamedDevice {
                    endpoint: range.first(),
                    id: id.to_owned(),
                });
                continue;
            };
            whole = false;
            self.refuse(&given.origin, &key, kind);
        }
        found.sort_by_key(|device| device.endpoint);
        whole.then_some(found)
    }
}

/// Whether `device` can have this value: QEMU takes the ID, and none of ours begins so.
pub fn is_device_id(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    text.len() <= MAX_ID
        && text
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphabetic())
        && text.bytes().all(is_inner)
        && !text.starts_with("viommu-")
}
