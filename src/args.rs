//! The command line as typed. `config` checks the values.
//!
//! Imports nothing of this crate, so that the manual page can be made from this file alone.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// A vhost-user backend for virtio-iommu: the IOMMU of a guest, in a process of its own
///
/// Serves one virtual machine. The configuration comes from a TOML file (--config), from the
/// options below, or from both. An option overrides the key of the file with the same meaning.
///
/// The state of the VM outlives the daemon only if systemd (254 or later) or `launch` starts it.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "vhost-device-iommu",
    version,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    /// The subcommand; without one, the program serves a virtual machine.
    #[command(subcommand)]
    pub command: Option<CliCommand>,
    /// The options of the daemon.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Options of the daemon.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct RunArgs {
    /// Read the configuration from this TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Create a socket at this path and listen on it for the VMM
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Listen for the VMM on this inherited descriptor of a listening socket
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub fd: Option<i32>,

    /// Write a line feed to this inherited descriptor and close it once the sockets listen
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub ready_fd: Option<i32>,

    /// Create a control socket at this path, for `ctl`
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,

    /// PCI address of the IOMMU itself, such as 00:05.0
    #[arg(long, value_name = "PCI")]
    pub iommu: Option<String>,

    /// PCI address of an endpoint, or a range of addresses such as 00:10.0-00:1e.7; may be repeated,
    /// and replaces the endpoints of the file
    #[arg(long, value_name = "PCI[-PCI]")]
    pub endpoint: Vec<String>,

    /// Width of I/O virtual addresses in bits, 32 to 57 [default: 48]
    #[arg(long, value_name = "N")]
    pub address_width: Option<u64>,

    /// Whether endpoints without a domain bypass the IOMMU at boot [default: on]
    #[arg(long, value_name = "on|off", hide_possible_values = true)]
    pub bypass: Option<OnOff>,

    /// Smallest page size of a mapping: 4k, 16k, 64k or 2m [default: 4k]
    #[arg(long, value_name = "SIZE")]
    pub granule: Option<String>,

    /// I/O virtual addresses that no endpoint may map; may be repeated, and replaces the list of the file
    /// [default: the machine's MSI region; of q35 0xfee00000..=0xfeefffff:msi]
    #[arg(long, value_name = "FIRST..=LAST:msi|reserved")]
    pub reserved: Vec<String>,

    /// Use an empty list of reserved addresses, without the default MSI region
    #[arg(long, conflicts_with = "reserved")]
    pub no_reserved: bool,

    /// The machine that the VMM emulates: q35 or virt (Arm) [default: q35]
    #[arg(long, value_name = "MACHINE")]
    pub machine: Option<String>,

    /// Size of guest RAM, such as 2G
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,

    /// Limit of the memory for page tables [default: memory / 256 + 64M]
    #[arg(long, value_name = "SIZE")]
    pub arena_limit: Option<String>,

    /// Descriptors of passthrough devices.
    #[command(flatten)]
    pub descriptors: DescriptorArgs,

    /// Use this inherited descriptor of a VFIO container for the passthrough endpoint with this address
    /// in the guest; its IOMMU type must have been set (VFIO_SET_IOMMU); may be repeated
    #[arg(long, value_name = "ADDRESS=N")]
    pub vfio_container_fd: Vec<String>,

    /// Keep descriptors beyond the end of the daemon with the process at the other end of this inherited socket. Only
    /// `launch` gives it.
    #[arg(long, hide = true, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub keeper_fd: Option<i32>,

    /// Take over this inherited descriptor, which the daemon before has kept under this name; may be repeated. Only
    /// `launch` gives it.
    #[arg(long, hide = true, value_name = "NAME=N", requires = "keeper_fd")]
    pub kept_fd: Vec<String>,

    /// Run without the sandbox; for debugging only: a guest that exploits the daemon gets all its rights
    /// on the host
    #[arg(long)]
    pub no_sandbox: bool,

    /// Name a forbidden system call on standard error before the process ends, instead of ending at
    /// once; for debugging only
    #[arg(long, conflicts_with = "no_sandbox")]
    pub sandbox_report: bool,

    /// Print the capabilities of this backend as JSON and exit; other arguments are ignored
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Inherited descriptors that the VMM uses, too.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct DescriptorArgs {
    /// Use this inherited descriptor of /dev/iommu
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub iommufd_fd: Option<i32>,

    /// Use this inherited descriptor of a VFIO device for the passthrough endpoint with this address in
    /// the guest; may be repeated
    #[arg(long, value_name = "ADDRESS=N")]
    pub vfio_fd: Vec<String>,
}

