//! The VMM's ACPI tables in guest RAM, and the VIOT table that the device adds to them.
//!
//! A VMM without an option for ACPI tables cannot tell its guest which endpoints are behind the IOMMU. Its guest boots
//! with `acpi_rsdp=` and the address of a BAR of the device. While the guest waits for the answer to its first read of
//! that BAR, the device calls [`add_viot`]:
//!
//! 1. `rsdp` finds the VMM's root system description pointer (RSDP) in guest RAM, or in the BIOS area that the VMM has
//!    mapped read-only (`read_only`).
//! 2. `tables` follows it to the root table (XSDT, or RSDT for an RSDP of revision 0) and to every table that the root
//!    table names, and checks each of them.
//! 3. `add_viot` plans where VIOT and its entry of the root table go, checks that both places are free, and only then
//!    writes.
//!
//! Everything in guest RAM is hostile input. Reads are bounded, a table counts only with a correct length and checksum,
//! and a refusal leaves guest RAM as it was. The guest could write whatever this file writes, so a hostile guest gains
//! nothing; the checks keep a broken table from becoming a guest that crashes at boot.
//!
//! Not a copy of the root table elsewhere: the guest's firmware and a kexec kernel may follow the VMM's RSDP, and would
//! find the table without VIOT.

mod read_only;
mod refusal;
mod rsdp;
mod table_state;
mod tables;
#[cfg(test)]
mod tests;

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

pub use read_only::ReadOnlyWindows;
pub use refusal::{AcpiRefusal, TableProblem};
pub use rsdp::Rsdp;
pub use table_state::TableState;

use tables::{CHECKSUM_AT, LENGTH_AT, TableSpan, Tables};

/// VIOT begins at a multiple of this address.
const VIOT_ALIGNMENT: u64 = 16;
/// The e820 map gives nothing smaller than a page to the operating system, so the rest of the page that holds the last
/// table belongs to the tables, too.
const PAGE: u64 = 0x1000;
/// Conventional memory ends here. Below, the last table is in the extended BIOS data area.
const CONVENTIONAL_MEMORY_END: u64 = 0xa_0000;
/// The legacy area of BIOS and adapters ends here. No operating system uses it as RAM.
const LEGACY_AREA_END: u64 = 0x10_0000;

/// VIOT is in the guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// This call has written it to guest-physical address `at`.
    Written {
        /// Where it is.
        at: u64,
    },
    /// An earlier call had written it: the guest reads the tables again, or has started another kernel.
    Present {
        /// Where it is.
        at: u64,
    },
}

/// Adds the table `viot` to the ACPI tables in `memory`, and returns the VMM's own RSDP, which the guest gets as the
/// answer to its read. The RSDP itself does not change, and may be in `read_only`. A second call finds the table of the
/// first and writes nothing. A call after a process that has died in one finishes what that process has begun.
///
/// If the table cannot be added, the RSDP, if there is one, is returned all the same: with it the guest boots as it
/// would without `acpi_rsdp=`.
///
/// # Errors
///
/// The second value is a [`AcpiRefusal`] if the table could not be added. Guest memory has not changed then.
pub fn add_viot<M: GuestMemory + ?Sized>(
    memory: &M,
    read_only: &ReadOnlyWindows,
    viot: &[u8],
) -> (Option<Rsdp>, Result<Added, AcpiRefusal>) {
    let Some(rsdp) = rsdp::find(memory, read_only) else {
        return (None, Err(AcpiRefusal::NoRsdp));
    };
    let added = add_behind(memory, &rsdp, viot);
    (Some(rsdp), added)
}

fn add_behind<M: GuestMemory + ?Sized>(
    memory: &M,
    rsdp: &Rsdp,
    viot: &[u8],
) -> Result<Added, AcpiRefusal> {
    let tables = Tables::follow(memory, rsdp)?;
    if let Some(at) = tables.viot {
        return if is_at(memory, at, viot) {
            Ok(Added::Present { at })
        } else {
            Err(AcpiRefusal::OtherViot { at })
        };
    }
    let plan = Plan::new(&tables, viot)?;
    if let Some(cause) = tables.interrupted
        && !plan.is_written(memory, viot)
    {
        return Err(cause);
    }
    plan.check(memory, &tables, viot)?;
    plan.write(memory, viot)
}

/// Whether `bytes` are in guest memory at `at`.
fn is_at<M: GuestMemory + ?Sized>(memory: &M, at: u64, bytes: &[u8]) -> bool {
    let mut found = vec![0; bytes.len()];
    memory.read_slice(&mut found, GuestAddress(at)).is_ok() && found == bytes
}

/// The writes that add a table.
struct Plan {
    viot: TableSpan,
    entry: TableSpan,
    entry_bytes: Vec<u8>,
    root_at: u64,
    /// The root table's length and checksum with the entry.
    root_length: u32,
    root_checksum: u8,
}

