//! Shadow readers: endpoints whose devices read the page tables themselves. Makes their backend and their
//! sockets, and reports their faults to the guest.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use log::info;
use thiserror::Error;

use super::kind::{EndpointKind, OpenDevice, Plug, PlugError, Resources};
use super::sockets::rights;
use super::status::StatusNames;
use crate::backends::shadow::Shadow;
use crate::config::Config;
use crate::device::Device;
use crate::faults::Fault;
use crate::ids::EndpointId;
use crate::iommu::Iommu;
use crate::locks::Mutex;
use crate::process::keeper::Keeper;
use crate::process::sandbox::Needs;
use crate::shadow::{Limits, Registry, RegistryError, ShadowEndpoint, ShadowServer, ShadowSocket};

/// Descriptors for each reader, such as its socket, its process and its epoch memory, and the keeper's copies.
const FILES_PER_READER: usize = 7;

/// Why shadow readers cannot be served.
#[derive(Debug, Error)]
pub enum ShadowError {
    /// The page tables cannot be shared with readers.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The backend cannot do what the configuration asks for.
    #[error("{0}")]
    Backend(String),
}

/// Adds a backend for the shadow endpoints of `config` to the core; `None` if there are none.
///
/// # Errors
/// See [`ShadowError`].
pub fn add_backend(
    config: &Config,
    iommu: &mut Iommu,
    keeper: &Arc<Keeper>,
) -> Result<Option<Arc<Registry>>, ShadowError> {
    if config.devices.shadow.is_empty() {
        return Ok(None);
    }
    let ids: Vec<_> = config
        .devices
        .shadow
        .iter()
        .map(|entry| entry.endpoint.endpoint_id())
        .collect();
    let endpoints = ids.iter().map(|&id| {
        let info = iommu.topology().endpoint(id);
        let reserved = info.map(|info| info.reserved.iter().map(|r| r.range).collect());
        ShadowEndpoint {
            id,
            reserved: reserved.unwrap_or_default(),
        }
    });
    let endpoints: Vec<_> = endpoints.collect();
    let limits = Limits {
        patience: config.readers.patience,
        readers: config.readers.limit,
        users: config.readers.users.clone(),
        fault_rate: config.fault_rate,
        ..Limits::default()
    };
    let registry = Registry::new(iommu.arena_mut(), endpoints, limits)?;
    let registry = Arc::new(registry.kept_by(keeper.clone()));
    let backend = Shadow::new(registry.clone(), &ids);
    iommu
        .add_backend(Box::new(backend), &ids)
        .map_err(ShadowError::Backend)?;
    Ok(Some(registry))
}

/// Listens for readers, and reports their refused accesses to the guest. If the core still has to take the state of the
/// daemon before over, readers wait until [`ShadowServer::admit`].
///
/// # Errors
/// A socket cannot be made.
pub fn serve(
    config: &Config,
    registry: Arc<Registry>,
    iommu: Arc<Mutex<Iommu>>,
    device: Arc<Device>,
) -> io::Result<ShadowServer> {
    let mut sockets: BTreeMap<_, Vec<EndpointId>> = BTreeMap::new();
    for entry in &config.devices.shadow {
        let served = sockets.entry(entry.path.as_path()).or_default();
        served.push(entry.endpoint.endpoint_id());
    }
    for (path, endpoints) in &sockets {
        info!("{} shadow endpoints at {}", endpoints.len(), path.display());
    }
    let sockets: Vec<_> = sockets
        .into_iter()
        .map(|(path, endpoints)| ShadowSocket {
            path,
            rights: rights(config.socket_access),
            endpoints,
        })
        .collect();
    let is_held = iommu.lock().is_adopting();
    let server = ShadowServer::start_held(registry, &sockets, move |fault| {
        let fault = with_reason(&iommu.lock(), fault);
        device.report_fault(&fault);
    })?;
    if !is_held {
        server.admit()?;
    }
    Ok(server)
}

/// The fault with its reason. A reader sends no reason, so this looks the address up in the core again. If the
/// core allows the access by now, the mapping was missing at the time of the access, and the reason stays
/// [`FaultReason::Mapping`](crate::faults::FaultReason::Mapping).
fn with_reason(iommu: &Iommu, fault: Fault) -> Fault {
    let again = iommu.translate(fault.endpoint, fault.address, fault.access);
    again.err().unwrap_or(fault)
}

/// Devices in processes that read the page tables themselves.
pub struct ShadowReaderKind;

impl EndpointKind for ShadowReaderKind {
    fn add_needs(&self, config: &Config, needs: &mut Needs) {
        needs.shadow = !config.devices.shadow.is_empty();
    }

    fn resources(&self, config: &Config) -> Resources {
        let endpoints = &config.devices.shadow;
        Resources {
            files: FILES_PER_READER * endpoints.len() * config.readers.limit,
            wait: endpoints.iter().map(|_| config.readers.patience).sum(),
            ..Resources::default()
        }
    }

    /// Always refuses: the registry of readers is made once, before the page tables are in use.
    fn plug(&self, _: &Plug<'_>) -> Result<OpenDevice, PlugError> {
        Err(PlugError::Shadow)
    }

    fn check_unplug(&self, _: &Config) -> Result<(), PlugError> {
        Err(PlugError::Shadow)
    }

    /// No names: readers come and go at one socket for several endpoints, so their registry reports them together.
    fn status_names(&self) -> Option<StatusNames> {
        None
    }
}
