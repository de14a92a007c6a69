//! The endpoints that `ctl` has added to the running VM and removed from it, at the start of a process.

use log::{error, info, warn};

use super::sandbox_needs::may_listen;
use crate::config::{Config, Descriptors, EndpointChanges};
use crate::device::execute::probe_room;
use crate::endpoints::changes::{ChangeRecord, LeftChanges, LeftRecordError};
use crate::endpoints::start::{LateEndpoints, OpenedDevices, StartError};
use crate::iommu::{GuestOffer, Iommu};
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::topology::PciRange;

/// What the process before has changed, applied to the file.
pub(super) struct LeftEndpoints {
    pub(super) record: ChangeRecord,
    /// The file's configuration without the endpoints that were removed.
    pub(super) file: Config,
    changes: EndpointChanges,
    /// The file contradicts an addition, so another process may have a device open that the file names.
    is_contradicted: bool,
    /// Endpoints that must be blocked: what became of them is unknown.
    pub(super) suspects: Vec<PciRange>,
    offer: Option<GuestOffer>,
    /// Why nothing of the process before may be taken over.
    pub(super) refusal: Option<String>,
}

impl LeftEndpoints {
    /// Finds what the process before has left, and applies it to the file's configuration. Says what cannot be applied.
    pub(super) fn find(file: &Config, keeper: &Keeper, life: &Life) -> Self {
        let mut found = Self {
            record: ChangeRecord::unkept(),
            file: file.clone(),
            changes: EndpointChanges::default(),
            is_contradicted: false,
            suspects: Vec::new(),
            offer: None,
            refusal: None,
        };
        if !keeper.is_present() {
            return found;
        }
        match ChangeRecord::find(keeper) {
            Ok((record, left)) => {
                found.record = record;
                if left.is_refused {
                    found.refusal = Some(
                        "the daemon before had refused the record of the endpoints that `ctl` has added and removed; reset \
                         the VM, and add and remove the endpoints again"
                            .into(),
                    );
                }
                found.apply(file, left, life);
            }
            Err(LeftRecordError::Unkept(cause)) => warn!("{}", LeftRecordError::Unkept(cause)),
            // Nobody knows which endpoints there were.
            Err(refused @ LeftRecordError::Refused(_)) => {
                found.refusal = Some(refused.to_string());
                match ChangeRecord::replace_refused(keeper) {
                    Ok(record) => found.record = record,
                    Err(cause) => warn!("{cause}"),
                }
            }
        }
        found
    }

    fn apply(&mut self, file: &Config, left: LeftChanges, life: &Life) {
        let mut applied = left.changes.apply(file);
        let lose = |text: String| {
            error!("{text}");
            life.lose(text);
        };
        self.is_contradicted = !applied.contradictions.is_empty();
        for contradiction in &applied.contradictions {
            lose(format!(
                "{contradiction}; the guest's endpoint there is blocked: change the file back, or unplug the device and start \
                 the VM anew"
            ));
            self.suspects.push(contradiction.range);
        }
        for added in applied.changes.added().to_vec() {
            let range = added.range();
            let device = applied.whole.devices.iter();
            let mut device = device.filter(|device| device.endpoint() == range.first());
            if let Some(path) = device.find_map(|device| device.listens_at())
                && !may_listen(&applied.file, path)
            {
                lose(format!(
                    "endpoint {range}, which `ctl` has added, is gone: its socket {} is in no folder in which the file places \
                     a socket; change the file back, or unplug the device and add both again",
                    path.display()
                ));
                applied.changes.forget(range);
                self.suspects.push(range);
            }
        }
        self.suspects.extend(left.blocked);
        if let Some(range) = left.half_removed {
            lose(format!(
                "the daemon before has died while `ctl` removed endpoint {range}, which is blocked: remove it again"
            ));
            self.suspects.push(range);
        }
        if let Some(range) = left.given_up {
            lose(format!(
                "endpoint {range} is not added: two daemons have died of it, the second one when it took over; unplug its \
                 device, and see their logs before you add it again"
            ));
            self.suspects.push(range);
        }
        if !applied.changes.is_empty() {
            info!("endpoints are as `ctl` has changed them, not as in the file alone");
        }
        self.file = applied.file;
        self.changes = applied.changes;
        self.offer = left.offer;
    }

