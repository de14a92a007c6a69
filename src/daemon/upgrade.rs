//! `upgrade`: has a running daemon leave its VM to this program, if this program can go on with it.
//!
//! 1. The running daemon tells what it will leave, at its control socket ([`Handover`]).
//! 2. This program compares that with the formats that it reads, and with the configuration.
//! 3. If all of it agrees, the daemon is asked to leave. It ends as at SIGTERM, and its keeper starts the next one.
//!
//! The running daemon goes on if any comparison fails. A restart without these comparisons would end in a daemon that
//! refuses the state, and blocks every endpoint until the guest starts anew.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fmt, io};

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::handover::handover;
use crate::args::Question;
use crate::config::{Config, ConfigError, Machine};
use crate::ctl::{self, CtlError};
use crate::ids::EndpointId;
use crate::process::handover::Handover;

/// The shortest life of a daemon that is asked to leave. The unit and `launch` allow five starts in 60 seconds: planned ends
/// alone must never reach that limit, beyond which the VM has no IOMMU any more.
const MIN_AGE: Duration = Duration::from_secs(13);
/// How often the next daemon is looked for.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long a daemon may take to leave, and the next one to take over, beside the time that a start takes.
const PATIENCE: Duration = Duration::from_secs(30);

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
    /// The guest uses an endpoint that is not configured.
    #[error(
        "the running daemon goes on: the guest uses the endpoint {address}, which {} does not have; add it there, or \
         unplug the device and remove the endpoint with `ctl`",
        file.display()
    )]
    Endpoint {
        /// The endpoint.
        address: String,
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
}

/// A daemon that is to leave its VM to this program.
pub struct Upgrade {
    file: PathBuf,
    control: PathBuf,
    /// How long the next daemon may take.
    patience: Duration,
    /// The number of the running daemon's process.
    process: Option<u64>,
    life: u64,
}

/// The daemon that has taken over.
#[derive(Debug)]
pub struct NextDaemon {
    name: String,
    version: String,
    life: u64,
    resumed_after_ms: Option<f64>,
}

impl Upgrade {
    /// Compares the running daemon with this program and the configuration in `file`. `control` is the daemon's control
    /// socket, if it is not the one in the file. Waits for a daemon that has just begun.
    ///
    /// # Errors
    /// See [`UpgradeError`]. The running daemon goes on.
    pub fn new(file: &Path, control: Option<&Path>) -> Result<Self, UpgradeError> {
        let mut config = Config::from_file(file)?;
        let control = control.map(Path::to_owned).or(config.control.take());
        let control = control.ok_or_else(|| UpgradeError::NoControl(file.to_owned()))?;
        let mut status = examine(file, &control)?;
        let age = status["life"]["age_s"].as_f64().unwrap_or(0.0);
        let left = MIN_AGE.saturating_sub(Duration::from_secs_f64(age.clamp(0.0, 1e6)));
        if !left.is_zero() {
            sleep(left);
            status = examine(file, &control)?;
        }
        Ok(Self {
            file: file.to_owned(),
            control,
            patience: config.start_limit().saturating_add(PATIENCE),
            process: status["life"]["pid"].as_u64(),
            life: status["life"]["number"].as_u64().unwrap_or(1),
        })
    }

    /// Asks the running daemon to leave. It ends after this call.
    ///
    /// # Errors
    /// It does not answer, or refuses.
    pub fn leave(&self) -> Result<(), UpgradeError> {
        let line = format!("leave {}", self.life);
        ctl::send(&self.control, &line)?;
        Ok(())
    }

    /// Waits until the next daemon has taken over.
    ///
    /// # Errors
    /// There is none, or it has refused the state.
    pub fn wait(&self) -> Result<NextDaemon, UpgradeError> {
        let deadline = Instant::now() + self.patience;
        while Instant::now() < deadline {
            sleep(INTERVAL);
            // Fails while there is no daemon, or while it ends.
            let Ok(status) = ctl::ask(&self.control, &Question::Status) else {
                continue;
            };
            let life = &status["life"];
            if life["pid"].as_u64() == self.process || life["state"] == "taking-over" {
                continue;
            }
            if life["state"] == "refused" {
                let reason = life["reason"].as_str().unwrap_or("no reason");
                return Err(UpgradeError::Refused(reason.into()));
            }
            return Ok(NextDaemon::new(&status, &self.file));
        }
        Err(UpgradeError::NoSuccessor(self.patience))
    }
}

