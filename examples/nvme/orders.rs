//! Accesses that a test orders: what a device does that has gone wrong, or means harm.
//!
//! A line is an order, and has a line for an answer:
//!
//! ```text
//! read ADDRESS LENGTH          ok HEX..., or error: WHY
//! write ADDRESS BYTE LENGTH    ok, or error: WHY
//! ```
//!
//! Addresses and the byte are hexadecimal, lengths decimal: `1..=4096`. The accesses go the way that
//! all of the device's go, whether the controller is enabled or not.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use log::{info, warn};
use parking_lot::Mutex;

use crate::memory::{Gate, Memory, Segment};

/// The most bytes of one access.
const MAX_BYTES: usize = 4096;
/// The longest line.
const MAX_LINE: u64 = 256;

/// Where orders find guest memory.
#[derive(Default)]
pub struct Orders(Mutex<Option<Arc<dyn Memory>>>);

impl Orders {
    /// Guest memory as it is for the client that is there, or none.
    pub fn set_memory(&self, memory: Option<Arc<dyn Memory>>) {
        *self.0.lock() = memory;
    }

    fn obey(&self, line: &str) -> Result<String, String> {
        let (segment, byte) = parse(line)?;
        let memory = self.0.lock().clone().ok_or("no client is here")?;
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
            // A text takes all that is written to it.
            let _ = write!(answer, "{byte:02x}");
        }
        Ok(answer)
    }
}

/// Serves orders from now on, one who gives them after the other.
///
/// # Errors
/// Where there can be no other thread.
pub fn listen(listener: UnixListener, orders: Arc<Orders>) -> io::Result<()> {
    let serve = move || {
        for stream in listener.incoming() {
            if let Err(cause) = stream.and_then(|stream| take_from(&stream, &orders)) {
                warn!("orders: {cause}");
            }
        }
    };
    thread::Builder::new().name("orders".into()).spawn(serve)?;
    Ok(())
}

/// Gives an order to whoever listens at `path`. Returns the answer.
///
/// # Errors
/// Where there is none.
pub fn give(path: &Path, order: &str) -> io::Result<String> {
    let stream = UnixStream::connect(path)?;
    (&stream).write_all(format!("{order}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

fn take_from(stream: &UnixStream, orders: &Orders) -> io::Result<()> {
    let mut from = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if from.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim();
        let answer = orders
            .obey(line)
            .unwrap_or_else(|why| format!("error: {why}"));
        let shown = answer.get(..64).unwrap_or(&answer);
        info!("ordered to {line}: {shown}");
        let mut to = stream;
        to.write_all(format!("{answer}\n").as_bytes())?;
    }
}

fn parse(line: &str) -> Result<(Segment, Option<u8>), String> {
    let words: Vec<_> = line.split_whitespace().collect();
    let (address, byte, len) = match words[..] {
        ["read", address, len] => (address, None, len),
        ["write", address, byte, len] => (address, Some(byte), len),
        _ => return Err("say `read ADDRESS LENGTH` or `write ADDRESS BYTE LENGTH`".into()),
    };
    let digits = |text: &str| text.strip_prefix("0x").unwrap_or(text).to_owned();
    let address = u64::from_str_radix(&digits(address), 16);
    let address = address.map_err(|_| "the address is no hexadecimal number")?;
    let byte = byte
        .map(|byte| u8::from_str_radix(&digits(byte), 16))
        .transpose();
    let byte = byte.map_err(|_| "the byte is no hexadecimal number of 8 bits")?;
    let len = len.parse().ok().filter(|len| (1..=MAX_BYTES).contains(len));
    let len = len.ok_or_else(|| format!("the length must be 1 to {MAX_BYTES}"))?;
    if address.checked_add(len as u64 - 1).is_none() {
        return Err("it goes past the last address".into());
    }
    Ok((Segment { address, len }, byte))
}
