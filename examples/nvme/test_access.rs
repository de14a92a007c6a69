//! Accesses that a test requests, as a faulty or malicious device makes them.
//!
//! Each request is a line, and so is its answer:
//!
//! ```text
//! read ADDRESS LENGTH          ok HEX..., or error: REASON
//! write ADDRESS BYTE LENGTH    ok, or error: REASON
//! ```
//!
//! Addresses and the byte are hexadecimal. Lengths are decimal, `1..=4096`. The accesses use the same
//! path as the controller's, whether the controller is enabled or not.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use log::{info, warn};
use parking_lot::Mutex;

use crate::memory::{Gate, Memory, Segment};

/// The maximum number of bytes of one access.
const MAX_BYTES: usize = 4096;
/// The maximum length of a line.
const MAX_LINE: u64 = 256;

/// The guest memory that requests access.
#[derive(Default)]
pub struct TestAccess(Mutex<Option<Arc<dyn Memory>>>);

impl TestAccess {
    /// Sets the guest memory of the connected client; `None` after the client has gone.
    pub fn set_memory(&self, memory: Option<Arc<dyn Memory>>) {
        *self.0.lock() = memory;
    }

    fn execute(&self, line: &str) -> Result<String, String> {
        let (segment, byte) = parse(line)?;
        let memory = self.0.lock().clone().ok_or("no client is connected")?;
        let gate = Gate::new();
        if let Some(byte) = byte {
            let data = vec![byte; segment.len];
            let written = memory.write(&gate, &[segment], &data);
            written.map_err(|cause| cause.to_string())?;
            return Ok("ok".into());
        }
        let mut data = vec![0; segment.len];
        let read = memory.read(&gate, &[segment], &mut data);
        read.map_err(|cause| cause.to_string())?;
        let mut answer = "ok ".to_owned();
        for byte in data {
            // Writing to a string cannot fail.
            let _ = write!(answer, "{byte:02x}");
        }
        Ok(answer)
    }
}

/// Starts a thread that serves requests, one connection after the other.
///
/// # Errors
/// The thread cannot be started.
pub fn listen(listener: UnixListener, access: Arc<TestAccess>) -> io::Result<()> {
    let run = move || {
        for stream in listener.incoming() {
            if let Err(cause) = stream.and_then(|stream| serve(&stream, &access)) {
                warn!("cannot serve requests for accesses: {cause}");
            }
        }
    };
    thread::Builder::new()
        .name("test-access".into())
        .spawn(run)?;
    Ok(())
}

/// Sends a request to the server that listens at `path`. Returns the answer.
///
/// # Errors
/// The server cannot be reached, or does not answer.
pub fn request(path: &Path, request: &str) -> io::Result<String> {
    let stream = UnixStream::connect(path)?;
    (&stream).write_all(format!("{request}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

fn serve(stream: &UnixStream, access: &TestAccess) -> io::Result<()> {
    let mut from = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if from.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim();
        let answer = access
            .execute(line)
            .unwrap_or_else(|reason| format!("error: {reason}"));
        let shown = answer.get(..64).unwrap_or(&answer);
        info!("request `{line}`: {shown}");
        let mut to = stream;
        to.write_all(format!("{answer}\n").as_bytes())?;
    }
}

fn parse(line: &str) -> Result<(Segment, Option<u8>), String> {
    let words: Vec<_> = line.split_whitespace().collect();
    let (address, byte, len) = match words[..] {
        ["read", address, len] => (address, None, len),
        ["write", address, byte, len] => (address, Some(byte), len),
        _ => return Err("give `read ADDRESS LENGTH` or `write ADDRESS BYTE LENGTH`".into()),
    };
    let digits = |text: &str| text.strip_prefix("0x").unwrap_or(text).to_owned();
    let address = u64::from_str_radix(&digits(address), 16);
    let address = address.map_err(|_| "the address is not a hexadecimal number")?;
    let byte = byte
        .map(|byte| u8::from_str_radix(&digits(byte), 16))
        .transpose();
    let byte = byte.map_err(|_| "the byte is not a hexadecimal number of 8 bits")?;
    let len = len.parse().ok().filter(|len| (1..=MAX_BYTES).contains(len));
    let len = len.ok_or_else(|| format!("the length must be 1 to {MAX_BYTES}"))?;
    if address.checked_add(len as u64 - 1).is_none() {
        return Err("the access exceeds the last address".into());
    }
    Ok((Segment { address, len }, byte))
}
