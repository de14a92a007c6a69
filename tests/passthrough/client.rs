//! A client of an exported device.

use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::connection::{Connection, REGION_READ, REGION_WRITE, VERSION, region, version_body};

/// The regions of a PCI device.
pub const BAR: u32 = 0;
pub const CONFIG: u32 = 7;
/// The command register, and its bit that switches the device's memory on.
pub const COMMAND: u64 = 4;
pub const MEMORY: u16 = 1 << 1;

/// A client that reads and writes the device's registers.
pub struct Client(pub Connection);

impl Client {
    /// Connects, and leaves the device as it is.
    pub fn open(path: &Path) -> Self {
        let mut connection = Connection::new(UnixStream::connect(path).expect("connected"));
        let text = r#"{"capabilities":{"max_msg_fds":16}}"#;
        let answer = connection.call(VERSION, &version_body(text), &[]);
        assert_eq!(answer.errno(), 0);
        Self(connection)
    }

    /// Connects and switches the device's memory on.
    pub fn connect(path: &Path) -> Self {
        let mut client = Self::open(path);
        client.write(CONFIG, COMMAND, &MEMORY.to_le_bytes());
        client
    }

    pub fn write(&mut self, index: u32, at: u64, data: &[u8]) {
        let body = region(at, index, data.len() as u32, data);
        assert_eq!(self.0.call(REGION_WRITE, &body, &[]).errno(), 0);
    }

    /// Reads 4 bytes of BAR 0.
    pub fn load(&mut self, at: u64) -> u32 {
        self.read(BAR, at)
    }

    /// Reads 4 bytes.
    pub fn read(&mut self, index: u32, at: u64) -> u32 {
        let reply = self.0.call(REGION_READ, &region(at, index, 4, &[]), &[]);
        assert_eq!((reply.errno(), reply.body.len()), (0, 20));
        reply.u32_at(16)
    }
}
