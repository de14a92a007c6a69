//! The trait that every kind of endpoint implements. [`super::kinds`] has the table of implementations.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::bound::{BoundExport, ServedExport};
use super::passthrough::PassthroughError;
use super::status::{DeviceStatus, StatusNames};
use crate::backends::DmaBackend;
use crate::config::Config;
use crate::export::HotResetRegistry;
use crate::faults::report::FaultReporter;
use crate::host::sysfs::IommuInstance;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::process::sandbox::Needs;
use crate::process::socket::SocketFile;
use crate::topology::{GroupName, PciAddress, ReservedRegions, Topology};
use crate::vfio::VmmCdev;

/// The operations of one kind of endpoint.
pub trait EndpointKind: Sync {
    /// Adds the rights that the sandbox must grant for the devices of `config`. If `needs` has `plugging`,
    /// hotplug can add a device of this kind at any time, so its rights are added in any case.
    fn add_needs(&self, config: &Config, needs: &mut Needs);

    /// The resources that the service manager must grant for the devices of `config`.
    fn resources(&self, config: &Config) -> Resources;

    /// Opens the device of one endpoint that was added to a running VM: by this process, or by one before. The core does not
    /// have its backend yet.
    ///
    /// # Errors
    /// The device cannot be opened, or devices of this kind cannot be plugged in.
    fn plug(&self, plug: &Plug<'_>) -> Result<OpenDevice, PlugError>;

    /// Whether a device of this kind can be unplugged from a VM with `config`.
    ///
    /// # Errors
    /// Devices of this kind stay for the life of the daemon.
    fn check_unplug(&self, config: &Config) -> Result<(), PlugError>;

    /// The names under which the control socket reports the devices of this kind; `None` if these devices report
    /// no status of their own.
    fn status_names(&self) -> Option<StatusNames>;
}

/// The resources that the service manager must grant a daemon for the devices of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Devices that the daemon opens or serves: each has threads, descriptors and buffers, and its
    /// DMA touches the guest's pages.
    pub devices: usize,
    /// Descriptors besides those of `devices`.
    pub files: usize,
    /// Bytes of memory besides those of `devices`.
    pub memory: u64,
    /// The longest time that the worker can wait for hanging peers, one after the other, until each is cut off.
    pub wait: Duration,
    /// Further directives of the unit, each with a line feed.
    pub directives: String,
}

/// A request to open the device of an endpoint.
pub struct Plug<'a> {
    /// The configuration with the endpoint.
    pub config: &'a Config,
    /// The endpoint. Its device must be of the kind whose `plug` is called.
    pub endpoint: PciAddress,
    /// Receives the refused accesses of the device.
    pub faults: &'a Arc<FaultReporter>,
    /// Knows all exported devices.
    pub hot_resets: &'a HotResetRegistry,
    /// Lets the device and its connections outlive this process.
    pub keeping: PlugKeeping<'a>,
}

/// How a device that is plugged in outlives this process.
#[derive(Clone, Copy)]
pub struct PlugKeeping<'a> {
    /// Keeps descriptors.
    pub keeper: &'a Arc<Keeper>,
    /// Learns what is lost.
    pub life: &'a Arc<Life>,
    /// The process that adds the endpoint.
    pub origin: PlugOrigin,
    /// Is called before a peer gets guest memory whose use does not end with this process.
    pub forgo_restart: &'a dyn Fn(),
}

/// The process that has added an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlugOrigin {
    /// This one.
    Here,
    /// One before, whose devices and connections this process takes over. `has_state`: it has left the core's state, too.
    Before {
        /// See above.
        has_state: bool,
    },
}

/// An open device behind an endpoint.
#[derive(Default)]
pub struct OpenDevice {
    /// The backend, which applies the guest's mappings to the device; `None` once the core has it.
    pub backend: Option<Box<dyn DmaBackend>>,
    /// Reports the device's figures.
    pub status: Option<Arc<dyn DeviceStatus>>,
    /// Whether the device reports refused accesses to [`Plug::faults`].
    pub reports_faults: bool,
    /// An exported device that has no server yet. It does no DMA.
    pub bound: Option<BoundExport>,
    /// Serves an exported device to the VMM.
    pub server: Option<ServedExport>,
    /// The socket at which the VMM connects.
    pub file: Option<Arc<SocketFile>>,
    /// The host's name of the device.
    pub host: Option<String>,
    /// The host's IOMMU that translates for the device.
    pub host_iommu: Option<IommuInstance>,
    /// The open file of a device that the VMM brings.
    pub vmm_file: Option<VmmCdev>,
    /// The names under which the keeper may have descriptors of the device, or of what it shares with other devices.
    pub kept: Vec<String>,
    /// The group and the reserved regions, if the host adds any to those of the configuration.
    pub facts: Option<(Option<GroupName>, ReservedRegions)>,
}

impl OpenDevice {
    /// Takes out the group and the reserved regions of its endpoint: those of `topology` unless the host adds any.
    pub(super) fn take_facts(
        &mut self,
        topology: &Topology,
        endpoint: PciAddress,
    ) -> (Option<GroupName>, ReservedRegions) {
        self.facts.take().unwrap_or_else(|| {
            let info = topology.endpoint(endpoint.endpoint_id());
            let group = info.and_then(|info| topology.group_name(info.group?));
            let reserved = info.map(|info| info.reserved.clone());
            (group.cloned(), reserved.unwrap_or_default())
        })
    }

    /// Serves an exported device to the VMM's clients. Does nothing for another device.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub fn serve(&mut self) -> io::Result<()> {
        if let Some(bound) = self.bound.take() {
            let (server, status, file) = bound.serve()?;
            self.status = Some(status);
            self.server = Some(server);
            self.file = Some(file);
        }
        Ok(())
    }
}

/// Why a device cannot be plugged into a running VM, or unplugged.
#[derive(Debug, Error)]
pub enum PlugError {
    /// The registry of readers is made once, before the page tables are in use.
    #[error(
        "endpoints with `shadow` can be neither added to nor removed from a running VM; put the endpoint \
         into the file, or take it out, and start the VM anew"
    )]
    Shadow,
    /// The VMM would need a descriptor of the device that it shares with the daemon.
    #[error(
        "a device of the host can be added to a running VM only if the daemon exports it; \
         give `export = \"PATH\"` beside `vfio` and plug it in as a vfio-user device"
    )]
    Shared,
    /// The sandbox was made for the devices of the file alone.
    #[error(
        "devices can be added to and removed from a running VM only if the file has `hotplug`; give the key \
         the ranges for later endpoints, and start the VM anew"
    )]
    Unprepared,
    /// The sandbox was made for the folders of the file's sockets alone.
    #[error(
        "{0:?} is out of the daemon's reach: it connects only to sockets in folders where the file places a socket or \
         names that of a device; put the server's socket into one of them, or name one of its folder in the file and \
         start the VM anew"
    )]
    OutOfReach(PathBuf),
    /// A passthrough device cannot be used.
    #[error(transparent)]
    Passthrough(#[from] PassthroughError),
    /// A socket cannot be made, or a thread started.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// Checks that `config` allows hotplug: the sandbox grants the rights for it at the start only.
///
/// # Errors
/// The configuration has no `hotplug`.
pub(super) fn check_prepared(config: &Config) -> Result<(), PlugError> {
    if config.topology.expected().is_empty() {
        return Err(PlugError::Unprepared);
    }
    Ok(())
}
