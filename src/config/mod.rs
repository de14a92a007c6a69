//! One VM's configuration: checked values, made once, from a file, from options, or from both.

mod addition;
mod draft;
mod emulated;
mod error;
mod export;
mod limits;
mod operator;
mod passthrough;
mod readers;
mod shadow;
mod summary;

use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::address::{Iova, IovaRange, PageMask};
use crate::args::{DescriptorArgs, RunArgs};
use crate::topology::{
    EndpointSpec, GroupName, PciAddress, PciRange, ReservedError, ReservedKind, ReservedRegion,
    ReservedRegions, Topology, TopologyError,
};
use draft::{Draft, EndpointDraft, Given, Origin, RegionDraft, Scalar};

pub use emulated::{Emulated, Isolation, MAX_DEADLINE_MS, MIN_DEADLINE_MS};
pub use error::{ConfigError, MAX_PROBLEMS, Place, Problem, ProblemKind};
pub use export::Export;
pub use limits::{MAX_BATCH, MAX_FAULT_RATE};
pub use operator::{
    MAX_INTERVAL_S, MAX_NAME, MIN_INTERVAL_S, MetricsOutput, SocketAccess, Textfile,
};
pub use passthrough::{Descriptors, HostIommu, Passthrough, Pin};
pub use readers::{MAX_READERS, MAX_USERS, Readers};
pub use shadow::ShadowListener;
pub use summary::Summary;

/// The longest configuration file read, in bytes.
pub const MAX_FILE: u64 = 1 << 20;
/// The longest path of a socket: `sun_path` less its final zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// The fewest bits of an I/O virtual address.
pub const MIN_WIDTH: u8 = 32;
/// The most bits of an I/O virtual address: what five table levels reach.
pub const MAX_WIDTH: u8 = 57;
/// The longest time the worker may look at an empty request ring, in microseconds.
pub const MAX_POLL_US: u64 = 10_000;
/// The highest realtime priority of a thread (sched(7)).
pub const MAX_PRIORITY: u8 = 99;
const DEFAULT_POLL: Duration = Duration::from_micros(100);

/// The most domains.
pub const MAX_DOMAINS: u32 = 65536;
/// The smallest arena in bytes.
pub const MIN_ARENA: u64 = 1 << 20;
/// The largest arena in bytes.
pub const MAX_ARENA: u64 = 1 << 40;
/// The most guest RAM in bytes: x86 has 52 bits of physical address.
pub const MAX_MEMORY: u64 = 1 << 52;

/// The window in which x86 hosts take writes for interrupts.
const X86_MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
const DEFAULT_WIDTH: u8 = 48;
const SMALLEST_PAGE: u64 = 4096;
const GRANULES: [u64; 4] = [4 << 10, 16 << 10, 64 << 10, 2 << 20];
/// What a VM of unknown size gets, and every VM besides its share of memory.
const BASE_ARENA: u64 = 64 << 20;

/// Where the frontend (the VMM) reaches the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A listening socket the daemon makes at this path.
    Path(PathBuf),
    /// A listening socket the daemon inherits.
    Fd(RawFd),
}

