//! A device's server that answers commands and accesses memory without a pause.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::connection::{
    Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, GET_INFO, Msg, REGION_INFO, REGION_READ,
    REGION_WRITE, REPLY, RESET, SET_IRQS, VERSION, dma, region, version_body,
};
use crate::roles::report;
use crate::stamps::{WRITE_OFFSET, check_stamp};

/// The number of accesses by message that may be pending.
const MAX_PENDING: usize = 4;
/// The flag of DMA_UNMAP that removes all windows.
const UNMAP_ALL: u32 = 2;
/// The region of a PCI device's configuration space.
const CONFIG_REGION: u32 = 7;
/// The length of the configuration space in bytes.
const CONFIG_LEN: u64 = 256;
/// The numbers of regions and kinds of interrupts, and the flags, in a PCI device's info.
const PCI_REGIONS: u32 = 9;
const PCI_IRQS: u32 = 5;
const PCI_AND_RESET: u32 = 3;
const GET_IRQ_INFO: u16 = 7;

/// How the server accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessMode {
    /// By messages that read and write. It checks what it reads.
    Messages,
    /// Through mapped memory. It checks what it reads.
    Mappings,
    /// By messages that read. It does not check what it reads.
    Reads,
}

/// Serves one connection after the other.
pub fn serve(path: &Path, mode: AccessMode) -> ! {
    // The socket of an earlier server that was killed.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).expect("a socket");
    report("listens");
    loop {
        let (stream, _) = listener.accept().expect("a connection");
        let mut session = Session {
            connection: Connection::new(stream),
            mode,
            windows: BTreeMap::new(),
            removed: None,
            has_removed_all: false,
            probes: 0,
            pending: HashMap::new(),
            turn: 0,
            done: 0,
            was_read: false,
        };
        let mut works = false;
        while session.step().is_some() {
            if session.done >= 10 && !std::mem::replace(&mut works, true) {
                report("works");
            }
        }
    }
}

/// A connection to the interposer and the state of its accesses.
struct Session {
    connection: Connection,
    mode: AccessMode,
    /// The windows by first address, each with its memory if it came with a descriptor.
    windows: BTreeMap<u64, Option<MmapRegion>>,
    /// The window that was removed last by itself.
    removed: Option<u64>,
    /// All windows were removed at once.
    has_removed_all: bool,
    /// After the first time, the interposer removes this many more to see whether they are gone.
    probes: usize,
    /// Pending accesses by message id: command and address.
    pending: HashMap<u16, (u16, u64)>,
    turn: usize,
    done: u64,
    /// Whether the client has read a register.
    was_read: bool,
}

impl Session {
    /// Handles a message or makes one access. `None` at the end of the connection.
    fn step(&mut self) -> Option<()> {
        let idle = self.windows.is_empty() || self.pending.len() >= MAX_PENDING;
        if self.has_message(if idle { 20_000_000 } else { 0 }) {
            let message = self.connection.recv()?;
            if message.flags & 0xf == REPLY {
                self.handle_reply(&message);
            } else {
                self.answer(message);
            }
            return Some(());
        }
        self.turn += 1;
        let at = self.turn % self.windows.len().max(1);
        let Some((&address, memory)) = self.windows.iter().nth(at) else {
            return Some(());
        };
        match (self.mode, memory) {
            (AccessMode::Mappings, Some(memory)) => {
                let memory = memory.as_volatile_slice();
                let found: u64 = memory.read_obj(0).expect("a page");
                check_stamp(found, address, "a server");
                memory
                    .write_obj(found, WRITE_OFFSET as usize)
                    .expect("a page");
                self.done += 1;
            }
            (AccessMode::Mappings, None) => panic!("a window without a descriptor"),
            (AccessMode::Messages | AccessMode::Reads, Some(_)) => {
                panic!("a window with a descriptor")
            }
            (AccessMode::Messages | AccessMode::Reads, None) => {
                if self.pending.len() < MAX_PENDING {
                    let id = self.connection.ask(DMA_READ, &dma(address, 8, &[]), &[]);
                    self.pending.insert(id, (DMA_READ, address));
                }
            }
        }
        Some(())
    }

