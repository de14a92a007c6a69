//! A client of QEMU's monitor that asks and waits.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::process::connector;
use crate::qemu::lines::{Lines, refuse};

/// A connection that has negotiated.
pub(super) struct MonitorClient {
    lines: Lines<UnixStream>,
    out: UnixStream,
    deadline: Instant,
    /// The number of the last command.
    number: u64,
}

/// Why QEMU does not carry a command out.
pub(super) enum MonitorRefusal {
    /// QEMU says so.
    Refused {
        /// The kind of error, such as `DeviceNotFound`.
        class: String,
        /// QEMU's message, in printable characters.
        why: String,
    },
    /// The connection has ended.
    Ended(io::Error),
}

#[derive(Deserialize)]
struct MonitorMessage {
    #[serde(rename = "QMP")]
    greeting: Option<IgnoredAny>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<MonitorError>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct MonitorError {
    class: String,
    desc: String,
}

impl From<io::Error> for MonitorRefusal {
    fn from(error: io::Error) -> Self {
        Self::Ended(error)
    }
}

impl MonitorClient {
    /// Connects, and negotiates. All reads and writes must end before `deadline`.
    pub fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        // Does not wait: the queue of a listener whose QEMU serves another client is full.
        let stream = UnixStream::from(connector::connect(path)?);
        stream.set_nonblocking(false)?;
        let mut monitor = Self {
            out: stream.try_clone()?,
            lines: Lines::new(stream),
            deadline,
            number: 0,
        };
        if monitor.message()?.greeting.is_none() {
            return refuse("the peer sent no QMP greeting");
        }
        match monitor.execute("qmp_capabilities", &json!({})) {
            Ok(_) => Ok(monitor),
            Err(MonitorRefusal::Ended(cause)) => Err(cause),
            Err(MonitorRefusal::Refused { why, .. }) => Err(io::Error::other(why)),
        }
    }

    /// Reads a property of an object.
    pub fn property(&mut self, path: &str, property: &str) -> Result<Value, MonitorRefusal> {
        self.execute("qom-get", &json!({ "path": path, "property": property }))
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, MonitorRefusal> {
        self.number += 1;
        let message = json!({ "execute": command, "arguments": arguments, "id": self.number });
        self.out.set_write_timeout(Some(self.left()?))?;
        self.out.write_all(format!("{message}\n").as_bytes())?;
        loop {
            // Events have no number.
            let answer = self.message()?;
            if answer.id != Some(self.number) {
                continue;
            }
            return match answer.error {
                None => Ok(answer.returned.unwrap_or(Value::Null)),
                Some(MonitorError { class, desc }) => Err(MonitorRefusal::Refused {
                    class,
                    why: printable(&desc),
                }),
            };
        }
    }

    fn message(&mut self) -> io::Result<MonitorMessage> {
        loop {
            let left = self.left()?;
            if let Some(line) = self.lines.next()? {
                return Ok(serde_json::from_slice(line)?);
            }
            self.lines.stream().set_read_timeout(Some(left))?;
            match self.lines.fill() {
                Ok(true) => {}
                Ok(false) => return refuse("it has closed the connection"),
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                Err(cause) => return Err(cause),
            }
        }
    }

    /// The time that is left, which is not zero.
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(late())
        } else {
            Ok(left)
        }
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer in time")
}

/// The beginning of a peer's text, without control characters.
fn printable(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(200).map(visible).collect()
}
