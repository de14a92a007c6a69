//! A configuration as an operator reads it.

use std::fmt;

use super::{Config, Readers, Socket, SocketAccess, VmmTransport};
use crate::topology::{EndpointRange, Port};

/// The most endpoint ranges that the summary lists.
const MAX_LISTED: usize = 64;

/// Prints a [`Config`], one setting to a line.
#[derive(Clone, Copy, Debug)]
pub struct Summary<'a> {
    config: &'a Config,
}

impl<'a> Summary<'a> {
    pub(super) fn new(config: &'a Config) -> Self {
        Self { config }
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.config;
        let topology = &config.topology;
        writeln!(f, "name:             {}", config.name)?;
        let socket = match config.transport {
            VmmTransport::VhostUser => "socket:          ",
            VmmTransport::VirtioPci => "vfio-user socket:",
        };
        match &config.socket {
            Some(Socket::Path(path)) => {
                let access = AccessText(config.socket_access);
                writeln!(f, "{socket} {}{access}", path.display())?;
            }
            Some(Socket::Fd(fd)) => writeln!(f, "{socket} descriptor {fd}")?,
            None => writeln!(
                f,
                "socket:           none; give --socket-path or --fd to run"
            )?,
        }
        match &config.control {
            Some(path) => {
                let access = AccessText(config.control_access);
                writeln!(f, "control socket:   {}{access}", path.display())?;
            }
            None => writeln!(f, "control socket:   none")?,
        }
        if let Some(path) = &config.qmp {
            writeln!(f, "QMP socket:       {}", path.display())?;
        }
        if let Some(path) = &config.metrics.socket {
            let access = AccessText(config.metrics.access);
            writeln!(f, "metrics socket:   {}{access}", path.display())?;
        }
        if let Some(file) = &config.metrics.textfile {
            let (path, interval) = (file.path.display(), file.interval);
            writeln!(f, "metrics textfile: {path}, every {interval:?}")?;
        }
        writeln!(f, "machine:          {}", config.machine.name())?;
        writeln!(f, "IOMMU address:    {}", topology.iommu())?;
        writeln!(f, "address width:    {} bits", config.address_width)?;
        write!(f, "page sizes:      ")?;
        for bit in (0..64).filter(|bit| config.page_mask.bits() >> bit & 1 == 1) {
            write!(f, " {}", Bytes(1 << bit))?;
        }
        writeln!(f)?;
        if !config.devices.passthrough.is_empty() {
            let (host, pin) = (config.host_iommu.name(), config.pin.name());
            writeln!(f, "host IOMMU:       {host}, pins {pin}")?;
            if config.takes_vmm_files() {
                let helper = config.vfio_helper.display();
                writeln!(
                    f,
                    "devices:          from the VMM, through the helper at {helper}"
                )?;
            }
        }
        if !config.devices.shadow.is_empty() {
            let Readers {
                users,
                patience,
                limit,
            } = &config.readers;
            write!(
                f,
                "readers:          up to {limit} of an endpoint, patience {patience:?}, users: own"
            )?;
            for user in users {
                write!(f, ", {user}")?;
            }
            writeln!(f)?;
        }
        let bypass = if config.bypass_at_boot { "on" } else { "off" };
        writeln!(f, "bypass at boot:   {bypass}")?;
        writeln!(f, "domains:          up to {}", config.max_domains)?;
        writeln!(
            f,
            "worker:           up to {} requests at a time, polls up to {:?}",
            config.max_batch, config.longest_poll
        )?;
        writeln!(
            f,
            "faults:           up to {} a second of an endpoint",
            config.fault_rate
        )?;
        match config.memory {
            Some(bytes) => writeln!(f, "guest memory:     {}", Bytes(bytes))?,
            None => writeln!(f, "guest memory:     not given")?,
        }
        writeln!(f, "page-table arena: up to {}", Bytes(config.arena_limit))?;
        writeln!(
            f,
            "kept state:       outlives the daemon if systemd (254 or later) or `launch` starts it"
        )?;

        write!(f, "reserved regions:")?;
        if topology.common_reserved().is_empty() {
            write!(f, " none")?;
        }
        for region in topology.common_reserved() {
            write!(f, " {region}")?;
        }
        writeln!(f)?;

        if !config.ports.is_empty() {
            writeln!(f, "ports:            {}", config.ports.iter().len())?;
        }
        for port in config.ports.iter().take(MAX_LISTED) {
            port_line(f, port)?;
        }
        write!(f, "endpoints:        {}", topology.endpoint_count())?;
        if topology.group_count() > 0 {
            write!(f, ", host groups: {}", topology.group_count())?;
        }
        writeln!(f)?;
        for entry in topology.ranges().take(MAX_LISTED) {
            self.endpoints(f, entry)?;
        }
        for range in topology.expected() {
            writeln!(f, "  {range} may come later")?;
        }
        let more = topology.ranges().len().saturating_sub(MAX_LISTED);
        if more > 0 {
            writeln!(f, "  and {more} more ranges")?;
        }
        Ok(())
    }
}

impl Summary<'_> {
    fn endpoints(&self, f: &mut fmt::Formatter<'_>, entry: EndpointRange<'_>) -> fmt::Result {
        let topology = &self.config.topology;
        write!(f, "  {}", entry.range)?;
        if let Some(port) = self.config.ports.before(entry.range.first()) {
            write!(f, " behind port {}", port.path)?;
        }
        if let Some(name) = entry.info.group.and_then(|id| topology.group_name(id)) {
            write!(f, " group {name}")?;
        }
        let devices = self.config.devices.iter();
        for device in devices.filter(|device| device.endpoint() == entry.range.first()) {
            device.summarize(f)?;
        }
        if entry.info.reserved != topology.common_reserved() {
            write!(f, " reserved")?;
            for region in entry.info.reserved {
                write!(f, " {region}")?;
            }
        }
        writeln!(f)
    }
}

/// A port: its place, its kind, and the numbers that its buses get.
fn port_line(f: &mut fmt::Formatter<'_>, port: &Port) -> fmt::Result {
    write!(f, "  {} {}, bus {:02x}", port.path, port.kind, port.bus)?;
    if port.last_bus != port.bus {
        write!(f, " to {:02x}", port.last_bus)?;
    }
    if port.hotplug {
        write!(f, ", devices may come later")?;
    }
    writeln!(f)
}

/// The access rights of a socket where the file gives them, each after a comma.
struct AccessText(SocketAccess);

impl fmt::Display for AccessText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(mode) = self.0.mode {
            write!(f, ", mode {mode:04o}")?;
        }
        match self.0.group {
            Some(group) => write!(f, ", group {group}"),
            None => Ok(()),
        }
    }
}

/// A number of bytes in the largest unit that needs no fraction.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in units {
            if self.0 >> shift << shift == self.0 && self.0 != 0 {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}