/// Everything that is settled before the daemon starts. All values are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What the VM is called in messages: 1 to [`MAX_NAME`] printable ASCII characters.
    pub name: String,
    /// Where the frontend connects. Always there in a configuration made from [`RunArgs`].
    pub socket: Option<Socket>,
    /// The path of the control socket, if there is to be one.
    pub control: Option<PathBuf>,
    /// Where the VMM listens for QMP, if the daemon is to hear of resets there.
    pub qmp: Option<PathBuf>,
    /// Who may connect there.
    pub control_access: SocketAccess,
    /// Where metrics go.
    pub metrics: MetricsOutput,
    /// Bits of an I/O virtual address: `32..=57`.
    pub address_width: u8,
    /// The page sizes offered to the guest: the granule, and 2 MiB and 1 GiB where not smaller.
    pub page_mask: PageMask,
    /// Whether endpoints that no domain holds pass untranslated when the VM starts.
    pub bypass_at_boot: bool,
    /// The number of domains that can live at once; their IDs are `0..max_domains`.
    pub max_domains: u32,
    /// The most requests the worker takes off the ring at a time: `1..=`[`MAX_BATCH`].
    pub max_batch: usize,
    /// The most faults of one endpoint that the guest is told of in a second, once 64 have been:
    /// `1..=`[`MAX_FAULT_RATE`].
    pub fault_rate: u32,
    /// How long the worker looks at an empty request ring at most before it sleeps:
    /// zero to [`MAX_POLL_US`] microseconds.
    pub longest_poll: Duration,
    /// The realtime priority of the worker: `1..=`[`MAX_PRIORITY`]. Ordinary scheduling without.
    pub realtime_priority: Option<u8>,
    /// The size of guest RAM in bytes, if known.
    pub memory: Option<u64>,
    /// The most bytes the page tables may take: a multiple of 4 KiB.
    pub arena_limit: u64,
    /// The IOMMU's own address, the endpoints, their groups and reserved regions.
    pub topology: Topology,
    /// The endpoints that are devices of the host, in ascending order; no host device twice.
    pub passthrough: Vec<Passthrough>,
    /// Those of them that the VMM gets as vfio-user devices, in ascending order.
    pub exports: Vec<Export>,
    /// The endpoints that are emulated in processes of their own, in ascending order.
    pub emulated: Vec<Emulated>,
    /// The endpoints whose devices follow the page tables themselves, in ascending order.
    pub shadow: Vec<ShadowListener>,
    /// What is asked of the processes that register for those.
    pub readers: Readers,
    /// How the host IOMMU is programmed for devices of the host.
    pub host_iommu: HostIommu,
    /// Which of the guest's memory is pinned for them.
    pub pin: Pin,
    /// What was inherited for them; empty in a configuration made from a file alone.
    pub descriptors: Descriptors,
}

impl Config {
    /// The configuration in `file` alone, which need not name a socket.
    ///
    /// # Errors
    ///
    /// With every problem found, where the file cannot be read or used.
    pub fn from_file(file: &Path) -> Result<Self, ConfigError> {
        Self::from_text(file, &read(file)?)
    }

    /// The configuration in `file`, which need not name a socket, and inherited descriptors.
    ///
    /// # Errors
    ///
    /// With every problem found, where the file or the descriptors cannot be used.
    pub fn with_descriptors(
        file: &Path,
        descriptors: &DescriptorArgs,
    ) -> Result<Self, ConfigError> {
        let text = read(file)?;
        let mut checker = Checker::new(Some(Source {
            path: file,
            text: &text,
        }));
        let draft = checker.parse()?;
        checker.config(&draft, descriptors, None)
    }

    /// The configuration that `text`, the content of `file`, stands for.
    ///
    /// # Errors
    ///
    /// With every problem found, where the text cannot be used.
    pub fn from_text(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut checker = Checker::new(Some(Source { path: file, text }));
        let draft = checker.parse()?;
        checker.config(&draft, &DescriptorArgs::default(), None)
    }

    /// What this configuration says, for people.
    pub fn summary(&self) -> Summary<'_> {
        Summary::new(self)
    }
}

impl TryFrom<&RunArgs> for Config {
    type Error = ConfigError;

    /// The configuration of a daemon that is to run: the file, if one is named, overridden by the
    /// other options.
    fn try_from(args: &RunArgs) -> Result<Self, ConfigError> {
        let text = args.config.as_deref().map(read).transpose()?;
        let source = args.config.as_deref().zip(text.as_deref());
        let mut checker = Checker::new(source.map(|(path, text)| Source { path, text }));
        let draft = checker.parse()?;
        let draft = draft.overridden_by(args, |flag, kind| {
            checker.refuse(&Origin::Flag(flag), "", kind);
        });
        checker.config(&draft, &args.descriptors, Some(args))
    }
}

