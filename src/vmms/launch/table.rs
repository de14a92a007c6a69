//! The VIOT table as an unnamed file that the VMM inherits.
#![expect(unsafe_code, reason = "makes a memfd")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

/// An unnamed file that holds a table. The kernel frees it when no process has it open.
#[derive(Debug)]
pub(super) struct TableFile(File);

impl TableFile {
    /// A file with the bytes of `table`. Started programs do not inherit it, unless it is passed on.
    pub fn new(table: &[u8]) -> io::Result<Self> {
        // SAFETY:
        // - the name is a C string that outlives the call; the kernel copies it
        let fd = unsafe { libc::memfd_create(c"viot".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY:
        // - ownership: the call has just made the descriptor, and nobody else knows it
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut file = File::from(owned);
        file.write_all(table)?;
        Ok(Self(file))
    }

    /// The path of the file in a program that has inherited it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

impl AsRawFd for TableFile {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_can_be_read_from_its_start() {
        let file = TableFile::new(b"VIOT and more").expect("made");
        for _ in 0..2 {
            let bytes = std::fs::read(file.path()).expect("read");
            assert_eq!(bytes, b"VIOT and more");
        }
    }
}
