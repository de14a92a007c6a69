//! The input that provokes each error.

/// The beginning of `docs/errors.md`.
pub const HEAD: &str = "# Errors and their cures\n\n\
This page lists every error that an operator can make in the configuration or on the command line. `...` stands for\n\
a part that varies. A message about the configuration begins with file, line and key, one about the command line\n\
with the option. The daemon and `check` report all problems of a file at once. The table is generated from the\n\
sources. A test (`tests/errors/`) provokes each row, and fails if an error is missing here. `vhost-device-iommu\n\
check` reports what the *host* lacks for a device, with the cure: [passthrough.md](passthrough.md).\n";

/// An error and the input that provokes it.
pub struct Case {
    /// Its name in the sources.
    pub name: &'static str,
    /// The input with which an operator provokes it.
    pub input: Input,
}

/// Kinds of input.
pub enum Input {
    /// `check` of a file with this text after the address of the IOMMU.
    File(&'static str),
    /// `check` of a file with exactly this text.
    Text(&'static str),
    /// A command without a configuration file.
    Args(&'static [&'static str]),
    /// A file `vm.toml` with this text after the address of the IOMMU, and a command.
    With(&'static str, &'static [&'static str]),
    /// Like `With`, with a generated text.
    Made(fn() -> String, &'static [&'static str]),
    /// A daemon with this configuration besides its address and sockets, and a command of `ctl`.
    Ctl(&'static str, &'static [&'static str]),
}

use Input::{Args, Ctl, File, Made, Text, With};

const CHECK: &[&str] = &["check", "--file-only", "vm.toml"];
/// An endpoint without an address.
const NAMED: &str = "[[endpoint]]\ndevice = 'nic'\n";
const RUN: &[&str] = &["--config", "vm.toml"];

const fn case(name: &'static str, input: Input) -> Case {
    Case { name, input }
}

fn long_path() -> String {
    format!("address = '00:05.0'\nsocket = '/{}'\n", "x".repeat(107))
}

fn too_many_regions() -> String {
    let region = |n: u64| {
        let first = n << 16;
        format!("{{ first = {first}, last = {} }}", first + 0xfff)
    };
    let regions: Vec<_> = (0..65).map(region).collect();
    format!("address = '00:05.0'\nreserved = [{}]\n", regions.join(", "))
}

fn too_many_users() -> String {
    format!(
        "address = '00:05.0'\n[readers]\nusers = {:?}\n",
        (0..65).collect::<Vec<_>>()
    )
}

/// Every other function of two segments, in the shortest text.
fn scattered() -> String {
    let each = (0..0x2_0000u32).step_by(2).map(|id| {
        let (segment, bus, device, function) = (id >> 16, id >> 8 & 0xff, id >> 3 & 31, id & 7);
        format!("'{segment}:{bus:x}:{device:x}.{function}'")
    });
    let list = each.collect::<Vec<_>>().join(",");
    format!("address='2:0:5.0'\nhotplug=[{list}]\n")
}

/// Errors whose texts are not in an `#[error]` attribute: heading, name, pattern.
pub const IN_CODE: &[(&str, &str, &str)] = &[
    (
        "TOML",
        "toml/unknown",
        "unknown key `...`; correct or remove it: the keys here are ...",
    ),
    (
        "TOML",
        "toml/duplicate",
        "duplicate key; keep one of the two",
    ),
    ("TOML", "toml/sequence", "must be a list ..., not ..."),
    ("TOML", "toml/table", "must be a table ..., not ..."),
    ("TOML", "toml/place", "the key `...` cannot stand here; ..."),
    ("TOML", "toml/other", "...; correct the TOML"),
    (
        "Sockets",
        "socket/file",
        "... exists and is not a socket; remove it or choose another path",
    ),
    (
        "Sockets",
        "socket/taken",
        "another process listens on ...; stop it or choose another path",
    ),
    ("Sockets", "socket/bind", "cannot listen on ...: ..."),
    (
        "Sockets",
        "socket/folder",
        "the folder ... of the socket ... does not exist; make it, or choose another path",
    ),
    (
        "Sockets",
        "socket/file-as-folder",
        "..., where the socket ... is to be, is not a folder; choose another path",
    ),
    (
        "Descriptors",
        "ready-fd",
        "descriptor ... cannot be used: ...; pass one that is open for writing with --ready-fd",
    ),
    (
        "`viot`",
        "viot/output",
        "cannot write ...: ...; give a path that can be written with -o",
    ),
    (
        "The command line",
        "clap/unknown",
        "error: unexpected argument '...' found",
    ),
    (
        "The command line",
        "clap/value",
        "error: invalid value '...' for '...'",
    ),
    (
        "The command line",
        "clap/required",
        "error: the following required arguments were not provided:",
    ),
    (
        "The command line",
        "clap/conflict",
        "error: the argument '...' cannot be used with '...'",
    ),
    (
        "The command line",
        "clap/subcommand",
        "error: '...' requires a subcommand but one was not provided",
    ),
    (
        "The command line",
        "clap/repeated",
        "error: the argument '...' cannot be used multiple times",
    ),
];

/// Errors without a case, because they need more than a file and a command, or because no operator
/// can cause them. Each has the test that provokes it elsewhere, or the reason that there is none.
pub const ELSEWHERE: &[(&str, &str)] = &[
    // The message consists of another error's, which has a row of its own.
    ("Problem", "a place before another error's words"),
    ("ProblemKind::Syntax", "see TOML"),
    ("PlugError::System", "see Sockets"),
    (
        "ResolveError::Syntax",
        "see TOML: both parsers refuse the same texts",
    ),
    (
        "ResolveError::Unusable",
        "src/qemu/resolve/tests.rs::places_that_are_none_of_an_endpoint_are_refused",
    ),
    ("ResolveError::Write", "a folder that cannot be written"),
    ("StartError::Backend", "a backend's words"),
    ("DaemonError::Socket", "see Sockets"),
    ("StartError::Socket", "see Sockets"),
    ("StartError::Thread", "no threads left"),
    (
        "AddError::Backend",
        "src/iommu/tests/hotplug.rs::a_refused_addition_changes_nothing",
    ),
    (
        "AddError::Unsettled",
        "src/iommu/tests/hotplug.rs::a_new_device_is_filled_until_guest_memory_stays_as_it_is",
    ),
    // Failures of the system, not mistakes of the operator.
    ("DaemonError::System", "no descriptors or threads left"),
    ("ServeError::Wait", "no descriptors left"),
    ("ServeError::Watch", "no descriptors left"),
    ("ServeError::VhostUser", "no descriptors or threads left"),
    ("ServeError::Relay", "no descriptors or threads left"),
    ("LaunchError::System", "no files, memory or processes left"),
    // An earlier check refuses the same mistake; these are a second safeguard.
    ("DaemonError::NoSocket", "ProblemKind::Missing comes first"),
    // Root is allowed to do this.
    (
        "RealtimeError",
        "tests/cli.rs::a_priority_that_is_not_allowed_is_refused_with_the_cure",
    ),
    // These need a program that dies, or a host with devices.
    (
        "SlotProblem::RangeHidden",
        "src/config/slots.rs::ranges_are_advised_about",
    ),
    (
        "SlotProblem::RangeOverMachine",
        "src/config/slots.rs::ranges_are_advised_about",
    ),
    (
        "VmmArgsError::ArmHost",
        "src/vmms/crosvm.rs::guests_that_could_not_learn_their_endpoints_are_refused",
    ),
    (
        "DeviceTreeError::Doorbell",
        "src/topology/device_tree.rs::a_tree_with_its_doorbell_outside_the_msi_region_is_refused",
    ),
    (
        "DeviceTreeError::TooDeep",
        "src/topology/device_tree.rs::deep_files_are_refused_without_recursion",
    ),
    (
        "DeviceTreeError::HostBridges",
        "src/topology/device_tree.rs::trees_that_cannot_be_extended_are_refused",
    ),
    (
        "DeviceTreeError::HasIommu",
        "src/topology/device_tree.rs::trees_that_cannot_be_extended_are_refused",
    ),
    (
        "DeviceTreeError::Segment",
        "src/topology/device_tree.rs::trees_that_cannot_be_extended_are_refused",
    ),
    (
        "DeviceTreeError::NotOnRootBus",
        "src/topology/device_tree.rs::trees_that_cannot_be_extended_are_refused",
    ),
    (
        "DeviceTreeError::NoPhandle",
        "src/topology/device_tree.rs::trees_that_cannot_be_extended_are_refused",
    ),
    ("DeviceTreeError::Model", "the names of the nodes are fixed"),
    ("BaseTreeError::Folder", "no room for a folder"),
    ("LaunchError::NoVmm", "clap/required comes first"),
    ("LaunchError::NotReady", "a machine that is too busy"),
    (
        "LaunchError::DaemonEnded",
        "tests/launch/main.rs::the_vmm_does_not_outlive_the_daemon",
    ),
    (
        "LaunchError::DaemonLoops",
        "tests/launch/restarts.rs::a_daemon_that_ends_again_and_again_is_given_up",
    ),
    (
        "OpenError::NotBound",
        "src/vmms/launch/devices.rs::missing_files_are_named_with_a_cure",
    ),
    (
        "OwnArgumentError::TakenPlatformKey",
        "needs a device of the host: src/vmms/cloud_hypervisor/operator.rs",
    ),
    (
        "OpenError::NoSuchDevice",
        "src/vmms/launch/devices.rs::missing_files_are_named_with_a_cure",
    ),
    (
        "OpenError::Device",
        "src/vmms/launch/devices.rs::missing_files_are_named_with_a_cure",
    ),
    (
        "PassthroughError::Device",
        "a device that VFIO refuses: tests/passthrough",
    ),
    (
        "PassthroughError::NoSnoop",
        "a host whose IOMMU has no snoop control: src/endpoints/passthrough/tests.rs",
    ),
    (
        "PassthroughError::NoGroup",
        "src/endpoints/passthrough/refusals.rs::a_device_that_no_iommu_translates_for_is_refused",
    ),
    (
        "PassthroughError::Granule",
        "src/endpoints/passthrough/refusals.rs::a_device_with_larger_pages_than_the_guest_is_refused",
    ),
    ("PassthroughError::OtherDevice", "tests/passthrough"),
    ("PassthroughError::OneContainer", "tests/passthrough"),
    ("PassthroughError::MixedGroup", "tests/passthrough"),
    (
        "PassthroughError::NoCommonAddresses",
        "two IOMMUs that differ",
    ),
    (
        "RemoveError::HostGroup",
        "src/iommu/tests/hotplug.rs::a_device_that_the_host_cannot_isolate_stays",
    ),
    (
        "ServiceError::Sockets",
        "src/process/service.rs::exactly_one_listening_socket_is_accepted",
    ),
    (
        "ServiceError::Names",
        "src/process/service.rs::names_that_do_not_match_the_descriptors_are_refused",
    ),
    (
        "ServiceError::Closed",
        "src/process/service.rs::names_that_do_not_match_the_descriptors_are_refused",
    ),
    (
        "SupervisorError::TooMany",
        "src/process/supervisor.rs::options_that_launch_does_not_give_are_refused",
    ),
    (
        "ServiceError::Notify",
        "src/process/service.rs::unusable_variables_are_refused_with_a_cure",
    ),
    (
        "ServiceError::Watchdog",
        "src/process/service.rs::unusable_variables_are_refused_with_a_cure",
    ),
    ("LevelError::NotOurs", "the library in another program"),
    (
        "StoreError::NotAStore",
        "src/store/tests/hostile.rs::a_store_of_another_version_or_size_is_refused",
    ),
    (
        "StoreError::Version",
        "src/store/tests/hostile.rs::a_store_of_another_version_or_size_is_refused",
    ),
    (
        "StoreError::NotNewest",
        "src/store/tests/hostile.rs::a_store_is_taken_over_once",
    ),
    (
        "StoreError::NoJournal",
        "src/store/tests/later.rs::a_store_without_a_journal_is_refused",
    ),
    (
        "StoreError::Damaged",
        "src/store/tests/hostile.rs::each_damaged_word_of_the_store_is_refused_or_harmless",
    ),
    (
        "StoreError::Twice",
        "src/store/tests/refusals.rs::a_store_with_two_records_of_an_endpoint_is_refused",
    ),
    (
        "RestoreError::Arena",
        "src/store/tests/refusals.rs::an_arena_without_its_header_is_refused",
    ),
    (
        "RestoreError::Torn",
        "src/store/tests/refusals.rs::a_mapping_without_one_of_its_pages_is_refused",
    ),
    (
        "RestoreError::Offer",
        "src/store/tests/refusals.rs::another_offer_is_refused",
    ),
    (
        "RestoreError::OutOfFrames",
        "src/store/tests/refusals.rs::an_arena_that_is_too_small_is_refused",
    ),
    (
        "RestoreError::Refused",
        "the reader refuses every mapping that a table refuses",
    ),
    (
        "RestoreError::NotNew",
        "src/store/tests/refusals.rs::a_core_that_is_in_use_restores_nothing",
    ),
    (
        "AddError::TooWeak",
        "src/iommu/tests/hotplug.rs::a_refused_addition_changes_nothing",
    ),
];

/// One case for each other error.
pub const CASES: &[Case] = &[
    // The file as a whole.
    case("ProblemKind::Read", Args(&["check", "missing.toml"])),
    case("ProblemKind::FileTooLong", Args(&["check", "long.toml"])),
    case("ProblemKind::NotUtf8", Args(&["check", "bytes.toml"])),
    case("toml/unknown", File("adress = '00:05.0'")),
    case("toml/duplicate", File("address = '00:05.0'")),
    case("toml/sequence", File("reserved = 1")),
    case("toml/table", File("reserved = [1]")),
    case("toml/place", File("[[endpoint]]\nmemory = '1G'")),
    case("toml/other", File("bypass = ")),
    case("ProblemKind::WrongType", File("bypass = 1")),
    case("ProblemKind::Missing", Text("")),
    // Sockets.
    case("ProblemKind::PathEmpty", File("socket = ''")),
    case("ProblemKind::PathTooLong", Made(long_path, CHECK)),
    case("ProblemKind::PathControl", File("socket = \"a\\tb\"")),
    case(
        "ProblemKind::TwoTransports",
        File("socket = 's'\nvfio-user-socket = 't'"),
    ),
    case("ProblemKind::SamePath", File("socket = 's'\ncontrol = 's'")),
    case("ProblemKind::QmpPath", File("control = 's'\nqmp = 's'")),
    case("socket/file", With("socket = 'file'", RUN)),
    case("socket/taken", With("socket = 'taken.sock'", RUN)),
    case("socket/bind", With("socket = '/proc/where'", RUN)),
    case("socket/folder", With("socket = 'no/where'", RUN)),
    case("socket/file-as-folder", With("socket = 'file/where'", RUN)),
    // Values.
    case("ProblemKind::Width", File("address-width = 20")),
    case("ProblemKind::Granule", File("granule = '8k'")),
    case("ProblemKind::Poll", File("poll-max-us = 20000")),
    case("ProblemKind::Priority", File("realtime-priority = 0")),
    case("ProblemKind::Batch", File("batch = 0")),
    case("ProblemKind::FaultRate", File("fault-rate = 0")),
    case("ProblemKind::Name", File("name = 'a b'")),
    case(
        "ProblemKind::SocketMode",
        File("control = 's'\ncontrol-mode = '0999'"),
    ),
    case(
        "ProblemKind::SocketGroup",
        File("control = 's'\ncontrol-group = -1"),
    ),
    case("ProblemKind::MetricsNowhere", File("[metrics]")),
    case(
        "ProblemKind::MetricsPath",
        File("control = 's'\n[metrics]\nsocket = 's'"),
    ),
    case(
        "ProblemKind::Textfile",
        File("[metrics]\ntextfile = 'm.txt'"),
    ),
    case(
        "ProblemKind::Interval",
        File("[metrics]\ntextfile = 'm.prom'\ninterval-s = 0"),
    ),
    case("ProblemKind::Domains", File("domains = 0")),
    case("ProblemKind::Size", File("memory = 'much'")),
    case("ProblemKind::Memory", File("memory = 4096")),
    case("ProblemKind::ArenaTooSmall", File("arena-limit = 4096")),
    case("ProblemKind::ArenaTooLarge", File("arena-limit = '2T'")),
    case("ProblemKind::HostIommu", File("host-iommu = 'vfio'")),
    case("ProblemKind::Machine", File("machine = 'microvm'")),
    case(
        "ProblemKind::OtherMachine",
        With(
            "socket = 's'\nmemory = '1G'\nmachine = 'q35'",
            &["launch", "--config", "vm.toml", "--", "true", "-M", "virt"],
        ),
    ),
    case(
        "DeviceTreeError::Malformed",
        With("machine = 'virt'", &["dtb", "vm.toml", "--base", "vm.toml"]),
    ),
    case(
        "BaseTreeError::Read",
        With("machine = 'virt'", &["dtb", "vm.toml", "--base", "none"]),
    ),
    case(
        "BaseTreeError::NoTree",
        With(
            "socket = 's'\nmemory = '1G'",
            &["launch", "--config", "vm.toml", "--", "true", "-M", "virt"],
        ),
    ),
    case(
        "BaseTreeError::Start",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch", "--config", "vm.toml", "--", "./none", "-M", "virt",
            ],
        ),
    ),
    case(
        "VmmOptionError::AcpiOnVirt",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-M",
                "virt,acpi=on",
            ],
        ),
    ),
    case(
        "VmmOptionError::Gic",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-M",
                "virt,gic-version=2",
            ],
        ),
    ),
    case(
        "VmmOptionError::NoTables",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch", "--config", "vm.toml", "--", "true", "-M", "microvm",
            ],
        ),
    ),
    case(
        "QemuArgsError::InHotplugRange",
        With(
            "socket = 's'\nmemory = '1G'\nhotplug = ['00:08.0-00:09.7']",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-device",
                "e1000e,addr=9",
            ],
        ),
    ),
    case(
        "VmmArgsError::MachineOfQemu",
        With(
            "socket = 's'\nmemory = '1G'\nmachine = 'virt'",
            &["crosvm-args", "vm.toml"],
        ),
    ),
    case("ProblemKind::Pin", File("pin = 'some'")),
    case("ProblemKind::User", File("[readers]\nusers = ['root']")),
    case("ProblemKind::TooManyUsers", Made(too_many_users, CHECK)),
    case("ProblemKind::ReaderLimit", File("[readers]\nlimit = 0")),
    // Addresses.
    case("ProblemKind::Pci", File("[[endpoint]]\naddress = 'x'")),
    case(
        "ProblemKind::Host",
        File("[[endpoint]]\naddress = '00:06.0'\nvfio = '0:x'"),
    ),
    case(
        "HostAddressError",
        File("[[endpoint]]\naddress = '00:06.0'\nvfio = '0:x'"),
    ),
    case("PciAddressError", File("[[endpoint]]\naddress = 'x'")),
    case(
        "ProblemKind::PciRange",
        File("[[endpoint]]\nrange = '00:07.0-00:06.0'"),
    ),
    case(
        "PciRangeError::Backwards",
        File("[[endpoint]]\nrange = '00:07.0-00:06.0'"),
    ),
    case(
        "PciRangeError::AcrossSegments",
        File("[[endpoint]]\nrange = '0:00:07.0-1:00:08.0'"),
    ),
    case(
        "ProblemKind::AddressAndRange",
        File("[[endpoint]]\naddress = '00:06.0'\nrange = '00:06.0-00:07.0'"),
    ),
    case("ProblemKind::NoAddress", File("[[endpoint]]\ngroup = 'g'")),
    case("ProblemKind::DeviceWithoutAddress", File(NAMED)),
    case(
        "ProblemKind::Group",
        File("[[endpoint]]\naddress = '00:06.0'\ngroup = 'a b'"),
    ),
    case(
        "GroupNameError",
        File("[[endpoint]]\naddress = '00:06.0'\ngroup = 'a b'"),
    ),
    case(
        "TopologyError::Duplicate",
        File("[[endpoint]]\naddress = '00:06.0'\n[[endpoint]]\naddress = '00:06.0'"),
    ),
    case(
        "TopologyError::Overlap",
        File("[[endpoint]]\naddress = '00:06.0'\n[[endpoint]]\nrange = '00:06.0-00:07.0'"),
    ),
    case(
        "TopologyError::ContainsIommu",
        File("[[endpoint]]\naddress = '00:05.0'"),
    ),
    case(
        "TopologyError::TooManyEndpoints",
        File(
            "[[endpoint]]\nrange = '1:00:00.0-1:ff:1f.7'\n\
             [[endpoint]]\nrange = '2:00:00.0-2:ff:1f.7'",
        ),
    ),
    case(
        "TopologyError::Reserved",
        File(
            "reserved = [{ first = 0, last = 0xfff }]\n[[endpoint]]\naddress = '00:06.0'\n\
             reserved = [{ first = 0, last = 0xfff }]",
        ),
    ),
    // Ports.
    case("ProblemKind::PortPath", File("[[port]]\naddress = '02.0'")),
    case("PortPathError", File("[[endpoint]]\nport = '01:00.0'")),
    case(
        "ProblemKind::Place",
        File("[[endpoint]]\nport = '00:02.0'\naddress = '01:00.0'"),
    ),
    case(
        "PlaceError",
        File("[[endpoint]]\nport = '00:02.0'\nrange = '00.0'\naddress = '00.8'"),
    ),
    case(
        "ProblemKind::PortKind",
        File("[[port]]\naddress = '00:02.0'\nkind = 'pxb'"),
    ),
    case(
        "ProblemKind::ReserveBuses",
        File("[[port]]\naddress = '00:02.0'\nreserve-buses = 0"),
    ),
    case(
        "ProblemKind::ReserveOnVirt",
        File("machine = 'virt'\n[[port]]\naddress = '00:02.0'\nreserve-buses = 1"),
    ),
    case(
        "ProblemKind::LinkSpeed",
        File("[[port]]\naddress = '00:02.0'\nspeed = 3"),
    ),
    case(
        "ProblemKind::LinkWidth",
        File("[[port]]\naddress = '00:02.0'\nwidth = 3"),
    ),
    case(
        "ProblemKind::PortInAddition",
        Ctl("", &["add-endpoint", "01:00.0", "port = \"00:02.0\""]),
    ),
    case(
        "ProblemKind::DeviceId",
        File("qmp = 'q'\n[[endpoint]]\naddress = '00:06.0'\ndevice = '1'"),
    ),
    case(
        "ProblemKind::DeviceOnRange",
        File("qmp = 'q'\n[[endpoint]]\nrange = '00:06.0-00:06.1'\ndevice = 'd'"),
    ),
    case(
        "ProblemKind::DeviceWithoutQmp",
        File("[[endpoint]]\naddress = '00:06.0'\ndevice = 'd'"),
    ),
    case(
        "ProblemKind::DeviceTwice",
        File(
            "qmp = 'q'\n[[endpoint]]\naddress = '00:06.0'\ndevice = 'd'\n\
             [[endpoint]]\naddress = '00:07.0'\ndevice = 'd'",
        ),
    ),
    case(
        "ProblemKind::DeviceInAddition",
        Ctl("", &["add-endpoint", "00:08.0", "device = \"d\""]),
    ),
    case(
        "PortError::Duplicate",
        File("[[port]]\naddress = '00:02.0'\n[[port]]\naddress = '00:02.0'"),
    ),
    case(
        "PortError::Place",
        File("[[port]]\naddress = '00:02.0'\nkind = 'downstream-port'"),
    ),
    case(
        "PortError::NotFirst",
        File("[[port]]\naddress = '00:02.0/01.0'"),
    ),
    case(
        "PortError::Hidden",
        File("[[endpoint]]\nport = '00:02.0/00.0/01.1'"),
    ),
    case(
        "PortError::TooMany",
        File("[[port]]\naddress = '00:02.0'\nreserve-buses = 254\n[[port]]\naddress = '00:03.0'"),
    ),
    case(
        "PortError::ReserveTooSmall",
        File(
            "[[port]]\naddress = '00:02.0'\nreserve-buses = 1\n[[port]]\naddress = '00:02.0/00.0'",
        ),
    ),
    case(
        "PortError::ReserveElsewhere",
        File("[[port]]\naddress = '00:02.0'\nkind = 'pcie-pci-bridge'\nreserve-buses = 1"),
    ),
    case(
        "PortError::LinkElsewhere",
        File("[[port]]\naddress = '00:02.0'\nkind = 'pcie-pci-bridge'\nspeed = 8"),
    ),
    case(
        "PortError::HotplugUpstream",
        File("[[port]]\naddress = '00:02.0/00.0'\nhotplug = true"),
    ),
    case("PortError::IsIommu", File("[[port]]\naddress = '00:05.0'")),
    case(
        "PortError::BeforeIommu",
        Text("address = '01:00.0'\n[[port]]\naddress = '00:02.0'"),
    ),
    case(
        "PortError::IsEndpoint",
        File("[[port]]\naddress = '00:02.0'\n[[endpoint]]\naddress = '00:02.0'"),
    ),
    case(
        "PortError::IsExpected",
        File("hotplug = ['00:02.0-00:03.7']\n[[port]]\naddress = '00:02.0'"),
    ),
    case(
        "PortError::OneDevice",
        File("[[endpoint]]\nport = '00:02.0'\naddress = '01.0'"),
    ),
    case(
        "PortError::BehindUpstream",
        File("[[endpoint]]\nport = '00:02.0/00.0'"),
    ),
    case(
        "PortError::SlotZero",
        File(
            "[[port]]\naddress = '00:02.0'\nkind = 'pcie-pci-bridge'\n[[endpoint]]\nport = '00:02.0'",
        ),
    ),
    case(
        "SlotProblem::PortHidden",
        With(
            "socket = 's'\nmemory = '1G'\n[[port]]\naddress = '00:02.1'",
            &["qemu-args", "vm.toml"],
        ),
    ),
    case(
        "VmmOptionError::UndeclaredPort",
        With(
            "socket = 's'\nmemory = '1G'\n[[port]]\naddress = '00:02.0'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-device",
                "pcie-root-port,id=p,addr=3",
            ],
        ),
    ),
    case(
        "VmmArgsError::Ports",
        With(
            "socket = 's'\nmemory = '1G'\n[[port]]\naddress = '00:02.0'",
            &["crosvm-args", "vm.toml"],
        ),
    ),
    // Devices.
    case(
        "ProblemKind::VfioOnRange",
        File("[[endpoint]]\nrange = '00:06.0-00:06.1'\nvfio = '65:00.0'"),
    ),
    case(
        "ProblemKind::HostTwice",
        File(
            "[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n\
             [[endpoint]]\naddress = '00:07.0'\nvfio = '65:00.0'",
        ),
    ),
    case(
        "ProblemKind::ExportWithoutVfio",
        File("[[endpoint]]\naddress = '00:06.0'\nexport = 'e'"),
    ),
    case(
        "ProblemKind::VfToken",
        File(
            "[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\nexport = 'e'\nvf-token = 'secret'",
        ),
    ),
    case(
        "ProblemKind::VfTokenWithoutExport",
        File(
            "[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n\
             vf-token = 'bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3'",
        ),
    ),
    case(
        "ProblemKind::VfTokenInAddition",
        Ctl(
            "",
            &[
                "add-endpoint",
                "00:06.0",
                "vf-token = 'bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3'",
            ],
        ),
    ),
    case(
        "ProblemKind::NoSnoopWithoutExport",
        File("[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\nallow-no-snoop = true"),
    ),
    case(
        "ProblemKind::Registers",
        File(
            "[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\nexport = 'e'\nregisters = 'direct'",
        ),
    ),
    case(
        "ProblemKind::RegistersWithoutExport",
        File("[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\nregisters = 'mapped'"),
    ),
    case(
        "ProblemKind::ExportPath",
        File("socket = 's'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\nexport = 's'"),
    ),
    case(
        "ProblemKind::ShadowOnRange",
        File("[[endpoint]]\nrange = '00:06.0-00:06.1'\nshadow = 'h'"),
    ),
    case(
        "ProblemKind::ShadowWithVfio",
        File("[[endpoint]]\naddress = '00:06.0'\nshadow = 'h'\nvfio = '65:00.0'"),
    ),
    case(
        "ProblemKind::ShadowPath",
        File("socket = 's'\n[[endpoint]]\naddress = '00:06.0'\nshadow = 's'"),
    ),
    case(
        "ProblemKind::EmulatedOnRange",
        File(
            "[[endpoint]]\nrange = '00:06.0-00:06.1'\n\
             vfio-user = { listen = 'l', connect = 'k' }",
        ),
    ),
    case(
        "ProblemKind::EmulatedAndVfio",
        File(
            "[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\n\
             vfio-user = { listen = 'l', connect = 'k' }",
        ),
    ),
    case(
        "ProblemKind::EmulatedMissing",
        File("[[endpoint]]\naddress = '00:06.0'\nvfio-user = { listen = 'l' }"),
    ),
    case(
        "ProblemKind::ListenIsConnect",
        File("[[endpoint]]\naddress = '00:06.0'\nvfio-user = { listen = 'l', connect = 'l' }"),
    ),
    case(
        "ProblemKind::ListenTwice",
        File(
            "socket = 's'\n[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = 's', connect = 'k' }",
        ),
    ),
    case(
        "ProblemKind::Isolation",
        File(
            "[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = 'l', connect = 'k', isolation = 'none' }",
        ),
    ),
    case(
        "ProblemKind::Announce",
        File(
            "[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = 'l', connect = 'k', announce = 'all' }",
        ),
    ),
    case(
        "ProblemKind::MaxWindows",
        File(
            "[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = 'l', connect = 'k', max-windows = 0 }",
        ),
    ),
    case(
        "ProblemKind::CoarseMappings",
        File(
            "[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = 'l', connect = 'k', isolation = 'mappings', announce = 'coarse' }",
        ),
    ),
    case(
        "ProblemKind::Deadline",
        File(
            "[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = 'l', connect = 'k', deadline-ms = 1 }",
        ),
    ),
    case(
        "ProblemKind::TotalDeadline",
        File(
            "[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = { listen = 'l', connect = 'k', total-deadline-ms = 999 }",
        ),
    ),
    // Reserved regions.
    case(
        "ProblemKind::Iova",
        File("reserved = [{ first = 'x', last = 1 }]"),
    ),
    case(
        "ProblemKind::RegionBackwards",
        File("reserved = [{ first = 0x1000, last = 0xfff }]"),
    ),
    case(
        "ProblemKind::RegionUnaligned",
        File("reserved = [{ first = 0, last = 0x1000 }]"),
    ),
    case(
        "ProblemKind::RegionKind",
        File("reserved = [{ first = 0, last = 0xfff, kind = 'mmio' }]"),
    ),
    case(
        "ProblemKind::RegionText",
        With(
            "socket = 's'",
            &["--config", "vm.toml", "--reserved", "0-1"],
        ),
    ),
    case("ReservedError::TooMany", Made(too_many_regions, CHECK)),
    case(
        "ReservedError::Overlap",
        File("reserved = [{ first = 0, last = 0x1fff }, { first = 0x1000, last = 0x1fff }]"),
    ),
    case(
        "ReservedError::TwoMsi",
        File(
            "reserved = [{ first = 0, last = 0xfff, kind = 'msi' }, \
             { first = 0x1000, last = 0x1fff, kind = 'msi' }]",
        ),
    ),
    case(
        "ProblemKind::BesideDefault",
        File(
            "[[endpoint]]\naddress = '00:06.0'\n\
             reserved = [{ first = 0xfee00000, last = 0xfee00fff }]",
        ),
    ),
    // Descriptors.
    case(
        "ProblemKind::DescriptorText",
        With("socket = 's'", &["--config", "vm.toml", "--vfio-fd", "4"]),
    ),
    case(
        "ProblemKind::NotPassthrough",
        With(
            "socket = 's'",
            &["--config", "vm.toml", "--vfio-fd", "00:06.0=4"],
        ),
    ),
    case(
        "ProblemKind::EndpointTwice",
        With(
            "socket = 's'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'",
            &[
                "--config",
                "vm.toml",
                "--iommufd-fd",
                "3",
                "--vfio-fd",
                "00:06.0=4",
                "--vfio-fd",
                "00:06.0=5",
            ],
        ),
    ),
    case(
        "ProblemKind::DescriptorTwice",
        With(
            "socket = 's'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'",
            &[
                "--config",
                "vm.toml",
                "--iommufd-fd",
                "4",
                "--vfio-fd",
                "00:06.0=4",
            ],
        ),
    ),
    case("ProblemKind::VfioFrom", File("vfio-from = 'qemu'")),
    case(
        "ProblemKind::VfioFromType1",
        File("vfio-from = 'vmm'\nhost-iommu = 'type1'"),
    ),
    case(
        "ProblemKind::VfioFromOverVfioUser",
        File("vfio-from = 'vmm'\nvfio-user-socket = '/s'"),
    ),
    case(
        "ProblemKind::VfioFromWithExport",
        File(
            "vfio-from = 'vmm'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\nexport = '/a'",
        ),
    ),
    case("ProblemKind::VfioHelperAlone", File("vfio-helper = '/h'")),
    case(
        "ProblemKind::IommufdWithType1",
        With(
            "socket = 's'\nhost-iommu = 'type1'",
            &["--config", "vm.toml", "--iommufd-fd", "4"],
        ),
    ),
    case(
        "ProblemKind::ContainerWithIommufd",
        With(
            "socket = 's'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'",
            &["--config", "vm.toml", "--vfio-container-fd", "00:06.0=4"],
        ),
    ),
    case(
        "ProblemKind::DeviceWithoutIommufd",
        With(
            "socket = 's'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'",
            &["--config", "vm.toml", "--vfio-fd", "00:06.0=4"],
        ),
    ),
    case(
        "ProblemKind::DeviceWithoutContainer",
        With(
            "socket = 's'\nhost-iommu = 'type1'\n[[endpoint]]\naddress = '00:06.0'\n\
             vfio = '65:00.0'",
            &["--config", "vm.toml", "--vfio-fd", "00:06.0=4"],
        ),
    ),
    case(
        "ready-fd",
        With("socket = 's'", &["--config", "vm.toml", "--ready-fd", "99"]),
    ),
    case(
        "DaemonError::InheritedFd",
        With("", &["--config", "vm.toml", "--fd", "0"]),
    ),
    // Passthrough devices, and the other commands.
    case(
        "PassthroughError::NoDevice",
        With(
            "socket = 's'\nhost-iommu = 'type1'\n[[endpoint]]\naddress = '00:06.0'\n\
             vfio = 'ff:1f.7'",
            RUN,
        ),
    ),
    case(
        "PassthroughError::Inherited",
        With(
            "socket = 's'\n[[endpoint]]\naddress = '00:06.0'\nvfio = 'ff:1f.7'",
            &["--config", "vm.toml", "--iommufd-fd", "99"],
        ),
    ),
    case(
        "ViotError",
        Made(scattered, &["viot", "vm.toml", "-o", "out"]),
    ),
    case(
        "viot/output",
        With("", &["viot", "vm.toml", "-o", "no/where"]),
    ),
    case(
        "SlotProblem::IommuHidden",
        Made(
            || "address = '00:05.1'\nsocket = 's'\nmemory = '1G'\n".into(),
            &["qemu-args", "vm.toml"],
        ),
    ),
    case(
        "SlotProblem::DeviceHidden",
        With(
            "socket = 's'\nmemory = '1G'\n[[endpoint]]\naddress = '00:06.1'\nvfio = '65:00.0'\nexport = 'e'",
            &["qemu-args", "vm.toml"],
        ),
    ),
    case(
        "SlotProblem::OfMachine",
        Made(
            || "address = '00:1f.0'\nsocket = 's'\nmemory = '1G'\n".into(),
            &["qemu-args", "vm.toml"],
        ),
    ),
    case(
        "QemuArgsError::NoFunctionZero",
        Made(
            || {
                "address = '00:05.1'\nsocket = 's'\nmemory = '1G'\n[[endpoint]]\naddress = '00:05.0'\n".into()
            },
            &["launch", "--config", "vm.toml", "--", "true", "-nodefaults"],
        ),
    ),
    case(
        "VmmOptionError::Daemonize",
        With(
            "socket = 's'\nmemory = '1G'",
            &["launch", "--config", "vm.toml", "--", "true", "-daemonize"],
        ),
    ),
    case(
        "VmmOptionError::MemPath",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-mem-path",
                "/f",
            ],
        ),
    ),
    case(
        "VmmOptionError::NotShared",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-numa",
                "node,memdev=m",
                "-object",
                "memory-backend-ram,id=m,size=1G",
            ],
        ),
    ),
    case(
        "VmmOptionError::SecondIommu",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-device",
                "intel-iommu",
            ],
        ),
    ),
    case(
        "VmmOptionError::ChangedIds",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-global",
                "vfio-user-pci.x-pci-device-id=0x1041",
            ],
        ),
    ),
    case(
        "VmmOptionError::NoAcpi",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-M",
                "q35,acpi=off",
            ],
        ),
    ),
    case(
        "VmmOptionError::TakenId",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-object",
                "iommufd,id=viommu-x",
            ],
        ),
    ),
    case(
        "ReadConfigError",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "true",
                "-readconfig",
                "no-such-file",
            ],
        ),
    ),
    case(
        "QemuArgsError::NoSocket",
        With("memory = '1G'", &["qemu-args", "vm.toml"]),
    ),
    case(
        "QemuArgsError::NoMemory",
        With("socket = 's'", &["qemu-args", "vm.toml"]),
    ),
    case(
        "QemuArgsError::NotOnRootBus",
        Made(
            || "address = '01:00.0'\nsocket = 's'\nmemory = '1G'\n".into(),
            &["qemu-args", "vm.toml"],
        ),
    ),
    case(
        "QemuArgsError::DeviceNotOnRootBus",
        With(
            "socket = 's'\nmemory = '1G'\n[[endpoint]]\naddress = '01:00.0'\nvfio = '65:00.0'\n\
             export = 'e'",
            &["launch", "--config", "vm.toml", "--", "true"],
        ),
    ),
    case(
        "QemuArgsError::Type1",
        With(
            "socket = 's'\nmemory = '1G'\nhost-iommu = 'type1'\n[[endpoint]]\n\
             address = '00:06.0'\nvfio = '65:00.0'",
            &["qemu-args", "vm.toml"],
        ),
    ),
    case(
        "ResolveError::NoSocket",
        With(NAMED, &["resolve", "vm.toml"]),
    ),
    case(
        "ResolveError::Monitor",
        With(NAMED, &["resolve", "vm.toml", "--qmp", "absent.sock"]),
    ),
    case(
        "ResolveError::Unanswered",
        With(NAMED, &["resolve", "vm.toml", "--qmp", "quiet-qemu.sock"]),
    ),
    case(
        "ResolveError::NoDevice",
        With(NAMED, &["resolve", "vm.toml", "--qmp", "no-qemu.sock"]),
    ),
    case(
        "ResolveError::NotPci",
        With(NAMED, &["resolve", "vm.toml", "--qmp", "odd-qemu.sock"]),
    ),
    case(
        "ResolveError::OtherRoot",
        With(NAMED, &["resolve", "vm.toml", "--qmp", "root-qemu.sock"]),
    ),
    case(
        "LibvirtError::NoMemory",
        With("socket = '/s'", &["libvirt-xml", "vm.toml"]),
    ),
    case(
        "LibvirtError::InheritedFiles",
        With(
            "socket = '/s'\nmemory = '1G'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'",
            &["libvirt-xml", "vm.toml"],
        ),
    ),
    case(
        "LibvirtError::MixedPort",
        With(
            "socket = '/s'\nmemory = '1G'\nvfio-from = 'vmm'\n\
             [[endpoint]]\nport = '00:02.0/00.0/00.0'\nvfio = '65:00.0'\n\
             [[port]]\naddress = '00:02.0/00.0/01.0'\nhotplug = true",
            &["libvirt-xml", "vm.toml"],
        ),
    ),
    case(
        "LibvirtError::Relative",
        With("socket = 's'\nmemory = '1G'", &["libvirt-xml", "vm.toml"]),
    ),
    case(
        "LibvirtError::Id",
        With(
            "socket = '/s'\nmemory = '1G'\nvfio-from = 'vmm'\nqmp = '/q'\n\
             [[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'\ndevice = 'nic0'",
            &["libvirt-xml", "vm.toml"],
        ),
    ),
    case(
        "LibvirtError::Name",
        With(
            "name = 'a/b'\nsocket = '/s'\nmemory = '1G'",
            &["libvirt-xml", "vm.toml"],
        ),
    ),
    case(
        "LibvirtError::Character",
        With(
            "socket = '/s'\nmemory = '1G'",
            &["libvirt-xml", "vm.toml", "--viot", "/\u{1}"],
        ),
    ),
    case(
        "VmmArgsError::NoSocketPath",
        With("memory = '1G'", &["cloud-hypervisor-args", "vm.toml"]),
    ),
    case(
        "VmmArgsError::NoMemorySize",
        With("socket = 's'", &["crosvm-args", "vm.toml"]),
    ),
    case(
        "VmmArgsError::NotASlot",
        Made(
            || "address = '00:05.1'\nvfio-user-socket = 's'\nmemory = '1G'\n".into(),
            &["cloud-hypervisor-args", "vm.toml"],
        ),
    ),
    case(
        "VmmArgsError::UnusablePath",
        With("socket = 'a,b'\nmemory = '1G'", &["crosvm-args", "vm.toml"]),
    ),
    case(
        "OwnArgumentError::PrivateMemory",
        With(
            "vfio-user-socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "cloud-hypervisor",
                "--memory",
                "size=1G",
            ],
        ),
    ),
    case(
        "OwnArgumentError::EncryptedMemory",
        With(
            "vfio-user-socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "cloud-hypervisor",
                "--platform",
                "sev_snp=on",
            ],
        ),
    ),
    case(
        "OwnArgumentError::OwnIommu",
        With(
            "vfio-user-socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "cloud-hypervisor",
                "--disk",
                "path=d,iommu=on",
            ],
        ),
    ),
    case(
        "OwnArgumentError::TooFewSegments",
        With(
            "vfio-user-socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "cloud-hypervisor",
                "--platform",
                "num_pci_segments=0",
            ],
        ),
    ),
    case(
        "OwnArgumentError::WeightedAperture",
        With(
            "vfio-user-socket = 's'\nmemory = '1G'",
            &[
                "launch",
                "--config",
                "vm.toml",
                "--",
                "cloud-hypervisor",
                "--pci-segment",
                "pci_segment=0,mmio32_aperture_weight=2",
            ],
        ),
    ),
    case(
        "VmmArgsError::NotForCrosvm",
        With(
            "socket = 's'\nmemory = '1G'\n[[endpoint]]\naddress = '00:06.0'\nvfio = '65:00.0'",
            &["crosvm-args", "vm.toml"],
        ),
    ),
    case(
        "QemuArgsError::Colon",
        With(
            "socket = 's'\nmemory = '1G'",
            &["qemu-args", "vm.toml", "--viot", "a:b"],
        ),
    ),
    case(
        "QemuArgsError::Path",
        With(
            "socket = 's'\nmemory = '1G'",
            &["qemu-args", "vm.toml", "--viot", "a\nb"],
        ),
    ),
    case(
        "OpenError::Iommufd",
        With(
            "socket = 's'\nmemory = '1G'\n[[endpoint]]\naddress = '00:06.0'\nvfio = 'ff:1f.7'",
            &["launch", "--config", "vm.toml", "--", "true"],
        ),
    ),
    case(
        "LaunchError::WriteTable",
        With(
            "socket = 's'\nmemory = '1G'",
            &[
                "launch", "--config", "vm.toml", "--viot", "no/where", "--", "true",
            ],
        ),
    ),
    case(
        "LaunchError::Start",
        With(
            "socket = 's'\nmemory = '1G'",
            &["launch", "--config", "vm.toml", "--", "./no-such-program"],
        ),
    ),
    case("CtlError::Connect", Args(&["ctl", "no-socket", "status"])),
    case("CtlError::Broken", Args(&["ctl", "mute.sock", "status"])),
    case(
        "CtlError::NotJson",
        Args(&["ctl", "nonsense.sock", "status"]),
    ),
    case("CtlError::Refused", Ctl("", &["translate", "x", "1"])),
    case(
        "SupervisorError::NotAFile",
        Args(&["--keeper-fd", "0", "--kept-fd", "arena"]),
    ),
    case(
        "SupervisorError::Closed",
        Args(&["--keeper-fd", "2147483647"]),
    ),
    // The command line.
    case("clap/unknown", Args(&["--colour"])),
    case("clap/value", Args(&["--address-width", "wide"])),
    case("clap/required", Args(&["check"])),
    case("clap/conflict", Args(&["--fd", "3", "--socket-path", "s"])),
    case("clap/subcommand", Args(&["ctl", "s"])),
    case(
        "clap/repeated",
        Args(&["--iommu", "00:05.0", "--iommu", "00:06.0"]),
    ),
    // Endpoints added and removed at run time.
    case(
        "ProblemKind::AdditionControl",
        Ctl("", &["add-endpoint", "00:06.0", "group = 'a\tb'"]),
    ),
    case(
        "ProblemKind::AdditionNotOne",
        Ctl(
            "",
            &["add-endpoint", "00:06.0", "group = 'g' }, { group = 'h'"],
        ),
    ),
    case(
        "ProblemKind::Slot",
        Ctl(
            "",
            &[
                "add-endpoint",
                "00:08.1",
                "vfio-user = { listen = '/l', connect = '/c' }",
            ],
        ),
    ),
    case("NoSuchEndpoints", Ctl("", &["remove-endpoint", "00:06.0"])),
    case(
        "PlugError::Shadow",
        Ctl("", &["add-endpoint", "00:06.0", "shadow = 'h'"]),
    ),
    case(
        "PlugError::Shared",
        Ctl("", &["add-endpoint", "00:06.0", "vfio = '65:00.0'"]),
    ),
    case(
        "PlugError::OutOfReach",
        Ctl(
            "hotplug = ['00:07.0']",
            &[
                "add-endpoint",
                "00:07.0",
                "vfio-user = { listen = '/run/l', connect = '/run/elsewhere/c' }",
            ],
        ),
    ),
    case(
        "PlugError::Unprepared",
        Ctl(
            "",
            &[
                "add-endpoint",
                "00:06.0",
                "vfio-user = { listen = 'l', connect = 'c' }",
            ],
        ),
    ),
    case("LevelError::Unknown", Ctl("", &["log-level", "loud"])),
    case(
        "AddError::NoRoom",
        Ctl("", &["add-endpoint", "00:06.0", MANY]),
    ),
];

/// More regions than fit the answer to PROBE.
const MANY: &str = "reserved = [{first=0,last=0xfff},{first=0x2000,last=0x2fff},\
{first=0x4000,last=0x4fff},{first=0x6000,last=0x6fff},{first=0x8000,last=0x8fff},\
{first=0xa000,last=0xafff},{first=0xc000,last=0xcfff},{first=0xe000,last=0xefff},\
{first=0x10000,last=0x10fff},{first=0x12000,last=0x12fff},{first=0x14000,last=0x14fff},\
{first=0x16000,last=0x16fff},{first=0x18000,last=0x18fff},{first=0x1a000,last=0x1afff},\
{first=0x1c000,last=0x1cfff},{first=0x1e000,last=0x1efff},{first=0x20000,last=0x20fff},\
{first=0x22000,last=0x22fff},{first=0x24000,last=0x24fff},{first=0x26000,last=0x26fff},\
{first=0x28000,last=0x28fff}]";
