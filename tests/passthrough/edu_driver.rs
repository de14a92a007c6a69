//! A client of an exported `edu` device.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::connection::{Connection, REGION_READ, REGION_WRITE, VERSION, region, version_body};

/// A client that drives an `edu` as a guest's driver does.
pub struct Driver(pub Connection);

pub const BAR: u32 = 0;
pub const CONFIG: u32 = 7;
pub const PAGE: u64 = 4096;
pub const EDU_BUFFER: u64 = 0x4_0000;
/// Bits of the command register.
pub const MEMORY: u16 = 1 << 1;
pub const MASTER: u16 = 1 << 2;

impl Driver {
    /// Connects, switches on memory and DMA, and acknowledges pending interrupts. `edu` cannot be reset, so
    /// interrupts of an earlier client may be pending.
    pub fn connect(path: &Path) -> Self {
        let mut connection = Connection::new(UnixStream::connect(path).expect("connected"));
        let text = r#"{"capabilities":{"max_msg_fds":16}}"#;
        let answer = connection.call(VERSION, &version_body(text), &[]);
        assert_eq!(answer.errno(), 0);
        let mut driver = Self(connection);
        driver.write(CONFIG, 4, &[6, 0]);
        let pending = driver.load(0x24);
        driver.write(BAR, 0x64, &pending.to_ne_bytes());
        driver
    }

    pub fn write(&mut self, index: u32, at: u64, data: &[u8]) {
        let body = region(at, index, data.len() as u32, data);
        let reply = self.0.call(REGION_WRITE, &body, &[]);
        assert_eq!((reply.errno(), reply.u32_at(12)), (0, data.len() as u32));
    }

    pub fn load(&mut self, at: u64) -> u32 {
        let reply = self.0.call(REGION_READ, &region(at, BAR, 4, &[]), &[]);
        assert_eq!((reply.errno(), reply.body.len()), (0, 20));
        reply.u32_at(16)
    }

    pub fn store(&mut self, at: u64, value: u64) {
        self.write(BAR, at, &value.to_ne_bytes());
    }

    pub fn start(&mut self, from: u64, to: u64, direction: u64) {
        self.store(0x80, from);
        self.store(0x88, to);
        self.store(0x90, PAGE);
        self.store(0x98, 1 | direction);
    }

    pub fn wait(&mut self) {
        while self.load(0x98) & 1 != 0 {
            sleep(Duration::from_millis(5));
        }
    }

    /// Reads a page into the device.
    pub fn dma_read(&mut self, iova: u64) {
        self.start(iova, EDU_BUFFER, 0);
        self.wait();
    }

    /// Writes the device's page.
    pub fn dma_write(&mut self, iova: u64) {
        self.start(EDU_BUFFER, iova, 2);
        self.wait();
    }
}
