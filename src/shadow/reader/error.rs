//! Why a process cannot become a reader, and why an access fails.

use std::io;

use thiserror::Error;

use crate::address::{Access, Iova};
use crate::ids::EndpointId;
use crate::page_table::ArenaError;
use crate::shadow::wire::{EPOCH_WORDS, Refusal, VERSION, endpoint_text};

/// Why a process cannot become a reader.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No daemon listens at the path.
    #[error(
        "cannot connect to {path}: {source}; start the daemon, with a `shadow` socket at that path"
    )]
    Connect {
        /// The path.
        path: String,
        /// The system's error.
        source: io::Error,
    },
    /// The daemon refuses the registration.
    #[error("{}", refusal_text(*refusal, *number))]
    Refused {
        /// The daemon's reason.
        refusal: Refusal,
        /// A number whose meaning depends on the reason, see [`Refusal`].
        number: u64,
    },
    /// The peer breaks the protocol.
    #[error("the peer does not speak the readers' protocol: {0}; connect to a `shadow` socket")]
    Protocol(&'static str),
    /// The daemon passed page tables that cannot be used.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// A system call failed.
    #[error("cannot become a reader: {0}")]
    System(#[from] io::Error),
    /// Guest memory cannot be mapped into this process.
    #[error("cannot map guest memory: {0}")]
    Memory(String),
}

fn refusal_text(refusal: Refusal, number: u64) -> String {
    match refusal {
        Refusal::NoGreeting => "the daemon does not accept the greeting; connect to a `shadow` socket".into(),
        Refusal::Version => format!(
            "the daemon speaks version {number} of the protocol and this library version \
             {VERSION}; build both from the same release"
        ),
        Refusal::User => format!(
            "the daemon accepts processes of user {number}, not of this one; run as that user, or \
             add this one to `users` of `[readers]`"
        ),
        Refusal::Endpoint => format!(
            "this socket does not serve {}; name it in the daemon's configuration, or connect to its own \
             socket",
            endpoint_text(number)
        ),
        Refusal::Full => format!("there are {number} readers already, which is the limit; end one of them"),
        Refusal::Process => {
            "the daemon must be able to kill its readers and has no right to kill this process; run both \
             as the same user"
                .into()
        }
        Refusal::Resources => {
            "the daemon lacks memory or descriptors for another reader, or the endpoint has had too many new ones; raise \
             its limits, or try again later"
                .into()
        }
    }
}

/// Why an access fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AccessError {
    /// The IOMMU does not allow the access. The library reports it to the guest as a fault.
    #[error("endpoint {endpoint} has no {access} access at {address}")]
    Fault {
        /// The endpoint.
        endpoint: EndpointId,
        /// The access that the device tried.
        access: Access,
        /// The first address without that access.
        address: Iova,
    },
    /// No daemon is connected. The library registers again by itself; accesses succeed once it has.
    #[error(
        "no daemon is connected; start it, and repeat the access: the library registers again by itself"
    )]
    Disconnected,
    /// The VMM has removed memory since this view of guest memory was taken.
    #[error("guest memory has changed since this view of it was taken; take a new one")]
    Outdated,
    /// This process already has as many accesses in progress as it may have.
    #[error("{EPOCH_WORDS} accesses are in progress in this process; end one before the next")]
    Busy,
    /// The range passes the last address that `vm-memory` can reach.
    #[error(
        "{length} bytes at {address} pass the last address; use a lower address or fewer bytes"
    )]
    Range {
        /// The first address.
        address: Iova,
        /// Bytes.
        length: u64,
    },
}
