//! The daemon's command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use vhost_device_iommu::address::{Iova, IovaRange, PageMask};
use vhost_device_iommu::config::{Config, Socket};
use vhost_device_iommu::daemon::Daemon;
use vhost_device_iommu::topology::{
    EndpointSpec, PciAddress, PciRange, ReservedKind, ReservedRegion, ReservedRegions, Topology,
};

#[derive(Parser)]
struct Args {
    #[arg(long)]
    socket_path: PathBuf,
    #[arg(long)]
    control_path: Option<PathBuf>,
    #[arg(long)]
    iommu: String,
    #[arg(long)]
    endpoint: Vec<String>,
    #[arg(long, default_value = "64M")]
    arena_limit: String,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let args = Args::parse();
    let msi = ReservedRegion {
        range: IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).expect("range"),
        kind: ReservedKind::Msi,
    };
    let specs: Vec<_> = args
        .endpoint
        .iter()
        .map(|e| {
            let (first, last) = e.split_once('-').unwrap_or((e, e));
            let first: PciAddress = first.parse().expect("address");
            let last: PciAddress = last.parse().expect("address");
            EndpointSpec {
                range: PciRange::new(first, last).expect("range"),
                group: None,
                reserved: Vec::new(),
            }
        })
        .collect();
    let config = Config {
        socket: Some(Socket::Path(args.socket_path)),
        control: args.control_path,
        address_width: 48,
        page_mask: PageMask::TABLE,
        bypass_at_boot: true,
        max_domains: 65536,
        memory: None,
        arena_limit: args
            .arena_limit
            .trim_end_matches('M')
            .parse::<u64>()
            .expect("MiB")
            << 20,
        topology: Topology::new(
            args.iommu.parse().expect("address"),
            ReservedRegions::new(vec![msi]).expect("regions"),
            &specs,
        )
        .expect("topology"),
    };
    let mut daemon = match Daemon::new(&config) {
        Ok(daemon) => daemon,
        Err(cause) => {
            eprintln!("error: {cause}");
            return ExitCode::FAILURE;
        }
    };
    match daemon.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("error: {cause}");
            ExitCode::FAILURE
        }
    }
}
