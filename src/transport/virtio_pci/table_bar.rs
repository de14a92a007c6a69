//! The BAR from which the guest reads its ACPI root pointer. The device adds the VIOT table meanwhile.

use std::sync::Arc;

use super::trapped_bar::{TrappedBar, TrappedBarRecord};
use crate::device::Device;
use crate::device::acpi::{Added, ReadOnlyWindows, TableState, add_viot};
use crate::{info_limited, warn_limited};

/// The longest RSDP, which is that of revision 2.
const ROOT_POINTER_LEN: u64 = 36;

/// A BAR that begins with the VMM's root pointer and is zero behind it.
///
/// The first read of the root pointer adds VIOT to the tables in guest RAM. Until that has succeeded, every further read
/// tries again: a firmware may have read the BAR before there were tables. After that, the BAR answers from its copy, so
/// the daemon writes to guest RAM once for each start of the VM.
pub struct TableBar {
    device: Arc<Device>,
    viot: Vec<u8>,
    /// The bytes of the root pointer, once it is found.
    root: Vec<u8>,
    /// The log says that the driver has started without a read of this BAR.
    is_missed: bool,
}

impl TableBar {
    /// The BAR of `device`, which announces `viot`.
    pub fn new(device: Arc<Device>, viot: Vec<u8>) -> Self {
        device.set_table_state(TableState::NotRead);
        Self {
            device,
            viot,
            root: Vec::new(),
            is_missed: false,
        }
    }

    fn add(&mut self, read_only: &ReadOnlyWindows) {
        let Some(memory) = self.device.memory() else {
            return;
        };
        let (root, added) = add_viot(&*memory, read_only, &self.viot);
        self.root = root.map_or_else(Vec::new, |root| root.bytes().to_vec());
        let before = self.device.table_state();
        let now = match added {
            Ok(added) => TableState::Added(added),
            Err(cause) => TableState::Refused(cause),
        };
        if now == before {
            return;
        }
        match now {
            TableState::Refused(_) => warn_limited!("{now}"),
            _ => info_limited!("{now}"),
        }
        self.device.set_table_state(now);
    }
}

impl TrappedBar for TableBar {
    fn read(&mut self, offset: u64, into: &mut [u8], read_only: &ReadOnlyWindows) {
        let is_added = matches!(self.device.table_state(), TableState::Added(_));
        if offset >= ROOT_POINTER_LEN {
            if self.device.table_state() == TableState::NotRead {
                let now = TableState::Elsewhere { offset };
                warn_limited!("{now}");
                self.device.set_table_state(now);
            }
            return;
        }
        if !is_added {
            self.add(read_only);
        }
        let wanted = usize::try_from(offset).ok();
        let wanted = wanted.and_then(|at| self.root.get(at..));
        for (byte, found) in into.iter_mut().zip(wanted.unwrap_or_default()) {
            *byte = *found;
        }
    }

    fn driver_started(&mut self) {
        let now = self.device.table_state();
        // Not a warning: the guest may have its table from elsewhere.
        if now == TableState::NotRead && !self.is_missed {
            self.is_missed = true;
            info_limited!("the guest's driver has started the device, but {now}");
        }
    }

    fn restart(&mut self) {
        self.root.clear();
        self.is_missed = false;
        self.device.set_table_state(TableState::NotRead);
    }

    /// Only of a table that is written: nothing may be written to the RAM of a guest that has its own by now.
    fn record(&self) -> Option<TrappedBarRecord> {
        match self.device.table_state() {
            TableState::Added(Added::Written { at } | Added::Present { at }) => {
                Some(TrappedBarRecord {
                    table_at: at,
                    root: self.root.clone(),
                })
            }
            _ => None,
        }
    }

