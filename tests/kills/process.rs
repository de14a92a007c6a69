//! A child process in a role: server, reader or VMM.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Time limit until a role prints the word that the test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child process in a role. It is killed when this is dropped.
pub struct Role {
    pub name: &'static str,
    child: Child,
    lines: Receiver<String>,
}

impl Role {
    /// Starts this program in the role `name`, with paths in its environment.
    pub fn start(name: &'static str, paths: &[(&str, &Path)]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command
            .args(["--ignored", "--exact", "roles::run_role", "--nocapture"])
            .env("KILLS_ROLE", name)
            .envs(paths.iter().copied());
        Self::of(name, &mut command)
    }

    /// Starts any program.
    pub fn of(name: &'static str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // An error means that the test is over.
                let _ = sender.send(line);
            }
        });
        Self { name, child, lines }
    }

    /// Waits until the process prints a line that ends with `word`.
    pub fn wait_for(&mut self, word: &str) {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
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

    /// Takes the lines that the process has printed so far. Returns how many of them end with `word`.
    pub fn count_lines(&mut self, word: &str) -> usize {
        self.lines
            .try_iter()
            .filter(|line| line.ends_with(word))
            .count()
    }

    /// Drops the lines that the process has printed so far.
    pub fn drop_lines(&mut self) {
        self.lines.try_iter().for_each(drop);
    }

    /// Fails the test if the process has ended by itself, which it does if one of its checks fails.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("its own child") {
            panic!("{} has ended: {status}", self.name);
        }
    }

    /// Kills the process. Fails the test if it had ended by itself before.
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
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