    fn has_message(&self, nanoseconds: i64) -> bool {
        let mut fds = [PollFd::new(&self.connection.stream, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: nanoseconds,
        };
        poll(&mut fds, Some(&patience)).expect("poll") > 0
    }

    fn handle_reply(&mut self, reply: &Msg) {
        let (command, address) = self.pending.remove(&reply.id).expect("a pending access");
        assert_eq!(command, reply.cmd);
        match reply.errno() {
            0 => {}
            libc::EFAULT => return,
            other => panic!("errno {other}"),
        }
        self.done += 1;
        if command != DMA_READ || self.mode == AccessMode::Reads {
            return;
        }
        let data: [u8; 8] = reply.body[16..].try_into().expect("eight bytes");
        let found = u64::from_le_bytes(data);
        check_stamp(found, address, "a server");
        let body = dma(address + WRITE_OFFSET, 8, &data);
        let id = self.connection.ask(DMA_WRITE, &body, &[]);
        self.pending.insert(id, (DMA_WRITE, address));
    }

    fn answer(&mut self, mut command: Msg) {
        let answer = match command.cmd {
            VERSION => version_body(r#"{"capabilities":{"max_msg_fds":8}}"#),
            DMA_MAP => {
                self.map(&mut command);
                Vec::new()
            }
            DMA_UNMAP => {
                // Unmaps the memory before the reply.
                if !self.unmap(&command) {
                    return self
                        .connection
                        .refuse(&command, libc::ENOENT.unsigned_abs());
                }
                command.body.clone()
            }
            SET_IRQS | RESET => Vec::new(),
            GET_INFO => [16, PCI_AND_RESET, PCI_REGIONS, PCI_IRQS]
                .into_iter()
                .flat_map(u32::to_ne_bytes)
                .collect(),
            REGION_INFO => region_info(command.u32_at(8)),
            GET_IRQ_INFO => [16, 0, command.u32_at(8), 0]
                .into_iter()
                .flat_map(u32::to_ne_bytes)
                .collect(),
            REGION_READ => {
                if self.mode == AccessMode::Reads && !std::mem::replace(&mut self.was_read, true) {
                    report("read");
                }
                region_read(&command)
            }
            REGION_WRITE => command.body[..16].to_vec(),
            _ => {
                return self
                    .connection
                    .refuse(&command, libc::ENOTSUP.unsigned_abs());
            }
        };
        if command.flags & 0x10 == 0 {
            self.connection.reply(&command, &answer, &[]);
        }
    }

    /// Returns false if the server does not have the window.
    fn unmap(&mut self, command: &Msg) -> bool {
        let (flags, first) = (command.u32_at(4), command.u64_at(8));
        if flags == UNMAP_ALL {
            self.windows.clear();
            let is_first = !std::mem::replace(&mut self.has_removed_all, true);
            self.probes = if is_first { 2 } else { 0 };
            return true;
        }
        let is_known = self.windows.remove(&first).is_some();
        if is_known {
            self.removed = Some(first);
        } else if self.probes > 0 {
            self.probes -= 1;
        } else {
            // The interposer asks twice before it removes all windows for the first time.
            let is_control = !self.has_removed_all && self.removed == Some(first);
            assert!(is_control, "the server has this window");
        }
        is_known
    }

    fn map(&mut self, command: &mut Msg) {
        let (offset, address) = (command.u64_at(8), command.u64_at(16));
        let size = usize::try_from(command.u64_at(24)).expect("fits");
        let memory = command.fds.pop().map(|fd| {
            let file = FileOffset::new(File::from(fd), offset);
            MmapRegion::from_file(file, size).expect("mapped")
        });
        let before = self.windows.insert(address, memory);
        assert!(
            before.is_none(),
            "the server has a window at {address:#x} already"
        );
    }
}

fn region_info(index: u32) -> Vec<u8> {
    let (flags, size) = if index == CONFIG_REGION {
        (3u32, CONFIG_LEN)
    } else {
        (0, 0)
    };
    let mut info: Vec<u8> = [32, flags, index, 0]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    info.extend(size.to_ne_bytes());
    info.extend(0u64.to_ne_bytes());
    info
}

/// The reply to REGION_READ. The configuration space has vendor, device and class; other bytes are zero.
fn region_read(command: &Msg) -> Vec<u8> {
    let mut space = [0u8; CONFIG_LEN as usize];
    space[..4].copy_from_slice(&[0x36, 0x1b, 0x05, 0x00]);
    space[10..12].copy_from_slice(&[0x00, 0xff]);
    let (offset, index, count) = (command.u64_at(0), command.u32_at(8), command.u32_at(12));
    let data: Vec<u8> = (offset..offset + u64::from(count))
        .map(|at| space.get(at as usize).copied().unwrap_or(0))
        .collect();
    region(offset, index, count, &data)
}