    /// Leaves an exported device out that cannot be opened: `ctl` had added it otherwise than the file names it, and its client
    /// may still have it. The endpoint counts as removed, also for later processes.
    ///
    /// # Errors
    /// Returns `cause` if it has another reason, or concerns no exported device. Also if the configuration has descriptors,
    /// which can be taken only once.
    pub(super) fn leave_out(
        &mut self,
        cause: StartError,
        keeper: &Keeper,
        life: &Life,
    ) -> Result<(), StartError> {
        let Some((endpoint, host)) = cause.unopened() else {
            return Err(cause);
        };
        let is_exported = self.file.devices.exported_at(endpoint).is_some();
        if !self.is_contradicted || !is_exported || self.file.descriptors != Descriptors::default()
        {
            return Err(cause);
        }
        let range = PciRange::from(endpoint);
        let Ok(without) = self.file.without_endpoints(range) else {
            return Err(cause);
        };
        if self.changes.remove(range).is_err() {
            return Err(cause);
        }
        self.file = without;
        self.suspects.push(range);
        OpenedDevices::forget_unopened(keeper, host);
        let text = format!(
            "endpoint {endpoint} is gone, because its device cannot be opened: {cause}; the client of the device that `ctl` had \
             added may still have it: end that client and start the VM anew, or unplug the device and add the endpoint again"
        );
        error!("{text}");
        life.lose(text);
        Ok(())
    }

    /// Tells a core with the backends of the file what it must know: the offer to the guest, and the endpoints that it must
    /// block. Returns the endpoints to add.
    pub(super) fn tell(&self, iommu: &mut Iommu) -> LateEndpoints {
        if let Some(offer) = self.offer.filter(|_| self.changes.has_removals()) {
            iommu.narrow_offer(&offer);
        }
        for range in &self.suspects {
            iommu.suspect(*range);
        }
        let size = match &self.offer {
            Some(offer) => offer.probe_size(),
            None => 0,
        };
        LateEndpoints {
            config: self.file.clone(),
            changes: self.changes.clone(),
            room: probe_room(size, iommu.topology()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;

    use super::*;
    use crate::endpoints::passthrough::PassthroughError;
    use crate::process::keeper_testing::Manager;
    use crate::vfio::VfioError;

    const HOST: &str = "0000:65:00.0";

    fn file(endpoints: &str) -> Config {
        let text =
            format!("socket = '/run/s'\naddress = '00:05.0'\nhotplug = ['00:06.0']\n{endpoints}");
        Config::from_text(Path::new("vm.toml"), &text).expect("a configuration")
    }

    fn busy(endpoint: &str) -> StartError {
        let cause = PassthroughError::Device {
            host: HOST.parse().expect("an address"),
            endpoint: endpoint.parse().expect("an address"),
            source: VfioError {
                problem: "cannot bind the device".into(),
                source: io::Error::from_raw_os_error(libc::EINVAL),
                cure: "see the kernel's log",
            },
        };
        cause.into()
    }

    /// The client of the device that `ctl` has added has its descriptor, and the file names the device with other keys.
    #[test]
    fn a_device_that_a_former_client_has_open_is_left_out() {
        let mut manager = Manager::new();
        let life = Life::new(true);
        let added = format!("address = '00:06.0', vfio = '{HOST}', export = '/run/a'");
        let export = format!("vfio = '{HOST}'\nexport = '/run/b'\n");
        let named = file(&format!("[[endpoint]]\naddress = '00:06.0'\n{export}"));
        let keeper = manager.keeper();
        let mut first = LeftEndpoints::find(&file(""), &keeper, &life);
        let mut unchanged = LeftEndpoints::find(&named, &keeper, &life);
        let refused = unchanged.leave_out(busy("00:06.0"), &keeper, &life);
        refused.expect_err("nobody has added the device");
        let range = "00:06.0".parse().expect("a range");
        first.record.begin_addition(&added, range).expect("room");
        first.record.finish_addition();

        let keeper = manager.keeper();
        let mut next = LeftEndpoints::find(&named, &keeper, &life);
        assert_eq!(next.file.devices.passthrough.len(), 1);
        let other = next.leave_out(busy("00:08.0"), &keeper, &life);
        other.expect_err("no exported device");
        let left_out = next.leave_out(busy("00:06.0"), &keeper, &life);
        left_out.expect("the daemon starts without it");
        assert_eq!(next.file.devices.passthrough.len(), 0);
        assert!(
            next.file
                .topology
                .endpoint(range.first().endpoint_id())
                .is_none()
        );
        assert!(next.suspects.contains(&range));
        let lost = life.lost().join("; ");
        assert!(lost.contains("its device cannot be opened"), "{lost}");
        let offer = r#"{"first":0,"last":65535,"page_sizes":4096,"probe_size":512}"#;
        let offer = serde_json::from_str(offer).expect("an offer");
        let settled = next.record.settled(next.changes, &next.suspects, offer);
        settled.expect("written");
        // The next one does not try again: the client may still have the device.
        let later = LeftEndpoints::find(&named, &manager.keeper(), &life);
        assert_eq!(later.file.devices.passthrough.len(), 0);
    }
}
