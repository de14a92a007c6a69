//! `upgrade`: has a running daemon leave its VM to this program, if this program can go on with it.
//!
//! 1. The running daemon tells what it will leave, at its control socket ([`Handover`](crate::process::handover::Handover)).
//! 2. This program compares that with the formats that it reads, and with the configuration.
//! 3. If all of it agrees, the daemon is asked to leave. It ends as at SIGTERM, and its keeper starts the next one.
//!
//! The running daemon goes on if any comparison fails. A restart without these comparisons would end in a daemon that
//! refuses the state, and blocks every endpoint until the guest starts anew.

mod compare;
mod error;

use std::fmt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use self::compare::compare;
pub use self::error::UpgradeError;
use crate::args::Question;
use crate::config::{Config, Machine};
use crate::ctl;

/// The shortest life of a daemon that is asked to leave. The unit and `launch` allow five starts in 60 seconds: planned ends
/// alone must never reach that limit, beyond which the VM has no IOMMU any more.
const MIN_AGE: Duration = Duration::from_secs(13);
/// How often the next daemon is looked for.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long a daemon may take to leave, and the next one to take over, beside the time that a start takes.
const PATIENCE: Duration = Duration::from_secs(30);

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