/// Reads a configuration file, but never more than [`MAX_FILE`].
fn read(path: &Path) -> Result<String, ConfigError> {
    let fail = |kind| {
        let place = Place::File {
            path: path.to_owned(),
            line: None,
            key: String::new(),
        };
        ConfigError {
            problems: vec![Problem { place, kind }],
            omitted: 0,
        }
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|source| fail(ProblemKind::Read(source)))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fail(ProblemKind::FileTooLong));
    }
    String::from_utf8(bytes).map_err(|_| fail(ProblemKind::NotUtf8))
}

#[derive(Clone, Copy)]
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

/// Checks a draft and collects what is wrong with it. A value that was refused is `None`, and what
/// depends on it is not checked.
struct Checker<'a> {
    source: Option<Source<'a>>,
    problems: Vec<Problem>,
    omitted: usize,
}

impl<'a> Checker<'a> {
    fn new(source: Option<Source<'a>>) -> Self {
        Self {
            source,
            problems: Vec::new(),
            omitted: 0,
        }
    }

    fn refuse(&mut self, origin: &Origin, key: &str, kind: ProblemKind) {
        if self.problems.len() >= MAX_PROBLEMS {
            // Finding lines takes a pass over the file each.
            self.omitted += 1;
            return;
        }
        let place = match (origin, self.source) {
            (Origin::Flag(name), _) => Place::Flag(name),
            (Origin::File(span), source) => Place::File {
                path: source.map_or_else(PathBuf::new, |source| source.path.to_owned()),
                line: source.map(|source| line_of(source.text, span.start)),
                key: key.to_owned(),
            },
        };
        self.push(place, kind);
    }

    /// Refuses something that is nowhere to be found.
    fn refuse_missing(&mut self, key: &str, flag: &'static str, cure: &'static str) {
        let place = match self.source {
            None => Place::Flag(flag),
            Some(source) => Place::File {
                path: source.path.to_owned(),
                line: None,
                key: key.to_owned(),
            },
        };
        self.push(place, ProblemKind::Missing(cure));
    }

    fn push(&mut self, place: Place, kind: ProblemKind) {
        self.problems.push(Problem { place, kind });
    }

    fn finish(self) -> ConfigError {
        ConfigError {
            problems: self.problems,
            omitted: self.omitted,
        }
    }

