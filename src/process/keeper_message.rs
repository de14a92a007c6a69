//! The messages to the process that keeps descriptors: of those in sd_notify(3), section "FDSTORE=1", the two that a daemon
//! sends.

use std::fmt;

/// The names of all kept descriptors begin with this. It tells them from the sockets of socket activation.
pub const PREFIX: &str = "viommu.";
/// The most bytes of a name, without [`PREFIX`].
pub const MAX_NAME: usize = 64;
/// The most bytes of a message to the keeper.
pub const MAX_MESSAGE: usize = 128;

/// A message to the keeper, with the name of a file without [`PREFIX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeeperMessage<'a> {
    /// Keep the file that comes with the message.
    Store(&'a str),
    /// Close the file.
    Remove(&'a str),
}

impl<'a> KeeperMessage<'a> {
    /// The message with these bytes. `None` for any that a [`Keeper`](super::keeper::Keeper) does not
    /// send.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (lines, name) = text.rsplit_once('\n')?;
        let name = name.strip_prefix("FDNAME=")?.strip_prefix(PREFIX)?;
        let message = match lines {
            "FDSTORE=1\nFDPOLL=0" => Self::Store(name),
            "FDSTOREREMOVE=1" => Self::Remove(name),
            _ => return None,
        };
        is_name(name).then_some(message)
    }
}

impl fmt::Display for KeeperMessage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // No polling: a file must stay even if its other end has closed. This process looks at it.
            Self::Store(name) => write!(f, "FDSTORE=1\nFDPOLL=0\nFDNAME={PREFIX}{name}"),
            Self::Remove(name) => write!(f, "FDSTOREREMOVE=1\nFDNAME={PREFIX}{name}"),
        }
    }
}

/// Whether files may be kept under this name, which does not include [`PREFIX`]: 1 to [`MAX_NAME`] letters, digits, dots
/// and dashes.
pub fn is_name(name: &str) -> bool {
    let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-';
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_is_sent() {
        let longest = "x".repeat(MAX_NAME);
        for message in [
            KeeperMessage::Store("file.0"),
            KeeperMessage::Remove("vmm"),
            KeeperMessage::Store(&longest),
            KeeperMessage::Remove(&longest),
        ] {
            let text = message.to_string();
            assert!(text.len() <= MAX_MESSAGE);
            assert_eq!(KeeperMessage::parse(text.as_bytes()), Some(message));
        }
    }

    #[test]
    fn any_other_message_is_refused() {
        let too_long = format!(
            "FDSTOREREMOVE=1\nFDNAME=viommu.{}",
            "x".repeat(MAX_NAME + 1)
        );
        for text in [
            "",
            "\n",
            "READY=1",
            "FDSTORE=1",
            "FDNAME=viommu.a",
            "FDSTORE=1\nFDNAME=viommu.a",
            "FDSTORE=1\nFDPOLL=1\nFDNAME=viommu.a",
            "FDSTORE=1\nFDPOLL=0\nFDNAME=a",
            "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.",
            "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.a\n",
            "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.a\nFDSTOREREMOVE=1",
            "FDSTORE=1\nFDSTOREREMOVE=1\nFDNAME=viommu.a",
            "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.a\0",
            "FDSTORE=1\nFDPOLL=0\nFDNAME=viommu.a=b",
            "FDSTOREREMOVE=2\nFDNAME=viommu.a",
            &too_long,
        ] {
            assert_eq!(KeeperMessage::parse(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(
            KeeperMessage::parse(b"FDSTOREREMOVE=1\nFDNAME=viommu.\xff"),
            None
        );
    }

    #[test]
    fn names_are_short_and_plain() {
        for name in ["a", "file.0", "conn-1", &"x".repeat(MAX_NAME)] {
            assert!(is_name(name), "{name}");
        }
        for name in [
            "",
            "a b",
            "a\nb",
            "a:b",
            "a/b",
            "ä",
            "a=1",
            &"x".repeat(MAX_NAME + 1),
        ] {
            assert!(!is_name(name), "{name}");
        }
    }
}
