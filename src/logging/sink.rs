//! Standard error as the log writes to it: never waiting for the process at the other end.
//!
//! Threads log while they hold locks. A pipe or a socket that nobody reads would stop them, and with them the guest, the
//! operator and SIGTERM. So a line is written only as far as that does not wait; otherwise it is lost and counted, and
//! the next line that is written says how many were lost.
//!
//! Not `O_NONBLOCK`: it is a property of the open file, which other processes share (`launch` gives its standard error
//! to the daemon and the VMM). Not a thread that writes lines from a queue: a daemon that is killed or aborts would lose
//! the lines that say why.

use std::fmt::Display;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::SendFlags;

/// `PIPE_BUF`: a pipe takes a line of this length whole or not at all.
const MAX_LINE: usize = 4096;

/// An open file to which lines are written, and the number of lines that it did not take.
#[derive(Debug)]
pub(super) struct Sink<F> {
    file: F,
    kind: SinkKind,
    lost: AtomicU64,
    /// Lost lines since the last one that was written.
    unreported: AtomicU64,
    /// The last line was written in part.
    is_torn: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SinkKind {
    /// A regular file. A write waits for the disk, and for no other process.
    Regular,
    Socket,
    /// A pipe, a terminal, another device.
    Stream,
}

impl<F: AsFd> Sink<F> {
    pub(super) fn new(file: F) -> Self {
        let kind = match rustix::fs::fstat(&file) {
            Ok(found) => match FileType::from_raw_mode(found.st_mode) {
                FileType::RegularFile => SinkKind::Regular,
                FileType::Socket => SinkKind::Socket,
                _ => SinkKind::Stream,
            },
            Err(_) => SinkKind::Stream,
        };
        Self {
            file,
            kind,
            lost: AtomicU64::new(0),
            unreported: AtomicU64::new(0),
            is_torn: AtomicBool::new(false),
        }
    }

