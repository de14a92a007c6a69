//! One VM's configuration: checked values, made once.

use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::address::PageMask;
use crate::topology::Topology;

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
    /// Where the frontend connects; `None` only where the configuration is not for running.
    pub socket: Option<Socket>,
    /// The path of the control socket, if there is to be one.
    pub control: Option<PathBuf>,
    /// Bits of an I/O virtual address: `32..=57`.
    pub address_width: u8,
    /// The page sizes offered to the guest: the granule, and 2 MiB and 1 GiB where not smaller.
    pub page_mask: PageMask,
    /// Whether endpoints that no domain holds pass untranslated when the VM starts.
    pub bypass_at_boot: bool,
    /// The number of domains that can live at once; their IDs are `0..max_domains`.
    pub max_domains: u32,
    /// The size of guest RAM in bytes, if known.
    pub memory: Option<u64>,
    /// The most bytes the page tables may take: a multiple of 4 KiB.
    pub arena_limit: u64,
    /// The IOMMU's own address, the endpoints, their groups and reserved regions.
    pub topology: Topology,
}
