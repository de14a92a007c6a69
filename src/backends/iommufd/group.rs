//! Groups of devices that the host IOMMU cannot isolate from each other, and their common address space.

use std::collections::BTreeSet;

use crate::backends::group_target::common_target;
use crate::backends::reach::refused;
use crate::backends::{BackendError, BackendErrorKind, Target};
use crate::ids::EndpointId;
use crate::vfio::Attach;
use crate::{error_limited, warn_limited};

/// A group of the host. Most groups have one device.
pub(super) struct DeviceGroup {
    /// The host's number of the group.
    number: u32,
    members: Vec<GroupMember>,
    attachment: Attachment,
    /// Whether the devices are known to be bound to this process's iommufd.
    verified: bool,
    /// The devices that an earlier process had in this process's iommufd. While one of them is not bound here, the group
    /// counts as unbound: Linux takes it out of its address space only with the last device.
    awaited: BTreeSet<EndpointId>,
    /// The address spaces that an attach has failed to enter since [`Self::take_refusing`].
    refusing: Vec<u32>,
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

/// The address space of a group's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attachment {
    /// None: the devices are not bound.
    Unbound,
    /// An address space of the VMM. It maps all guest RAM at its guest-physical addresses.
    Vmm,
    /// An address space of this process.
    Ioas(u32),
    /// None: the devices are bound and detached.
    Detached,
    /// Unknown: the devices were bound before this process started, or could not be detached. If they could not be
    /// detached, their bus-master bits are cleared.
    Unknown,
}

impl GroupMember {
    /// A device. The VMM binds it if it is `shared`; otherwise this process has bound it.
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
    /// A group before a VMM has connected. `endpoints::passthrough` refuses a group that has both shared devices and
    /// others.
    pub(super) fn new(number: u32, members: Vec<GroupMember>) -> Self {
        let shared = members.iter().any(|m| m.shared);
        let attachment = if !shared {
            Attachment::Detached
        } else if members.iter().any(|m| m.attach.is_bound()) {
            // Another process has bound the device: this VMM has not connected yet.
            Attachment::Unknown
        } else {
            Attachment::Unbound
        };
        Self {
            number,
            members,
            attachment,
            verified: !shared,
            awaited: BTreeSet::new(),
            refusing: Vec::new(),
        }
    }

