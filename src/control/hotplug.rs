//! The commands that add and remove endpoints.

use serde_json::{Value, json};

use super::answer::{VERSION, refusal};
use crate::endpoints::hotplug::Hotplug;
use crate::topology::PciRange;

/// Adds the endpoint that the keys in `text` describe.
pub(super) fn add(hotplug: &Hotplug, text: &str) -> Value {
    match hotplug.add(text) {
        Ok(added) => json!({
            "version": VERSION,
            "added": range(added.range),
            "described": added.is_described,
        }),
        Err(cause) => refusal(&cause.to_string()),
    }
}

/// Removes the endpoints that `text` names.
pub(super) fn remove(hotplug: &Hotplug, text: &str) -> Value {
    let named: PciRange = match text.parse() {
        Ok(named) => named,
        Err(cause) => return refusal(&format!("{text:?}: {cause}")),
    };
    match hotplug.remove(named) {
        Ok(()) => json!({ "version": VERSION, "removed": range(named) }),
        Err(cause) => refusal(&cause.to_string()),
    }
}

fn range(range: PciRange) -> Value {
    json!({
        "first": range.first().to_string(),
        "last": range.last().to_string(),
        "endpoints": range.count(),
    })
}
