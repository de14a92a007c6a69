//! Tells the process that started the daemon that its sockets listen.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::RawFd;

use crate::process::inherited::adopt;

/// An inherited descriptor, on which another process waits for a line feed.
#[derive(Debug)]
pub struct ReadyDescriptor(Option<File>);

impl ReadyDescriptor {
    /// Takes over the descriptor, if there is one. The caller must not have opened any file before: see
    /// [`adopt`].
    ///
    /// # Errors
    /// The descriptor is not open.
    pub fn adopt(fd: Option<RawFd>) -> io::Result<Self> {
        let Some(fd) = fd else {
            return Ok(Self(None));
        };
        let file = adopt(fd).map_err(|cause| {
            let text = format!(
                "descriptor {fd} cannot be used: {cause}; \
                 pass one that is open for writing with --ready-fd"
            );
            io::Error::new(cause.kind(), text)
        })?;
        Ok(Self(Some(file.into())))
    }

    /// Writes the line feed and closes the descriptor.
    ///
    /// # Errors
    /// The descriptor cannot be written to, for example because the other process has closed its end.
    pub fn notify(self) -> io::Result<()> {
        match self.0 {
            Some(mut file) => file.write_all(b"\n"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn a_line_feed_is_written_and_the_descriptor_closed() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let ready = ReadyDescriptor::adopt(Some(writer.into_raw_fd())).expect("open");
        ready.notify().expect("written");
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("the end");
        assert_eq!(text, "\n");
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        let message = ReadyDescriptor::adopt(Some(RawFd::MAX))
            .expect_err("closed")
            .to_string();
        assert!(message.contains("--ready-fd"), "{message}");
        ReadyDescriptor::adopt(None)
            .and_then(ReadyDescriptor::notify)
            .expect("nothing to write to");
    }
}