    /// The file as a draft; an empty one without a file.
    fn parse(&mut self) -> Result<Draft, ConfigError> {
        let Some(source) = self.source else {
            return Ok(Draft::default());
        };
        toml::from_str(source.text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            let kind = ProblemKind::Syntax(syntax_message(
                error.message(),
                line_text(source.text, span.start),
            ));
            let mut checker = Checker::new(self.source);
            checker.refuse(&Origin::File(span), "", kind);
            checker.finish()
        })
    }

    /// The checked configuration. `args` are there where the daemon is to run.
    fn config(
        mut self,
        draft: &Draft,
        descriptors: &DescriptorArgs,
        args: Option<&RunArgs>,
    ) -> Result<Config, ConfigError> {
        let socket = match args.and_then(|args| args.fd) {
            Some(fd) => Some(Socket::Fd(fd)),
            None => {
                if args.is_some() && draft.socket.is_none() {
                    self.refuse_missing(
                        "socket",
                        "--socket-path",
                        "give `socket = \"/run/vm0/iommu.sock\"` in the file, --socket-path or --fd",
                    );
                }
                self.socket_path(draft.socket.as_ref(), "socket")
                    .map(Socket::Path)
            }
        };
        let control = self.socket_path(draft.control.as_ref(), "control");
        if let (Some(Socket::Path(path)), Some(given)) = (&socket, &draft.control)
            && control.as_ref() == Some(path)
        {
            self.refuse(&given.origin, "control", ProblemKind::SamePath);
        }
        let name = self.name(draft.name.as_ref(), socket.as_ref());
        let control_access = self.control_access(draft);

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
        let topology = self.topology(draft);
        let host_iommu = self.host_iommu(draft.host_iommu.as_ref());
        let pin = self.pin(draft.pin.as_ref());
        let passthrough = self.passthrough(draft);
        let shadow = self.shadow(draft, socket.as_ref(), control.as_ref());
        let readers = self.readers(draft);
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
        let exports = self.exports(draft, &taken);
        // Which endpoints there are decides which descriptors are right.
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
            && let Some(metrics) = metrics
            && let Some(max_batch) = max_batch
            && let Some(fault_rate) = fault_rate
            && let Some(longest_poll) = longest_poll
            && let Some(realtime_priority) = realtime_priority
            && let Some(memory) = memory
            && let Some(arena_limit) = arena_limit
            && let Some(passthrough) = passthrough
            && let Some(exports) = exports
            && let Some(emulated) = emulated
            && let Some(shadow) = shadow
            && let Some(readers) = readers
            && let Some(host_iommu) = host_iommu
            && let Some(pin) = pin
            && self.problems.is_empty()
        {
            Ok(Config {
                name,
                socket,
                control,
                qmp,
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
                passthrough,
                exports,
                emulated,
                shadow,
                readers,
                host_iommu,
                pin,
                descriptors,
            })
        } else {
            Err(self.finish())
        }
    }

    fn socket_path(&mut self, given: Option<&Given<Scalar>>, key: &str) -> Option<PathBuf> {
        let given = given?;
        let text = self.text(
            given,
            key,
            "a path as a text, such as \"/run/vm0/iommu.sock\"",
        )?;
        let kind = if text.is_empty() {
            ProblemKind::PathEmpty
        } else if text.len() > MAX_SOCKET_PATH {
            ProblemKind::PathTooLong(text.len())
        } else if text.chars().any(char::is_control) {
            ProblemKind::PathControl
        } else {
            return Some(PathBuf::from(text));
        };
        self.refuse(&given.origin, key, kind);
        None
    }

    fn address_width(&mut self, given: Option<&Given<Scalar>>) -> Option<u8> {
        let Some(given) = given else {
            return Some(DEFAULT_WIDTH);
        };
        let bits = self.integer(given, "address-width", "a number of bits, such as 48")?;
        let width = u8::try_from(bits)
            .ok()
            .filter(|width| (MIN_WIDTH..=MAX_WIDTH).contains(width));
        if width.is_none() {
            self.refuse(&given.origin, "address-width", ProblemKind::Width(bits));
        }
        width
    }

    fn granule(&mut self, given: Option<&Given<Scalar>>) -> Option<u64> {
        let Some(given) = given else {
            return Some(GRANULES[0]);
        };
        let size = match &given.value {
            Scalar::Text(text) => parse_size(text),
            Scalar::Integer(bytes) => u64::try_from(*bytes).ok(),
            other => {
                let wanted = "a size as a text, such as \"4k\"";
                self.wrong_type(given, "granule", other.found(), wanted);
                return None;
            }
        };
        let granule = size.filter(|size| GRANULES.contains(size));
        if granule.is_none() {
            let kind = ProblemKind::Granule(shown(&given.value));
            self.refuse(&given.origin, "granule", kind);
        }
        granule
    }

    fn bypass(&mut self, given: Option<&Given<Scalar>>) -> Option<bool> {
        match given {
            None => Some(true),
            Some(Given {
                value: Scalar::Bool(value),
                ..
            }) => Some(*value),
            Some(given) => {
                self.wrong_type(given, "bypass", given.value.found(), "true or false");
                None
            }
        }
    }

    fn longest_poll(&mut self, given: Option<&Given<Scalar>>) -> Option<Duration> {
        let Some(given) = given else {
            return Some(DEFAULT_POLL);
        };
        let micros = self.integer(
            given,
            "poll-max-us",
            "a number of microseconds, such as 100",
        )?;
        let fits = u64::try_from(micros).ok().filter(|&us| us <= MAX_POLL_US);
        if fits.is_none() {
            self.refuse(&given.origin, "poll-max-us", ProblemKind::Poll(micros));
        }
        fits.map(Duration::from_micros)
    }

    fn realtime_priority(&mut self, given: Option<&Given<Scalar>>) -> Option<Option<u8>> {
        let Some(given) = given else {
            return Some(None);
        };
        let number = self.integer(given, "realtime-priority", "a priority, such as 1")?;
        let priority = u8::try_from(number)
            .ok()
            .filter(|priority| (1..=MAX_PRIORITY).contains(priority));
        if priority.is_none() {
            self.refuse(
                &given.origin,
                "realtime-priority",
                ProblemKind::Priority(number),
            );
        }
        priority.map(Some)
    }

    fn domains(&mut self, given: Option<&Given<Scalar>>) -> Option<u32> {
        let Some(given) = given else {
            return Some(MAX_DOMAINS);
        };
        let count = self.integer(given, "domains", "a number, such as 1024")?;
        let domains = u32::try_from(count)
            .ok()
            .filter(|domains| (1..=MAX_DOMAINS).contains(domains));
        if domains.is_none() {
            self.refuse(&given.origin, "domains", ProblemKind::Domains(count));
        }
        domains
    }

    /// `Some(None)` where no size is given.
    fn memory(&mut self, given: Option<&Given<Scalar>>) -> Option<Option<u64>> {
        let Some(given) = given else {
            return Some(None);
        };
        let bytes = self.size(given, "memory")?;
        let whole = bytes % (1 << 20) == 0;
        if bytes == 0 || bytes > MAX_MEMORY || !whole {
            self.refuse(&given.origin, "memory", ProblemKind::Memory(bytes));
            return None;
        }
        Some(Some(bytes))
    }

    fn arena_limit(&mut self, given: Option<&Given<Scalar>>, memory: Option<u64>) -> Option<u64> {
        let Some(given) = given else {
            let share = memory.unwrap_or(0) / 256;
            return Some(whole_pages(share.saturating_add(BASE_ARENA).min(MAX_ARENA)));
        };
        let bytes = self.size(given, "arena-limit")?;
        let kind = if bytes < MIN_ARENA {
            ProblemKind::ArenaTooSmall(bytes)
        } else if bytes > MAX_ARENA {
            ProblemKind::ArenaTooLarge(bytes)
        } else {
            return Some(whole_pages(bytes));
        };
        self.refuse(&given.origin, "arena-limit", kind);
        None
    }

    fn topology(&mut self, draft: &Draft) -> Option<Topology> {
        let iommu = self.iommu(draft.address.as_ref());
        let reserved = self.common_reserved(draft);
        let mut specs = Vec::with_capacity(draft.endpoint.len());
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            specs.extend(self.endpoint(index, endpoint));
        }
        // A refused endpoint is missing from the specs, and their numbers would not be the file's.
        if specs.len() != draft.endpoint.len() {
            return None;
        }
        let expected = self.expected(draft)?;
        match Topology::new(iommu?, reserved?, &specs) {
            Ok(topology) => match topology.expecting(expected) {
                Ok(topology) => Some(topology),
                Err(error) => {
                    let list = draft.hotplug.as_ref().map(|list| &list.value);
                    if let Some(given) = list.and_then(|list| list.get(error.index())) {
                        let key = format!("hotplug[{}]", error.index());
                        self.refuse(&given.origin, &key, ProblemKind::Topology(error));
                    }
                    None
                }
            },
            Err(error) => {
                self.refuse_topology(draft, error);
                None
            }
        }
    }

    /// Where endpoints may come later.
    fn expected(&mut self, draft: &Draft) -> Option<Vec<PciRange>> {
        let list = draft.hotplug.as_ref().map(|list| list.value.as_slice());
        let list = list.unwrap_or_default();
        let mut ranges = Vec::with_capacity(list.len());
        for (index, given) in list.iter().enumerate() {
            ranges.extend(self.pci_range(given, &format!("hotplug[{index}]")));
        }
        (ranges.len() == list.len()).then_some(ranges)
    }

    fn refuse_topology(&mut self, draft: &Draft, error: TopologyError) {
        let index = error.index();
        let Some(endpoint) = draft.endpoint.get(index) else {
            return;
        };
        let value = &endpoint.value;
        let (key, origin) = if let TopologyError::Reserved { .. } = error {
            ("reserved", value.reserved.as_ref().map(|list| &list.origin))
        } else if let Some(given) = &value.address {
            ("address", Some(&given.origin))
        } else {
            ("range", value.range.as_ref().map(|given| &given.origin))
        };
        let kind = if draft.reserved.is_none() && names_default(&error) {
            ProblemKind::BesideDefault(error)
        } else {
            ProblemKind::Topology(error)
        };
        let origin = origin.unwrap_or(&endpoint.origin);
        self.refuse(origin, &format!("endpoint[{index}].{key}"), kind);
    }

    fn iommu(&mut self, given: Option<&Given<Scalar>>) -> Option<PciAddress> {
        let Some(given) = given else {
            self.refuse_missing(
                "address",
                "--iommu",
                "give the PCI address the IOMMU itself has in the guest: \
                 `address = \"00:05.0\"` in the file, or --iommu 00:05.0",
            );
            return None;
        };
        self.pci_address(given, "address")
    }

    fn pci_address(&mut self, given: &Given<Scalar>, key: &str) -> Option<PciAddress> {
        let text = self.text(given, key, "a PCI address as a text, such as \"00:05.0\"")?;
        match text.parse() {
            Ok(address) => Some(address),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::Pci { value, source });
                None
            }
        }
    }

    fn pci_range(&mut self, given: &Given<Scalar>, key: &str) -> Option<PciRange> {
        let wanted = "PCI addresses as a text, such as \"00:10.0-00:1f.7\"";
        let text = self.text(given, key, wanted)?;
        match text.parse() {
            Ok(range) => Some(range),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::PciRange { value, source });
                None
            }
        }
    }

    fn endpoint(&mut self, index: usize, given: &Given<EndpointDraft>) -> Option<EndpointSpec> {
        let key = |name: &str| format!("endpoint[{index}].{name}");
        let value = &given.value;
        let range = match (&value.address, &value.range) {
            (Some(address), None) => self
                .pci_address(address, &key("address"))
                .map(PciRange::from),
            (None, Some(range)) => self.pci_range(range, &key("range")),
            (Some(_), Some(range)) => {
                self.refuse(&range.origin, &key("range"), ProblemKind::AddressAndRange);
                None
            }
            (None, None) => {
                let key = format!("endpoint[{index}]");
                self.refuse(&given.origin, &key, ProblemKind::NoAddress);
                None
            }
        };
        let group = match &value.group {
            None => Some(None),
            Some(group) => self.group(group, &key("group")).map(Some),
        };
        let reserved = match &value.reserved {
            None => Some(Vec::new()),
            Some(list) => self.regions(&list.value, &key("reserved")),
        };
        Some(EndpointSpec {
            range: range?,
            group: group?,
            reserved: reserved?,
        })
    }

    fn group(&mut self, given: &Given<Scalar>, key: &str) -> Option<GroupName> {
        let text = self.text(given, key, "a name as a text, such as \"nic0\"")?;
        match GroupName::new(text) {
            Ok(name) => Some(name),
            Err(source) => {
                let value = shown(&given.value);
                self.refuse(&given.origin, key, ProblemKind::Group { value, source });
                None
            }
        }
    }

    fn common_reserved(&mut self, draft: &Draft) -> Option<ReservedRegions> {
        let Some(list) = &draft.reserved else {
            return ReservedRegions::new(vec![default_region()?]).ok();
        };
        let regions = self.regions(&list.value, "reserved")?;
        match ReservedRegions::new(regions) {
            Ok(set) => Some(set),
            Err(error) => {
                self.refuse(&list.origin, "reserved", error.into());
                None
            }
        }
    }

    fn regions(&mut self, list: &[Given<RegionDraft>], key: &str) -> Option<Vec<ReservedRegion>> {
        let mut regions = Vec::with_capacity(list.len());
        for (index, region) in list.iter().enumerate() {
            regions.extend(self.region(region, &format!("{key}[{index}]")));
        }
        (regions.len() == list.len()).then_some(regions)
    }

    fn region(&mut self, given: &Given<RegionDraft>, key: &str) -> Option<ReservedRegion> {
        let value = &given.value;
        let first = self.bound(given, value.first.as_ref(), &format!("{key}.first"));
        let last = self.bound(given, value.last.as_ref(), &format!("{key}.last"));
        let kind = match &value.kind {
            None => Some(ReservedKind::Reserved),
            Some(kind) => self.region_kind(kind, &format!("{key}.kind")),
        };
        let (first, last) = (first?, last?);
        let Some(range) = IovaRange::new(Iova(first), Iova(last)) else {
            self.refuse(
                &given.origin,
                key,
                ProblemKind::RegionBackwards { first, last },
            );
            return None;
        };
        // Pages of 4 KiB whatever the granule: meeting a region is a matter of bytes, so a
        // region need not fill a larger granule (the MSI window does not fill 2 MiB). Bounds
        // inside such a page are a slip, most often the length or the end in place of `last`.
        let (whole_first, whole_last) = (whole_pages(first), last | (SMALLEST_PAGE - 1));
        if (first, last) != (whole_first, whole_last) {
            let kind = ProblemKind::RegionUnaligned {
                first,
                last,
                whole_first,
                whole_last,
            };
            self.refuse(&given.origin, key, kind);
            return None;
        }
        Some(ReservedRegion { range, kind: kind? })
    }

    fn bound(
        &mut self,
        region: &Given<RegionDraft>,
        given: Option<&Given<Scalar>>,
        key: &str,
    ) -> Option<u64> {
        let Some(given) = given else {
            let cure = "give `first` and `last`, the first and last address of the region";
            self.refuse(&region.origin, key, ProblemKind::Missing(cure));
            return None;
        };
        let address = match &given.value {
            Scalar::Integer(value) => u64::try_from(*value).ok(),
            Scalar::Text(text) => parse_number(text),
            other => {
                let wanted = "an address, such as 0xfee00000";
                self.wrong_type(given, key, other.found(), wanted);
                return None;
            }
        };
        if address.is_none() {
            self.refuse(&given.origin, key, ProblemKind::Iova(shown(&given.value)));
        }
        address
    }

    fn region_kind(&mut self, given: &Given<Scalar>, key: &str) -> Option<ReservedKind> {
        match self.text(given, key, "\"reserved\" or \"msi\"")? {
            "reserved" => Some(ReservedKind::Reserved),
            "msi" => Some(ReservedKind::Msi),
            _ => {
                self.refuse(
                    &given.origin,
                    key,
                    ProblemKind::RegionKind(shown(&given.value)),
                );
                None
            }
        }
    }

    fn text<'g>(
        &mut self,
        given: &'g Given<Scalar>,
        key: &str,
        wanted: &'static str,
    ) -> Option<&'g str> {
        if let Scalar::Text(text) = &given.value {
            return Some(text);
        }
        self.wrong_type(given, key, given.value.found(), wanted);
        None
    }

    fn integer(&mut self, given: &Given<Scalar>, key: &str, wanted: &'static str) -> Option<i128> {
        if let Scalar::Integer(value) = given.value {
            return Some(value);
        }
        self.wrong_type(given, key, given.value.found(), wanted);
        None
    }

    fn size(&mut self, given: &Given<Scalar>, key: &str) -> Option<u64> {
        let size = match &given.value {
            Scalar::Text(text) => parse_size(text),
            Scalar::Integer(bytes) => u64::try_from(*bytes).ok(),
            other => {
                let wanted = "a size: bytes as a number, or a text such as \"2G\"";
                self.wrong_type(given, key, other.found(), wanted);
                return None;
            }
        };
        if size.is_none() {
            self.refuse(&given.origin, key, ProblemKind::Size(shown(&given.value)));
        }
        size
    }

    fn wrong_type(
        &mut self,
        given: &Given<Scalar>,
        key: &str,
        found: &'static str,
        wanted: &'static str,
    ) {
        self.refuse(&given.origin, key, ProblemKind::WrongType { found, wanted });
    }
}

