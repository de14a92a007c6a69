//! Emulated devices: the sockets and the backends of devices that other processes emulate.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown};

use super::kind::{
    EndpointKind, OpenDevice, Plug, PlugError, PlugKeeping, PlugOrigin, Resources, check_prepared,
};
use super::sockets::rights;
use super::status::{DeviceFigure, DeviceMetric, DeviceStatus, StatusNames};
use crate::backends::vfio_user::{self, Deadlines, EmulatedDevice, Isolation, KeptDevice, Watch};
use crate::config::{Config, Emulated, ServerIsolation};
use crate::faults::report::FaultReporter;
use crate::ids::EndpointId;
use crate::process::connector;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::process::sandbox::Needs;
use crate::process::socket::bind_for;
use crate::topology::Topology;

/// Why the state ends with this process although there is a keeper.
pub(super) const MEMORY_SERVER: &str = "the next daemon will not go on where this one ends: the server of an emulated device has guest \
    memory (isolation = \"mappings\"), its connection is not kept, and it goes on using the memory until it notices the end of \
    its connection; with isolation = \"messages\" it has none";

/// Whether the server of a device is connected.
const SERVER_UP: DeviceMetric = DeviceMetric {
    name: "emulated_up",
    metric_type: "gauge",
    help: "Whether the server of an emulated device is connected.",
};
/// The refused accesses of a device.
const REFUSED: DeviceMetric = DeviceMetric {
    name: "emulated_refused_total",
    metric_type: "counter",
    help: "Refused accesses of an emulated device.",
};

/// The windows that the server of a device has refused.
const WINDOWS_REFUSED: DeviceMetric = DeviceMetric {
    name: "emulated_windows_refused_total",
    metric_type: "counter",
    help: "Windows that the server of an emulated device has refused, or had no room for.",
};
/// The windows that the server of a device should have and does not have.
const WINDOWS_MISSING: DeviceMetric = DeviceMetric {
    name: "emulated_windows_missing",
    metric_type: "gauge",
    help: "Windows of an emulated device that its server does not have.",
};
/// Whether a server that was cut off may still use guest memory.
const KEEPS_MEMORY: DeviceMetric = DeviceMetric {
    name: "emulated_keeps_memory",
    metric_type: "gauge",
    help: "Whether a former server of an emulated device has guest memory and has not hung up.",
};
/// The memory slots that were removed meanwhile.
const KEPT_SLOTS: DeviceMetric = DeviceMetric {
    name: "emulated_kept_slots_total",
    metric_type: "counter",
    help: "Memory slots removed while a former server of an emulated device might still map them.",
};
/// The times that the server of a device was cut off.
const CUT_OFFS: DeviceMetric = DeviceMetric {
    name: "emulated_cut_offs_total",
    metric_type: "counter",
    help: "Times the server of an emulated device was cut off.",
};
/// The part of them for a late reply.
const DEADLINE_CUT_OFFS: DeviceMetric = DeviceMetric {
    name: "emulated_deadline_cut_offs_total",
    metric_type: "counter",
    help: "Times the server of an emulated device was cut off for a reply later than deadline-ms.",
};
/// The part of them for a request with too many slow replies.
const TOTAL_CUT_OFFS: DeviceMetric = DeviceMetric {
    name: "emulated_total_deadline_cut_offs_total",
    metric_type: "counter",
    help: "Times the server of an emulated device was cut off for replies to a request later than total-deadline-ms.",
};
/// The part of them for a late reply after the server has connected.
const CONNECT_CUT_OFFS: DeviceMetric = DeviceMetric {
    name: "emulated_connect_deadline_cut_offs_total",
    metric_type: "counter",
    help: "Times the server of an emulated device was cut off for a reply later than connect-deadline-ms.",
};
/// The part of them for slow replies.
const SLOW_CUT_OFFS: DeviceMetric = DeviceMetric {
    name: "emulated_slow_cut_offs_total",
    metric_type: "counter",
    help: "Times the server of an emulated device was cut off for slow replies.",
};

