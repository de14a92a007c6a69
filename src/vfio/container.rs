//! A VFIO container with a type1 IOMMU.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_CC_IOMMU, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES,
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_TYPE1v2_IOMMU,
    VFIO_UNMAP_ALL, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};
use vm_memory::MmapRegion;

use super::ioctl::size_of_u32;
use super::{Group, Type1, VfioError, ioctl};
use crate::address::{Access, Iova, IovaRange};

/// The properties of a type1 IOMMU (`VFIO_IOMMU_GET_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type1Info {
    /// Bit n stands for pages of 2^n bytes; 0 if the kernel does not say.
    pub page_sizes: u64,
    /// The addresses that can be mapped; `None` if the kernel does not say.
    pub ranges: Option<Vec<IovaRange>>,
    /// The number of further mappings it takes; `None` if the kernel does not say.
    pub available: Option<u32>,
}

/// An open container, `/dev/vfio/vfio`.
#[derive(Debug)]
pub struct Container {
    file: File,
    /// Kept open: a group leaves its container when its last descriptor is closed.
    group: Option<Group>,
}

impl Container {
    /// Opens a container through the node at `path`.
    ///
    /// # Errors
    /// The node does not exist, this process may not open it, or the kernel's VFIO lacks an extension that this module
    /// needs.
    pub fn open(path: &Path) -> Result<Self, VfioError> {
        let failed = |source| VfioError {
            problem: format!("cannot open a container through {}", path.display()),
            source,
            cure: "load the module vfio and let this process open the node; \
                   `vhost-device-iommu check` tells more",
        };
        let file = OpenOptions::new().read(true).write(true).open(path);
        let container = Self {
            file: file.map_err(failed)?,
            group: None,
        };
        container.check_extensions().map_err(failed)?;
        Ok(container)
    }

    /// The container that `fd` is open on. Its groups and its IOMMU must be set already.
    ///
    /// # Errors
    /// `fd` is open on something else, or no IOMMU is set.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let container = Self {
            file: fd.into(),
            group: None,
        };
        container.check_extensions()?;
        container.info()?;
        Ok(container)
    }

    /// As [`Self::adopt`], with the container's group, which then is the one of [`Self::set_group`].
    ///
    /// # Errors
    /// One of the descriptors is open on something else, or the group has no container.
    pub fn adopt_with_group(fd: OwnedFd, group: OwnedFd) -> io::Result<Self> {
        let mut container = Self::adopt(fd)?;
        container.group = Some(Group::adopt(group)?);
        Ok(container)
    }

    /// Puts a group into the container, and then makes the container a type1 IOMMU.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_group(&mut self, group: Group) -> Result<(), VfioError> {
        group.set_container(self.as_fd())?;
        self.group = Some(group);
        ioctl::set_iommu(self.as_fd(), VFIO_TYPE1v2_IOMMU).map_err(|source| VfioError {
            problem: "cannot set a type1 IOMMU".into(),
            source,
            cure: "load vfio_iommu_type1; `vhost-device-iommu check` says whether interrupt remapping is off, \
                   which it also refuses",
        })
    }

    /// The group of [`Self::set_group`].
    pub fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// `VFIO_IOMMU_GET_INFO`.
    ///
    /// # Errors
    /// No IOMMU is set.
    pub fn info(&self) -> io::Result<Type1Info> {
        let words = ioctl::type1_info(self.as_fd())?;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        Ok(parse_info(&bytes))
    }

    /// Whether the host's IOMMU makes all DMA of the container's devices snoop the caches, also DMA that a device marks
    /// with No Snoop (`VFIO_DMA_CC_IOMMU`).
    ///
    /// # Errors
    /// The kernel's.
    pub fn enforces_coherency(&self) -> io::Result<bool> {
        ioctl::check_extension(&self.file, VFIO_DMA_CC_IOMMU)
    }

    fn check_extensions(&self) -> io::Result<()> {
        let version = ioctl::api_version(self.as_fd())?;
        if u32::try_from(version) != Ok(VFIO_API_VERSION) {
            return Err(io::Error::other(format!("VFIO has version {version}")));
        }
        for (extension, name) in [
            (VFIO_TYPE1v2_IOMMU, "VFIO_TYPE1v2_IOMMU"),
            (VFIO_UNMAP_ALL, "VFIO_UNMAP_ALL"),
        ] {
            if !ioctl::check_extension(&self.file, extension)? {
                return Err(io::Error::other(format!("the kernel lacks {name}")));
            }
        }
        Ok(())
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Type1 for Container {
    fn map(
        &self,
        range: IovaRange,
        access: Access,
        memory: &MmapRegion,
        offset: u64,
    ) -> io::Result<()> {
        ioctl::map_dma(self.as_fd(), memory, offset, map_argument(range, access)?)
    }

    fn unmap(&self, range: IovaRange) -> io::Result<u64> {
        ioctl::unmap_dma(self.as_fd(), unmap_argument(range)?)
    }

    fn unmap_all(&self) -> io::Result<()> {
        ioctl::unmap_dma(self.as_fd(), unmap_all_argument()).map(|_| ())
    }

    fn available(&self) -> io::Result<Option<u32>> {
        self.info().map(|info| info.available)
    }
}

/// The argument of `VFIO_IOMMU_MAP_DMA`, without the address of the memory.
pub(super) fn map_argument(
    range: IovaRange,
    access: Access,
) -> io::Result<vfio_iommu_type1_dma_map> {
    let read = if access.read {
        VFIO_DMA_MAP_FLAG_READ
    } else {
        0
    };
    let write = if access.write {
        VFIO_DMA_MAP_FLAG_WRITE
    } else {
        0
    };
    Ok(vfio_iommu_type1_dma_map {
        argsz: size_of_u32::<vfio_iommu_type1_dma_map>(),
        flags: read | write,
        iova: range.first().0,
        size: length(range)?,
        ..Default::default()
    })
}

/// The argument of `VFIO_IOMMU_UNMAP_DMA` for a range.
pub(super) fn unmap_argument(range: IovaRange) -> io::Result<vfio_iommu_type1_dma_unmap> {
    Ok(vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<vfio_iommu_type1_dma_unmap>(),
        iova: range.first().0,
        size: length(range)?,
        ..Default::default()
    })
}

