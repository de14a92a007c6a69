//! Finds the addresses of endpoints that name their device by its ID in QEMU.
//!
//! The guest's table must exist before QEMU starts, and it names devices by their addresses. So nobody can look an address up
//! when the daemon starts. Instead, the operator starts a QEMU with the same devices once, paused, and has the
//! addresses written into the file.
//!
//! QEMU's object model knows the place of a device from the start. Not `query-pci`: it lists no device behind a port until
//! the firmware has given the port's bus a number.

mod edit;
mod error;
mod monitor;
mod place;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use edit::EndpointTables;
pub use edit::replace;
pub use error::ResolveError;
use monitor::MonitorClient;

use crate::config::Config;

/// How long QEMU may take to answer all questions.
const DEADLINE: Duration = Duration::from_secs(10);

/// The addresses for a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// The endpoints without an address, in the order of the file.
    pub found: Vec<FoundDevice>,
    /// The file's text with the addresses. It is a configuration that can be used.
    pub text: String,
}

/// The address of an endpoint's device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDevice {
    /// The position of the endpoint in the file, from 0.
    pub endpoint: usize,
    /// The ID of the device in QEMU.
    pub id: String,
    /// The keys that the endpoint needs, and their values: `address`, or `port` and perhaps `address`.
    pub keys: Vec<(&'static str, String)>,
}

/// The keys as lines to paste below the endpoint's `device`.
impl fmt::Display for FoundDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# endpoint[{}], device = {:?}:", self.endpoint, self.id)?;
        for (key, value) in &self.keys {
            writeln!(f, "{key} = {value:?}")?;
        }
        Ok(())
    }
}

impl Resolution {
    /// Asks the QEMU at the monitor `socket` for the addresses that `file` lacks. Without `socket`, the file's `qmp` is used.
    /// Asks nobody if no address is missing.
    ///
    /// # Errors
    /// The file cannot be read, QEMU does not answer within 10 seconds, has no such device, or has it where no endpoint can
    /// be; or the file with the addresses cannot be used.
    pub fn new(file: &Path, socket: Option<&Path>) -> Result<Self, ResolveError> {
        let text = Config::text_of(file)?;
        let mut tables = EndpointTables::parse(&text).map_err(|syntax| {
            // The reader of configurations says the same in its own words, with the line.
            Config::from_text(file, &text)
                .map_or_else(ResolveError::File, |_| ResolveError::Syntax(syntax))
        })?;
        let wanted = tables.without_address();
        if wanted.is_empty() {
            Config::from_text(file, &text)?;
            return Ok(Self {
                found: Vec::new(),
                text,
            });
        }
        let socket = socket.map(Path::to_owned).or_else(|| tables.qmp());
        let socket: PathBuf = socket.ok_or(ResolveError::NoSocket)?;
        let mut monitor = MonitorClient::connect(&socket, Instant::now() + DEADLINE)
            .map_err(|source| ResolveError::Monitor { socket, source })?;
        let mut found = Vec::new();
        for (endpoint, id) in wanted {
            let keys = place::keys(&mut monitor, &id)?;
            tables.insert(endpoint, &keys);
            found.push(FoundDevice { endpoint, id, keys });
        }
        let text = tables.text();
        Config::from_text(file, &text).map_err(ResolveError::Unusable)?;
        Ok(Self { found, text })
    }
}

#[cfg(test)]
mod tests;
