//! The agent of a test guest (`qemu-scripts/guest/init`), over the socket of its second serial port.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a command may take in a guest that is emulated in an emulated machine.
const ANSWER: Duration = Duration::from_secs(240);
/// How long the guest may take from the firmware's start to its first program.
pub const BOOT: Duration = Duration::from_secs(1800);
/// The serial port may lose characters: an unanswered line is sent again after this time.
const REPEAT: Duration = Duration::from_secs(30);

/// A connection to the agent, if its guest runs.
#[derive(Default)]
pub struct Agent {
    reader: Option<BufReader<UnixStream>>,
    /// The bytes of a line that has not ended.
    line: Vec<u8>,
    /// The number of the last command.
    number: u32,
}

impl Agent {
    /// Connects to the serial port, which QEMU has made.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("the serial port of the guest");
        let limit = Some(Duration::from_secs(1));
        stream.set_read_timeout(limit).expect("a limit");
        Self {
            reader: Some(BufReader::new(stream)),
            line: Vec::new(),
            number: 0,
        }
    }

    /// Waits until the guest's first program says that it is ready, and begins anew with the numbers of commands.
    pub fn wait_until_up(&mut self) {
        let deadline = Instant::now() + BOOT;
        while self.next_line(deadline).expect("the guest boots") != "= ready" {}
        self.number = 0;
    }

    /// Runs a command that must succeed. Returns its output.
    pub fn run(&mut self, command: &str) -> Vec<String> {
        let (lines, status) = self.try_run(command);
        assert_eq!(status, 0, "{command}: {lines:?}");
        lines
    }

    /// Runs a command. Returns its output and status.
    pub fn try_run(&mut self, command: &str) -> (Vec<String>, i32) {
        self.number += 1;
        self.send(command);
        let deadline = Instant::now() + ANSWER;
        let mut lines = Vec::new();
        loop {
            let Some(line) = self.next_line(deadline.min(Instant::now() + REPEAT)) else {
                assert!(Instant::now() < deadline, "no answer to {command}");
                self.send(command);
                continue;
            };
            if let Some(line) = line.strip_prefix('|') {
                lines.push(line.to_owned());
            } else if line == "= garbled" {
                self.send(command);
            } else if let Some(end) = line.strip_prefix(&format!("= {} ", self.number)) {
                return (lines, end.trim().parse().expect("a status"));
            } else {
                // The answer to an earlier copy of another command.
                lines.clear();
            }
        }
    }

    fn send(&mut self, command: &str) {
        let text = format!("{} {command}", self.number);
        let line = format!("{} {text}\n", text.len());
        let stream = self.reader.as_mut().expect("started").get_mut();
        stream.write_all(line.as_bytes()).expect("the guest runs");
    }

    /// The next line; `None` if it is not there in time.
    fn next_line(&mut self, deadline: Instant) -> Option<String> {
        let reader = self.reader.as_mut().expect("started");
        loop {
            match reader.read_until(b'\n', &mut self.line) {
                Ok(0) => panic!("the guest's serial port is closed"),
                Ok(_) if self.line.ends_with(b"\n") => {
                    let line = String::from_utf8_lossy(&self.line).trim().to_owned();
                    self.line.clear();
                    return Some(line);
                }
                // A part, kept in `line`: the time limit of a read is up.
                Ok(_) | Err(_) if Instant::now() >= deadline => return None,
                Ok(_) | Err(_) => {}
            }
        }
    }
}