/// Listens for the VMM's client of an emulated device, at a socket with the configured rights.
///
/// `kept`: the connections outlive this process.
///
/// # Errors
/// The socket cannot be made, or the system has no descriptor or thread left.
pub fn open(
    device: &Emulated,
    config: &Config,
    topology: &Topology,
    faults: &Arc<FaultReporter>,
    kept: Option<KeptDevice>,
) -> io::Result<OpenDevice> {
    let (listener, file) = bind_for(&device.listen, rights(config.socket_access))?;
    let endpoint = device.endpoint.endpoint_id();
    let info = topology.endpoint(endpoint);
    let regions = info.iter().flat_map(|info| info.reserved.iter());
    let emulated = EmulatedDevice {
        endpoint,
        name: name_of(device),
        server: device.connect.clone(),
        isolation: match device.isolation {
            ServerIsolation::Messages => Isolation::Messages,
            ServerIsolation::ExactMessages => Isolation::ExactMessages,
            ServerIsolation::Mappings => Isolation::Mappings,
        },
        max_windows: device.max_windows,
        reserved: regions.map(|region| region.range).collect(),
        deadlines: Deadlines {
            answer: device.deadlines.answer,
            total: device.deadlines.total,
            connect: device.deadlines.connect,
        },
        answers_all_accesses: config.answers_all_accesses(),
    };
    let (backend, watch) = vfio_user::start_kept(emulated, listener, faults.clone(), kept)?;
    info!(
        "endpoint {} is emulated by the server at {}, isolation {}",
        device.endpoint,
        device.connect.display(),
        device.isolation.name()
    );
    Ok(OpenDevice {
        status: Some(Arc::new(watch)),
        reports_faults: true,
        backend: Some(backend),
        file: Some(Arc::new(file)),
        ..OpenDevice::default()
    })
}

/// The device's name in the log.
fn name_of(device: &Emulated) -> String {
    format!("endpoint {}", device.endpoint)
}

/// Has the connections of a device kept, and takes over those that the daemon before has left. `is_successor`: the core takes
/// its state over. Without a keeper, or if it does not take them, they end with this daemon.
pub fn keep(
    device: &Emulated,
    keeper: &Arc<Keeper>,
    life: &Arc<Life>,
    is_successor: bool,
) -> Option<KeptDevice> {
    let endpoint = device.endpoint.endpoint_id();
    match KeptDevice::open(keeper, life, endpoint, &name_of(device), is_successor) {
        Ok(kept) => Some(kept),
        Err(cause) => {
            warn!(
                "the connections of endpoint {} end with this daemon: {cause}",
                device.endpoint
            );
            None
        }
    }
}

/// Ends the servers of devices that the daemon before has left and that are not configured any more. They may have guest
/// memory, so this waits for them to hang up, for a second in all.
pub fn end_strays(keeper: &Keeper, life: &Life) {
    let is_server = |name: &String| name.starts_with("vfio-user.") && name.ends_with(".server");
    let strays = keeper.unclaimed().into_iter().filter(is_server);
    let deadline = Instant::now() + Duration::from_secs(1);
    for name in strays {
        end_server(keeper, life, &name, deadline);
    }
}

/// Ends the connections of a device that cannot be opened.
fn end_connections(keeper: &Keeper, life: &Life, endpoint: EndpointId) {
    let names = format!("vfio-user.{}.", endpoint.0);
    let deadline = Instant::now() + Duration::from_secs(1);
    let of_device = keeper.names().into_iter();
    for name in of_device.filter(|name| name.starts_with(&names)) {
        if name.ends_with(".server") {
            end_server(keeper, life, &name, deadline);
            continue;
        }
        if let Some(file) = keeper.claim(&name) {
            // Fails if the peer has gone, and for the memory of the connections.
            let _ = rustix::net::shutdown(&*file, Shutdown::Both);
        }
        keeper.drop_file(&name);
    }
}

/// Ends a server that the daemon before has left. Waits until it hangs up.
fn end_server(keeper: &Keeper, life: &Life, name: &str, deadline: Instant) {
    let Some(socket) = keeper.claim(name) else {
        return;
    };
    // Fails if it has hung up.
    let _ = rustix::net::shutdown(&*socket, Shutdown::Write);
    if !hangs_up(socket.as_fd(), deadline) {
        let text = format!(
            "{name}: the device is not configured any more, and its server has not hung up; if it has guest memory, it may \
             still use that: end that server"
        );
        error!("{text}");
        life.lose(text);
    }
    keeper.drop_file(name);
}

