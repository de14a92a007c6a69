//! Serves one VMM after the other until the daemon ends.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{error, info};

use super::device::{RestoreCore, VirtioPciDevice};
use super::trapped_bar::TrappedBar;
use super::worker::RingWorker;
use crate::device::Device;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::process::sandbox::Role;
use crate::vfio_user::server::{ClientKeeping, DeviceServer, ServerStatus};

/// The base of the names of what is kept of a VMM's connection.
const NAME: &str = "pci";

/// Keeps the connections of VMMs for a later process.
pub struct VmmKeeping {
    keeper: Arc<Keeper>,
    clients: ClientKeeping,
    restore: Option<RestoreCore>,
}

impl VmmKeeping {
    /// Keeps connections with `keeper`. Finds the one that an earlier process has left; what cannot be gone on with is
    /// closed and noted in `life`. Must be called before the process is confined.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn find(keeper: Arc<Keeper>, life: Arc<Life>) -> io::Result<Self> {
        Ok(Self {
            clients: ClientKeeping::find(keeper.clone(), NAME, life)?,
            keeper,
            restore: None,
        })
    }

    /// Whether an earlier process has left a VMM that has begun to use the device. The server then needs [`Self::restore`].
    pub fn has_left_vmm(&self) -> bool {
        self.clients.has_left_device()
    }

    /// Has the server call `restore` once, when the VMM counts as present and the device has its memory, and go on with
    /// the rings afterwards. If the VMM cannot be served after all, the server calls it, too, and the VMM has gone
    /// afterwards.
    #[must_use]
    pub fn restore(self, restore: impl FnOnce() + Send + 'static) -> Self {
        Self {
            restore: Some(Box::new(restore)),
            ..self
        }
    }
}

/// The running server of the PCI device. Dropping it ends the VMM's connection.
pub struct VirtioPciServer {
    server: DeviceServer,
    end: Arc<End>,
    /// Readable once the server has to end.
    ended: UnixStream,
}

impl VirtioPciServer {
    /// Serves `device` to the VMMs that connect to `listener`, one after the other. `trapped` answers accesses to BAR
    /// 2; without it, the device has no such BAR. Calls `vmm_present(true)` when a VMM has connected, and
    /// `vmm_present(false)` when it has gone. With `keeping`, a VMM's connection outlives this process.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub fn start(
        device: Arc<Device>,
        listener: UnixListener,
        trapped: Option<Box<dyn TrappedBar>>,
        vmm_present: impl Fn(bool) + Send + 'static,
        keeping: Option<VmmKeeping>,
    ) -> io::Result<Self> {
        let (end, ended) = UnixStream::pair()?;
        let end = Arc::new(End {
            stream: end,
            worker_died: AtomicBool::new(false),
        });
        let mut served = VirtioPciDevice::new(device.clone(), trapped, Box::new(vmm_present))
            .map_err(io::Error::other)?;
        let dead = end.clone();
        let worker = RingWorker::start(device, served.rings(), move || {
            dead.worker_died.store(true, Ordering::Release);
            dead.end();
        })?;
        served.set_worker(worker);
        let clients = keeping.map(|keeping| {
            served.kept_with(keeping.keeper, keeping.restore);
            keeping.clients
        });
        let served = Box::new(served);
        Ok(Self {
            server: DeviceServer::start_kept(Role::VirtioPci, listener, served, clients)?,
            end,
            ended,
        })
    }

    /// The connections so far.
    pub fn status(&self) -> Arc<ServerStatus> {
        self.server.status()
    }

    /// A handle that ends [`Self::run`] from another thread.
    pub fn stopper(&self) -> PciStopper {
        PciStopper(self.end.clone())
    }

    /// Waits until a [`PciStopper`] ends the server.
    ///
    /// # Errors
    /// The worker has ended, or the wait has failed.
    pub fn run(&mut self) -> io::Result<()> {
        info!("waiting for a VMM to connect");
        loop {
            match self.ended.read(&mut [0]) {
                Ok(_) => break,
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
        if self.end.worker_died.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "the thread that serves the rings has ended",
            ));
        }
        info!("ended");
        Ok(())
    }
}

/// Ends a running server. Clones end the same one.
#[derive(Clone)]
pub struct PciStopper(Arc<End>);

impl PciStopper {
    /// Makes [`VirtioPciServer::run`] return soon. Dropping the server closes the VMM's connection.
    pub fn stop(&self) {
        self.0.end();
    }
}

struct End {
    stream: UnixStream,
    worker_died: AtomicBool,
}

impl End {
    fn end(&self) {
        if let Err(cause) = self.stream.shutdown(Shutdown::Write) {
            error!("cannot end the daemon: {cause}");
        }
    }
}
