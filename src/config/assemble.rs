//! Runs the checks of all keys on a draft, and makes the configuration of their results.

use super::checker::Checker;
use super::draft::Draft;
use super::error::{ConfigError, ProblemKind};
use super::translation::page_mask;
use super::{Config, Descriptors, DeviceLists, Machine, Socket, VmmTransport};
use crate::args::{DescriptorArgs, RunArgs};

impl Checker<'_> {
    /// The checked configuration. `args` are the options of a daemon that is to run.
    pub(super) fn config(
        mut self,
        draft: &Draft,
        descriptors: &DescriptorArgs,
        args: Option<&RunArgs>,
        machine_of_vmm: Option<Machine>,
    ) -> Result<Config, ConfigError> {
        let (socket, transport) = self.vmm_socket(draft, args);
        let control = self.socket_path(draft.control.as_ref(), "control");
        if let (Some(Socket::Path(path)), Some(given)) = (&socket, &draft.control)
            && control.as_ref() == Some(path)
        {
            self.refuse(&given.origin, "control", ProblemKind::SamePath);
        }
        let name = self.name(draft.name.as_ref(), socket.as_ref());
        let control_access = self.control_access(draft);
        let socket_access = self.socket_access(draft);

        let qmp = self.socket_path(draft.qmp.as_ref(), "qmp");
        let own = socket.as_ref().and_then(|socket| match socket {
            Socket::Path(path) => Some(path),
            Socket::Fd(_) => None,
        });
        if let (Some(path), Some(given)) = (&qmp, &draft.qmp)
            && [own, control.as_ref()].contains(&Some(path))
        {
            self.refuse(&given.origin, "qmp", ProblemKind::QmpPath);
        }

        let address_width = self.address_width(draft.address_width.as_ref());
        let granule = self.granule(draft.granule.as_ref());
        let bypass_at_boot = self.bypass(draft.bypass.as_ref());
        let max_domains = self.domains(draft.domains.as_ref());
        let max_batch = self.max_batch(draft.batch.as_ref());
        let fault_rate = self.fault_rate(draft.fault_rate.as_ref());
        let longest_poll = self.longest_poll(draft.poll_max_us.as_ref());
        let realtime_priority = self.realtime_priority(draft.realtime_priority.as_ref());
        let memory = self.memory(draft.memory.as_ref());
        let arena_limit = self.arena_limit(draft.arena_limit.as_ref(), memory.flatten());
        let machine = self.machine(draft.machine.as_ref(), machine_of_vmm);
        let mut draft = draft.clone();
        // The checks below need the addresses of endpoints behind ports.
        let Some(ports) = self.ports(&mut draft, machine.unwrap_or_default()) else {
            return Err(self.finish());
        };
        let draft = &draft;
        let topology = self.topology(draft, &ports, machine.unwrap_or_default());
        let host_iommu = self.host_iommu(draft.host_iommu.as_ref());
        let pin = self.pin(draft.pin.as_ref());
        let passthrough = self.passthrough(draft);
        let shadow = self.shadow(draft, socket.as_ref(), control.as_ref());
        let readers = self.readers(draft);
        let named = self.named(draft);
        let mut taken: Vec<_> = control.iter().collect();
        if let Some(Socket::Path(path)) = &socket {
            taken.push(path);
        }
        taken.extend(shadow.iter().flatten().map(|listener| &listener.path));
        let metrics = self.metrics(draft, &taken);
        taken.extend(metrics.iter().filter_map(|metrics| metrics.socket.as_ref()));
        let emulated = self.emulated(draft, &taken);
        taken.extend(emulated.iter().flatten().map(|device| &device.listen));
        taken.extend(emulated.iter().flatten().map(|device| &device.connect));
        let exported = self.exported(draft, &taken);
        let has_exports = exported
            .as_ref()
            .is_some_and(|exported| !exported.is_empty());
        let vfio_from = self.vfio_from(draft, transport, host_iommu, has_exports);
        let vfio_helper = self.vfio_helper(draft);
        // Only after the check of `passthrough`: each descriptor must belong to one of its endpoints.
        let descriptors = if let Some(host_iommu) = host_iommu
            && let Some(passthrough) = &passthrough
        {
            self.descriptors(descriptors, args, host_iommu, passthrough)
        } else {
            Descriptors::default()
        };

        if let Some(topology) = topology
            && let Some(address_width) = address_width
            && let Some(page_mask) = granule.and_then(page_mask)
            && let Some(bypass_at_boot) = bypass_at_boot
            && let Some(max_domains) = max_domains
            && let Some(name) = name
            && let Some(control_access) = control_access
            && let Some(socket_access) = socket_access
            && let Some(metrics) = metrics
            && let Some(max_batch) = max_batch
            && let Some(fault_rate) = fault_rate
            && let Some(longest_poll) = longest_poll
            && let Some(realtime_priority) = realtime_priority
            && let Some(memory) = memory
            && let Some(arena_limit) = arena_limit
            && let Some(passthrough) = passthrough
            && let Some(exported) = exported
            && let Some(emulated) = emulated
            && let Some(shadow) = shadow
            && let Some(readers) = readers
            && let Some(named) = named
            && let Some(host_iommu) = host_iommu
            && let Some(machine) = machine
            && let Some(pin) = pin
            && let Some(vfio_from) = vfio_from
            && let Some(vfio_helper) = vfio_helper
            && self.problems.is_empty()
        {
            Ok(Config {
                name,
                socket,
                transport,
                control,
                qmp,
                socket_access,
                control_access,
                metrics,
                address_width,
                page_mask,
                bypass_at_boot,
                max_domains,
                max_batch,
                fault_rate,
                longest_poll,
                realtime_priority,
                memory,
                arena_limit,
                topology,
                ports,
                devices: DeviceLists {
                    passthrough,
                    exported,
                    emulated,
                    shadow,
                },
                named,
                readers,
                host_iommu,
                machine,
                pin,
                vfio_from,
                vfio_helper,
                descriptors,
            })
        } else {
            Err(self.finish())
        }
    }

    /// Where the VMM connects, and the protocol that it speaks there.
    fn vmm_socket(
        &mut self,
        draft: &Draft,
        args: Option<&RunArgs>,
    ) -> (Option<Socket>, VmmTransport) {
        let (given, key, transport) = match &draft.vfio_user_socket {
            Some(given) => {
                if draft.socket.is_some() {
                    self.refuse(
                        &given.origin,
                        "vfio-user-socket",
                        ProblemKind::TwoTransports,
                    );
                }
                (Some(given), "vfio-user-socket", VmmTransport::VirtioPci)
            }
            None => (draft.socket.as_ref(), "socket", VmmTransport::VhostUser),
        };
        let path = self.socket_path(given, key);
        let socket = match args.and_then(|args| args.fd) {
            Some(fd) => Some(Socket::Fd(fd)),
            None => {
                if args.is_some() && given.is_none() {
                    self.refuse_missing(
                        "socket",
                        "--socket-path",
                        "give `socket = \"/run/vm0/iommu.sock\"` or `vfio-user-socket` in the file, --socket-path \
                         or --fd",
                    );
                }
                path.map(Socket::Path)
            }
        };
        (socket, transport)
    }
}
