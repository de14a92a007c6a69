//! The event queue: writes fault records into the buffers that the driver has posted.

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use zerocopy::IntoBytes;

use super::ring::{LockedRing, Ring, notify};
use crate::faults::Fault;
use crate::protocol::fault::FAULT_LEN;
use crate::protocol::wire::FaultRecord;
use crate::warn_limited;

/// The number of buffers that a fault may skip, because they are too small, before its last attempt.
const MAX_TOO_SMALL: usize = 16;

/// Writes `fault` into the next buffer. The caller must send the ring's interrupts.
///
/// 1. The caller has refused an access and describes it as a [`Fault`].
/// 2. The device locks the ring and takes the next buffer off it.
/// 3. If the buffer is too small for a record, the device returns it empty and takes the next one, up to 16 times.
/// 4. The device writes the record, returns the buffer and requests an interrupt.
///
/// Returns `false` if the ring is not running or has no buffer that fits: the fault is dropped.
pub fn deliver(ring: &impl Ring, memory: &GuestMemoryMmap, fault: &Fault) -> bool {
    let record = FaultRecord::from(fault);

    let mut ring = ring.lock();
    if !ring.is_running() {
        return false;
    }
    let mut delivered = false;
    let mut returned = 0;
    while !delivered {
        let queue = ring.queue_mut();
        let size = queue.size();
        let chain = match queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(cause) => {
                warn_limited!("the event ring cannot be read: {cause}");
                ring.report_broken();
                break;
            }
        };
        let Some(chain) = chain else {
            break;
        };
        let head = chain.head_index();
        delivered = write_record(memory, chain, size, &record);
        let len = if delivered { FAULT_LEN } else { 0 };
        if let Err(cause) = queue.add_used(memory, head, u32::try_from(len).unwrap_or(0)) {
            warn_limited!("cannot return event buffer {head}: {cause}");
            ring.report_broken();
            delivered = false;
        }
        returned += 1;
        if returned > MAX_TOO_SMALL {
            break;
        }
    }
    if returned > 0 {
        notify(&mut ring, memory);
    }
    delivered
}

/// Writes a record into one buffer, which may have several descriptors. Returns whether it fits; if not, writes
/// nothing.
fn write_record(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    queue_size: u16,
    record: &FaultRecord,
) -> bool {
    let mut pieces = [(GuestAddress(0), 0); FAULT_LEN];
    let (mut count, mut room) = (0, 0usize);
    for piece in chain.take(usize::from(queue_size)) {
        let len = (piece.len() as usize).min(FAULT_LEN - room);
        if !piece.is_write_only() || !memory.check_range(piece.addr(), len, Permissions::Write) {
            return false;
        }
        if len > 0 {
            pieces[count] = (piece.addr(), len);
            count += 1;
            room += len;
        }
        if room == FAULT_LEN {
            break;
        }
    }
    if room < FAULT_LEN {
        return false;
    }
    let mut rest = record.as_bytes();
    pieces.iter().take(count).all(|&(at, len)| {
        let (now, later) = rest.split_at(len);
        rest = later;
        memory.write_slice(now, at).is_ok()
    })
}