impl NextDaemon {
    fn new(status: &Value, file: &Path) -> Self {
        let life = &status["life"];
        let name = status["name"].as_str();
        Self {
            name: name.map_or_else(|| file.display().to_string(), str::to_owned),
            version: life["version"].as_str().unwrap_or("unknown").into(),
            life: life["number"].as_u64().unwrap_or(1),
            resumed_after_ms: life["resumed_after_ms"].as_f64(),
        }
    }
}

impl fmt::Display for NextDaemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            version,
            life,
            ..
        } = self;
        write!(
            f,
            "{name}: a daemon of version {version} goes on (life {life})"
        )?;
        match self.resumed_after_ms {
            Some(after) => write!(
                f,
                ", and the guest was answered {after:.1} ms after its start"
            ),
            None => Ok(()),
        }
    }
}

/// The status of the daemon at `control`, if this program can go on with the configuration in `file` where it ends.
fn examine(file: &Path, control: &Path) -> Result<Value, UpgradeError> {
    let status = ctl::ask(control, &Question::Status)?;
    // `launch` tells the daemon by an option what the VMM emulates. The file may leave it out.
    let machine = &status["handover"]["offer"]["machine"];
    let is_virt = machine == Machine::Virt.name();
    let config = Config::for_machine(file, is_virt.then_some(Machine::Virt))?;
    if let Some(program) = status["handover"]["program"].as_str() {
        check_program(Path::new(program))?;
    }
    let endpoints = ctl::ask(control, &Question::Endpoints)?;
    compare(file, &config, &status, &endpoints)?;
    Ok(status)
}

/// Whether `program`, which the keeper will start, is this one.
fn check_program(program: &Path) -> Result<(), UpgradeError> {
    let Ok(own) = std::env::current_exe() else {
        // Without /proc it is not known.
        return Ok(());
    };
    let cause = match program.canonicalize() {
        Ok(found) if found == own => return Ok(()),
        Ok(_) => None,
        Err(cause) => Some(cause),
    };
    Err(UpgradeError::Program {
        program: program.to_owned(),
        cause,
        own,
    })
}

