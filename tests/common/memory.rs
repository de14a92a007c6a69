//! Guest memory: memfds at any guest-physical address, which the test maps and passes to the daemon.

#![expect(
    unsafe_code,
    reason = "memfd_create has no safe wrapper among our dependencies"
)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// The frontend's address of guest-physical 0. Nothing is mapped there: the daemon may use such addresses only to
/// find the region of a ring.
pub const USER_BASE: u64 = 0x7a00_0000_0000;

/// A memfd of `len` zero bytes. Its size is not sealed.
pub fn memfd(len: u64) -> File {
    // SAFETY: the name is a NUL-terminated string that lives for the call.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: `fd` was just returned by memfd_create and nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).expect("memfd grows");
    file
}

/// A memory slot: `len` bytes of a file from offset `file_start`, at `gpa`.
pub struct Region {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Its file.
    pub file: Arc<File>,
    file_start: u64,
    map: MmapRegion,
}

impl Region {
    /// RAM at `gpa` in a new memfd.
    pub fn new(gpa: u64, len: u64) -> Self {
        Self::of_file(gpa, len, Arc::new(memfd(len)), 0)
    }

    /// RAM at `gpa` in the bytes `file_start..file_start + len` of `file`.
    pub fn of_file(gpa: u64, len: u64, file: Arc<File>, file_start: u64) -> Self {
        let offset = FileOffset::from_arc(Arc::clone(&file), file_start);
        let map = MmapRegion::from_file(offset, len as usize).expect("memfd maps");
        Self {
            gpa,
            len,
            file,
            file_start,
            map,
        }
    }

    /// All bytes of the slot.
    pub fn read_all(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        let memory = self.map.as_volatile_slice();
        memory.read_slice(&mut bytes, 0).expect("all of it");
        bytes
    }

    /// The same slot with the same bytes, mapped once more.
    pub fn duplicate(&self) -> Self {
        Self::of_file(self.gpa, self.len, self.file.clone(), self.file_start)
    }

    /// The slot as vhost-user describes it.
    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.gpa,
            memory_size: self.len,
            userspace_addr: USER_BASE.wrapping_add(self.gpa),
            mmap_offset: self.file_start,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

/// All of a guest's memory.
#[derive(Default)]
pub struct Memory {
    /// The slots, in no order.
    pub regions: Vec<Region>,
}

impl Memory {
    fn find(&self, gpa: u64, len: usize) -> (&Region, usize) {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = gpa.checked_sub(region.gpa)?;
                (offset.checked_add(len as u64)? <= region.len).then_some((region, offset as usize))
            })
            .unwrap_or_else(|| {
                panic!("the test touches {gpa:#x} + {len:#x}, which is not guest memory")
            })
    }

    /// Takes all bytes from the files of the slots. Nobody must touch the memory afterwards.
    pub fn shrink(&self) {
        for region in &self.regions {
            region.file.set_len(0).expect("an unsealed memfd");
        }
    }

    /// Writes `bytes` at `gpa`.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let (region, offset) = self.find(gpa, bytes.len());
        region
            .map
            .as_volatile_slice()
            .write_slice(bytes, offset)
            .expect("inside the region");
    }

    /// Reads `len` bytes at `gpa`.
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let (region, offset) = self.find(gpa, len);
        let mut bytes = vec![0; len];
        region
            .map
            .as_volatile_slice()
            .read_slice(&mut bytes, offset)
            .expect("inside the region");
        bytes
    }

    /// Reads a u32 at `gpa`.
    pub fn read_u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa, 4).try_into().expect("4 bytes"))
    }

    /// Stores a ring index with release ordering: the device sees every earlier write first.
    pub fn store_u16(&self, gpa: u64, value: u16) {
        let (region, offset) = self.find(gpa, 2);
        region
            .map
            .as_volatile_slice()
            .store(value.to_le(), offset, Ordering::Release)
            .expect("aligned and inside the region");
    }

    /// Loads a ring index with acquire ordering: later reads happen after it.
    pub fn load_u16(&self, gpa: u64) -> u16 {
        let (region, offset) = self.find(gpa, 2);
        let value: u16 = region
            .map
            .as_volatile_slice()
            .load(offset, Ordering::Acquire)
            .expect("aligned and inside the region");
        u16::from_le(value)
    }
}
