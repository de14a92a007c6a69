//! A device's server that keeps a number of accesses in flight. It uses few system calls, so that the interposer is the
//! bottleneck: the commands that it can send at once are one `write`, and one `read` takes the replies that have come.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::connection::{COMMAND, DMA_MAP, DMA_READ, DMA_WRITE, REPLY, bytes, dma};

const HEADER: usize = 16;
/// Bytes of header and fields in front of the data.
const HEAD: usize = 32;

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// The server's end of the connection.
pub struct Server {
    stream: UnixStream,
    received: Vec<u8>,
    len: usize,
}

impl Server {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(None).expect("set");
        stream.set_write_timeout(None).expect("set");
        Self {
            stream,
            received: vec![0; 1 << 20],
            len: 0,
        }
    }

    /// Accepts the window that the interposer announces first.
    pub fn answer_windows(&mut self) {
        self.fill(HEADER + 32);
        assert_eq!(
            u16::from_ne_bytes([self.received[2], self.received[3]]),
            DMA_MAP
        );
        let id = u16::from_ne_bytes([self.received[0], self.received[1]]);
        self.consume(HEADER + 32);
        let reply = bytes(id, DMA_MAP, REPLY, 0, &[]);
        self.stream.write_all(&reply).expect("sent");
    }

    /// Makes accesses for as long as `time`, in ascending order within `0..limit`. Returns their number.
    pub fn run(
        &mut self,
        access: Access,
        bytes: u64,
        in_flight: usize,
        limit: u64,
        time: Duration,
    ) -> u64 {
        let begin = Instant::now();
        let (mut sent, mut done) = (0, 0);
        let mut commands = Vec::new();
        let mut due = in_flight;
        let reply_len = match access {
            Access::Read => HEAD + bytes as usize,
            Access::Write => HEAD,
        };
        loop {
            commands.clear();
            for _ in 0..due {
                push_command(&mut commands, access, sent, bytes, limit);
                sent += 1;
            }
            self.send(&commands);
            due = 0;
            self.fill(reply_len);
            while self.len >= (due + 1) * reply_len {
                let header = &self.received[due * reply_len..][..HEADER];
                assert_eq!(
                    u16::from_ne_bytes([header[0], header[1]]),
                    done as u16,
                    "in order"
                );
                assert_eq!(header[8], REPLY as u8, "no refusal");
                due += 1;
                done += 1;
            }
            self.consume(due * reply_len);
            if begin.elapsed() >= time {
                break;
            }
        }
        while done < sent {
            self.fill(reply_len);
            self.consume(reply_len);
            done += 1;
        }
        done
    }

    /// Receives until at least `len` bytes are there.
    fn fill(&mut self, len: usize) {
        while self.len < len {
            match self.stream.read(&mut self.received[self.len..]) {
                Ok(0) => panic!("the interposer has hung up"),
                Ok(n) => self.len += n,
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => panic!("{cause}"),
            }
        }
    }

    fn consume(&mut self, len: usize) {
        self.received.copy_within(len..self.len, 0);
        self.len -= len;
    }

    fn send(&mut self, commands: &[u8]) {
        self.stream.write_all(commands).expect("sent");
    }
}

fn push_command(into: &mut Vec<u8>, access: Access, number: u64, len: u64, limit: u64) {
    let address = number * len % limit;
    let (command, data) = match access {
        Access::Read => (DMA_READ, Vec::new()),
        Access::Write => (DMA_WRITE, vec![0x5a; len as usize]),
    };
    let body = dma(address, len, &data);
    into.extend(bytes(number as u16, command, COMMAND, 0, &body));
}
