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
mod progress;

use std::fmt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use self::compare::compare;
pub use self::error::UpgradeError;
use self::progress::{Before, Takeover};
use crate::args::Question;
use crate::config::{Config, Machine};
use crate::ctl;
use crate::process::handover::MIN_AGE;

/// How often the next daemon is looked for.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long a daemon may take to leave, and the next one to take over, beside the time that a start takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a daemon that has the state may take until it has the VMM, too.
const VMM_PATIENCE: Duration = Duration::from_secs(5);

/// A daemon that is to leave its VM to this program.
pub struct Upgrade {
    file: PathBuf,
    control: PathBuf,
    /// Where the next daemon may answer. It applies the file, unless its arguments name a control socket.
    next_control: Vec<PathBuf>,
    /// How long the next daemon may take.
    patience: Duration,
    before: Before,
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
        let configured = config.control.take();
        let control = control.map(Path::to_owned).or(configured.clone());
        let control = control.ok_or_else(|| UpgradeError::NoControl(file.to_owned()))?;
        let mut status = examine(file, &control)?;
        let age = status["life"]["age_s"].as_f64().unwrap_or(0.0);
        let left = MIN_AGE.saturating_sub(Duration::from_secs_f64(age.clamp(0.0, 1e6)));
        if !left.is_zero() {
            sleep(left + INTERVAL);
            status = examine(file, &control)?;
        }
        Ok(Self {
            file: file.to_owned(),
            next_control: next_control(configured, &control),
            control,
            patience: config.start_limit().saturating_add(PATIENCE),
            before: Before::new(&status),
        })
    }

    /// Asks the running daemon to leave. It ends after this call.
    ///
    /// # Errors
    /// It does not answer, or refuses.
    pub fn leave(&self) -> Result<(), UpgradeError> {
        let Before {
            life, connections, ..
        } = self.before;
        ctl::send(&self.control, &format!("leave {life} {connections}"))?;
        Ok(())
    }

    /// Waits until the next daemon has taken over.
    ///
    /// # Errors
    /// There is none, or it has not taken everything over.
    pub fn wait(&self) -> Result<NextDaemon, UpgradeError> {
        let deadline = Instant::now() + self.patience;
        let mut alone_since = None;
        while Instant::now() < deadline {
            sleep(INTERVAL);
            // Fails while there is no daemon, or while it ends.
            let mut answers = self
                .next_control
                .iter()
                .filter_map(|at| ctl::ask(at, &Question::Status).ok());
            let Some(status) = answers.find(|status| self.before.is_left(status)) else {
                continue;
            };
            match self.before.progress(&status)? {
                Takeover::TakenOver => return Ok(NextDaemon::new(&status, &self.file)),
                Takeover::TakingOver => {}
                Takeover::WithoutVmm => {
                    let since = *alone_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= VMM_PATIENCE {
                        return Err(UpgradeError::Lost("the VMM's connection has ended".into()));
                    }
                }
            }
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

/// Where the next daemon may answer if the running one answers at `control`.
fn next_control(configured: Option<PathBuf>, control: &Path) -> Vec<PathBuf> {
    let configured = configured.filter(|path| path != control);
    configured.into_iter().chain([control.into()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_daemon_answers_at_the_socket_of_the_file() {
        let [one, other] = ["/one", "/other"].map(PathBuf::from);
        assert_eq!(next_control(None, &one), std::slice::from_ref(&one));
        let same = next_control(Some(one.clone()), &one);
        assert_eq!(same, std::slice::from_ref(&one));
        assert_eq!(next_control(Some(other.clone()), &one), [other, one]);
    }
}
