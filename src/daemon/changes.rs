//! The endpoints that `ctl` has added to the running VM and removed from it, at the start of a process.

use log::{error, info, warn};

use super::sandbox_needs::may_listen;
use crate::config::{Config, EndpointChanges};
use crate::device::execute::probe_room;
use crate::endpoints::changes::{ChangeRecord, LeftChanges, LeftRecordError};
use crate::endpoints::start::LateEndpoints;
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