/// The argument of `VFIO_IOMMU_UNMAP_DMA` for everything.
pub(super) fn unmap_all_argument() -> vfio_iommu_type1_dma_unmap {
    vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<vfio_iommu_type1_dma_unmap>(),
        flags: VFIO_DMA_UNMAP_FLAG_ALL,
        ..Default::default()
    }
}

fn length(range: IovaRange) -> io::Result<u64> {
    range
        .len_bytes()
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Parses a `vfio_iommu_type1_info` and its chain of capabilities. Parts that lie outside of `bytes` are left out.
fn parse_info(bytes: &[u8]) -> Type1Info {
    let u32_at = |at: usize| -> Option<u32> {
        let field = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(field.try_into().ok()?))
    };
    let u64_at = |at: usize| -> Option<u64> {
        let field = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_ne_bytes(field.try_into().ok()?))
    };
    let flags = u32_at(4).unwrap_or(0);
    let mut info = Type1Info {
        page_sizes: 0,
        ranges: None,
        available: None,
    };
    if flags & VFIO_IOMMU_INFO_PGSIZES != 0 {
        info.page_sizes = u64_at(8).unwrap_or(0);
    }
    let mut next = if flags & VFIO_IOMMU_INFO_CAPS != 0 {
        u32_at(16).unwrap_or(0) as usize
    } else {
        0
    };
    // Each capability must lie behind the one before, so the chain ends.
    let mut passed = 0;
    while next > passed {
        let at = next;
        let Some(header) = u32_at(at) else { break };
        match header & 0xffff {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let count = u32_at(at + 8).unwrap_or(0) as usize;
                info.ranges = Some(
                    (0..count)
                        .map_while(|n| {
                            let entry = at + 16 + 16 * n;
                            Some((u64_at(entry)?, u64_at(entry + 8)?))
                        })
                        .filter_map(|(first, last)| IovaRange::new(Iova(first), Iova(last)))
                        .collect(),
                );
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.available = u32_at(at + 8),
            _ => {}
        }
        passed = at;
        next = u32_at(at + 4).unwrap_or(0) as usize;
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn word(bytes: &mut Vec<u8>, value: u32) {
        bytes.extend(value.to_ne_bytes());
    }

    fn long(bytes: &mut Vec<u8>, value: u64) {
        bytes.extend(value.to_ne_bytes());
    }

    fn sample() -> Vec<u8> {
        let mut bytes = Vec::new();
        for value in [96, 3] {
            word(&mut bytes, value);
        }
        long(&mut bytes, 0x4020_1000);
        for value in [24, 0, 1 | 1 << 16, 72, 2, 0] {
            word(&mut bytes, value);
        }
        for value in [0, 0xfedf_ffff, 0xfef0_0000, (1 << 39) - 1] {
            long(&mut bytes, value);
        }
        for value in [3 | 1 << 16, 0, 65535] {
            word(&mut bytes, value);
        }
        bytes
    }

    #[test]
    fn capabilities_are_found() {
        let info = parse_info(&sample());
        let range = |first, last| IovaRange::new(Iova(first), Iova(last)).expect("a range");
        assert_eq!(
            info,
            Type1Info {
                page_sizes: 0x4020_1000,
                ranges: Some(vec![
                    range(0, 0xfedf_ffff),
                    range(0xfef0_0000, (1 << 39) - 1)
                ]),
                available: Some(65535),
            }
        );
    }

    proptest! {
        #[test]
        fn any_capability_chain_ends(
            changes in proptest::collection::vec((0usize..84, any::<u8>()), 0..12),
            cut in 0usize..84,
        ) {
            let mut bytes = sample();
            for (at, value) in changes {
                bytes[at] = value;
            }
            bytes.truncate(cut.max(4));
            let info = parse_info(&bytes);
            prop_assert!(info.ranges.is_none_or(|r| r.len() <= 84 / 16));
        }
    }
}
