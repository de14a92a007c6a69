//! A process in a role.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// How long it may take to do what it is there for.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Role {
    pub name: &'static str,
    child: Child,
    said: Receiver<String>,
}

impl Role {
    /// This program again, told what to be by its environment.
    pub fn start(name: &'static str, told: &[(&str, &Path)]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command
            .args(["--ignored", "--exact", "roles::play", "--nocapture"])
            .env("KILLS_ROLE", name)
            .envs(told.iter().copied());
        Self::of(name, &mut command)
    }

    /// Any program.
    pub fn of(name: &'static str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // The test may be over.
                let _ = sender.send(line);
            }
        });
        Self { name, child, said }
    }

    /// Waits until it says `word`.
    pub fn wait_for(&mut self, word: &str) {
        loop {
            match self.said.recv_timeout(PATIENCE) {
                Ok(line) if line.ends_with(word) => return,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("{}: no {word:?}", self.name),
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = self.child.wait().expect("its own child");
                    panic!("{} has ended: {ended}", self.name);
                }
            }
        }
    }

    /// Whatever it has said so far is of no interest.
    pub fn forget(&mut self) {
        self.said.try_iter().for_each(drop);
    }

    /// Fails the test where it has ended by itself: its checks have failed then.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("its own child") {
            panic!("{} has ended: {status}", self.name);
        }
    }

    /// Kills it, which must be what it dies of.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        let status = self.child.wait().expect("its own child");
        assert_eq!(
            status.signal(),
            Some(libc::SIGKILL),
            "{}: {status}",
            self.name
        );
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
