//! What a device in a process of the library does with guest memory.

use vm_memory::{Bytes, VolatileMemory};

use super::Library;
use crate::connection::{DMA_READ, DMA_WRITE, dma};

const READ: u32 = 1;
const WRITE: u32 = 2;

impl Library {
    /// Reads guest memory by messages, which go to the socket for commands. The library sends none unless it knows the
    /// region.
    pub fn read(&self, address: u64, len: u64) -> Result<Vec<u8>, i32> {
        let mut state = self.state();
        state.regions.lookup(address, len, READ)?;
        let twin = state.twin.as_mut().expect("a twin socket");
        let reply = twin.call(DMA_READ, &dma(address, len, &[]), &[]);
        match reply.errno() {
            0 => Ok(reply.body[16..].to_vec()),
            errno => Err(errno),
        }
    }

    /// Writes guest memory in the same way.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), i32> {
        let len = data.len() as u64;
        let mut state = self.state();
        state.regions.lookup(address, len, WRITE)?;
        let twin = state.twin.as_mut().expect("a twin socket");
        let reply = twin.call(DMA_WRITE, &dma(address, len, data), &[]);
        match reply.errno() {
            0 => Ok(()),
            errno => Err(errno),
        }
    }

    /// Reads guest memory where the server has mapped it. The range must be in one region, as SPDK's targets want it.
    pub fn load(&self, address: u64, len: usize) -> Result<Vec<u8>, i32> {
        let state = self.state();
        let parts = state.regions.lookup(address, len as u64, READ)?;
        let [(region, first, _)] = parts[..] else {
            return Err(libc::EINVAL);
        };
        let mapped = region.mapped.as_ref().ok_or(libc::EFAULT)?;
        assert_eq!(mapped.missing, 0, "the server would use other memory");
        let at = usize::try_from(mapped.at + first - region.first).expect("small");
        let memory = mapped.memory.get_slice(at, len).map_err(|_| libc::EFAULT)?;
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, 0).map_err(|_| libc::EFAULT)?;
        Ok(bytes)
    }
}