/// Whether the peer of a socket closes it in time. Whatever it sends is discarded.
fn hangs_up(socket: BorrowedFd<'_>, deadline: Instant) -> bool {
    let mut discarded = vec![0; 64 << 10];
    loop {
        match rustix::net::recv(socket, &mut discarded[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => return true,
        }
        if Instant::now() >= deadline {
            return false;
        }
    }
}

impl DeviceStatus for Watch {
    fn figures(&self) -> Vec<DeviceFigure> {
        let state = self.state();
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        vec![
            DeviceFigure::flag("client", state.ends.client),
            DeviceFigure::flag("server", state.ends.server).with_metric(&SERVER_UP),
            DeviceFigure::count("windows", state.windows as u64),
            DeviceFigure::count("windows_missing", state.limits.missing)
                .with_metric(&WINDOWS_MISSING),
            DeviceFigure::count("windows_limit", state.limits.most),
            DeviceFigure::count("windows_refused", state.limits.refused)
                .with_metric(&WINDOWS_REFUSED),
            DeviceFigure::count("refused", state.refused).with_metric(&REFUSED),
            DeviceFigure::flag("keeps_memory", state.ends.keeps_memory).with_metric(&KEEPS_MEMORY),
            DeviceFigure::count("kept_slots", state.kept_slots).with_metric(&KEPT_SLOTS),
            DeviceFigure::count("cut_offs", state.ends.cut_offs).with_metric(&CUT_OFFS),
            DeviceFigure::count("slow_cut_offs", state.ends.slow_cut_offs)
                .with_metric(&SLOW_CUT_OFFS),
            DeviceFigure::count("deadline_cut_offs", state.ends.answer_cut_offs)
                .with_metric(&DEADLINE_CUT_OFFS),
            DeviceFigure::count("total_deadline_cut_offs", state.ends.total_cut_offs)
                .with_metric(&TOTAL_CUT_OFFS),
            DeviceFigure::count("connect_deadline_cut_offs", state.ends.connect_cut_offs)
                .with_metric(&CONNECT_CUT_OFFS),
            DeviceFigure::count("deadline_ms", millis(state.deadlines.answer)),
            DeviceFigure::count("total_deadline_ms", millis(state.deadlines.total)),
            DeviceFigure::count("connect_deadline_ms", millis(state.deadlines.connect)),
        ]
    }
}

/// Devices that other processes emulate over vfio-user.
pub struct EmulatedKind;

impl EndpointKind for EmulatedKind {
    fn add_needs(&self, config: &Config, needs: &mut Needs) {
        needs.emulated = needs.plugging.is_some() || !config.devices.emulated.is_empty();
    }

    fn resources(&self, config: &Config) -> Resources {
        let devices = &config.devices.emulated;
        Resources {
            devices: devices.len(),
            wait: devices.iter().map(|e| e.deadlines.total).sum(),
            ..Resources::default()
        }
    }

    fn plug(&self, plug: &Plug<'_>) -> Result<OpenDevice, PlugError> {
        check_prepared(plug.config)?;
        let Some(device) = plug.config.devices.emulated_at(plug.endpoint) else {
            return Ok(OpenDevice::default());
        };
        if !connector::may_connect(&device.connect) {
            return Err(PlugError::OutOfReach(device.connect.clone()));
        }
        let PlugKeeping {
            keeper,
            life,
            origin,
            forgo_restart,
        } = plug.keeping;
        let has_state = origin == PlugOrigin::Before { has_state: true };
        let kept = keeper
            .is_present()
            .then(|| keep(device, keeper, life, has_state))
            .flatten();
        if kept.is_none() && keeper.is_present() {
            keeper.unkept().count_always();
            if device.shares_memory() {
                warn!("endpoint {}: {MEMORY_SERVER}", device.endpoint);
                forgo_restart();
            }
        }
        let topology = &plug.config.topology;
        let opened = open(device, plug.config, topology, plug.faults, kept);
        Ok(opened.inspect_err(|_| {
            end_connections(keeper, life, device.endpoint.endpoint_id());
        })?)
    }

    fn check_unplug(&self, config: &Config) -> Result<(), PlugError> {
        check_prepared(config)
    }

    fn status_names(&self) -> Option<StatusNames> {
        Some(StatusNames {
            list: "emulated",
            flag: "emulated",
        })
    }
}
