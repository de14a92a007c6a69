//! The reply to DEVICE_GET_REGION_INFO.

use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;

use super::device::{RegionCapability, ServedDevice};
use crate::vfio_user::message::{
    REGION_CAP_MSIX_MAPPABLE, REGION_CAP_SPARSE_MMAP, REGION_CAP_TYPE, REGION_CAPS, REGION_MMAP,
    REGION_READ, REGION_WRITE, RegionInfoBody,
};

/// Bytes of a capability's header in a chain.
const CAP_HEADER: usize = 8;

/// Returns the body of the reply, and the file for the client to map. If the client has no room for
/// the capabilities, the body has none, and there is no file: `argsz` tells the client how much room
/// it needs, and it asks again.
///
/// # Errors
/// `EINVAL`: there is no such region.
pub(super) fn region_info(
    device: &mut dyn ServedDevice,
    request: &RegionInfoBody,
) -> Result<(Vec<u8>, Option<OwnedFd>), i32> {
    let index = request.index.get();
    let may_map = device.region(index).ok_or(libc::EINVAL)?.flags & REGION_MMAP != 0;
    let file = may_map.then(|| device.region_file(index)).flatten();
    let region = device.region(index).ok_or(libc::EINVAL)?;
    let mut flags = region.flags & (REGION_READ | REGION_WRITE);
    if file.is_some() {
        flags |= REGION_MMAP;
    }
    let offered = region
        .capabilities
        .iter()
        .filter(|c| is_offered(c, file.is_some()));
    let chain = encode_chain(offered, size_of::<RegionInfoBody>());
    let mut cap_offset = 0;
    if !chain.is_empty() {
        flags |= REGION_CAPS;
        cap_offset = RegionInfoBody::BYTES;
    }
    let needed = size_of::<RegionInfoBody>() + chain.len();
    let has_room = request.argsz.get() as usize >= needed;
    let head = RegionInfoBody {
        argsz: u32::try_from(needed).unwrap_or(u32::MAX).into(),
        flags: flags.into(),
        index: index.into(),
        cap_offset: cap_offset.into(),
        size: region.size.into(),
        offset: file.as_ref().map_or(0, |file| file.offset).into(),
    };
    let mut body = head.as_bytes().to_vec();
    if has_room {
        body.extend(chain);
    }
    let file = file.filter(|_| has_room).map(|region| region.file);
    Ok((body, file))
}

/// Whether a client can use a capability: those that concern mapping only if there is a file to map.
fn is_offered(capability: &RegionCapability, mapped: bool) -> bool {
    match capability.id {
        REGION_CAP_TYPE => true,
        REGION_CAP_SPARSE_MMAP | REGION_CAP_MSIX_MAPPABLE => mapped,
        _ => false,
    }
}

/// The chain of capabilities after a structure of `first` bytes. Each header holds the offset of the
/// next header from the start of that structure, and 0 in the last one.
fn encode_chain<'a>(
    capabilities: impl Iterator<Item = &'a RegionCapability>,
    first: usize,
) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut previous = None;
    for capability in capabilities {
        let at = bytes.len();
        if let Some(previous) = previous {
            let next = u32::try_from(first + at).unwrap_or(0).to_ne_bytes();
            bytes[previous + 4..previous + CAP_HEADER].copy_from_slice(&next);
        }
        bytes.extend(capability.id.to_ne_bytes());
        bytes.extend(capability.version.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&capability.data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        previous = Some(at);
    }
    bytes
}
