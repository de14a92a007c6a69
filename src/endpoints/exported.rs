//! Exported devices: passthrough devices that the daemon offers to the VMM over vfio-user, with their
//! sockets and servers.

use std::io;
use std::sync::Arc;

use log::warn;

use super::bound::BoundExport;
use super::kind::{
    EndpointKind, OpenDevice, Plug, PlugError, PlugKeeping, PlugOrigin, Resources, check_prepared,
};
use super::passthrough::{
    DeviceKeeping, OpenedExport, PassthroughDevices, PlugAttempt, client_name,
};
use super::sockets::rights;
use super::status::StatusNames;
use crate::config::{Config, Descriptors, HostIommu, RegisterAccess};
use crate::export::{ClientKeeping, ExportedDevice, HotResetRegistry};
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::process::sandbox::Needs;
use crate::process::socket::bind_for;
use crate::topology::{HostAddress, PciAddress};
use crate::vfio::{
    DeviceAccess, HostFunction, ioctls_of_bus_resets, ioctls_of_exports, ioctls_of_opening,
};

/// Asks the exported device of `endpoint` for its registers, and makes the socket of its server. Opens nothing if the
/// configuration does not export it. [`OpenDevice::serve`] then serves the VMM's clients. Their connections outlive this
/// process with `kept`.
///
/// # Errors
/// The socket cannot be made, or the device does not describe its registers.
pub fn bind_export(
    config: &Config,
    endpoint: PciAddress,
    device: Box<dyn DeviceAccess>,
    hot_resets: &HotResetRegistry,
    kept: Option<KeptExport>,
) -> io::Result<OpenDevice> {
    let devices = &config.devices;
    let Some(export) = devices.exported_at(endpoint) else {
        return Ok(OpenDevice::default());
    };
    let offered = ExportedDevice::new(format!("endpoint {endpoint}"), device).map_err(|cause| {
        let text = format!("endpoint {endpoint} cannot be exported: {cause}");
        io::Error::new(cause.kind(), text)
    })?;
    let offered = offered
        .answering_all_accesses(config.answers_all_accesses())
        .lending(export.registers == RegisterAccess::Mapped);
    if export.registers == RegisterAccess::Mapped && config.host_iommu == HostIommu::Iommufd {
        warn!(
            "endpoint {endpoint}: with `registers = \"mapped\"` and iommufd the VMM can attach the device to every address \
             space of this daemon, and the daemon does not see whether a former VMM still has the device"
        );
    }
    let host = devices.passthrough_at(endpoint).map(|p| p.host);
    let offered = match host.and_then(function_of) {
        Some(host) => offered.with_hot_reset(hot_resets, host)?,
        None => offered,
    };
    let (offered, keeping, is_abandoned) = match kept {
        Some(kept) => {
            let is_left = kept.is_left;
            let (offered, keeping) = kept.keep(endpoint, offered)?;
            let is_abandoned = is_left && !keeping.has_left_device();
            (offered, Some(keeping), is_abandoned)
        }
        None => (offered, None, false),
    };
    let (listener, file) = bind_for(&export.path, rights(config.socket_access))?;
    Ok(OpenDevice {
        bound: Some(BoundExport {
            endpoint,
            path: export.path.clone(),
            listener,
            file: Arc::new(file),
            device: offered,
            keeping,
            is_abandoned,
        }),
        host: host.map(|host| host.to_string()),
        ..OpenDevice::default()
    })
}

/// Has the keeper close all that it has of the clients of an endpoint's exported device: the endpoint is removed.
pub(super) fn drop_client(keeper: &Keeper, endpoint: PciAddress) {
    let names = format!("{}-", client_name(endpoint));
    let of_client = keeper.names().into_iter();
    for name in of_client.filter(|name| name.starts_with(&names)) {
        keeper.drop_file(&name);
    }
}

/// What lets the connections of an exported device's clients outlive this process.
pub struct KeptExport {
    /// Keeps the connections, and the device.
    pub keeper: Arc<Keeper>,
    /// Where losses are noted.
    pub life: Arc<Life>,
    /// The device is as the process before has left it.
    pub is_left: bool,
    /// The name of the device's descriptor at the keeper.
    pub kept_as: String,
}

