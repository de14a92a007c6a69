//! The reader's errors.

use std::io;

use thiserror::Error;

use crate::address::{Access, Iova};
use crate::ids::EndpointId;
use crate::page_table::ArenaError;
use crate::shadow::wire::{EPOCH_WORDS, Refusal, VERSION};

/// Why a process does not become a reader.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Nobody listens there.
    #[error("cannot connect to {path}: {source}; is the daemon running, with a socket there?")]
    Connect {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon does not want it.
    #[error("{}", refusal_text(*refusal, *number))]
    Refused {
        /// Why.
        refusal: Refusal,
        /// A number that explains it.
        number: u64,
    },
    /// The other end does not keep to the protocol.
    #[error("no daemon of this protocol is at the other end: {0}; connect to a `shadow` socket")]
    Protocol(&'static str),
    /// The page tables are not as they should be.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// A system call failed.
    #[error("cannot become a reader: {0}")]
    System(#[from] io::Error),
    /// Guest memory cannot be mapped.
    #[error("guest memory cannot be mapped: {0}")]
    Memory(String),
}

fn refusal_text(refusal: Refusal, number: u64) -> String {
    match refusal {
        Refusal::NoGreeting => "the daemon has not understood the greeting".into(),
        Refusal::Version => format!(
            "the daemon speaks version {number} of the protocol and this library version \
             {VERSION}; build both from the same release"
        ),
        Refusal::User => format!(
            "the daemon lets processes of user {number} in and not of this one; run as that user"
        ),
        Refusal::Endpoint => format!(
            "this socket does not serve endpoint {number:#x}; name it in the daemon's \
             configuration, or connect to its own socket"
        ),
        Refusal::Full => format!("there are {number} readers already; end one of them"),
        Refusal::Process => {
            "the daemon could not end this process, should it have to; run both as the same user"
                .into()
        }
        Refusal::Resources => {
            "the daemon lacks memory or descriptors for another reader; raise its limits".into()
        }
    }
}

/// Why an access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AccessError {
    /// The IOMMU does not allow it. The guest is told.
    #[error("endpoint {endpoint} has no {access} access at {address}")]
    Fault {
        /// The endpoint.
        endpoint: EndpointId,
        /// What it tried.
        access: Access,
        /// The first address at which it is refused.
        address: Iova,
    },
    /// The daemon is gone, and nothing is reached any more.
    #[error("the IOMMU is gone; connect anew")]
    Disconnected,
    /// Memory has gone since this view of it was asked for.
    #[error("guest memory has changed; ask for it again")]
    Outdated,
    /// Too many accesses are in progress in this process.
    #[error("{EPOCH_WORDS} accesses are in progress in this process; end one before the next")]
    Busy,
    /// The range is empty, or passes the last address that can be reached.
    #[error("{length} bytes from {address} cannot be reached by one access")]
    Range {
        /// The first address.
        address: Iova,
        /// The length in bytes.
        length: u64,
    },
}
