//! Lines of a peer that may send anything: bounded in length.

use std::io::{self, Read};

/// The longest line, in bytes. QEMU's events have a few hundred; the list of 250 devices has 300 KiB.
const MAX_LINE: usize = 1 << 20;

/// Splits a stream into lines of up to [`MAX_LINE`] bytes.
pub(super) struct Lines<R> {
    stream: R,
    buffer: Vec<u8>,
    /// The length of the line that was returned last, from the start of the buffer.
    taken: usize,
    /// The bytes after it that have no line end.
    searched: usize,
}

impl<R: Read> Lines<R> {
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            taken: 0,
            searched: 0,
        }
    }

    /// The stream.
    pub fn stream(&self) -> &R {
        &self.stream
    }

    /// The next line that has been read, without its end.
    pub fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let mut rest = self.buffer.iter().skip(self.searched);
        if let Some(more) = rest.position(|byte| *byte == b'\n') {
            let end = self.searched + more;
            self.searched = 0;
            self.taken = end + 1;
            return Ok(self.buffer.get(..end));
        }
        self.searched = self.buffer.len();
        if self.searched >= MAX_LINE {
            return refuse("a line is longer than any of QMP's");
        }
        Ok(None)
    }

    /// Reads once. Returns `false` at the end of the stream.
    pub fn fill(&mut self) -> io::Result<bool> {
        let mut piece = [0; 4096];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(false),
                Ok(count) => {
                    self.buffer.extend(piece.iter().take(count));
                    return Ok(true);
                }
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
    }
}

/// An error: the peer sends what it must not.
pub(super) fn refuse<T>(why: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut lines = Lines::new(bytes);
        let mut all = Vec::new();
        while lines.fill()? {
            while let Some(line) = lines.next()? {
                all.push(line.to_vec());
            }
        }
        Ok(all)
    }

    #[test]
    fn lines_are_split_and_limited_in_length() {
        let long = vec![b'x'; MAX_LINE - 1];
        let text = [&b"one\n\n"[..], &long, b"\nlast\nno line"].concat();
        let found = all(&text).expect("lines");
        assert_eq!(found, [b"one".to_vec(), Vec::new(), long, b"last".to_vec()]);
        assert!(all(&vec![b'x'; 2 * MAX_LINE]).is_err());
    }
}