/// The value of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// The switch is on.
    On,
    /// The switch is off.
    Off,
}

/// A kind of VMM that `launch` starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VmmChoice {
    /// QEMU.
    Qemu,
    /// cloud-hypervisor.
    CloudHypervisor,
}

/// A subcommand.
#[derive(Clone, Debug, Subcommand)]
pub enum CliCommand {
    /// Check a configuration file and print a summary
    ///
    /// With passthrough endpoints, also list the missing requirements of this host and how to meet them.
    /// The exit status is 1 if anything is missing. The command changes nothing and does not disturb
    /// running VMs.
    Check {
        /// The configuration
        file: PathBuf,
        /// Do not check this host
        #[arg(long)]
        file_only: bool,
    },
    /// Print the devices of this host behind the endpoints, their groups and reserved regions
    Topology {
        /// The configuration
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask QEMU for the addresses of endpoints that name their device
    ///
    /// For endpoints with `device` and without `address`: prints the keys that each needs, to paste into the file. Start a
    /// QEMU with the same machine and devices before, paused, with another device in the place of the IOMMU
    /// (-S -device pci-testdev,addr=05.0 -qmp unix:PATH,server=on,wait=off); then end it.
    Resolve {
        /// The configuration
        file: PathBuf,
        /// QEMU's QMP socket, if it is not `qmp` of the file
        #[arg(long, value_name = "PATH")]
        qmp: Option<PathBuf>,
        /// Write the keys into the file
        #[arg(long)]
        write: bool,
    },
    /// Write the ACPI VIOT table, which tells the guest the endpoints of the IOMMU
    Viot {
        /// The configuration
        file: PathBuf,
        /// Write to this file instead of standard output, which must not be a terminal
        #[arg(short, long, value_name = "OUT")]
        output: Option<PathBuf>,
    },
    /// Add the IOMMU and its endpoints to the device tree of an Arm guest
    ///
    /// For `machine = "virt"`. QEMU writes the base with the -machine, -cpu and -smp options of the VM and
    /// -machine dumpdtb=BASE. `launch` does all of this itself.
    Dtb {
        /// The configuration
        file: PathBuf,
        /// The device tree of the VMM, without the IOMMU
        #[arg(long, value_name = "BASE")]
        base: PathBuf,
        /// Write to this file instead of standard output, which must not be a terminal
        #[arg(short, long, value_name = "OUT")]
        output: Option<PathBuf>,
    },
    /// Print the arguments of QEMU (10.2 or later) for a configuration, one in a line
    ///
    /// Prints notes about other requirements, such as the addresses of devices, on standard error.
    QemuArgs {
        /// The configuration
        file: PathBuf,
        /// Path at which QEMU finds the table written by `viot`, or the device tree written by `dtb` [default: FILE
        /// with the ending .viot or .dtb]
        #[arg(long, value_name = "PATH")]
        viot: Option<PathBuf>,
        /// Print one line, quoted for a POSIX shell
        #[arg(long)]
        shell: bool,
        /// The descriptors that QEMU will inherit [default: 3 and up].
        #[command(flatten)]
        descriptors: DescriptorArgs,
    },
    /// Print the arguments of cloud-hypervisor for a configuration, one in a line
    ///
    /// The VMM connects to the socket over vfio-user and has no option for ACPI tables: the kernel command line
    /// names a BAR of the IOMMU (acpi_rsdp=), from which the guest learns its endpoints. Prints notes about
    /// other requirements on standard error.
    CloudHypervisorArgs {
        /// The configuration
        file: PathBuf,
        /// The number of --disk options that the VMM will have, which move the BAR
        #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=31))]
        disks: u16,
        /// The other parameters of the guest's kernel
        #[arg(
            long,
            value_name = "TEXT",
            default_value = "",
            allow_hyphen_values = true
        )]
        cmdline: String,
        /// Print one line, quoted for a POSIX shell
        #[arg(long)]
        shell: bool,
        /// The descriptors that the VMM will inherit [default: 3 and up].
        #[command(flatten)]
        descriptors: DescriptorArgs,
    },
    /// Print the arguments of `crosvm run` for a configuration, one in a line
    ///
    /// Prints notes about other requirements on standard error.
    CrosvmArgs {
        /// The configuration
        file: PathBuf,
        /// Path at which crosvm finds the table written by `viot` [default: FILE with the ending .viot]
        #[arg(long, value_name = "PATH")]
        viot: Option<PathBuf>,
        /// Print one line, quoted for a POSIX shell
        #[arg(long)]
        shell: bool,
    },
    /// Print a libvirt domain for a configuration, as XML
    ///
    /// The domain has what the IOMMU needs: shared memory, the table, ports, passthrough devices, and QEMU arguments for the
    /// rest. `virsh define` takes it as it is, without disks and networks; the comments in it say what to copy into a
    /// domain that exists. Needs QEMU 10.2 and libvirt 11.2, or libvirt 12.1 for `vfio-from = "vmm"`.
    LibvirtXml {
        /// The configuration
        file: PathBuf,
        /// Absolute path at which QEMU finds the table written by `viot`, or the device tree written by `dtb` [default:
        /// FILE's name in /var/lib/vhost-device-iommu, with the ending .viot or .dtb]
        #[arg(long, value_name = "PATH")]
        viot: Option<PathBuf>,
    },
    /// Print the systemd settings that a configuration needs, as a drop-in for vhost-device-iommu@.service
    ///
    /// The drop-in limits memory, descriptors and threads, and allows the nodes of passthrough devices. The
    /// generator of the package calls this command.
    DropIn {
        /// The configuration
        file: PathBuf,
    },
    /// Start the daemon and a VMM (QEMU 10.2 or later, or cloud-hypervisor), and end them together
    ///
    /// The program of the VMM and its own arguments follow --, as in
    /// `launch --config vm0.toml -- qemu-system-x86_64 -smp 4`.
    ///
    /// Opens the passthrough devices for both. Adds the arguments that `qemu-args` or `cloud-hypervisor-args`
    /// prints to those of the VMM; leaves out the machine type and RAM if the arguments of the VMM name them.
    /// The exit status is that of the VMM, 128 plus the number of the signal that ended it, or 1 if the daemon
    /// ended first.
    Launch {
        /// The configuration
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// The kind of the VMM [default: cloud-hypervisor if its program's name begins like that, else qemu]
        #[arg(long = "vmm", value_name = "KIND", value_enum)]
        kind: Option<VmmChoice>,
        /// Write the VIOT table or the device tree to this file and keep it. Without it, QEMU gets an unnamed file
        #[arg(long, value_name = "PATH")]
        viot: Option<PathBuf>,
        /// Start a daemon that has ended again up to this many times a minute; beyond that, end the VMM
        #[arg(long, value_name = "N", default_value_t = 5)]
        max_restarts: u32,
        /// The program of the VMM and its own arguments
        #[arg(last = true, required = true, value_name = "VMM")]
        vmm: Vec<OsString>,
    },
    /// Have the running daemon of a VM leave the VM to this program, if this program can go on with it
    ///
    /// Compares the running daemon with this program and with the configuration. If a new daemon would refuse the
    /// VM's state, the running one goes on, and the command fails and says why. Otherwise the running one ends between two
    /// requests, the process that has started it (systemd or `launch`) starts the next one, and the command ends when
    /// that one has taken over. Applies changes of the configuration, too. A daemon that has run for less than 13
    /// seconds is waited for, because systemd and `launch` give up on a daemon that ends too often. The exit status is 1
    /// if the running daemon goes on, and 3 if it has left and the next one has not taken everything over.
    Upgrade {
        /// The configuration, with `control`
        file: PathBuf,
        /// The control socket of the daemon, if it is not `control` of the file
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        /// Do not wait for the next daemon. For ExecReload= of a unit, because systemd starts the next daemon only when
        /// this command has ended
        #[arg(long)]
        no_wait: bool,
    },
    /// Hand the open VFIO devices of a VMM to the daemon of its VM
    ///
    /// For `vfio-from = "vmm"`: the daemon sends its VMM's connection, and gets the VMM's open files of /dev/iommu and of the
    /// devices that the VM's file names. Needs CAP_SYS_PTRACE, and gives up all other capabilities. Without a path, it
    /// serves one connection at the socket that systemd passes (vhost-device-iommu-adopt@NAME.socket), and only the service
    /// vhost-device-iommu@NAME of the file NAME.toml.
    Adopt {
        /// The configuration of the VM
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Create the socket at this path, for this process's user, and serve whoever may connect to it
        #[arg(long, value_name = "PATH")]
        socket_path: Option<PathBuf>,
        /// Let the users of the group with this number connect, too
        #[arg(long, value_name = "GID", requires = "socket_path")]
        socket_group: Option<u32>,
    },
    /// Query or change a running daemon
    Ctl {
        /// The control socket of the daemon
        socket: PathBuf,
        /// Print JSON
        #[arg(long, global = true)]
        json: bool,
        /// The query or change.
        #[command(subcommand)]
        question: Question,
    },
}

