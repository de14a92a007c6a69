//! The disk: a file of blocks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a block, as a power of two.
pub const BLOCK_SHIFT: u8 = 9;
/// Bytes of a block.
pub const BLOCK: usize = 1 << BLOCK_SHIFT;
/// The zeros of one write.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// A file of blocks. Its length is read once, when it is opened.
#[derive(Debug)]
pub struct Disk {
    file: File,
    blocks: u64,
}

impl Disk {
    /// Opens the file for reading and writing.
    ///
    /// # Errors
    /// The file cannot be opened, or its length is not a multiple of a block.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|e| {
            io::Error::new(e.kind(), format!("cannot open {}: {e}", path.display()))
        })?;
        Self::new(file)
    }

    /// A disk in an open file.
    ///
    /// # Errors
    /// The length is 0 or not a multiple of a block.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        if bytes == 0 || bytes % BLOCK as u64 != 0 {
            return Err(io::Error::other(format!(
                "the disk has {bytes} bytes; its length must be a multiple of {BLOCK}, and not 0"
            )));
        }
        let blocks = bytes >> BLOCK_SHIFT;
        Ok(Self { file, blocks })
    }

    /// The length in blocks, not 0.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether the disk has `count` blocks from `first` on.
    pub fn has(&self, first: u64, count: u64) -> bool {
        first
            .checked_add(count)
            .is_some_and(|end| end <= self.blocks)
    }

    /// Reads whole blocks from `first` on, which must be on the disk.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, first << BLOCK_SHIFT)
    }

    /// Writes whole blocks from `first` on, which must be on the disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, first: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, first << BLOCK_SHIFT)
    }

    /// Writes zeros to `count` blocks from `first` on, which must be on the disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn zero(&self, first: u64, count: u64) -> io::Result<()> {
        let (mut at, end) = (first << BLOCK_SHIFT, (first + count) << BLOCK_SHIFT);
        while at < end {
            let step = (end - at).min(ZEROS.len() as u64);
            let zeros = usize::try_from(step).unwrap_or(ZEROS.len());
            self.file.write_all_at(&ZEROS[..zeros], at)?;
            at += step;
        }
        Ok(())
    }

    /// Makes all writes durable.
    ///
    /// # Errors
    /// The kernel cannot write the file to its medium.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
