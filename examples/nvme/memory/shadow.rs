//! Guest memory through the daemon's page tables.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use log::info;
use parking_lot::Mutex;
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::{ShadowMemory, ShadowReader};
use vhost_device_iommu::vfio_user::message::{DmaMapBody, DmaUnmapBody};
use vm_memory::{Bytes, GuestAddress};

use super::{DmaError, Gate, Memory, PIECE, Segment};

/// A reader of the page tables. It connects at the first access. It ignores the client's windows. When the daemon is
/// replaced, the library registers again, and accesses wait meanwhile.
pub struct Shadow {
    path: PathBuf,
    endpoint: EndpointId,
    view: Mutex<Option<(ShadowReader, ShadowMemory)>>,
}

impl Shadow {
    /// A reader for `endpoint`, at the daemon's socket `path`.
    pub fn new(path: PathBuf, endpoint: EndpointId) -> Self {
        Self {
            path,
            endpoint,
            view: Mutex::default(),
        }
    }

    /// Splits segments into pieces and calls `access` for each, with its address, its offset in the data
    /// and its length. The guest's UNMAP waits for one call at most.
    fn for_each_piece(
        &self,
        gate: &Gate,
        segments: &[Segment],
        mut access: impl FnMut(
            &ShadowMemory,
            GuestAddress,
            usize,
            usize,
        ) -> Result<(), vm_memory::GuestMemoryError>,
    ) -> Result<(), DmaError> {
        let mut view = self.view.lock();
        let memory = self.current(&mut view)?;
        let mut at = 0;
        for segment in segments {
            for offset in (0..segment.len).step_by(PIECE) {
                let len = PIECE.min(segment.len - offset);
                let address = GuestAddress(segment.address.wrapping_add(offset as u64));
                let _open = gate.enter()?;
                access(memory, address, at, len).map_err(|e| DmaError::Refused(e.to_string()))?;
                at += len;
            }
        }
        Ok(())
    }

    /// The guest's present memory; connects if necessary.
    fn current<'a>(
        &self,
        view: &'a mut Option<(ShadowReader, ShadowMemory)>,
    ) -> Result<&'a ShadowMemory, DmaError> {
        if let Some((reader, memory)) = view
            && reader.has_changed(memory)
        {
            *memory = reader.memory();
        }
        if view.is_none() {
            let reader = ShadowReader::connect(&self.path, self.endpoint);
            let reader = reader.map_err(|cause| DmaError::Refused(cause.to_string()))?;
            info!("connected to {} as a shadow reader", self.path.display());
            let memory = reader.memory();
            *view = Some((reader, memory));
        }
        view.as_ref()
            .map(|(_, memory)| memory)
            .ok_or(DmaError::Closed)
    }
}

impl Memory for Shadow {
    fn read(&self, gate: &Gate, from: &[Segment], into: &mut [u8]) -> Result<(), DmaError> {
        self.for_each_piece(gate, from, |memory, address, at, len| {
            let into = into.get_mut(at..at + len).unwrap_or_default();
            memory.read_slice(into, address)
        })
    }

    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError> {
        self.for_each_piece(gate, to, |memory, address, at, len| {
            let from = from.get(at..at + len).unwrap_or_default();
            memory.write_slice(from, address)
        })
    }

    fn map(&self, _: &DmaMapBody, _: Option<OwnedFd>) -> Result<(), i32> {
        Ok(())
    }

    fn unmap(&self, _: &DmaUnmapBody) -> Result<(), i32> {
        Ok(())
    }
}
