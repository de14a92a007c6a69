//! Tells whoever started the daemon that it can be connected to.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::RawFd;

use crate::process::inherited::adopt;

/// An inherited descriptor on which somebody waits for a line feed.
#[derive(Debug)]
pub struct Ready(Option<File>);

impl Ready {
    /// Takes over the descriptor, if one was given. Must come before any file is opened, which
    /// could get the number of a descriptor that was not passed on.
    ///
    /// # Errors
    /// Where it is not open.
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
    /// Where it cannot be written to, as where nobody reads any more.
    pub fn tell(self) -> io::Result<()> {
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
    fn a_line_feed_is_written_and_that_is_the_end() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let ready = Ready::adopt(Some(writer.into_raw_fd())).expect("open");
        ready.tell().expect("told");
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("the end");
        assert_eq!(text, "\n");
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        let message = Ready::adopt(Some(RawFd::MAX))
            .expect_err("closed")
            .to_string();
        assert!(message.contains("--ready-fd"), "{message}");
        Ready::adopt(None)
            .and_then(Ready::tell)
            .expect("nobody waits");
    }
}
