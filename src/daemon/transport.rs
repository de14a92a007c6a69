//! The server of the configured transport.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::DaemonError;
use crate::config::{Config, Socket, VmmTransport};
use crate::device::Device;
use crate::endpoints::sockets::rights;
use crate::process::keeper::Keeper;
use crate::process::socket::{SocketFile, bind_for};
use crate::transport::listener::inherit;
use crate::transport::vhost_user::LeftVmm;
use crate::transport::vhost_user::serve::{Stopper, VhostUserServer};
use crate::transport::virtio_pci::serve::{PciStopper, VirtioPciServer, VmmKeeping};
use crate::transport::virtio_pci::table_bar::TableBar;
use crate::transport::virtio_pci::trapped_bar::TrappedBar;

/// Serves the device to VMMs.
pub(super) enum VmmServer {
    VhostUser {
        server: Box<VhostUserServer>,
        vmm_present: Box<dyn Fn(bool) + Send>,
    },
    VirtioPci(Box<VirtioPciServer>),
}

impl VmmServer {
    /// A server of `device` at `listener`. Over virtio-pci, the guest can learn its endpoints from the device if `viot`
    /// is their table, and `keeping` keeps the connection. It calls `vmm_present(true)` when a VMM has connected, and
    /// `vmm_present(false)` when it has gone.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub(super) fn new(
        transport: VmmTransport,
        device: Arc<Device>,
        listener: UnixListener,
        keeper: Arc<Keeper>,
        viot: Option<Vec<u8>>,
        keeping: Option<VmmKeeping>,
        vmm_present: impl Fn(bool) + Send + 'static,
    ) -> io::Result<Self> {
        Ok(match transport {
            VmmTransport::VhostUser => Self::VhostUser {
                server: Box::new(VhostUserServer::new(device, listener, keeper)?),
                vmm_present: Box::new(vmm_present),
            },
            VmmTransport::VirtioPci => {
                let bar = viot.map(|viot| TableBar::new(device.clone(), viot));
                let bar = bar.map(|bar| Box::new(bar) as Box<dyn TrappedBar>);
                let server = VirtioPciServer::start(device, listener, bar, vmm_present, keeping)?;
                Self::VirtioPci(Box::new(server))
            }
        })
    }

    /// Lets [`Self::run`] go on with the VMM that the daemon before has left; see [`VhostUserServer::resume`].
    pub(super) fn resume(&mut self, left: LeftVmm, restore: impl FnOnce() + Send + 'static) {
        match self {
            Self::VhostUser { server, .. } => server.resume(left, restore),
            Self::VirtioPci(_) => left.refuse(),
        }
    }

    pub(super) fn stopper(&self) -> ServerStopper {
        match self {
            Self::VhostUser { server, .. } => ServerStopper::VhostUser(server.stopper()),
            Self::VirtioPci(server) => ServerStopper::VirtioPci(server.stopper()),
        }
    }

    /// Serves until a [`ServerStopper`] ends the server.
    ///
    /// # Errors
    /// The server cannot continue, and the VMM is not the cause.
    pub(super) fn run(&mut self) -> Result<(), DaemonError> {
        match self {
            Self::VhostUser {
                server,
                vmm_present,
            } => Ok(server.run(&*vmm_present)?),
            Self::VirtioPci(server) => server.run().map_err(|source| DaemonError::System {
                step: "serve the VMM",
                source,
            }),
        }
    }
}

/// Ends a running server. Clones end the same one.
#[derive(Clone)]
pub(super) enum ServerStopper {
    VhostUser(Stopper),
    VirtioPci(PciStopper),
}

impl ServerStopper {
    pub(super) fn stop(&self) {
        match self {
            Self::VhostUser(stopper) => stopper.stop(),
            Self::VirtioPci(stopper) => stopper.stop(),
        }
    }
}

/// The socket that listens for the VMM, and its file if the daemon has made it.
pub(super) fn listener(config: &Config) -> Result<(UnixListener, Option<SocketFile>), DaemonError> {
    match config.socket.as_ref().ok_or(DaemonError::NoSocket)? {
        Socket::Path(path) => {
            let rights = rights(config.socket_access);
            let (listener, file) = bind_for(path, rights).map_err(DaemonError::Socket)?;
            Ok((listener, Some(file)))
        }
        Socket::Fd(fd) => match inherit(*fd) {
            Ok(listener) => Ok((listener, None)),
            Err(why) => Err(DaemonError::InheritedFd { fd: *fd, why }),
        },
    }
}
