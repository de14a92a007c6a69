//! Checks of guest memory, which the VMM shares as files.

#![expect(unsafe_code, reason = "asks fstatfs for the kind of a file system")]

use std::fs::{File, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::SealFlags;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::address::{Gpa, GpaRange, PageMask};
use crate::backends::MemorySlot;
use crate::{info_limited, warn_limited};

/// Refuses regions that are not of a regular file, such as of a device, and regions that reach past the end of their
/// file: an access there would kill the daemon.
///
/// A file that shrinks later has the same effect. A file that can shrink is accepted and logged. VMMs use sealed
/// memfds, which cannot shrink.
///
/// # Errors
/// Names the refused region.
pub fn check_regions(memory: &GuestMemoryMmap) -> io::Result<()> {
    for region in memory.iter() {
        let Some(backing) = region.file_offset() else {
            continue;
        };
        let metadata = backing.file().metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "memory region at guest-physical {:#x} is not of a regular file; share the guest's \
                     memory as a memfd or a file",
                    region.start_addr().0
                ),
            ));
        }
        if can_shrink(backing.file()) {
            info_limited!(
                "memory region at guest-physical {:#x} is of a file that can shrink, which would kill \
                 this daemon; share a memfd with F_SEAL_SHRINK",
                region.start_addr().0
            );
        }
        let size = metadata.len();
        let fits = backing
            .start()
            .checked_add(region.len())
            .is_some_and(|end| end <= size);
        if !fits {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "memory region of {:#x} bytes at guest-physical {:#x} reaches past the end of \
                     its file of {size:#x} bytes",
                    region.len(),
                    region.start_addr().0
                ),
            ));
        }
    }
    Ok(())
}

/// Whether all of `len` bytes from `at` are guest memory.
pub fn is_backed(memory: &GuestMemoryMmap, at: Gpa, len: usize) -> bool {
    GuestMemoryBackend::check_range(memory, GuestAddress(at.0), len)
}

/// The memory slots that DMA may reach: the whole pages of all regions that the VMM shares as a file. The host's IOMMU
/// maps and unmaps nothing smaller, and the guest's page tables hold nothing smaller.
///
/// # Errors
/// The system cannot say which file a region is of.
pub fn slots(memory: &GuestMemoryMmap) -> io::Result<Vec<MemorySlot>> {
    let mut slots = Vec::new();
    for region in memory.iter() {
        let (Some(backing), Some(range)) = (
            region.file_offset(),
            GpaRange::from_len(Gpa(region.start_addr().0), region.len()),
        ) else {
            continue;
        };
        // A file is mapped from a page's first byte on, so a region that begins within a page of guest memory has no
        // page of the guest in one page of the file.
        let begins_with_page = PageMask::TABLE.is_aligned(range.first().0);
        let pages = range
            .whole_pages(PageMask::TABLE.granule())
            .filter(|_| begins_with_page);
        if pages != Some(range) {
            warn_limited!(
                "memory region {range} does not consist of whole pages: devices reach {} of it",
                pages.map_or("nothing".into(), |pages| format!("only {pages}"))
            );
        }
        let Some(range) = pages else { continue };
        let metadata = backing.file().metadata()?;
        slots.push(MemorySlot {
            range,
            memory: region.get_mmap(),
            file: backing.arc().clone(),
            offset: backing.start(),
            block_len: block_len(&metadata),
            is_shared_memory: is_shared_memory(backing.file())?,
            identity: (metadata.dev(), metadata.ino()),
        });
    }
    Ok(slots)
}

/// Bytes of a block of a file: the size of its huge pages, if it has them, and otherwise that of its pages.
fn block_len(metadata: &Metadata) -> u64 {
    let page = PageMask::TABLE.granule();
    let block = metadata.blksize();
    if block.is_multiple_of(page) {
        block.max(page)
    } else {
        page
    }
}

/// Whether a file can become shorter; true if the system cannot tell.
fn can_shrink(file: &File) -> bool {
    let seals = rustix::fs::fcntl_get_seals(file);
    !seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// Whether a file is a memfd or on a tmpfs or hugetlbfs.
///
/// # Errors
/// The system cannot say.
pub(crate) fn is_shared_memory(file: &File) -> io::Result<bool> {
    let mut answer = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY:
    // - the descriptor is open: it is borrowed
    // - answer: valid for writes of the whole structure
    if unsafe { libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it has filled in the whole structure.
    let answer = unsafe { answer.assume_init() };
    Ok(matches!(
        answer.f_type,
        libc::TMPFS_MAGIC | libc::HUGETLBFS_MAGIC
    ))
}

#[cfg(test)]
mod tests {
    use vm_memory::FileOffset;

    use super::*;
    use crate::backends::testing::slot;

    #[test]
    fn a_sealed_memfd_cannot_shrink() {
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("test", flags).expect("a memfd"));
        assert!(can_shrink(&file));
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).expect("sealed");
        assert!(!can_shrink(&file));
        assert!(can_shrink(
            &File::open("/proc/self/status").expect("a file")
        ));
    }

    #[test]
    fn slots_are_the_whole_pages_of_regions() {
        let region = |gpa: u64, len: u64| {
            let file = FileOffset::new(slot(0, 0x4000, 0).file.try_clone().expect("a file"), 0);
            let len = usize::try_from(len).expect("small");
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(gpa), len, Some(file))])
                .expect("mapped")
        };
        let found = |gpa, len| {
            let slots = slots(&region(gpa, len)).expect("a file");
            slots.first().map(|slot| slot.range)
        };
        let range = |gpa, len| GpaRange::from_len(Gpa(gpa), len);
        assert_eq!(found(0x1000, 0x2000), range(0x1000, 0x2000));
        assert_eq!(found(0x1000, 0x2fff), range(0x1000, 0x2000));
        assert_eq!(found(0x1000, 0xfff), None);
        assert_eq!(found(0x1800, 0x2000), None);
    }

    #[test]
    fn shared_memory_is_distinguished_from_other_files() {
        assert!(is_shared_memory(&slot(0, 4096, 0).file).expect("a memfd"));
        let other = File::open("/proc/self/status").expect("a file");
        assert!(!is_shared_memory(&other).expect("procfs"));
    }
}
