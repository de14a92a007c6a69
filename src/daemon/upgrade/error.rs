//! Why a running daemon has not left its VM to this program, or why the next one has not taken it over.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::config::{ConfigError, Contradiction};
use crate::ctl::CtlError;

/// Why the VM has no new daemon. Unless the error says otherwise, the running one goes on.
#[derive(Debug, Error)]
pub enum UpgradeError {
    /// The configuration is refused.
    #[error("the running daemon goes on: {0}")]
    Config(#[from] ConfigError),
    /// The configuration names no control socket.
    #[error(
        "the running daemon goes on: {} has no `control`, where the daemon tells what it will leave; name its control socket \
         with --control, or write `control` before the next start of the VM",
        .0.display()
    )]
    NoControl(PathBuf),
    /// The daemon does not answer, or refuses to leave.
    #[error("the daemon was not asked to leave: {0}")]
    Ctl(#[from] CtlError),
    /// The daemon is of a version without this command.
    #[error(
        "the running daemon goes on: it is of a version that does not tell what it will leave ({0}); stop the VM, and start \
         the new daemon with it"
    )]
    Silent(serde_json::Error),
    /// Nobody keeps the daemon's state, or the VMM's connection.
    #[error(
        "the running daemon goes on: nobody keeps its state or its VMM's connection (see its log), so the VM's IOMMU would \
         end with it; stop the VM, and run the daemon with `launch` or as a service of systemd 254 or later"
    )]
    NotKept,
    /// The next daemon would be another program.
    #[error(
        "the running daemon goes on: its next start runs {}{}, and this program is {}; run `upgrade` of that program, after \
         it was replaced",
        program.display(),
        cause.as_ref().map(|cause| format!(" ({cause})")).unwrap_or_default(),
        own.display()
    )]
    Program {
        /// The path of the daemon's program.
        program: PathBuf,
        /// Why it cannot be found.
        cause: Option<io::Error>,
        /// The path of this program.
        own: PathBuf,
    },
    /// This program does not read what the daemon will leave.
    #[error(
        "the running daemon goes on: it leaves \"{name}\" of version {version}, and this program ({}) reads {}; install a \
         version in between, or stop the VM and start the new daemon with it",
        env!("CARGO_PKG_VERSION"),
        reads.map_or_else(|| "none".to_owned(), |version| format!("version {version}"))
    )]
    Format {
        /// The name of the format.
        name: String,
        /// The version that the daemon writes.
        version: u64,
        /// The version that this program reads.
        reads: Option<u64>,
    },
    /// The configuration offers the guest something else.
    #[error(
        "the running daemon goes on: the guest was offered \"{name}\": {}, and {} has: {}; change the file back, or stop the \
         VM and start the daemon with it",
        was.as_deref().unwrap_or("none"),
        file.display(),
        now.as_deref().unwrap_or("none")
    )]
    Offer {
        /// The property.
        name: String,
        /// The running daemon's.
        was: Option<String>,
        /// The configuration's.
        now: Option<String>,
        /// The file of the configuration.
        file: PathBuf,
    },
    /// The file has something else where `ctl` has added an endpoint.
    #[error(
        "the running daemon goes on: {contradiction}; change {} back, or unplug the device and remove the endpoint with `ctl`",
        file.display()
    )]
    Contradiction {
        /// The endpoint.
        contradiction: Contradiction,
        /// The file of the configuration.
        file: PathBuf,
    },
    /// The guest uses an endpoint that is not configured.
    #[error(
        "the running daemon goes on: the guest uses the endpoint {address}, which {} does not have; change the file back, or \
         unplug the device and remove the endpoint with `ctl`",
        file.display()
    )]
    Endpoint {
        /// The endpoint.
        address: String,
        /// The file of the configuration.
        file: PathBuf,
    },
    /// The guest uses an endpoint that has another group or other reserved regions.
    #[error(
        "the running daemon goes on: the guest uses the endpoint {address}, which was offered with: {}, and {} has: {}; change \
         the file back, or stop the VM and start the daemon with it",
        was.as_deref().unwrap_or("none"),
        file.display(),
        now.as_deref().unwrap_or("none")
    )]
    EndpointOffer {
        /// The endpoint.
        address: String,
        /// The running daemon's group and regions.
        was: Option<String>,
        /// The configuration's.
        now: Option<String>,
        /// The file of the configuration.
        file: PathBuf,
    },
    /// The mappings do not fit.
    #[error(
        "the running daemon goes on: its page tables have {used} bytes, and {} has an `arena-limit` of {limit}; raise it",
        file.display()
    )]
    Arena {
        /// The bytes in use.
        used: u64,
        /// The configured limit.
        limit: u64,
        /// The file of the configuration.
        file: PathBuf,
    },
    /// A connection would end.
    #[error(
        "the running daemon goes on: these connections would end with it: {0}; stop the VM and start the new daemon with \
         it, or restart the daemon if the guest can do without these devices"
    )]
    Ends(String),
    /// No next daemon answers.
    #[error(
        "THE DAEMON HAS LEFT, and the next one does not answer after {} s; read the log of the daemon's service, or what \
         `launch` has printed",
        .0.as_secs()
    )]
    NoSuccessor(Duration),
    /// The next daemon has refused the state.
    #[error(
        "THE DAEMON HAS LEFT, and the next one has refused its state, so all endpoints are blocked: {0}"
    )]
    Refused(String),
    /// The next daemon has not taken everything over.
    #[error(
        "THE DAEMON HAS LEFT, and the next one has not taken everything over: {0}; read its log"
    )]
    Lost(String),
}

impl UpgradeError {
    /// Whether the daemon has left all the same. If not, the running one goes on.
    pub fn has_left(&self) -> bool {
        matches!(
            self,
            Self::NoSuccessor(_) | Self::Refused(_) | Self::Lost(_)
        )
    }

    /// What the operator must know besides the error: the keeper starts the installed program with the present file after a
    /// crash, without these comparisons. `None` if that is as good as a start of the old ones.
    pub fn warning(&self) -> Option<&'static str> {
        match self {
            Self::Config(_)
            | Self::NoControl(_)
            | Self::Silent(_)
            | Self::Program { .. }
            | Self::Format { .. }
            | Self::Offer { .. }
            | Self::Contradiction { .. }
            | Self::Endpoint { .. }
            | Self::EndpointOffer { .. }
            | Self::Arena { .. } => Some(
                "if the running daemon crashes before that, its keeper starts the installed program with the present file \
                 all the same, which may block all endpoints; if the cure must wait, put the earlier program and the \
                 earlier file back",
            ),
            Self::Ctl(_)
            | Self::NotKept
            | Self::Ends(_)
            | Self::NoSuccessor(_)
            | Self::Refused(_)
            | Self::Lost(_) => None,
        }
    }
}
