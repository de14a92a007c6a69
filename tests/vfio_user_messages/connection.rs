//! One end of a vfio-user connection, written from the specification. It shares no code with the daemon: the tests
//! could not notice a misreading of the specification in shared code.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const REGION_INFO: u16 = 5;
pub const IO_FDS: u16 = 6;
pub const IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const DIRTY_PAGES: u16 = 14;
pub const FEATURE: u16 = 16;
pub const MIG_READ: u16 = 17;
pub const MIG_WRITE: u16 = 18;

pub const COMMAND: u32 = 0;
pub const REPLY: u32 = 1;
pub const NO_REPLY: u32 = 0x10;
pub const ERROR: u32 = 0x21;

/// A decoded message.
#[derive(Debug)]
pub struct Msg {
    pub id: u16,
    pub cmd: u16,
    pub flags: u32,
    pub error: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Msg {
    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.body[at..at + 4].try_into().unwrap())
    }

    pub fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.body[at..at + 8].try_into().unwrap())
    }

    /// The capabilities text of VERSION, decoded.
    pub fn text(&self) -> serde_json::Value {
        let text = self.body[4..].split(|b| *b == 0).next().unwrap();
        serde_json::from_slice(text).expect("JSON")
    }

    /// The errno of an error reply, or 0 for a success.
    pub fn errno(&self) -> i32 {
        match self.flags {
            REPLY => 0,
            ERROR => self.error.cast_signed(),
            other => panic!("flags {other:#x}"),
        }
    }
}

/// The bytes of a message: header and body.
pub fn bytes(id: u16, cmd: u16, flags: u32, error: u32, body: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    all.extend(id.to_ne_bytes());
    all.extend(cmd.to_ne_bytes());
    all.extend((16 + body.len() as u32).to_ne_bytes());
    all.extend(flags.to_ne_bytes());
    all.extend(error.to_ne_bytes());
    all.extend(body);
    all
}

/// The body of VERSION 0.0 with this capabilities text.
pub fn version_body(text: &str) -> Vec<u8> {
    [&[0; 4], text.as_bytes(), &[0]].concat()
}

/// The body of DMA_MAP.
pub fn dma_map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    let mut body = [32u32.to_ne_bytes(), flags.to_ne_bytes()].concat();
    for word in [offset, address, size] {
        body.extend(word.to_ne_bytes());
    }
    body
}

/// The body of DMA_UNMAP.
pub fn dma_unmap(address: u64, size: u64) -> Vec<u8> {
    let mut body = [24u32.to_ne_bytes(), [0; 4]].concat();
    body.extend(address.to_ne_bytes());
    body.extend(size.to_ne_bytes());
    body
}

/// The body of DMA_READ (without data) and DMA_WRITE.
pub fn dma(address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    [&address.to_ne_bytes(), &count.to_ne_bytes(), data].concat()
}

/// The body of REGION_READ (without data) and REGION_WRITE.
pub fn region(offset: u64, index: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let head = [index.to_ne_bytes(), count.to_ne_bytes()].concat();
    [&offset.to_ne_bytes()[..], &head, data].concat()
}

/// The body of SET_IRQS without data.
pub fn irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    let words = [20, flags, index, start, count];
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// A connected socket that sends and receives messages.
pub struct Connection {
    pub stream: UnixStream,
    next_id: u16,
}

impl Connection {
    pub fn new(stream: UnixStream) -> Self {
        let patience = Some(Duration::from_secs(120));
        stream.set_read_timeout(patience).expect("set");
        stream.set_write_timeout(patience).expect("set");
        Self {
            stream,
            next_id: 100,
        }
    }

    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let flags = SendFlags::NOSIGNAL;
        let iov = [IoSlice::new(bytes)];
        match sendmsg(&self.stream, &iov, &mut control, flags) {
            Ok(sent) => match self.stream.write_all(&bytes[sent..]) {
                Ok(()) => {}
                Err(cause) if is_gone(&cause) => {}
                Err(cause) => panic!("not sent: {cause}"),
            },
            // The next `recv` reports the end of the connection.
            Err(cause) if is_gone(&cause.into()) => {}
            Err(cause) => panic!("not sent: {cause}"),
        }
    }

    pub fn send(&mut self, id: u16, cmd: u16, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_raw(&bytes(id, cmd, flags, 0, body), fds);
    }

    pub fn refuse(&mut self, to: &Msg, error: u32) {
        self.refuse_with(to, error, &[]);
    }

    /// Refuses as libvfio-user does: with the body of the reply that it had prepared.
    pub fn refuse_with(&mut self, to: &Msg, error: u32, body: &[u8]) {
        self.send_raw(&bytes(to.id, to.cmd, ERROR, error, body), &[]);
    }

    pub fn reply(&mut self, to: &Msg, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(to.id, to.cmd, REPLY, body, fds);
    }

    /// Sends a command. Returns its message id.
    pub fn ask(&mut self, cmd: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.send(self.next_id, cmd, COMMAND, body, fds);
        self.next_id
    }

    /// Sends a command and waits for its reply, which must be the next message.
    pub fn call(&mut self, cmd: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Msg {
        let id = self.ask(cmd, body, fds);
        let reply = self.recv().expect("a reply");
        assert_eq!((reply.id, reply.cmd), (id, cmd));
        reply
    }

    /// The next message, or `None` at the end of the stream.
    pub fn recv(&mut self) -> Option<Msg> {
        let mut fds = Vec::new();
        let mut head = [0; 16];
        if !self.fill(&mut head, &mut fds) {
            return None;
        }
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(4) as usize - 16];
        if !self.fill(&mut body, &mut fds) {
            // The other end died within the message.
            return None;
        }
        Some(Msg {
            id: word(0) as u16,
            cmd: (word(0) >> 16) as u16,
            flags: word(8),
            error: word(12),
            body,
            fds,
        })
    }

    /// Waits for the end of the stream. False if a byte comes first.
    pub fn is_closed(&mut self) -> bool {
        loop {
            match self.stream.read(&mut [0]) {
                Ok(n) => return n == 0,
                Err(cause) if cause.kind() == ErrorKind::ConnectionReset => return true,
                // The process was stopped, and goes on.
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => panic!("{cause}"),
            }
        }
    }

    fn fill(&mut self, mut buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> bool {
        while !buffer.is_empty() {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(253))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(buffer)];
            let n = match recvmsg(&self.stream, into, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::CONNRESET) => 0,
                // The process was stopped, and goes on. The socket has a timeout, so the kernel does not repeat the call.
                Err(rustix::io::Errno::INTR) => continue,
                Err(cause) => panic!("no message: {cause}"),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(came) = message {
                    fds.extend(came);
                }
            }
            if n == 0 {
                return false;
            }
            buffer = &mut buffer[n..];
        }
        true
    }
}

/// Whether the error means that the other end has closed the socket.
fn is_gone(cause: &std::io::Error) -> bool {
    matches!(
        cause.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
    )
}
