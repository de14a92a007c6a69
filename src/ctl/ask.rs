//! One query of a running daemon.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

use super::hotplug;
use crate::args::Question;

/// The time a daemon has to answer. It answers its clients one after the other, each within 30 seconds.
const DEADLINE: Duration = Duration::from_secs(35);

/// Why a query has no answer.
#[derive(Debug, Error)]
pub enum CtlError {
    /// No daemon listens on the socket.
    #[error(
        "cannot ask the daemon at {}: {source}; is it running, with --control-path or `control`?",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The connection failed before the answer was complete.
    #[error("the daemon did not answer: {0}")]
    Broken(#[from] io::Error),
    /// The answer is not JSON.
    #[error("the daemon's answer cannot be read: {0}")]
    NotJson(#[from] serde_json::Error),
    /// The daemon refused the query.
    #[error("the daemon says: {0}")]
    Refused(String),
}

/// Queries the daemon whose control socket is at `path`.
///
/// # Errors
/// See [`CtlError`].
pub fn ask(path: &Path, question: &Question) -> Result<Value, CtlError> {
    let line = match question {
        Question::Status => "status".into(),
        Question::Endpoints => "endpoints".into(),
        Question::Domains => "domains".into(),
        Question::Mappings { domain, iova } => {
            let domain = domain.map_or_else(|| "all".into(), |domain| domain.to_string());
            format!("mappings {domain} {}", iova.as_deref().unwrap_or(""))
        }
        Question::Faults => "faults".into(),
        Question::Translate { endpoint, iova } => format!("translate {endpoint} {iova}"),
        Question::Stats | Question::Watch { .. } => "stats".into(),
        Question::LogLevel { level } => {
            format!("log-level {}", level.as_deref().unwrap_or(""))
        }
        Question::AddEndpoint { endpoint, keys } => hotplug::add_line(endpoint, keys),
        Question::RemoveEndpoint { endpoint } => format!("remove-endpoint {endpoint}"),
    };
    send(path, &line)
}

/// Sends a request line to the daemon whose control socket is at `path`. Returns its answer.
///
/// # Errors
/// See [`CtlError`].
pub fn send(path: &Path, line: &str) -> Result<Value, CtlError> {
    let connect = |source| CtlError::Connect {
        path: path.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(connect)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    writeln!(stream, "{line}")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let answer: Value = serde_json::from_str(&text)?;
    match answer.get("error").and_then(Value::as_str) {
        Some(message) => Err(CtlError::Refused(message.into())),
        None => Ok(answer),
    }
}