fn default_region() -> Option<ReservedRegion> {
    Some(ReservedRegion {
        range: IovaRange::new(Iova(X86_MSI.0), Iova(X86_MSI.1))?,
        kind: ReservedKind::Msi,
    })
}

/// Whether one of two reserved regions at odds is the default one.
fn names_default(error: &TopologyError) -> bool {
    let TopologyError::Reserved { source, .. } = error else {
        return false;
    };
    match *source {
        ReservedError::Overlap { first, second } | ReservedError::TwoMsi { first, second } => {
            [Some(first), Some(second)].contains(&default_region())
        }
        ReservedError::TooMany { .. } => false,
    }
}

fn page_mask(granule: u64) -> Option<PageMask> {
    let larger = PageMask::TABLE.bits() & !(granule - 1);
    PageMask::new(granule | larger)
}

fn whole_pages(bytes: u64) -> u64 {
    bytes & !(SMALLEST_PAGE - 1)
}

/// Reads a decimal or, after `0x`, hexadecimal number; `_` may stand between digits.
fn parse_number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let well_formed = digits.starts_with(|c: char| c.is_ascii_hexdigit())
        && digits.bytes().all(|b| b.is_ascii_hexdigit() || b == b'_');
    well_formed.then(|| u64::from_str_radix(&digits.replace('_', ""), radix).ok())?
}

