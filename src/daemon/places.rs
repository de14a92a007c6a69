//! Compares the places of devices in the running guest with those in its table, at each start of a driver.
//!
//! 1. The worker finds that the request ring has started, asks for the places, and serves nothing yet
//!    (`device::start_gate`).
//! 2. The thread `qmp` asks the VMM, and gets an answer or none within its deadline (`qemu::qmp`).
//! 3. [`PlaceChecker`] withholds the endpoints whose places differ or are not known, and opens the gate.

use std::sync::Arc;

use crate::config::NamedDevice;
use crate::control::places::{MisplacedDevice, PlaceReport, PlaceState, WrongPort};
use crate::device::Device;
use crate::iommu::Iommu;
use crate::locks::Mutex;
use crate::qemu::pci_tree::{Difference, PciTree, all_on};
use crate::qemu::qmp::VmReports;
use crate::topology::{PciRange, Ports};
use crate::{error_limited, info_limited};

/// Carries out what the VMM reports over QMP.
pub(super) struct PlaceChecker {
    pub ports: Ports,
    pub named: Vec<NamedDevice>,
    pub iommu: Arc<Mutex<Iommu>>,
    pub device: Arc<Device>,
    pub report: Arc<PlaceReport>,
}

impl VmReports for PlaceChecker {
    fn reset(&self) {
        if self.device.reset_vm() {
            info_limited!("the VM was reset: all domains are gone");
        }
    }

    fn places(&self, answer: Result<PciTree, String>) {
        if self.ports.is_empty() && self.named.is_empty() {
            self.device.start_is_checked();
            return;
        }
        let (withheld, state) = match answer {
            Ok(tree) => self.compare(&tree),
            Err(why) => {
                error_limited!(
                    "the places of the guest's devices are not known: {why}; all endpoints behind ports and those with `device` \
                     are blocked until the VMM lists its devices over QMP"
                );
                (
                    all_compared(&self.ports, &self.named),
                    PlaceState::Unknown { why },
                )
            }
        };
        self.iommu.lock().withhold(withheld);
        self.report.set(state);
        // Last: the driver's requests must meet the endpoints as the check has left them.
        self.device.start_is_checked();
    }
}

impl PlaceChecker {
    /// The functions to withhold, and the state to report.
    fn compare(&self, tree: &PciTree) -> (Vec<PciRange>, PlaceState) {
        let differences = tree.differences(&self.ports);
        for Difference {
            path,
            expected,
            found,
        } in &differences
        {
            let found = found.map_or_else(
                || "no port there".to_owned(),
                |bus| format!("the number {bus:02x} for it"),
            );
            error_limited!(
                "the bus behind port {path} has the number {expected:02x} in the guest's table, and the guest has {found}; \
                 all endpoints there are blocked. Another port that the file does not have may have taken a number: \
                 declare every port (`[[port]]`), and start the VM anew"
            );
        }
        let wrong = tree.wrong_devices(&self.named);
        for device in &wrong {
            let found = device.found.as_deref().unwrap_or("nowhere");
            error_limited!(
                "the device {} of endpoint {} is at {found} in the guest; the endpoint is blocked. Correct the address or \
                 the port of the endpoint, or the place of the device in QEMU's arguments, and start the VM anew",
                device.id,
                device.endpoint
            );
        }
        if differences.is_empty() && wrong.is_empty() {
            return (Vec::new(), PlaceState::Agree);
        }
        let withheld = differences
            .iter()
            .filter_map(|difference| all_on(difference.expected))
            .chain(wrong.iter().map(|device| device.endpoint.into()))
            .collect();
        let ports = differences
            .into_iter()
            .map(|difference| WrongPort {
                port: difference.path.to_string(),
                expected: difference.expected,
                found: difference.found,
            })
            .collect();
        let devices = wrong.into_iter().map(|device| MisplacedDevice {
            id: device.id,
            expected: device.endpoint,
            found: device.found,
        });
        let devices = devices.collect();
        (withheld, PlaceState::Differ { ports, devices })
    }
}

/// All functions that are compared.
pub(super) fn all_compared(ports: &Ports, named: &[NamedDevice]) -> Vec<PciRange> {
    let ports = ports.iter();
    let ports = ports.filter_map(|port| all_on(port.bus));
    let named = named.iter().map(|device| device.endpoint.into());
    ports.chain(named).collect()
}