impl Plan {
    fn new(tables: &Tables, viot: &[u8]) -> Result<Self, AcpiRefusal> {
        let entry_len = tables.root.entry_len;
        let viot_len = u64::try_from(viot.len()).unwrap_or(u64::MAX);
        let root_end = tables.root.span.end;
        let no_room = AcpiRefusal::NoRoom {
            at: tables.last_end(),
            bytes: viot_len,
        };
        let entry = TableSpan::from_len(root_end, entry_len as u64).ok_or(no_room)?;
        let at = tables
            .last_end()
            .max(entry.end)
            .checked_next_multiple_of(VIOT_ALIGNMENT)
            .ok_or(no_room)?;
        let viot_span = TableSpan::from_len(at, viot_len).ok_or(no_room)?;
        if viot_span.end > area_end(tables.last_end()) {
            return Err(no_room);
        }
        let entry_bytes = if entry_len == 4 {
            u32::try_from(at)
                .map_err(|_| no_room)?
                .to_le_bytes()
                .to_vec()
        } else {
            at.to_le_bytes().to_vec()
        };

        let mut root = tables.root.bytes.clone();
        root.extend_from_slice(&entry_bytes);
        let root_length = u32::try_from(root.len()).map_err(|_| no_room)?;
        root[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&root_length.to_le_bytes());
        root[CHECKSUM_AT] = 0;
        let root_checksum = rsdp::sum(&root).wrapping_neg();
        Ok(Self {
            viot: viot_span,
            entry,
            entry_bytes,
            root_at: tables.root.span.start,
            root_length,
            root_checksum,
        })
    }

    /// Whether the table and its entry are in memory.
    fn is_written<M: GuestMemory + ?Sized>(&self, memory: &M, viot: &[u8]) -> bool {
        is_at(memory, self.viot.start, viot) && is_at(memory, self.entry.start, &self.entry_bytes)
    }

    /// Both places are RAM that the guest can write, hold zeroes and belong to no table. They may also hold what
    /// [`Self::write`] writes, or a part of it: the process before has died there.
    fn check<M: GuestMemory + ?Sized>(
        &self,
        memory: &M,
        tables: &Tables,
        viot: &[u8],
    ) -> Result<(), AcpiRefusal> {
        if let Some(other) = tables.overlapping(self.entry) {
            return Err(AcpiRefusal::NoEntryRoom { at: other.start });
        }
        let free = tables.last_end().max(self.entry.end);
        let gap = self.viot.start.saturating_sub(free);
        let mut behind = vec![0; usize::try_from(gap).unwrap_or_default()];
        behind.extend(viot);
        if !is_free(memory, self.entry.start, &self.entry_bytes) {
            return Err(AcpiRefusal::NoEntryRoom {
                at: self.entry.start,
            });
        }
        if !is_free(memory, free, &behind) {
            return Err(AcpiRefusal::NoRoom {
                at: free,
                bytes: self.viot.len(),
            });
        }
        let head = TableSpan {
            start: self.root_at,
            end: self.entry.end,
        };
        if !is_writable(memory, head) {
            return Err(AcpiRefusal::ReadOnly { at: self.root_at });
        }
        Ok(())
    }

    /// VIOT first, then what makes it reachable. If the process dies between two writes, or within one of the first two, the
    /// next process makes all of them again.
    fn write<M: GuestMemory + ?Sized>(
        &self,
        memory: &M,
        viot: &[u8],
    ) -> Result<Added, AcpiRefusal> {
        let write = |bytes: &[u8], at: u64| {
            memory
                .write_slice(bytes, GuestAddress(at))
                // `check` has asked for the same ranges.
                .map_err(|_| AcpiRefusal::ReadOnly { at })
        };
        write(viot, self.viot.start)?;
        write(&self.entry_bytes, self.entry.start)?;
        write(
            &self.root_length.to_le_bytes(),
            self.root_at + LENGTH_AT as u64,
        )?;
        write(&[self.root_checksum], self.root_at + CHECKSUM_AT as u64)?;
        Ok(Added::Written {
            at: self.viot.start,
        })
    }
}

/// Up to which address the memory behind a table that ends at `end` belongs to the tables.
fn area_end(end: u64) -> u64 {
    if end <= CONVENTIONAL_MEMORY_END {
        CONVENTIONAL_MEMORY_END
    } else if end <= LEGACY_AREA_END {
        LEGACY_AREA_END
    } else {
        end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
    }
}

/// Whether `planned` may be written to `at`: each byte there is 0, or the planned one.
fn is_free<M: GuestMemory + ?Sized>(memory: &M, at: u64, planned: &[u8]) -> bool {
    let mut found = vec![0; planned.len()];
    let span = TableSpan::from_len(at, planned.len() as u64);
    let is_ours = |(found, planned): (&u8, &u8)| *found == 0 || found == planned;
    span.is_some_and(|span| is_writable(memory, span))
        && memory.read_slice(&mut found, GuestAddress(at)).is_ok()
        && found.iter().zip(planned).all(is_ours)
}

fn is_writable<M: GuestMemory + ?Sized>(memory: &M, span: TableSpan) -> bool {
    usize::try_from(span.len())
        .is_ok_and(|len| memory.check_range(GuestAddress(span.start), len, Permissions::ReadWrite))
}
