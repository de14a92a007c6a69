//! A guest's IOMMU as a process of its own: a vhost-user backend for virtio-iommu.
//!
//! The map, from the top down. `docs/architecture.md` walks a request, a fault and a configuration key
//! through it; `tests/layering/` holds the imports that each folder may have.
//!
//! | module | holds |
//! |---|---|
//! | `args` | the command line |
//! | `daemon` | assembly of a running daemon, signals, the service drop-in, the rights that the sandbox must grant |
//! | `control` | the control socket's server, and metrics |
//! | `ctl` | the control socket's client, `ctl` |
//! | `endpoints` | opening the parts of each configured endpoint, by kind of endpoint; hot-plug |
//! | `vmms` | the arguments of VMMs other than QEMU, `launch` |
//! | `qemu` | QEMU's arguments, QMP |
//! | `adopt` | the helper that takes a VMM's open devices out of its process, and its messages |
//! | `host` | this host: its sysfs, the subcommand `check`, the tree of its devices |
//! | `config` | the file and the flags, checked |
//! | `transport` | how a VMM reaches the device: vhost-user, or virtio-pci over vfio-user |
//! | `device` | the virtio device: rings, chains, request queue, event queue, guest memory, polling, resume |
//! | `iommu` | the core: endpoints, domains, and the specification's rules between them |
//! | `store` | what survives the daemon's death beside the page tables: the core's records, the journal of requests |
//! | `backends` | control of the endpoints' DMA: one trait, thin adapters |
//! | `export` | a device of the host, served by the vfio-user server |
//! | `shadow` | readers of the page tables in other processes: their library, and the server that admits them |
//! | `protocol` | virtio-iommu on the wire: types, no actions |
//! | `faults` | the `Fault` type, the queue of faults to the guest, their log |
//! | `vfio_user` | vfio-user: messages, the link to a server, the interposer, one server for every served device |
//! | `vfio` | VFIO and iommufd: the ioctls, and traits above them |
//! | `page_table` | I/O page tables in a sealed memfd: writer, readers, the arena |
//! | `process` | parts that any daemon needs: sandbox, service manager, watchdog, priorities, sockets, event loop |
//! | `topology` | PCI addresses and ranges, host groups, reserved regions, the VIOT table |
//! | `logging` | the VM's log, its limits, the journal |
//! | `locks` | locks with a rank |
//! | `metrics` | counters |
//! | `address` | addresses, ranges, permissions: one type for each address space |
//! | `ids` | identifiers of endpoints and domains |
//!
//! Without the feature `daemon` the crate is a library for device processes: `address`, `ids`, `locks`, `faults`,
//! `page_table` and `shadow`'s reader.

pub mod address;
#[cfg(feature = "daemon")]
pub mod adopt;
#[cfg(feature = "daemon")]
pub mod args;
#[cfg(feature = "daemon")]
pub mod backends;
#[cfg(feature = "daemon")]
pub mod config;
#[cfg(all(feature = "daemon", not(miri)))]
pub mod control;
#[cfg(feature = "daemon")]
pub mod ctl;
#[cfg(all(feature = "daemon", not(miri)))]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod device;
#[cfg(feature = "daemon")]
pub mod endpoints;
#[cfg(feature = "daemon")]
pub mod export;
pub mod faults;
#[cfg(feature = "daemon")]
pub mod host;
pub mod ids;
#[cfg(feature = "daemon")]
pub mod iommu;
pub mod locks;
#[cfg(feature = "daemon")]
pub mod logging;
#[cfg(feature = "daemon")]
pub mod metrics;
pub mod page_table;
#[cfg(feature = "daemon")]
pub mod process;
#[cfg(feature = "daemon")]
pub mod protocol;
#[cfg(feature = "daemon")]
pub mod qemu;
#[cfg(not(miri))]
pub mod shadow;
#[cfg(feature = "daemon")]
pub mod store;
#[cfg(feature = "daemon")]
pub mod topology;
#[cfg(feature = "daemon")]
pub mod transport;
#[cfg(feature = "daemon")]
pub mod vfio;
#[cfg(feature = "daemon")]
pub mod vfio_user;
#[cfg(feature = "daemon")]
pub mod vmms;
