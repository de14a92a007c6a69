//! An NVMe controller in a process of its own: a vfio-user server, and a file as its disk.
//!
//! ```text
//! VMM ---------------------------------------> this server      no IOMMU
//! VMM ---> daemon (vfio-user interposer) ----> this server      --dma messages, --dma mapped
//! VMM ---------------------------------------> this server      --dma shadow=SOCKET
//!            daemon (page tables, faults) <-------+
//! ```
//!
//! It shows how a device process can reach guest memory, and serves the tests and the
//! demonstration of this crate:
//!
//! - `mapped`: it maps the descriptors that come with DMA_MAP. Where none came, it asks.
//! - `messages`: it asks for each access with DMA_READ and DMA_WRITE, and has no guest memory.
//! - `shadow=SOCKET`: it follows the daemon's page tables with this crate's `shadow` library.
//!
//! `nvme serve` is the server. `nvme order` has it make an access of its own, as one that has gone
//! wrong would (see `orders`).
//!
//! Two threads serve a client: `server` takes messages and answers at once, `controller` has a
//! worker that fetches commands, moves data and waits for the disk. So a DMA_UNMAP never waits for
//! a disk, and whatever arrives while the worker waits for the reply to a DMA_READ is served.
//!
//! The messages are taken apart by this crate's `vfio_user` modules and not by the `vfio_user`
//! crate, whose server has no DMA_READ and DMA_WRITE and loses its place in the stream of messages
//! where a client sends one it does not know.

mod admin;
mod command;
mod controller;
mod disk;
mod identify;
mod io;
mod memory;
mod orders;
mod pci;
mod prp;
mod queues;
mod server;
mod state;
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
use crate::orders::Orders;
use crate::server::Setup;

/// An NVMe controller as a vfio-user server.
#[derive(Debug, Parser)]
enum Args {
    /// Serves a disk.
    Serve(Serve),
    /// Orders a server to access guest memory, and prints its answer.
    Order {
        /// Where the server takes orders.
        socket: PathBuf,
        /// `read ADDRESS LENGTH` or `write ADDRESS BYTE LENGTH`.
        #[arg(required = true)]
        words: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// Where to listen for a vfio-user client.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The disk: a file of whole blocks of 512 bytes, no longer than 2^63 - 1 bytes.
    #[arg(long, value_name = "FILE")]
    disk: PathBuf,
    /// How guest memory is reached: `mapped`, `messages`, or `shadow=SOCKET`.
    #[arg(long, value_name = "MANNER")]
    dma: Dma,
    /// With `shadow`: the device's PCI address in the guest.
    #[arg(long, value_name = "PCI")]
    endpoint: Option<PciAddress>,
    /// Where to take orders for accesses of the device's own, with which tests see what becomes of
    /// them.
    #[arg(long, value_name = "PATH")]
    orders: Option<PathBuf>,
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
            None | Some(_) => Err("say mapped, messages or shadow=SOCKET".into()),
        }
    }
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let outcome = match Args::parse() {
        Args::Serve(serve) => run(serve),
        Args::Order { socket, words } => order(&socket, &words.join(" ")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            error!("{cause}");
            ExitCode::FAILURE
        }
    }
}

fn order(socket: &Path, order: &str) -> Result<(), Box<dyn Error>> {
    let answer = orders::give(socket, order)?;
    println!("{answer}");
    match answer.starts_with("ok") {
        true => Ok(()),
        false => Err("the server could not".into()),
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
        (Dma::Shadow(_), None) => return Err("--dma shadow needs --endpoint too".into()),
        (Dma::Mapped | Dma::Messages, Some(_)) => {
            return Err("--endpoint goes with --dma shadow only; leave it out".into());
        }
    };
    let disk = Disk::open(&args.disk)?;
    info!("{}: {} blocks", args.disk.display(), disk.blocks());
    let orders = Arc::new(Orders::default());
    let _orders_file = match args.orders {
        Some(path) => {
            let (listener, file) = socket::bind(&path)?;
            orders::listen(listener, orders.clone())?;
            Some(file)
        }
        None => None,
    };
    let setup = Setup {
        disk: Arc::new(disk),
        manner,
        orders,
    };
    let (listener, _file) = socket::bind(&args.socket)?;
    loop {
        let (client, _) = listener.accept()?;
        info!("a client is here");
        match server::serve(client, &setup) {
            Ok(()) => info!("the client has gone"),
            Err(cause) => error!("the client is sent away: {cause}"),
        }
    }
}
