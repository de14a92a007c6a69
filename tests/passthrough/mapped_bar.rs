//! A BAR that a client of an exported device has mapped.
#![expect(unsafe_code, reason = "maps registers")]

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};

use vhost_device_iommu::vfio::Cdev;

use crate::connection::{Connection, REGION_INFO};

/// Flags of a region: it can be mapped, and it has capabilities.
const MMAP: u32 = 1 << 2;
const CAPS: u32 = 1 << 3;
/// Capabilities: the areas that can be mapped, and the MSI-X table among them.
const SPARSE: u16 = 1;
const MSIX_MAPPABLE: u16 = 3;

/// The description of a region and the descriptor that came with it.
pub struct LentRegion {
    pub size: u64,
    /// Its first byte in the descriptor's file.
    pub offset: u64,
    /// It has the capability of an MSI-X table that can be mapped.
    pub has_table: bool,
    pub file: OwnedFd,
}

impl LentRegion {
    /// Asks for region `index`. `None` if it cannot be mapped.
    pub fn ask(client: &mut Connection, index: u32) -> Option<Self> {
        let words = [4096, 0, index, 0, 0, 0, 0, 0];
        let body: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut info = client.call(REGION_INFO, &body, &[]);
        let file = info.fds.pop();
        let flags = info.u32_at(4);
        assert_eq!(flags & MMAP != 0, file.is_some());
        let mut capabilities = Vec::new();
        let mut at = if flags & CAPS == 0 {
            0
        } else {
            info.u32_at(12)
        };
        while at != 0 {
            capabilities.push(info.u32_at(at as usize) as u16);
            at = info.u32_at(at as usize + 4);
        }
        // Linux has such areas for devices of special drivers alone.
        assert!(!capabilities.contains(&SPARSE));
        Some(Self {
            size: info.u64_at(16),
            offset: info.u64_at(24),
            has_table: capabilities.contains(&MSIX_MAPPABLE),
            file: file?,
        })
    }

    /// Maps all of it.
    pub fn map(&self) -> MappedBar {
        let len = self.size as usize;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let (fd, offset) = (self.file.as_raw_fd(), self.offset.cast_signed());
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe { libc::mmap(null_mut(), len, prot, flags, fd, offset) };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        MappedBar {
            first: NonNull::new(address.cast()).expect("a mapping"),
            len,
            pipe: io::pipe().expect("a pipe"),
        }
    }

    /// The device, through the descriptor.
    pub fn device(&self) -> Cdev {
        Cdev::adopt(self.file.try_clone().expect("a duplicate"))
    }
}

/// The registers of a BAR.
pub struct MappedBar {
    first: NonNull<u8>,
    len: usize,
    pipe: (PipeReader, PipeWriter),
}

impl MappedBar {
    fn at<T>(&self, at: usize) -> *mut T {
        assert!(at.is_multiple_of(size_of::<T>()) && at + size_of::<T>() <= self.len);
        self.first.as_ptr().wrapping_add(at).cast()
    }

    pub fn load(&self, at: usize) -> u32 {
        // SAFETY: it lies within the mapping, which lives as long as this. The test's process dies by SIGBUS if the BAR is
        // not there.
        unsafe { self.at::<u32>(at).read_volatile() }
    }

    pub fn store(&self, at: usize, value: u32) {
        // SAFETY: as in `load`.
        unsafe { self.at::<u32>(at).write_volatile(value) }
    }

    /// Whether an access finds the BAR. Where a program would get SIGBUS, the kernel, which makes this access, gets an error.
    pub fn is_there(&self, at: usize) -> bool {
        // SAFETY: the kernel reads 4 bytes within the mapping, or fails.
        let written = unsafe { libc::write(self.pipe.1.as_raw_fd(), self.at::<u32>(at).cast(), 4) };
        match written {
            // Nobody reads the pipe; it has room for thousands of these.
            4 => true,
            -1 => {
                let cause = io::Error::last_os_error();
                assert_eq!(cause.raw_os_error(), Some(libc::EFAULT), "{cause}");
                false
            }
            other => panic!("{other} bytes"),
        }
    }
}

impl Drop for MappedBar {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from the mapping.
        unsafe { libc::munmap(self.first.as_ptr().cast(), self.len) };
    }
}

/// A group's or node's request by its number alone. Returns the errno.
pub fn request(device: BorrowedFd<'_>, number: libc::c_ulong, argument: &mut [u32]) -> i32 {
    // SAFETY: each request that tests make takes a structure that begins with its size, which is the array's.
    let done = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), number, argument.as_mut_ptr()) };
    if done >= 0 {
        return 0;
    }
    io::Error::last_os_error().raw_os_error().expect("an errno")
}