/// A query or change of a running daemon.
#[derive(Clone, Debug, Subcommand)]
pub enum Question {
    /// Show the VM, its endpoints, domains and device processes, and counters
    ///
    /// Lists up to 1024 endpoints used by the guest, up to 256 others, and up to 256 domains.
    Status,
    /// List all endpoints
    Endpoints,
    /// List all domains
    Domains,
    /// List mappings
    Mappings {
        /// Only mappings of this domain
        #[arg(long, value_name = "N")]
        domain: Option<u32>,
        /// Only mappings that share an address with this range, such as 0x1000..=0x2fff
        #[arg(long, value_name = "FIRST..=LAST")]
        iova: Option<String>,
    },
    /// List refused accesses: the last 256, and counts
    Faults,
    /// Translate an I/O virtual address of an endpoint
    Translate {
        /// The endpoint, as a PCI address or a number
        endpoint: String,
        /// The address, decimal or with 0x
        iova: String,
    },
    /// Add an endpoint to the running VM
    ///
    /// Plug the device into the VMM afterwards.
    AddEndpoint {
        /// PCI address of the endpoint in the guest, or a range of addresses
        #[arg(value_name = "PCI[-PCI]")]
        endpoint: String,
        /// The other keys of the endpoint, as in the configuration, each in an argument of its own,
        /// such as 'group = "nic0"'
        #[arg(value_name = "KEY = VALUE")]
        keys: Vec<String>,
    },
    /// Remove an endpoint from the running VM
    ///
    /// Unplug the device from the VMM before. When the command returns, the endpoint cannot reach any
    /// memory that was mapped for it.
    RemoveEndpoint {
        /// PCI address of the endpoint in the guest, or a range of addresses
        #[arg(value_name = "PCI[-PCI]")]
        endpoint: String,
    },
    /// Show all counters, the durations of request batches, and each limit with its use
    Stats,
    /// Show the rates of the counters, every second until interrupted
    Watch {
        /// Seconds between two queries
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: u64,
        /// End after this many queries
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Show or change the log level of the daemon
    ///
    /// A change lasts until the daemon ends. Only root and the user of the daemon may change the level.
    LogLevel {
        /// off, error, warn, info, debug or trace; `default` is the level at the start of the daemon
        level: Option<String>,
    },
}
