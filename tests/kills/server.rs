//! A device's server: it answers, and reaches memory all the time.

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
use crate::roles::say;
use crate::stamps::{SCRIBBLE, check};

/// Accesses by message that wait for replies at once.
const AT_ONCE: usize = 4;
/// Region of a PCI device's configuration space, and its length.
const CONFIG_REGION: u32 = 7;
const CONFIG_LEN: u64 = 256;
/// The kinds of regions and interrupts that a PCI device has, and what its info says of it.
const PCI_REGIONS: u32 = 9;
const PCI_IRQS: u32 = 5;
const PCI_AND_RESET: u32 = 3;
const GET_IRQ_INFO: u16 = 7;

/// How memory is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// By messages; what is found is checked.
    Messages,
    /// Mapped; what is found is checked.
    Mappings,
    /// By messages that read, whatever is found.
    Reads,
}

/// Serves one connection after the other.
pub fn serve(path: &Path, manner: Manner) -> ! {
    // Another one's that was killed.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).expect("a socket");
    say("listens");
    loop {
        let (stream, _) = listener.accept().expect("a connection");
        let mut connection = Session {
            connection: Connection::new(stream),
            manner,
            windows: BTreeMap::new(),
            asked: HashMap::new(),
            turn: 0,
            done: 0,
            was_read: false,
        };
        let mut works = false;
        while connection.step().is_some() {
            if connection.done >= 10 && !std::mem::replace(&mut works, true) {
                say("works");
            }
        }
    }
}

struct Session {
    connection: Connection,
    manner: Manner,
    /// By first address. With the memory, where it is mapped.
    windows: BTreeMap<u64, Option<MmapRegion>>,
    /// Accesses without a reply: read or written, and where.
    asked: HashMap<u16, (u16, u64)>,
    turn: usize,
    done: u64,
    /// One of its registers was.
    was_read: bool,
}

impl Session {
    /// Does something. `None` at the end of the connection.
    fn step(&mut self) -> Option<()> {
        let idle = self.windows.is_empty() || self.asked.len() >= AT_ONCE;
        if self.has_come(if idle { 20_000_000 } else { 0 }) {
            let message = self.connection.recv()?;
            if message.flags & 0xf == REPLY {
                self.replied(&message);
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
        match (self.manner, memory) {
            (Manner::Mappings, Some(memory)) => {
                let memory = memory.as_volatile_slice();
                let found: u64 = memory.read_obj(0).expect("a page");
                check(found, address, "a server");
                memory.write_obj(found, SCRIBBLE as usize).expect("a page");
                self.done += 1;
            }
            (Manner::Mappings, None) => panic!("a window without a descriptor"),
            (Manner::Messages | Manner::Reads, Some(_)) => panic!("a window with a descriptor"),
            (Manner::Messages | Manner::Reads, None) => {
                if self.asked.len() < AT_ONCE {
                    let id = self.connection.ask(DMA_READ, &dma(address, 8, &[]), &[]);
                    self.asked.insert(id, (DMA_READ, address));
                }
            }
        }
        Some(())
    }

    fn has_come(&self, nanoseconds: i64) -> bool {
        let mut fds = [PollFd::new(&self.connection.stream, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: nanoseconds,
        };
        poll(&mut fds, Some(&patience)).expect("poll") > 0
    }

    fn replied(&mut self, reply: &Msg) {
        let (command, address) = self.asked.remove(&reply.id).expect("asked");
        assert_eq!(command, reply.cmd);
        match reply.errno() {
            0 => {}
            libc::EFAULT => return,
            other => panic!("errno {other}"),
        }
        self.done += 1;
        if command != DMA_READ || self.manner == Manner::Reads {
            return;
        }
        let data: [u8; 8] = reply.body[16..].try_into().expect("eight bytes");
        let found = u64::from_le_bytes(data);
        check(found, address, "a server");
        let body = dma(address + SCRIBBLE, 8, &data);
        let id = self.connection.ask(DMA_WRITE, &body, &[]);
        self.asked.insert(id, (DMA_WRITE, address));
    }

    fn answer(&mut self, mut command: Msg) {
        let answer = match command.cmd {
            VERSION => version_body(r#"{"capabilities":{"max_msg_fds":8}}"#),
            DMA_MAP => {
                self.map(&mut command);
                Vec::new()
            }
            DMA_UNMAP => {
                // Nothing of it is left when this is answered.
                let gone = self.windows.remove(&command.u64_at(8));
                assert!(gone.is_some(), "it was told of");
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
                if self.manner == Manner::Reads && !std::mem::replace(&mut self.was_read, true) {
                    say("read");
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

    fn map(&mut self, command: &mut Msg) {
        let (offset, address) = (command.u64_at(8), command.u64_at(16));
        let size = usize::try_from(command.u64_at(24)).expect("fits");
        let memory = command.fds.pop().map(|fd| {
            let file = FileOffset::new(File::from(fd), offset);
            MmapRegion::from_file(file, size).expect("mapped")
        });
        let before = self.windows.insert(address, memory);
        assert!(before.is_none(), "it had {address:#x}");
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

/// The reply to a read. In a configuration space there are numbers of vendor and device, and a class.
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
