//! Devices the host cannot keep apart, and what they obey together.

use crate::backends::group_target::common_target;
use crate::backends::reach::refused;
use crate::backends::{BackendError, BackendErrorKind, Target};
use crate::error_limited;
use crate::ids::EndpointId;
use crate::vfio::Attach;

/// A group of the host's; most have one device.
pub(super) struct DeviceGroup {
    members: Vec<GroupMember>,
    attachment: Attachment,
    /// The devices are known to be bound to our iommufd.
    verified: bool,
}

/// A device of a group.
pub(super) struct GroupMember {
    endpoint: EndpointId,
    name: String,
    shared: bool,
    attach: Box<dyn Attach>,
    wanted: Target,
    quarantined: bool,
}

/// What a group's devices obey.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attachment {
    /// Nobody has bound them.
    Unbound,
    /// The VMM's address space, which is identity.
    Vmm,
    /// An address space of ours.
    Ioas(u32),
    /// Nothing: they are in no address space.
    Detached,
    /// It is not known what: they were bound before this process was there, or could not be taken
    /// out of an address space. In the latter case their bus-master bits are cleared.
    Unknown,
}

impl GroupMember {
    /// A device. `shared`: the VMM binds it; else this process has.
    pub(super) fn new(
        endpoint: EndpointId,
        name: String,
        shared: bool,
        attach: Box<dyn Attach>,
    ) -> Self {
        Self {
            endpoint,
            name,
            shared,
            attach,
            wanted: Target::Blocked,
            quarantined: false,
        }
    }
}

impl DeviceGroup {
    /// A group before a VMM is there. Devices of both kinds do not go together: see `endpoints::passthrough`.
    pub(super) fn new(members: Vec<GroupMember>) -> Self {
        let shared = members.iter().any(|m| m.shared);
        let attachment = if !shared {
            Attachment::Detached
        } else if members.iter().any(|m| m.attach.is_bound()) {
            // Not by this VMM, which has not connected yet.
            Attachment::Unknown
        } else {
            Attachment::Unbound
        };
        Self {
            members,
            attachment,
            verified: !shared,
        }
    }

    /// What the devices obey.
    pub(super) fn attachment(&self) -> Attachment {
        self.attachment
    }

    /// Whether the devices are known to be bound to our iommufd.
    pub(super) fn is_verified(&self) -> bool {
        self.verified
    }

    /// They are.
    pub(super) fn set_verified(&mut self) {
        self.verified = true;
    }

    /// What to say where they are bound to another one.
    pub(super) fn is_foreign(&self) -> BackendError {
        let names: Vec<_> = self.members.iter().map(|m| m.name.as_str()).collect();
        BackendError {
            kind: BackendErrorKind::DevErr,
            message: format!(
                "{}: the VMM has bound it to another iommufd than this process was given; start \
                 both with the same open /dev/iommu (for QEMU `-object iommufd,fd=...`)",
                names.join(", ")
            ),
        }
    }

    /// Where the members belong.
    pub(super) fn target(&self) -> Target {
        common_target(self.members.iter().map(|m| (m.wanted, m.quarantined)))
    }

    /// Sets what a member wants; answers what it wanted, and whether it was quarantined.
    pub(super) fn set_wanted(&mut self, endpoint: EndpointId, target: Target) -> (Target, bool) {
        let mut before = (Target::Blocked, false);
        for member in self.members.iter_mut().filter(|m| m.endpoint == endpoint) {
            before = (member.wanted, member.quarantined);
            (member.wanted, member.quarantined) = (target, false);
        }
        before
    }

    /// Undoes it.
    pub(super) fn restore_wanted(&mut self, endpoint: EndpointId, before: (Target, bool)) {
        for member in self.members.iter_mut().filter(|m| m.endpoint == endpoint) {
            (member.wanted, member.quarantined) = before;
        }
    }

    /// Devices that somebody has bound meanwhile are in his address space.
    pub(super) fn notice_binding(&mut self) {
        if self.attachment == Attachment::Unbound
            && self.members.iter().any(|m| m.attach.is_bound())
        {
            self.attachment = Attachment::Vmm;
        }
    }

    /// Refuses a member that nobody has bound.
    pub(super) fn check_bound(&mut self, endpoint: EndpointId) -> Result<(), BackendError> {
        self.notice_binding();
        let unbound = self
            .members
            .iter()
            .find(|m| m.endpoint == endpoint && !m.attach.is_bound());
        match unbound {
            None => Ok(()),
            Some(member) => Err(BackendError {
                kind: BackendErrorKind::Unsupp,
                message: format!(
                    "the VMM has not bound {} to the iommufd both were given; give it the device \
                     before the vhost-user device",
                    member.name
                ),
            }),
        }
    }

    /// Puts all devices that are bound somewhere else; also where they are said to be there: the VMM
    /// may have moved them since.
    ///
    /// On error they may be anywhere, or nowhere: drivers of IOMMUs take a device out of one address
    /// space before they find that they cannot put it into the next, and the kernel holds it to be in
    /// the first one all the same.
    pub(super) fn move_to(&mut self, attachment: Attachment) -> Result<(), BackendError> {
        let put = self.try_move_to(attachment);
        self.attachment = if put.is_ok() {
            attachment
        } else {
            Attachment::Unknown
        };
        put
    }

    fn try_move_to(&self, attachment: Attachment) -> Result<(), BackendError> {
        for member in self.members.iter().filter(|m| m.attach.is_bound()) {
            let result = match attachment {
                Attachment::Ioas(ioas) => member.attach.attach(ioas),
                Attachment::Detached => member.attach.detach(),
                // Nobody but the VMM can put them there, or nobody wants to.
                Attachment::Vmm | Attachment::Unbound | Attachment::Unknown => Ok(()),
            };
            result.map_err(|cause| {
                let what = format_args!("{} cannot be switched over", member.name);
                refused(what, &cause)
            })?;
        }
        Ok(())
    }

    /// The same where it is not known what they obey: the kernel does nothing for a device that it
    /// holds to be there already.
    pub(super) fn reattach(&mut self, attachment: Attachment) -> Result<(), BackendError> {
        self.move_to(Attachment::Detached)?;
        self.move_to(attachment)
    }

    /// Ends all DMA of the group, for a member's sake.
    pub(super) fn quarantine(&mut self, endpoint: EndpointId) {
        for member in self.members.iter_mut().filter(|m| m.endpoint == endpoint) {
            member.quarantined = true;
        }
        self.block();
    }

    /// Ends all DMA of the group.
    pub(super) fn block(&mut self) {
        if self.attachment == Attachment::Unbound {
            return;
        }
        self.attachment = Attachment::Detached;
        for member in &self.members {
            let Err(cause) = member.attach.detach() else {
                continue;
            };
            if !member.attach.is_bound() {
                continue;
            }
            // No reason is known why this should fail, but for a device that does not wake up. What
            // is left then is the switch on the device itself.
            self.attachment = Attachment::Unknown;
            error_limited!(
                "{} cannot be taken out of its address space ({cause}): its bus-master bit is \
                 cleared",
                member.name
            );
            if let Err(cause) = member.attach.clear_bus_master() {
                error_limited!("{} cannot be stopped: {cause}", member.name);
            }
        }
    }
}
