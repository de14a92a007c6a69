//! The command line, as typed: nothing here is checked beyond its shape.
//!
//! Imports nothing of this crate, so that the manual page can be made from it alone.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// A guest's IOMMU as a process of its own: a vhost-user backend for virtio-iommu
///
/// Serves one virtual machine. The configuration comes from a TOML file (--config), from the
/// options below, or from both: an option overrides the file's key of the same meaning.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "vhost-device-iommu",
    version,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    /// What to do instead of serving a virtual machine.
    #[command(subcommand)]
    pub command: Option<CliCommand>,
    /// How to serve one.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Options of the daemon itself.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct RunArgs {
    /// Read the configuration from this TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Listen for the VMM on a socket made at this path
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Listen for the VMM on this inherited descriptor of a listening socket
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub fd: Option<i32>,

    /// Write a line feed to this inherited descriptor, and close it, once the sockets listen
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub ready_fd: Option<i32>,

    /// Answer `ctl` on a socket made at this path
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,

    /// PCI address of the IOMMU itself, such as 00:05.0
    #[arg(long, value_name = "PCI")]
    pub iommu: Option<String>,

    /// A PCI address behind the IOMMU, or a range of them such as 00:10.0-00:1e.7; may be
    /// repeated, and replaces the file's endpoints
    #[arg(long, value_name = "PCI[-PCI]")]
    pub endpoint: Vec<String>,

    /// Bits of an I/O virtual address, 32 to 57 [default: 48]
    #[arg(long, value_name = "N")]
    pub address_width: Option<u64>,

    /// Whether endpoints outside every domain pass untranslated at boot [default: on]
    #[arg(long, value_name = "on|off", hide_possible_values = true)]
    pub bypass: Option<OnOff>,

    /// Smallest page of a mapping: 4k, 16k, 64k or 2m [default: 4k]
    #[arg(long, value_name = "SIZE")]
    pub granule: Option<String>,

    /// Addresses no endpoint may map; may be repeated, and replaces the file's list
    /// [default: 0xfee00000..=0xfeefffff:msi]
    #[arg(long, value_name = "FIRST..=LAST:msi|reserved")]
    pub reserved: Vec<String>,

    /// Reserve no addresses for all endpoints, not even the default MSI window
    #[arg(long, conflicts_with = "reserved")]
    pub no_reserved: bool,

    /// Size of guest RAM, such as 2G
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,

    /// Most memory the page tables may take [default: memory / 256 + 64M]
    #[arg(long, value_name = "SIZE")]
    pub arena_limit: Option<String>,

    /// What the devices of the host are reached through.
    #[command(flatten)]
    pub descriptors: DescriptorArgs,

    /// Use this inherited descriptor of a VFIO container, whose IOMMU is set, for the endpoint with
    /// this address in the guest; may be repeated
    #[arg(long, value_name = "ADDRESS=N")]
    pub vfio_container_fd: Vec<String>,

    /// Run without the sandbox, for debugging only: a fault in the daemon is then the host's
    #[arg(long)]
    pub no_sandbox: bool,

    /// Name a forbidden system call on standard error before ending, instead of being ended at
    /// once, for debugging only
    #[arg(long, conflicts_with = "no_sandbox")]
    pub sandbox_report: bool,

    /// Print what this backend can do as JSON and exit; everything else is ignored
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Inherited descriptors that a VMM uses too.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct DescriptorArgs {
    /// Use this inherited descriptor of /dev/iommu
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub iommufd_fd: Option<i32>,

    /// Use this inherited descriptor of a device of the host for the endpoint with this address in
    /// the guest; may be repeated
    #[arg(long, value_name = "ADDRESS=N")]
    pub vfio_fd: Vec<String>,
}

/// A switch that is written out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Yes.
    On,
    /// No.
    Off,
}