/// Whether a daemon of this program with `config` can go on where the one with this `status` and these `endpoints` ends.
fn compare(
    file: &Path,
    config: &Config,
    status: &Value,
    endpoints: &Value,
) -> Result<(), UpgradeError> {
    let theirs = Handover::deserialize(&status["handover"]).map_err(UpgradeError::Silent)?;
    let ours = handover(config);
    if status["life"]["kept"] != true {
        return Err(UpgradeError::NotKept);
    }
    // Without a VMM there is no guest that could notice.
    if status["connected"] != true {
        return Ok(());
    }
    for (name, &version) in &theirs.formats {
        let reads = ours.formats.get(name).copied();
        if reads != Some(version) {
            let name = name.clone();
            return Err(UpgradeError::Format {
                name,
                version,
                reads,
            });
        }
    }
    for name in theirs.offer.keys().chain(ours.offer.keys()) {
        let (was, now) = (theirs.offer.get(name), ours.offer.get(name));
        if was != now {
            return Err(UpgradeError::Offer {
                name: name.clone(),
                was: was.cloned(),
                now: now.cloned(),
                file: file.to_owned(),
            });
        }
    }
    for endpoint in endpoints["endpoints"].as_array().into_iter().flatten() {
        let id = endpoint["id"]
            .as_u64()
            .and_then(|id| u32::try_from(id).ok());
        let is_configured = id.is_some_and(|id| config.topology.endpoint(EndpointId(id)).is_some());
        if endpoint["state"] != "unattached" && !is_configured {
            return Err(UpgradeError::Endpoint {
                address: endpoint["address"].as_str().unwrap_or("unknown").into(),
                file: file.to_owned(),
            });
        }
    }
    let (used, limit) = (
        status["arena"]["used_bytes"].as_u64().unwrap_or(0),
        config.arena_limit,
    );
    if used > limit {
        return Err(UpgradeError::Arena {
            used,
            limit,
            file: file.to_owned(),
        });
    }
    if !theirs.ends.is_empty() {
        return Err(UpgradeError::Ends(theirs.ends.join("; ")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const FILE: &str = "vm.toml";

    fn config() -> Config {
        let text =
            "address = \"00:05.0\"\narena-limit = \"1M\"\n[[endpoint]]\naddress = \"00:06.0\"\n";
        Config::from_text(Path::new(FILE), text).expect("a configuration")
    }

    /// The status of a daemon with the same configuration, after a change.
    fn outcome(change: impl FnOnce(&mut Value, &mut Value)) -> Result<(), String> {
        let config = config();
        let mut status = json!({
            "connected": true,
            "life": { "kept": true },
            "arena": { "used_bytes": 1 << 20 },
            "handover": serde_json::to_value(handover(&config)).expect("JSON"),
        });
        let attached = json!({ "id": 0x30, "address": "0000:00:06.0", "state": "attached" });
        let mut endpoints = json!({ "endpoints": [attached] });
        change(&mut status, &mut endpoints);
        compare(Path::new(FILE), &config, &status, &endpoints).map_err(|error| error.to_string())
    }

    #[test]
    fn a_daemon_of_the_same_kind_may_leave() {
        assert_eq!(outcome(|_, _| ()), Ok(()));
    }

    #[test]
    fn a_daemon_whose_state_would_be_refused_goes_on() {
        type Change = fn(&mut Value, &mut Value);
        let cases: [(Change, &str); 9] = [
            (
                |s, _| s["handover"] = Value::Null,
                "of a version that does not tell",
            ),
            (|s, _| s["handover"]["formats"] = json!(7), "does not tell"),
            (
                |s, _| s["life"]["kept"] = false.into(),
                "nobody keeps its state",
            ),
            (
                |s, _| s["handover"]["formats"]["state"] = 99.into(),
                "\"state\" of version 99",
            ),
            (
                |s, _| s["handover"]["formats"]["more"] = 1.into(),
                "reads none",
            ),
            (
                |s, _| s["handover"]["offer"]["domains"] = "3".into(),
                "\"domains\": 3, and vm.toml has: ",
            ),
            (
                |s, _| s["handover"]["offer"]["more"] = "3".into(),
                "\"more\": 3, and vm.toml has: none",
            ),
            (
                |s, _| s["arena"]["used_bytes"] = ((1 << 20) + 1).into(),
                "`arena-limit` of 1048576",
            ),
            (
                |_, e| e["endpoints"][0]["id"] = 0x31.into(),
                "which vm.toml does not have",
            ),
        ];
        for (change, expected) in cases {
            let refused = outcome(change).expect_err(expected);
            assert!(refused.contains(expected), "{expected} in {refused}");
            assert!(refused.contains("goes on"), "{refused}");
        }
        let refused = outcome(|s, _| s["handover"]["ends"] = json!(["one", "two"]));
        assert!(refused.expect_err("ends").contains("one; two"));
    }

    #[test]
    fn without_a_vmm_another_offer_is_no_obstacle() {
        let done = outcome(|s, _| {
            s["connected"] = false.into();
            s["handover"]["offer"]["domains"] = "3".into();
        });
        assert_eq!(done, Ok(()));
    }

    #[test]
    fn an_endpoint_that_the_guest_does_not_use_may_go() {
        let done = outcome(|_, e| {
            e["endpoints"][0]["id"] = 0x31.into();
            e["endpoints"][0]["state"] = "unattached".into();
        });
        assert_eq!(done, Ok(()));
    }
}
