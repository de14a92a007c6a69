//! Shadow readers: endpoints with `shadow`.

use std::fmt;
use std::path::PathBuf;

use super::Socket;
use super::checker::Checker;
use super::draft::Draft;
use super::error::ProblemKind;
use super::kind::{ConfiguredDevice, DeviceKind};
use super::passthrough::range_in;
use crate::topology::PciAddress;

/// An endpoint whose readers register at a socket. Several endpoints may share one socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ShadowListener {
    /// The address of the device in the guest.
    pub endpoint: PciAddress,
    /// The path of the socket.
    pub path: PathBuf,
}

impl ConfiguredDevice for ShadowListener {
    fn kind(&self) -> DeviceKind {
        DeviceKind::ShadowReader
    }

    fn endpoint(&self) -> PciAddress {
        self.endpoint
    }

    fn listens_at(&self) -> Option<&PathBuf> {
        Some(&self.path)
    }

    fn connects_to(&self) -> Option<&PathBuf> {
        None
    }

    fn summarize(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, " shadow {}", self.path.display())
    }
}

impl Checker<'_> {
    /// The endpoints with `shadow`, in ascending order. The topology's check refuses bad addresses.
    /// `socket` and `control` are the daemon's other sockets.
    pub(super) fn shadow(
        &mut self,
        draft: &Draft,
        socket: Option<&Socket>,
        control: Option<&PathBuf>,
    ) -> Option<Vec<ShadowListener>> {
        let mut found = Vec::new();
        let mut whole = true;
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            let value = &endpoint.value;
            let Some(given) = &value.shadow else { continue };
            let key = format!("endpoint[{index}].shadow");
            let path = self.socket_path(Some(given), &key);
            let range = value.address.as_ref().or(value.range.as_ref());
            let (Some(path), Some(range)) = (path, range.and_then(range_in)) else {
                whole = false;
                continue;
            };
            let vmm = matches!(socket, Some(Socket::Path(other)) if *other == path);
            let kind = if vmm || control == Some(&path) {
                ProblemKind::ShadowPath
            } else if range.count() > 1 {
                ProblemKind::ShadowOnRange { range }
            } else if value.vfio.is_some() || value.vfio_user.is_some() {
                ProblemKind::ShadowWithVfio
            } else {
                found.push(ShadowListener {
                    endpoint: range.first(),
                    path,
                });
                continue;
            };
            whole = false;
            self.refuse(&given.origin, &key, kind);
        }
        found.sort_by_key(|entry| entry.endpoint);
        whole.then_some(found)
    }
}