/// What to do instead of serving a virtual machine.
#[derive(Clone, Debug, Subcommand)]
pub enum CliCommand {
    /// Check a configuration file and print what it says
    ///
    /// Where endpoints are devices of the host, also print what this host lacks for them, and the
    /// cure; the exit status is 1 if anything is missing. Nothing is changed, and VMs that run do
    /// not notice.
    Check {
        /// The configuration
        file: PathBuf,
        /// Leave out this host
        #[arg(long)]
        file_only: bool,
    },
    /// Print which endpoints are which devices of this host, their groups and reserved regions
    Topology {
        /// The configuration
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write the ACPI VIOT table that tells the guest which devices are behind the IOMMU
    Viot {
        /// The configuration
        file: PathBuf,
        /// Write to this file instead of standard output, which must not be a terminal
        #[arg(short, long, value_name = "OUT")]
        output: Option<PathBuf>,
    },
    /// Print the QEMU (10.2 or later) arguments that go with a configuration, one to a line
    ///
    /// What cannot be an argument, such as the addresses to give to devices, is printed on
    /// standard error.
    QemuArgs {
        /// The configuration
        file: PathBuf,
        /// Where QEMU finds the table written by `viot` [default: FILE with the ending .viot]
        #[arg(long, value_name = "PATH")]
        viot: Option<PathBuf>,
        /// Print one line, quoted for a POSIX shell
        #[arg(long)]
        shell: bool,
        /// The descriptors that QEMU will inherit [default: 3 and up].
        #[command(flatten)]
        descriptors: DescriptorArgs,
    },
    /// Print what a configuration asks of systemd beyond the unit that all daemons share
    ///
    /// A drop-in for vhost-device-iommu@.service: memory, descriptors, threads, and devices of the host
    /// where there are any. The package's generator calls this.
    DropIn {
        /// The configuration
        file: PathBuf,
    },
    /// Start the daemon and a VMM (QEMU 10.2 or later), and end them together
    ///
    /// The VMM's program and its own arguments stand after --, as in
    /// `launch --config vm0.toml -- qemu-system-x86_64 -smp 4`.
    ///
    /// Opens the devices of the host for both, and adds to the VMM's arguments those that `qemu-args`
    /// prints, without a machine type and RAM where they are given. The exit status is the VMM's, 128
    /// and the number for a signal, or 1 where the daemon ended first.
    Launch {
        /// The configuration
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Write the VIOT table to this file and leave it there, instead of a file without a name
        #[arg(long, value_name = "PATH")]
        viot: Option<PathBuf>,
        /// The VMM's program and its own arguments
        #[arg(last = true, required = true, value_name = "VMM")]
        vmm: Vec<OsString>,
    },
    /// Ask a running daemon
    Ctl {
        /// Its control socket
        socket: PathBuf,
        /// Print JSON
        #[arg(long, global = true)]
        json: bool,
        /// The question
        #[command(subcommand)]
        question: Question,
    },
}

/// What a running daemon can be asked.
#[derive(Clone, Debug, Subcommand)]
pub enum Question {
    /// The VM, its endpoints and domains, devices in other processes, and counts
    ///
    /// Lists the endpoints the guest has touched, up to 256 others, and up to 256 domains.
    Status,
    /// All endpoints
    Endpoints,
    /// All domains
    Domains,
    /// Live mappings
    Mappings {
        /// Of this domain only
        #[arg(long, value_name = "N")]
        domain: Option<u32>,
        /// Only those that share an address with this range, such as 0x1000..=0x2fff
        #[arg(long, value_name = "FIRST..=LAST")]
        iova: Option<String>,
    },
    /// Accesses that were refused: the last 256, and counts
    Faults,
    /// Where an endpoint's access to an I/O virtual address goes
    Translate {
        /// The endpoint, as a PCI address or a number
        endpoint: String,
        /// The address, decimal or with 0x
        iova: String,
    },
    /// Add an endpoint to the running VM
    ///
    /// The device itself is plugged in afterwards, by the VMM.
    AddEndpoint {
        /// Its PCI address in the guest, or a range of them
        #[arg(value_name = "PCI[-PCI]")]
        endpoint: String,
        /// What else would stand below its address in the configuration, each key in an
        /// argument of its own, such as 'group = "nic0"'
        #[arg(value_name = "KEY = VALUE")]
        keys: Vec<String>,
    },
    /// Remove an endpoint from the running VM
    ///
    /// The device itself is unplugged before, by the VMM. Nothing that the endpoint had mapped is in
    /// its reach when this returns.
    RemoveEndpoint {
        /// Its PCI address in the guest, or a range of them
        #[arg(value_name = "PCI[-PCI]")]
        endpoint: String,
    },
    /// All counters, the times of request batches, and each limit with its use
    Stats,
    /// Show the rates of what happens, each second anew, until interrupted
    Watch {
        /// Seconds between two looks
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: u64,
        /// End after so many
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Show or change how much the daemon logs
    ///
    /// What is changed lasts until the daemon ends. Only root and the user it runs as may change it.
    LogLevel {
        /// off, error, warn, info, debug or trace, or default for what it was started with
        level: Option<String>,
    },
}
