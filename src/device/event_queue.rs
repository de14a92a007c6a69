//! The event queue: fault records into the buffers the driver has posted.

use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, Permissions};

use crate::iommu::{Fault, FaultReason};
use crate::protocol::fault::{FAULT_LEN, WireReason, encode};
use crate::warn_limited;

/// Writes `fault` into the next buffer and notifies the driver.
///
/// 1. Somebody meets a refused access and has the core's [`Fault`].
/// 2. The next buffer is taken off the ring, under the ring's lock.
/// 3. A buffer too small for a record goes back empty, and the next one is tried; there are no
///    more of them than the ring has entries.
/// 4. The record is written, the buffer returned, the driver notified.
///
/// Returns `false` where the ring is not running or has no fitting buffer: the fault is dropped.
pub fn deliver(vring: &VringRwLock, memory: &GuestMemoryMmap, fault: &Fault) -> bool {
    let reason = match fault.reason {
        FaultReason::Unknown => WireReason::Unknown,
        FaultReason::Domain => WireReason::Domain,
        FaultReason::Mapping => WireReason::Mapping,
    };
    let record = encode(reason, fault.access, fault.endpoint, Some(fault.address));

    let mut ring = vring.get_mut();
    if !ring.is_enabled() || !ring.get_queue().ready() {
        return false;
    }
    let mut delivered = false;
    for _ in 0..ring.get_queue().size() {
        let chain = match ring.get_queue_mut().iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(cause) => {
                warn_limited!("the event ring cannot be read: {cause}");
                return false;
            }
        };
        let Some(chain) = chain else {
            break;
        };
        let head = chain.head_index();
        let fits = write_record(memory, chain, &record);
        let len = if fits { FAULT_LEN } else { 0 };
        let returned = ring
            .get_queue_mut()
            .add_used(memory, head, u32::try_from(len).unwrap_or(0));
        if let Err(cause) = returned {
            warn_limited!("cannot return event buffer {head}: {cause}");
        } else if fits {
            delivered = true;
            break;
        }
    }
    if ring.needs_notification().unwrap_or(true)
        && let Err(cause) = ring.signal_used_queue()
    {
        warn_limited!("cannot notify the driver of an event: {cause}");
    }
    delivered
}

/// Writes a record into one buffer, which may consist of several descriptors; not at all where it
/// does not fit.
fn write_record(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    record: &[u8; FAULT_LEN],
) -> bool {
    let fits = |len: usize| len >= FAULT_LEN;
    let mut pieces = Vec::with_capacity(1);
    let mut room = 0usize;
    for piece in chain {
        let len = piece.len() as usize;
        if !piece.is_write_only() || !memory.check_range(piece.addr(), len, Permissions::Write) {
            return false;
        }
        room = room.saturating_add(len);
        pieces.push((piece.addr(), len));
        if fits(room) {
            break;
        }
    }
    if !fits(room) {
        return false;
    }
    let mut rest = record.as_slice();
    pieces.iter().all(|&(at, len)| {
        let (now, later) = rest.split_at(len.min(rest.len()));
        rest = later;
        memory.write_slice(now, at).is_ok()
    })
}
