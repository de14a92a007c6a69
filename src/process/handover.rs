//! A daemon's description of itself for the program that is to take over from it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The shortest life of a daemon that is asked to leave. The unit and `launch` allow five starts in 60 seconds: planned ends
/// alone must never reach that limit, beyond which the VM has no IOMMU any more.
pub const MIN_AGE: Duration = Duration::from_secs(13);

/// What a program must know before a daemon leaves its state to it. Each daemon tells this at its control socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The absolute path by which the daemon was started, and at which its keeper finds the next one; `None` if it is not
    /// known.
    pub program: Option<PathBuf>,
    /// The formats of the memory that the daemon leaves, by name, with their versions.
    pub formats: BTreeMap<String, u64>,
    /// The configured part of the offer to the guest, by name. The host's devices may narrow it.
    pub offer: BTreeMap<String, String>,
    /// The feature bits that the guest was offered.
    pub features: u64,
    /// The endpoints that have a group or reserved regions of their own, by range, with both.
    pub endpoints: BTreeMap<String, String>,
    /// Connections that end with the daemon, although another one takes over.
    pub ends: Vec<String>,
    /// The endpoints that were added and removed since the file was read, which the next daemon changes, too; null if the
    /// daemon is of a version that leaves none.
    #[serde(default)]
    pub changes: Value,
}