impl KeptExport {
    /// Has the device go on with the client that the process before has left, if both are there.
    fn keep(
        self,
        endpoint: PciAddress,
        device: ExportedDevice,
    ) -> io::Result<(ExportedDevice, ClientKeeping)> {
        let name = client_name(endpoint);
        let mut keeping = ClientKeeping::find(self.keeper.clone(), &name, self.life)?;
        let device = device.kept_with(self.keeper, &self.kept_as);
        if self.is_left {
            device.reserve();
        } else if keeping.has_left_device() {
            keeping.refuse_left("its exported device was not kept, and is opened anew");
        }
        Ok((device, keeping))
    }
}

/// The place of a device on the host, as VFIO names it; `None` in a domain of more than 16 bits, which VFIO cannot
/// name.
fn function_of(host: HostAddress) -> Option<HostFunction> {
    Some(HostFunction {
        domain: u16::try_from(host.domain()).ok()?,
        bus: host.bus(),
        devfn: host.device() << 3 | host.function(),
    })
}

/// Passthrough devices that the daemon offers to the VMM over vfio-user.
pub struct ExportedKind;

impl EndpointKind for ExportedKind {
    fn add_needs(&self, config: &Config, needs: &mut Needs) {
        if needs.plugging.is_some() || !config.devices.exported.is_empty() {
            needs.device_ioctls = ioctls_of_exports();
            needs.reset_ioctls = ioctls_of_bus_resets();
        }
        if let Some(plugging) = &mut needs.plugging {
            plugging.ioctls.extend(ioctls_of_opening());
            plugging
                .nodes
                .extend(["/dev/vfio", "/dev/iommu"].map(Into::into));
            plugging.sysfs_folders.push("/sys".into());
        }
    }

    /// No resources: the passthrough kind counts the device already.
    fn resources(&self, _: &Config) -> Resources {
        Resources::default()
    }

    fn plug(&self, plug: &Plug<'_>) -> Result<OpenDevice, PlugError> {
        check_prepared(plug.config)?;
        let endpoint = plug.endpoint;
        let devices = &plug.config.devices;
        let Some(&device) = devices.passthrough_at(endpoint) else {
            return Ok(OpenDevice::default());
        };
        let mut alone = plug.config.clone();
        alone.devices.passthrough = vec![device];
        alone.descriptors = Descriptors::default();
        let PlugKeeping {
            keeper,
            life,
            origin,
            ..
        } = plug.keeping;
        let keeping = DeviceKeeping::of_plugged(keeper, endpoint, origin == PlugOrigin::Here);
        let attempt = PlugAttempt::begin(&keeping, device.host);
        let opened = PassthroughDevices::open(&alone, &keeping)?;
        let info = opened.topology.endpoint(endpoint.endpoint_id());
        let facts = info.map(|info| {
            let group = info.group.and_then(|id| opened.topology.group_name(id));
            (group.cloned(), info.reserved.clone())
        });
        let backend = opened.backends.into_iter().next();
        let Some(OpenedExport {
            access,
            is_left,
            kept_as,
            ..
        }) = opened.exported.into_iter().next()
        else {
            return Ok(OpenDevice::default());
        };
        if !is_left {
            // VFIO opens a device without bus mastering. Make sure of it: the backend is filled before the core knows the
            // endpoint.
            access.stop_dma()?;
        }
        let kept = keeper.is_present().then(|| KeptExport {
            keeper: keeper.clone(),
            life: life.clone(),
            is_left,
            kept_as,
        });
        let bound = bind_export(&alone, endpoint, access, plug.hot_resets, kept)?;
        attempt.succeed();
        Ok(OpenDevice {
            backend: backend.map(|(backend, _)| backend),
            facts,
            host_iommu: opened.iommus.get(&endpoint).cloned(),
            kept: opened.kept.get(&endpoint).cloned().unwrap_or_default(),
            ..bound
        })
    }

    fn check_unplug(&self, config: &Config) -> Result<(), PlugError> {
        check_prepared(config)
    }

    fn status_names(&self) -> Option<StatusNames> {
        Some(StatusNames {
            list: "exports",
            flag: "exported",
        })
    }
}
