//! Working with files that come from the VMM when it runs, and go with it.
//!
//! While this process lacks the VMM's iommufd, the backend makes no address space, and the devices are where the VMM has
//! put them: to this backend they are unbound. A switch to bypass mode or to blocked mode is deferred until they come; one
//! to a domain asks for them, and fails if they do not come.

use super::group::Attachment;
use super::{Iommufd, Target};
use crate::backends::{BackendError, BackendErrorKind};
use crate::vfio::VmmFiles;

impl Iommufd {
    /// Has the backend work with files of the VMM.
    #[must_use]
    pub fn with_vmm_files(mut self, files: Box<dyn VmmFiles>) -> Self {
        self.vmm_files = Some(files);
        self.spaces.adopting = self.lacks_iommufd();
        self
    }

    /// Whether the iommufd is to come from the VMM, and has not come yet.
    pub(super) fn lacks_iommufd(&self) -> bool {
        let files = self.vmm_files.as_ref();
        files.is_some_and(|files| !files.is_open())
    }

    /// Whether devices of a group are in an address space of this iommufd, and the file of one of them or more was lost with an
    /// earlier process: without it this process cannot take the group out. [`Self::take_over`] has emptied the address space.
    pub(super) fn has_lost_files(&self, index: usize) -> bool {
        let group = &self.groups[index];
        self.vmm_files.is_some() && group.attachment() == Attachment::Unbound && group.is_verified()
    }

    /// The refusal to switch a group that [has lost its files](Self::has_lost_files).
    pub(super) fn lost_files(&self, index: usize) -> BackendError {
        let group = &self.groups[index];
        let lacking = group.lacking();
        BackendError {
            kind: BackendErrorKind::DevErr,
            message: format!(
                "no device of host group {} ({}) reaches memory: the file of {lacking} was lost with the daemon before, and has \
                 not come again from the VMM; see that the helper answers, or start the VM anew",
                group.number(),
                group.names()
            ),
        }
    }

    /// Gets missing files of a device that is to enter a domain, or to leave an address space of this process. Takes note of
    /// what has come.
    pub(super) fn fetch_for(&mut self, index: usize, target: Target) {
        let is_wanted = matches!(target, Target::Domain(_)) || self.has_lost_files(index);
        let Some(files) = &self.vmm_files else {
            return;
        };
        if self.connected && is_wanted && !self.groups[index].is_whole() {
            files.fetch();
        }
        self.notice_files(Some(index));
    }

    /// Begins to use the files that have come. A device among them whose endpoint is not in bypass mode leaves the VMM's
    /// address space at once, and one that an earlier process has moved goes to its present target. The caller moves the
    /// `switched` group.
    pub(super) fn notice_files(&mut self, switched: Option<usize>) {
        let Some(files) = self.vmm_files.as_ref().filter(|_| !self.awaits_take_over) else {
            return;
        };
        files.accept();
        if self.lacks_iommufd() {
            return;
        }
        if self.spaces.adopting {
            self.spaces.adopting = false;
            self.begin_records();
            self.spaces.make_bypass_if_pinned();
        }
        if !self.connected {
            return;
        }
        for index in 0..self.groups.len() {
            let has_come = self.groups[index].attachment() == Attachment::Unbound;
            self.groups[index].notice_binding();
            // A device that comes to an attached group can enter an address space from now on.
            self.note_group(index);
            let is_elsewhere = match self.groups[index].attachment() {
                Attachment::Vmm => true,
                Attachment::Unknown => has_come,
                Attachment::Unbound | Attachment::Ioas(_) | Attachment::Detached => false,
            };
            if is_elsewhere
                && switched != Some(index)
                && let Err(cause) = self.go_to_target(index)
            {
                self.stop(index, &cause);
            }
            self.renew_refusing(index);
        }
        self.moved();
    }

    /// Moves a group to its target after a failed switch: its files may have come with the request.
    pub(super) fn place_arrived(&mut self, index: usize) {
        let is_elsewhere = matches!(
            self.groups[index].attachment(),
            Attachment::Vmm | Attachment::Unknown
        );
        if self.vmm_files.is_some()
            && is_elsewhere
            && let Err(cause) = self.go_to_target(index)
        {
            self.stop(index, &cause);
        }
    }

    /// Moves a group to its target. In bypass mode it stays in the VMM's address space.
    fn go_to_target(&mut self, index: usize) -> Result<(), BackendError> {
        let attachment = self.attachment_for(index)?;
        match attachment {
            Attachment::Vmm => Ok(()),
            Attachment::Ioas(_) if !self.verify_iommufd(index)? => {
                Err(self.groups[index].wrong_iommufd())
            }
            _ => self.groups[index].move_to(attachment),
        }
    }

    /// Records the address spaces of this iommufd from now on.
    fn begin_records(&mut self) {
        let Some(records) = &self.records else {
            return;
        };
        let notes = self.spaces.notes.get_mut();
        notes.begin(records.clone());
        notes.make_anchor(&*self.spaces.kernel);
        self.note_verified_groups();
    }

    /// The VMM has gone. The core has blocked all devices and has removed all memory before. Gives the files up, and with
    /// them every address space.
    pub(super) fn release_files(&mut self) {
        if self.vmm_files.is_none() {
            return;
        }
        if !self.lacks_iommufd() {
            self.domains.clear();
            self.partial_map = None;
            self.spaces.forget_all();
            for group in &mut self.groups {
                group.forget_binding();
            }
        }
        if let Some(files) = &self.vmm_files {
            files.release();
        }
        self.spaces.adopting = true;
    }
}