    fn resume(&mut self, record: &TrappedBarRecord) {
        self.root.clone_from(&record.root);
        let at = record.table_at;
        self.device
            .set_table_state(TableState::Added(Added::Present { at }));
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::device::acpi::AcpiRefusal;
    use crate::device::testing::device;

    const VIOT: &[u8] = b"VIOT\x28\0\0\0\0\0............................!!!!";

    /// A VMM's tables: an RSDP at 0xa0000 and an empty XSDT behind it.
    fn tables() -> Vec<u8> {
        let mut bytes = b"RSD PTR \0VMM   \x02\0\0\0\0\x24\0\0\0".to_vec();
        bytes.extend_from_slice(&0xa_0024u64.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        bytes[8] = sum(&bytes[..20]).wrapping_neg();
        bytes[32] = sum(&bytes).wrapping_neg();
        let mut xsdt = b"XSDT\x24\0\0\0\x01\0............................".to_vec();
        xsdt.truncate(36);
        xsdt[9] = sum(&xsdt).wrapping_neg();
        bytes.extend_from_slice(&xsdt);
        bytes
    }

    fn with_memory(contents: &[u8]) -> (Arc<Device>, TableBar) {
        let (device, _) = device();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("mapped");
        memory
            .write_slice(contents, GuestAddress(0xa_0000))
            .expect("written");
        device.set_memory(Arc::new(memory)).expect("accepted");
        let bar = TableBar::new(device.clone(), VIOT.to_vec());
        (device, bar)
    }

    fn read(bar: &mut TableBar, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bar.read(offset, &mut bytes, &ReadOnlyWindows::default());
        bytes
    }

    fn ram(device: &Device) -> Vec<u8> {
        let mut bytes = vec![0; 0x200];
        let memory = device.memory().expect("memory");
        memory
            .read_slice(&mut bytes, GuestAddress(0xa_0000))
            .expect("read");
        bytes
    }

    #[test]
    fn the_first_read_of_the_root_pointer_writes_the_table_once() {
        let (device, mut bar) = with_memory(&tables());
        assert_eq!(device.table_state().word(), Some("not read"));
        // Linux's decompressor begins in the middle.
        assert_eq!(read(&mut bar, 24, 8), 0xa_0024u64.to_le_bytes());
        assert_eq!(device.table_state().word(), Some("written"));
        let written = ram(&device);
        let at = written.windows(4).position(|window| window == b"VIOT");
        assert!(at.is_some(), "no table in RAM");
        assert_eq!(read(&mut bar, 0, 64)[..36], tables()[..36]);
        assert_eq!(read(&mut bar, 0, 64)[36..], [0; 28]);
        assert_eq!(ram(&device), written);

        // The guest destroys its tables: the answer is the same, and nothing is written again.
        let memory = device.memory().expect("memory");
        memory
            .write_slice(&[0; 0x200], GuestAddress(0xa_0000))
            .expect("written");
        assert_eq!(read(&mut bar, 0, 36), tables()[..36]);
        assert_eq!(ram(&device), [0; 0x200]);

        // A reset, and the VMM's tables anew.
        bar.restart();
        assert_eq!(device.table_state().word(), Some("not read"));
        memory
            .write_slice(&tables(), GuestAddress(0xa_0000))
            .expect("written");
        assert_eq!(read(&mut bar, 0, 1), b"R");
        assert_eq!(ram(&device), written);
    }

    #[test]
    fn reads_elsewhere_and_refusals_are_noticed() {
        let (device, mut bar) = with_memory(&[]);
        assert_eq!(read(&mut bar, 0x100, 4), [0; 4]);
        assert_eq!(
            device.table_state(),
            TableState::Elsewhere { offset: 0x100 }
        );
        assert_eq!(read(&mut bar, 0, 8), [0; 8]);
        let refused = TableState::Refused(AcpiRefusal::NoRsdp);
        assert_eq!(device.table_state(), refused);

        // The tables come later; the next read finds them.
        let memory = device.memory().expect("memory");
        let mut broken = tables();
        broken[36 + 9] ^= 1;
        for (contents, word) in [(broken, "refused"), (tables(), "written")] {
            memory
                .write_slice(&contents, GuestAddress(0xa_0000))
                .expect("written");
            assert_eq!(read(&mut bar, 0, 8), b"RSD PTR ");
            assert_eq!(device.table_state().word(), Some(word));
        }
    }
}