    /// The number of lines that were lost so far.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Writes a line, with its line feed, or counts it as lost. If lines were lost before it, `notice` makes the line
    /// that says so from their number.
    pub(super) fn write_line(&self, line: &[u8], notice: impl Fn(u64) -> String) {
        let unreported = self.unreported.swap(0, Ordering::Relaxed);
        let is_written = if unreported == 0 {
            self.try_write(line)
        } else {
            // In one piece: the notice alone may fit where no line does.
            self.try_write(&[notice(unreported).as_bytes(), line].concat())
        };
        if !is_written {
            self.unreported.fetch_add(unreported + 1, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes a line of at most [`MAX_LINE`] bytes. Takes no memory, and says nothing of lines that were lost before it.
    pub(super) fn write_prepared(&self, line: &[u8]) {
        if !self.try_write(line) {
            self.unreported.fetch_add(1, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes a line without waiting. Returns whether all of it is written.
    fn try_write(&self, line: &[u8]) -> bool {
        let cut;
        let mut line = line;
        if self.kind != SinkKind::Regular && line.len() > MAX_LINE {
            cut = shortened(line);
            line = &cut;
        }
        if self.is_torn.load(Ordering::Relaxed) {
            if !matches!(self.write_some(b"\n"), Ok(1)) {
                return false;
            }
            self.is_torn.store(false, Ordering::Relaxed);
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.write_some(rest) {
                Ok(count) if count > 0 => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => {
                    let is_torn = rest.len() < line.len();
                    self.is_torn.store(is_torn, Ordering::Relaxed);
                    return false;
                }
            }
        }
        true
    }

    fn write_some(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let file = self.file.as_fd();
        match self.kind {
            SinkKind::Regular => rustix::io::write(file, bytes),
            SinkKind::Socket => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                rustix::net::send(file, bytes, flags)
            }
            SinkKind::Stream => write_at_once(file, bytes),
        }
    }
}

/// Writes to a pipe or a terminal without waiting.
fn write_at_once(file: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    // At the present position, which a pipe does not have.
    let here = u64::MAX;
    match rustix::io::pwritev2(file, &[IoSlice::new(bytes)], here, ReadWriteFlags::NOWAIT) {
        // Terminals, and pipes before Linux 6.4.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::SPIPE) => {}
        outcome => return outcome,
    }
    // A pipe that can be written to has room for `PIPE_BUF` bytes, unless another process is faster.
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::from_borrowed_fd(file, PollFlags::OUT)];
    if poll(&mut fds, Some(&at_once))? == 0 {
        return Err(Errno::AGAIN);
    }
    rustix::io::write(file, bytes)
}

/// The beginning of a long line.
fn shortened(line: &[u8]) -> Vec<u8> {
    const END: &str = "...\n";
    let mut end = MAX_LINE - END.len();
    // Not in the middle of a character.
    while end > 0 && line.get(end).is_some_and(|byte| byte & 0xc0 == 0x80) {
        end -= 1;
    }
    let mut cut = line.get(..end).unwrap_or_default().to_vec();
    cut.extend(END.as_bytes());
    cut
}

/// The sink as the logger writes to it: each line in one piece.
pub(super) struct LineWriter<F> {
    pub(super) sink: Arc<Sink<F>>,
    /// The beginning of the lines that the sink adds.
    pub(super) head: String,
}

impl<F: AsFd> Write for LineWriter<F> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let notice = |lost: u64| notice(&self.head, lost);
        self.sink.write_line(line, notice);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn notice(head: &str, lost: impl Display) -> String {
    format!("{head}{lost} messages before this one were lost: nobody read standard error\n")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    fn notice_of(lost: u64) -> String {
        notice("", lost)
    }

    /// Writes lines until the sink takes no more, then more. Returns how many it took.
    fn fill(sink: &Sink<OwnedFd>) -> u64 {
        let line = [&[b'x'; 999][..], b"\n"].concat();
        let mut written = 0;
        while sink.lost() == 0 {
            sink.write_line(&line, notice_of);
            written += 1;
            assert!(written < 10_000, "it is never full");
        }
        sink.write_line(&line, notice_of);
        sink.write_line(&line, notice_of);
        written - 1
    }

    fn check_losses(sink: Sink<OwnedFd>, mut reader: impl Read + Send) {
        let (done, waiting) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| done.send(fill(&sink)));
            // A hang fails the test by the time limit of the test program's caller, and by this message.
            let taken = waiting.recv_timeout(Duration::from_secs(30));
            let taken = taken.expect("nobody waits for the reader");
            assert_eq!(sink.lost(), 3);
            let mut read = vec![0; usize::try_from(taken).expect("small") * 1000];
            reader.read_exact(&mut read).expect("whole lines");
            sink.write_line(b"again\n", notice_of);
            sink.write_line(b"and again\n", notice_of);
        });
        assert_eq!(sink.lost(), 3);
        drop(sink);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).expect("text");
        let expected = format!("{}again\nand again\n", notice_of(3));
        assert_eq!(rest, expected);
    }

    #[test]
    fn a_full_pipe_loses_lines_and_keeps_nobody_waiting() {
        let (reader, writer) = io::pipe().expect("a pipe");
        check_losses(Sink::new(writer.into()), reader);
    }

    #[test]
    fn a_full_socket_loses_lines_and_keeps_nobody_waiting() {
        let (reader, writer) = UnixStream::pair().expect("sockets");
        check_losses(Sink::new(writer.into()), reader);
    }

    #[test]
    fn a_file_takes_every_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let sink = Sink::new(File::create(&path).expect("a file"));
        let long = [&[b'x'; 9999][..], b"\n"].concat();
        sink.write_line(&long, notice_of);
        sink.write_line(b"end\n", notice_of);
        assert_eq!(sink.lost(), 0);
        let text = std::fs::read(&path).expect("a file");
        assert_eq!(text, [&long[..], b"end\n"].concat());
    }

    #[test]
    fn a_long_line_is_cut_between_two_characters() {
        let line = format!("{}\n", "\u{e4}".repeat(3000));
        let cut = shortened(line.as_bytes());
        let text = String::from_utf8(cut).expect("whole characters");
        assert!(text.len() <= MAX_LINE && text.len() > MAX_LINE - 8);
        assert!(text.ends_with("\u{e4}...\n"));
    }

    #[test]
    fn a_closed_reader_loses_lines() {
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        let sink = Sink::new(OwnedFd::from(writer));
        sink.write_line(b"x\n", notice_of);
        assert_eq!(sink.lost(), 1);
    }
}
