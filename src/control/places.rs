//! The result of the last comparison of the places of devices in the guest with those in its table.

use serde_json::{Value, json};

use crate::locks::{Mutex, Rank};
use crate::metrics::Counter;
use crate::topology::PciAddress;

/// Whether the guest has the devices behind ports where its table has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PlaceState {
    /// No driver has started yet.
    #[default]
    Unchecked,
    /// All ports have the numbers of the table.
    Agree,
    /// Some have others, or a named device is elsewhere.
    Differ {
        /// These ports.
        ports: Vec<WrongPort>,
        /// The named devices that are at other addresses.
        devices: Vec<MisplacedDevice>,
    },
    /// The VMM has not said.
    Unknown {
        /// The reason.
        why: String,
    },
}

/// A port whose bus has another number than in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongPort {
    /// The way to the port.
    pub port: String,
    /// The number in the table.
    pub expected: u8,
    /// The number in the guest; `None` without a port there.
    pub found: Option<i64>,
}

/// A named device that is not at the address of its endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MisplacedDevice {
    /// Its ID in QEMU.
    pub id: String,
    /// The address of the endpoint.
    pub expected: PciAddress,
    /// Its address in the guest; `None` without such a device.
    pub found: Option<String>,
}

/// The present state, and how often it was determined.
pub struct PlaceReport {
    state: Mutex<PlaceState>,
    checks: Counter,
}

impl Default for PlaceReport {
    fn default() -> Self {
        Self {
            state: Mutex::new(Rank::PlaceReport, PlaceState::default()),
            checks: Counter::default(),
        }
    }
}

impl PlaceReport {
    /// Notes the outcome of a check.
    pub fn set(&self, state: PlaceState) {
        self.checks.inc();
        *self.state.lock() = state;
    }

    /// The number of checks.
    pub fn checks(&self) -> u64 {
        self.checks.get()
    }

    /// The state.
    pub fn state(&self) -> PlaceState {
        self.state.lock().clone()
    }
}

impl PlaceState {
    /// The name, as `status` and the metrics have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unchecked => "unchecked",
            Self::Agree => "agree",
            Self::Differ { .. } => "differ",
            Self::Unknown { .. } => "unknown",
        }
    }

    /// Whether endpoints are withheld.
    pub fn is_bad(&self) -> bool {
        matches!(self, Self::Differ { .. } | Self::Unknown { .. })
    }

    /// The state and the number of checks, as JSON.
    pub(super) fn to_json(&self, checks: u64) -> Value {
        let mut value = json!({ "state": self.name(), "checks": checks });
        match self {
            Self::Unchecked | Self::Agree => {}
            Self::Unknown { why } => value["why"] = why.as_str().into(),
            Self::Differ { ports, devices } => {
                let ports = ports.iter().map(|port| {
                    json!({ "port": port.port, "bus": port.expected, "guest_bus": port.found })
                });
                value["ports"] = ports.collect();
                let devices = devices.iter().map(|device| {
                    json!({ "device": device.id, "address": device.expected.to_string(),
                        "guest_address": device.found })
                });
                value["devices"] = devices.collect();
            }
        }
        value
    }
}
