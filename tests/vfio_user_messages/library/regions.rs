//! The regions of guest memory that a server of the library knows.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::fstat;
use vm_memory::{FileOffset, MmapRegion};

use super::{UnmapAll, Version};
use crate::connection::Msg;

/// The library takes no larger region.
const MAX_LEN: u64 = 8 << 40;
/// The flag of DMA_UNMAP that removes all regions.
const UNMAP_ALL: u32 = 2;

/// The regions, by last address.
#[derive(Default)]
pub struct Regions {
    all: BTreeMap<u64, Region>,
    /// The errno of all further removals.
    refusal: Option<i32>,
}

/// A region.
pub struct Region {
    pub first: u64,
    pub last: u64,
    /// Bit 0: the device may read; bit 1: it may write.
    pub prot: u32,
    pub offset: u64,
    /// Device and inode of the file, if the region has one.
    file: Option<(u64, u64)>,
    pub mapped: Option<Mapped>,
}

/// The file of a region, as the library maps it: from the beginning of a page of the file, and as many pages as the
/// region's length needs.
pub struct Mapped {
    pub memory: MmapRegion,
    /// The region's first byte in `memory`.
    pub at: u64,
    /// The bytes of the region that the library has not mapped, although it uses them.
    pub missing: u64,
}

impl Regions {
    /// DMA_MAP.
    pub fn add(&mut self, version: Version, msg: &Msg) -> Result<(), i32> {
        if msg.body.len() < 32 || msg.u32_at(0) < 32 {
            return Err(libc::EINVAL);
        }
        let (prot, offset) = (msg.u32_at(4), msg.u64_at(8));
        let (first, len) = (msg.u64_at(16), msg.u64_at(24));
        if prot & !3 != 0 {
            return Err(libc::EINVAL);
        }
        if len > MAX_LEN {
            return Err(libc::ENOSPC);
        }
        let last = first.checked_add(len).ok_or(libc::EINVAL)? - 1;
        let file = msg
            .fds
            .first()
            .map(|fd| File::from(fd.try_clone().unwrap()));
        let identity = match &file {
            Some(file) => {
                let found = file.metadata().map_err(|_| libc::EINVAL)?;
                Some((found.dev(), found.ino()))
            }
            None => None,
        };
        if let Some((_, other)) = self.all.range(first..).next() {
            if (other.first, other.last) == (first, last) {
                let is_same = (other.prot, other.offset, other.file) == (prot, offset, identity);
                return is_same.then_some(()).ok_or(libc::EINVAL);
            }
            if other.first <= last {
                return Err(libc::EINVAL);
            }
        }
        if self.all.len() == version.max_regions {
            return Err(libc::EINVAL);
        }
        let mapped = self.all.values().filter(|region| region.mapped.is_some());
        if file.is_some() && mapped.count() == version.max_mapped {
            return Err(libc::ENOMEM);
        }
        let mapped = file
            .map(|file| Mapped::new(file, offset, len))
            .transpose()?;
        let region = Region {
            first,
            last,
            prot,
            offset,
            file: identity,
            mapped,
        };
        self.all.insert(last, region);
        Ok(())
    }

    /// DMA_UNMAP: of exactly one region, or of all.
    pub fn remove(&mut self, version: Version, msg: &Msg) -> Result<(), i32> {
        if msg.body.len() < 24 || msg.u32_at(0) < 24 {
            return Err(libc::EINVAL);
        }
        if let Some(errno) = self.refusal {
            return Err(errno);
        }
        let (first, len) = (msg.u64_at(8), msg.u64_at(16));
        match msg.u32_at(4) {
            UNMAP_ALL if first == 0 && len == 0 => self.remove_all(version.unmap_all),
            0 => {
                let last = first.checked_add(len).ok_or(libc::ENOENT)?.wrapping_sub(1);
                if self.all.get(&last).is_none_or(|found| found.first != first) {
                    return version.unknown;
                }
                self.all.remove(&last);
                Ok(())
            }
            _ => Err(libc::EINVAL),
        }
    }

    fn remove_all(&mut self, how: UnmapAll) -> Result<(), i32> {
        match how {
            UnmapAll::Removes => self.all.clear(),
            UnmapAll::Refuses(errno) => return Err(errno),
            UnmapAll::Ignores => {}
            UnmapAll::RemovesHalf => {
                let middle = self.all.keys().nth(self.all.len() / 2).copied();
                self.all = self.all.split_off(&middle.unwrap_or(0));
            }
            UnmapAll::Hangs(errno) => self.refusal = Some(errno),
        }
        Ok(())
    }

    /// The regions behind `len` bytes from `first` on, each with the part of the bytes in it.
    pub fn lookup(&self, first: u64, len: u64, prot: u32) -> Result<Vec<(&Region, u64, u64)>, i32> {
        let (mut next, mut left) = (first, len);
        let mut parts = Vec::new();
        for region in self.all.range(first..).map(|(_, region)| region) {
            if left == 0 {
                break;
            }
            if next < region.first {
                return Err(libc::ENOENT);
            }
            if region.prot & prot != prot {
                return Err(libc::EACCES);
            }
            let part = left.min(region.last - next + 1);
            parts.push((region, next, part));
            next = next.wrapping_add(part);
            left -= part;
        }
        (left == 0).then_some(parts).ok_or(libc::ENOENT)
    }

    /// All regions, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.all.values()
    }

    /// The first addresses and the lengths, in ascending order.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.iter()
            .map(|r| (r.first, r.last - r.first + 1))
            .collect()
    }
}

impl Mapped {
    fn new(file: File, offset: u64, len: u64) -> Result<Self, i32> {
        let found = fstat(&file).map_err(rustix::io::Errno::raw_os_error)?;
        let page = u64::try_from(found.st_blksize).unwrap_or(0).max(4096);
        let (at, end) = (offset % page, offset + len);
        let begin = offset - at;
        let mapped = len.next_multiple_of(page);
        // A mapping may reach beyond the end of the file, but this crate's does not.
        let until = (begin + mapped)
            .min(found.st_size.unsigned_abs())
            .max(begin);
        let size = usize::try_from(until - begin).map_err(|_| libc::ENOMEM)?;
        let memory = MmapRegion::from_file(FileOffset::new(file, begin), size);
        Ok(Self {
            memory: memory.map_err(|_| libc::EINVAL)?,
            at,
            missing: end.saturating_sub(begin + mapped),
        })
    }
}