    /// The host's number of the group.
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// The endpoints of its devices.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = EndpointId> + '_ {
        self.members.iter().map(|m| m.endpoint)
    }

    /// The address spaces that [`Self::take_refusing`] will return.
    pub(super) fn refusing(&self) -> &[u32] {
        &self.refusing
    }

    /// The address spaces that an attach has failed to enter since the last call, and may have left half done.
    pub(super) fn take_refusing(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.refusing)
    }

    /// The devices' address space.
    pub(super) fn attachment(&self) -> Attachment {
        self.attachment
    }

    /// Whether the devices are known to be bound to this process's iommufd.
    pub(super) fn is_verified(&self) -> bool {
        self.verified
    }

    /// Notes that an earlier process has bound the devices, to an unknown iommufd.
    pub(super) fn set_bound_before(&mut self) {
        self.verified = false;
        self.attachment = Attachment::Unknown;
    }

    /// Notes that the devices are bound to this process's iommufd.
    pub(super) fn set_verified(&mut self) {
        self.verified = true;
    }

    /// The error for devices that are bound to another iommufd.
    pub(super) fn wrong_iommufd(&self) -> BackendError {
        BackendError {
            kind: BackendErrorKind::DevErr,
            message: format!(
                "{}: bound by the VMM to another iommufd than the one of this process; start \
                 both with the same open /dev/iommu (for QEMU `-object iommufd,fd=...`)",
                self.names()
            ),
        }
    }

    /// The host's names for its devices.
    pub(super) fn names(&self) -> String {
        let names: Vec<_> = self.members.iter().map(|m| m.name.as_str()).collect();
        names.join(", ")
    }

    /// The target of the group, from the wanted targets of its members.
    pub(super) fn target(&self) -> Target {
        common_target(self.members.iter().map(|m| (m.wanted, m.quarantined)))
    }

    /// Sets the wanted target of a member, and ends its quarantine. Returns the former state of both.
    pub(super) fn set_wanted(&mut self, endpoint: EndpointId, target: Target) -> (Target, bool) {
        let mut before = (Target::Blocked, false);
        for member in self.members.iter_mut().filter(|m| m.endpoint == endpoint) {
            before = (member.wanted, member.quarantined);
            (member.wanted, member.quarantined) = (target, false);
        }
        before
    }

    /// Notes that a member is quarantined. Does not move the devices.
    pub(super) fn set_quarantined(&mut self, endpoint: EndpointId) {
        for member in self.members.iter_mut().filter(|m| m.endpoint == endpoint) {
            member.quarantined = true;
        }
    }

    /// Undoes [`Self::set_wanted`].
    pub(super) fn restore_wanted(&mut self, endpoint: EndpointId, before: (Target, bool)) {
        for member in self.members.iter_mut().filter(|m| m.endpoint == endpoint) {
            (member.wanted, member.quarantined) = before;
        }
    }

    /// Notices that the VMM has bound devices of the group. They are then in the VMM's address space, or where an earlier
    /// process has put them.
    pub(super) fn notice_binding(&mut self) {
        if self.attachment == Attachment::Unbound
            && self.members.iter().any(|m| m.attach.is_bound())
            && !self.lacks_awaited()
        {
            self.attachment = if self.verified {
                Attachment::Unknown
            } else {
                Attachment::Vmm
            };
        }
    }

    /// Notes which devices of a verified group an earlier process had in this process's iommufd; `None` if that may be any of
    /// them. If one of them is not bound here, the group counts as unbound.
    pub(super) fn await_members(&mut self, bound_before: Option<BTreeSet<EndpointId>>) {
        self.awaited = bound_before.unwrap_or_else(|| self.endpoints().collect());
        if self.lacks_awaited() {
            self.attachment = Attachment::Unbound;
        }
    }

    /// Whether a device is not bound here that an earlier process had in this process's iommufd.
    pub(super) fn lacks_awaited(&self) -> bool {
        let bound: BTreeSet<_> = self.bound_endpoints().into_iter().collect();
        !self.awaited.is_subset(&bound)
    }

    /// The names of the devices that [`Self::lacks_awaited`] tells of: the host's, or those of endpoints that the
    /// configuration does not have any more.
    pub(super) fn lacking(&self) -> String {
        let bound = self.bound_endpoints();
        let lacking = self.awaited.iter().filter(|e| !bound.contains(e));
        let named = lacking.map(|endpoint| {
            let mut members = self.members.iter();
            let member = members.find(|member| member.endpoint == *endpoint);
            member.map_or_else(
                || format!("the former endpoint {endpoint}"),
                |member| member.name.clone(),
            )
        });
        named.collect::<Vec<_>>().join(", ")
    }

    /// The endpoints of its bound devices.
    pub(super) fn bound_endpoints(&self) -> Vec<EndpointId> {
        let bound = self.members.iter().filter(|m| m.attach.is_bound());
        bound.map(|m| m.endpoint).collect()
    }

    /// Whether it has several devices.
    pub(super) fn has_several(&self) -> bool {
        self.members.len() > 1
    }

    /// Whether all of its devices are bound.
    pub(super) fn is_whole(&self) -> bool {
        self.members.iter().all(|member| member.attach.is_bound())
    }

    /// Forgets that the VMM has bound the devices: this process gives their files up.
    pub(super) fn forget_binding(&mut self) {
        self.attachment = Attachment::Unbound;
        self.verified = false;
        self.awaited.clear();
        self.refusing.clear();
    }

    /// Refuses a member that is not bound.
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
                    "the VMM has not bound {} to the iommufd that it shares with this process; name \
                     the device before the vhost-user device on the VMM's command line",
                    member.name
                ),
            }),
        }
    }

    /// Ends the DMA of the devices that the VMM has bound, wherever the VMM attaches them next. The guest's next driver
    /// sets the bus-master bit again.
    pub(super) fn stop_shared(&self) {
        let bound = |member: &&GroupMember| member.shared && member.attach.is_bound();
        for member in self.members.iter().filter(bound) {
            if let Err(cause) = member.attach.clear_bus_master() {
                warn_limited!(
                    "{} may do DMA between this VMM and the next: its bus-master bit cannot be cleared: {cause}",
                    member.name
                );
            }
        }
    }

    /// Moves all bound devices to another address space. Calls the kernel even if they should be there already: the VMM
    /// may have moved them since.
    ///
    /// On error their address space is unknown. An IOMMU driver may take a device out of its address space and then
    /// fail to put it into the next one, while the kernel still records the device in the former one.
    pub(super) fn move_to(&mut self, attachment: Attachment) -> Result<(), BackendError> {
        let moved = self.try_move_to(attachment);
        self.attachment = if moved.is_ok() {
            attachment
        } else {
            Attachment::Unknown
        };
        moved
    }

    fn try_move_to(&mut self, attachment: Attachment) -> Result<(), BackendError> {
        for member in self.members.iter().filter(|m| m.attach.is_bound()) {
            let result = match attachment {
                Attachment::Ioas(ioas) => member.attach.attach(ioas).inspect_err(|cause| {
                    // The kernel finds addresses that the device cannot have before it calls the IOMMU's driver.
                    if cause.raw_os_error() != Some(libc::EADDRINUSE) {
                        self.refusing.push(ioas);
                    }
                }),
                Attachment::Detached => member.attach.detach(),
                // Only the VMM can put devices into its address space; the others are no destinations.
                Attachment::Vmm | Attachment::Unbound | Attachment::Unknown => Ok(()),
            };
            result.map_err(|cause| {
                let failure = format_args!("{} cannot be switched over", member.name);
                refused(failure, &cause)
            })?;
        }
        Ok(())
    }

    /// As [`Self::move_to`], for devices whose address space is unknown. Detaches them first: if the kernel records a
    /// device in `attachment` already, an attach alone does nothing.
    pub(super) fn reattach(&mut self, attachment: Attachment) -> Result<(), BackendError> {
        self.move_to(Attachment::Detached)?;
        self.move_to(attachment)
    }

    /// Quarantines a member, which ends all DMA of the group.
    pub(super) fn quarantine(&mut self, endpoint: EndpointId) {
        self.set_quarantined(endpoint);
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
            // The only known cause is a device that does not wake up. The last means is the device's own bus-master
            // bit.
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