/// Reads a number of bytes with an optional binary suffix: `4096`, `64k`, `2G`, `2GiB`.
fn parse_size(text: &str) -> Option<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(split);
    let suffix = suffix.trim_start().to_ascii_lowercase();
    let shift = match suffix.strip_suffix("ib").unwrap_or(&suffix) {
        "" if suffix.is_empty() => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A value as a message shows it: not too long.
fn shown(value: &Scalar) -> String {
    match value {
        Scalar::Text(text) => shorten(text),
        Scalar::Integer(value) => value.to_string(),
        other => other.found().to_owned(),
    }
}

fn shorten(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}...", &text[..at]),
    }
}

/// The parser's message in this program's words, with a cure and the line at fault. Both may hold
/// anything, so control characters are made visible.
fn syntax_message(message: &str, line: &str) -> String {
    let message = message.replace("unknown field", "unknown key");
    let message = printable(&message);
    let cure = if message.starts_with("unknown key") {
        "correct or remove it"
    } else if message.starts_with("duplicate key") {
        "keep one of the two"
    } else if message.contains("expected a sequence") {
        "write `reserved` as a list of tables and each endpoint under its own [[endpoint]]"
    } else if message.starts_with("invalid type") {
        "write a table, such as { first = 0x0, last = 0xfff } for a reserved region"
    } else {
        "correct the TOML"
    };
    let line = line.trim();
    if line.is_empty() {
        format!("{message}; {cure}")
    } else {
        format!("{message}; {cure} (in {:?})", shorten(line))
    }
}

fn printable(message: &str) -> String {
    const MOST: usize = 400;
    let mut text = String::new();
    for c in message.chars().take(MOST) {
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text
}

/// The number of the line that byte `at` is on, counted from 1.
fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().iter().take(at);
    before.filter(|&&byte| byte == b'\n').count() + 1
}

/// The line that byte `at` is on.
fn line_text(text: &str, at: usize) -> &str {
    text.lines().nth(line_of(text, at) - 1).unwrap_or_default()
}

#[cfg(test)]
mod tests;
