//! An NVMe controller in its own process: a vfio-user server with a file as its disk.
//!
//! ```text
//! VMM ---------------------------------------> this server      no IOMMU
//! VMM ---> daemon (vfio-user interposer) ----> this server      --dma messages, --dma mapped
//! VMM ---------------------------------------> this server      --dma shadow=SOCKET
//!            daemon (page tables, faults) <-------+
//! ```
//!
//! The example shows how a device process can reach guest memory. The tests and the demonstration of
//! this crate use it:
//!
//! - `mapped`: the server maps the descriptors of DMA_MAP. It reaches windows without a descriptor by
//!   messages.
//! - `messages`: the server has no guest memory and sends DMA_READ or DMA_WRITE for each access.
//! - `shadow=SOCKET`: the server reads the daemon's page tables with this crate's `shadow` library.
//!
//! `nvme serve` is the server. `nvme access` makes it access an address of the caller's choice, as a
//! faulty or malicious device would (`test_access`).
//!
//! Two threads serve a client. One receives messages and replies at once (`server`). The other is the
//! controller's worker (`controller`): it fetches commands, moves data and waits for the disk. A
//! DMA_UNMAP therefore never waits for the disk, and messages are handled while the worker waits for
//! the reply to a DMA_READ.
//!
//! The server is this crate's `vfio_user::server`. It is not that of the `vfio_user` crate, which has
//! no DMA_READ and DMA_WRITE and loses its position in the stream when a client sends an unknown
//! message.

mod admin;
mod command;
mod controller;
mod disk;
mod identify;
mod io;
mod memory;
mod pci;
mod prp;
mod queues;
mod server;
mod state;
mod test_access;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use clap::Parser;
use log::{error, info};
use vhost_device_iommu::process::socket;
use vhost_device_iommu::topology::PciAddress;

use crate::disk::Disk;
use crate::memory::Manner;
use crate::server::Setup;
use crate::test_access::TestAccess;

/// An NVMe controller as a vfio-user server.
#[derive(Debug, Parser)]
enum Args {
    /// Serves a disk to vfio-user clients.
    Serve(Serve),
    /// Makes a server access guest memory, as tests do, and prints its answer.
    Access {
        /// The socket that the server was given with `--access-socket`.
        socket: PathBuf,
        /// `read ADDRESS LENGTH` or `write ADDRESS BYTE LENGTH`.
        #[arg(required = true)]
        words: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// The socket to listen on for a vfio-user client.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The disk: a file whose length is a multiple of 512, at most 2^63 - 1 bytes.
    #[arg(long, value_name = "FILE")]
    disk: PathBuf,
    /// How the server reaches guest memory: `mapped`, `messages` or `shadow=SOCKET`.
    #[arg(long, value_name = "MANNER")]
    dma: Dma,
    /// With `shadow`, the device's PCI address in the guest.
    #[arg(long, value_name = "PCI")]
    endpoint: Option<PciAddress>,
    /// The socket to listen on for `nvme access`.
    #[arg(long, value_name = "PATH")]
    access_socket: Option<PathBuf>,
}

#[derive(Clone, Debug)]
enum Dma {
    Mapped,
    Messages,
    Shadow(PathBuf),
}

impl FromStr for Dma {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "mapped" => Ok(Self::Mapped),
            None if text == "messages" => Ok(Self::Messages),
            Some(("shadow", path)) if !path.is_empty() => Ok(Self::Shadow(path.into())),
            None | Some(_) => Err("give mapped, messages or shadow=SOCKET".into()),
        }
    }
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let outcome = match Args::parse() {
        Args::Serve(serve) => run(serve),
        Args::Access { socket, words } => request_access(&socket, &words.join(" ")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            error!("{cause}");
            ExitCode::FAILURE
        }
    }
}

fn request_access(socket: &Path, request: &str) -> Result<(), Box<dyn Error>> {
    let answer = test_access::request(socket, request)?;
    println!("{answer}");
    match answer.starts_with("ok") {
        true => Ok(()),
        false => Err("the server could not access guest memory".into()),
    }
}

fn run(args: Serve) -> Result<(), Box<dyn Error>> {
    let manner = match (args.dma, args.endpoint) {
        (Dma::Mapped, None) => Manner::Mapped,
        (Dma::Messages, None) => Manner::Messages,
        (Dma::Shadow(path), Some(endpoint)) => Manner::Shadow {
            path,
            endpoint: endpoint.endpoint_id(),
        },
        (Dma::Shadow(_), None) => {
            return Err("--dma shadow needs --endpoint, too; give the device's PCI address".into());
        }
        (Dma::Mapped | Dma::Messages, Some(_)) => {
            return Err("--endpoint is for --dma shadow only; leave it out".into());
        }
    };
    let disk = Disk::open(&args.disk)?;
    info!("{}: {} blocks", args.disk.display(), disk.blocks());
    let test_access = Arc::new(TestAccess::default());
    let _test_access_file = match args.access_socket {
        Some(path) => {
            let (listener, file) = socket::bind(&path)?;
            test_access::listen(listener, test_access.clone())?;
            Some(file)
        }
        None => None,
    };
    let setup = Setup {
        disk: Arc::new(disk),
        manner,
        test_access,
    };
    let (listener, _file) = socket::bind(&args.socket)?;
    loop {
        let (client, _) = listener.accept()?;
        info!("a client has connected");
        match server::serve(client, &setup) {
            Ok(()) => info!("the client has hung up"),
            Err(cause) => error!("the client is cut off: {cause}"),
        }
    }
}
