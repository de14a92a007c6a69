//! VERSION: what two ends agree on, and what the interposer says to each of them.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::message::{Command, MAX_DATA, MAX_DESCRIPTORS, Malformed, VersionBody, take};

/// The only major version there is.
const MAJOR: u16 = 0;
/// The highest minor version spoken.
const MINOR: u16 = 1;
/// The longest text read, in bytes.
const MAX_TEXT: usize = 16 << 10;
/// Windows a peer can have at once where it does not say.
const DEFAULT_WINDOWS: u64 = 65535;
/// Descriptors a peer can take with a message where it does not say.
const DEFAULT_DESCRIPTORS: u64 = 1;
/// Page sizes of a peer that does not say: 4 KiB.
const DEFAULT_PAGES: u64 = 4096;

/// A version and its capabilities, as one end has sent them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Must be the same on both sides.
    pub major: u16,
    /// The lower one counts.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

/// What a sender can do. What is not said has a default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Capabilities {
    /// Descriptors it can receive with one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// Bytes of one transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// Windows that can exist at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Page sizes of windows, or'ed together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// How it logs what DMA writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
    /// A socket of its own for the server's commands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// Several small writes in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
}

/// See [`Capabilities::migration`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Migration {
    /// Bytes a bit stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsize: Option<u64>,
    /// Bytes of the longest bitmap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bitmap_size: Option<u64>,
}

/// See [`Capabilities::twin_socket`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct TwinSocket {
    /// The sender can have one; in a reply: has one.
    pub supported: bool,
    /// Which of the reply's descriptors it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u64>,
}

/// What a connection to a server is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Descriptors the server takes with one message.
    pub server_descriptors: usize,
    /// Descriptors the client takes with one message.
    pub client_descriptors: usize,
    /// The most bytes of one transfer that the server serves.
    pub server_data: u32,
    /// Windows the server can have at once.
    pub windows: u64,
    /// Which of the reply's descriptors the server's commands come over.
    pub twin: Option<usize>,
}

/// Why two ends do not come together.
#[derive(Debug, Error)]
pub enum VersionError {
    /// The message is none.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The text is too long.
    #[error("the capabilities take {0} bytes; {MAX_TEXT} are read")]
    TooLong(usize),
    /// The text is no JSON of the expected form.
    #[error("the capabilities cannot be read: {0}")]
    Text(#[from] serde_json::Error),
    /// The peer speaks another protocol.
    #[error("version {major}.{minor} is not spoken here; {MAJOR}.0 to {MAJOR}.{MINOR} are")]
    Unknown {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// The server's answer is none to what it was asked.
    #[error("the server answers with version {major}.{minor} to {asked}")]
    Answer {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
        /// The minor version it was asked for.
        asked: u16,
    },
    /// The server's own socket is not there.
    #[error("the server names descriptor {0} as its socket, which it has not sent")]
    NoTwin(u64),
}

#[derive(Deserialize, Serialize)]
struct Document {
    #[serde(default)]
    capabilities: Capabilities,
}

impl Version {
    /// Reads the body of VERSION. The text may be missing, and so may the zero that ends it.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn decode(body: &[u8]) -> Result<Self, VersionError> {
        let (head, text) = take::<VersionBody>(Command::Version, body)?;
        if text.len() > MAX_TEXT {
            return Err(VersionError::TooLong(text.len()));
        }
        let text = text.split(|b| *b == 0).next().unwrap_or_default();
        let capabilities = if text.is_empty() {
            Capabilities::default()
        } else {
            serde_json::from_slice::<Document>(text)?.capabilities
        };
        Ok(Self {
            major: head.major.get(),
            minor: head.minor.get(),
            capabilities,
        })
    }

    /// The body of VERSION.
    pub fn encode(&self) -> Vec<u8> {
        let head = VersionBody {
            major: self.major.into(),
            minor: self.minor.into(),
        };
        let document = Document {
            capabilities: self.capabilities.clone(),
        };
        let mut body = head.as_bytes().to_vec();
        // A structure of numbers and truth values always has a text.
        body.extend(serde_json::to_vec(&document).unwrap_or_default());
        body.push(0);
        body
    }

    /// What a server is asked for on behalf of a client that has asked for this.
    ///
    /// Windows and the server's own accesses to memory are the interposer's affair: what it can do
    /// there counts, not what the client can. Capabilities it does not know are not passed on, as
    /// they might change what messages look like.
    ///
    /// # Errors
    /// [`VersionError::Unknown`].
    pub fn proposal(&self) -> Result<Self, VersionError> {
        if self.major != MAJOR {
            return Err(VersionError::Unknown {
                major: self.major,
                minor: self.minor,
            });
        }
        Ok(Self {
            major: MAJOR,
            minor: self.minor.min(MINOR),
            capabilities: Capabilities {
                max_msg_fds: Some(self.descriptors()),
                max_data_xfer_size: Some(MAX_DATA.into()),
                max_dma_maps: Some(DEFAULT_WINDOWS),
                pgsizes: Some(DEFAULT_PAGES),
                migration: self.migration(),
                twin_socket: Some(TwinSocket {
                    supported: true,
                    fd_index: None,
                }),
                write_multiple: self.capabilities.write_multiple,
            },
        })
    }

    /// What the client is answered that has asked for this, where the server has answered
    /// `server` together with `descriptors` descriptors; and what holds from then on.
    ///
    /// # Errors
    /// Where the server's answer is none to the proposal.
    pub fn answer(&self, server: &Self, descriptors: usize) -> Result<(Self, Terms), VersionError> {
        let asked = self.minor.min(MINOR);
        if server.major != MAJOR || server.minor > asked {
            return Err(VersionError::Answer {
                major: server.major,
                minor: server.minor,
                asked,
            });
        }
        let can = &server.capabilities;
        let twin = match &can.twin_socket {
            Some(TwinSocket {
                supported: true,
                fd_index: Some(index),
            }) => {
                let at = usize::try_from(*index).ok().filter(|at| *at < descriptors);
                Some(at.ok_or(VersionError::NoTwin(*index))?)
            }
            Some(_) | None => None,
        };
        let data = can
            .max_data_xfer_size
            .map_or(MAX_DATA, |n| u32::try_from(n).unwrap_or(MAX_DATA))
            .min(MAX_DATA);
        let terms = Terms {
            server_descriptors: small(server.descriptors()),
            client_descriptors: small(self.descriptors()),
            server_data: data,
            windows: can.max_dma_maps.unwrap_or(DEFAULT_WINDOWS),
            twin,
        };
        let both_have = |mine: Option<u64>, theirs: u64| mine.map(|mine| mine.min(theirs));
        let asked_for = &self.capabilities;
        let migration = self.migration().zip(server.migration()).map(|(_, can)| can);
        let write_multiple = asked_for.write_multiple == Some(true);
        Ok((
            Self {
                major: MAJOR,
                minor: server.minor,
                capabilities: Capabilities {
                    max_msg_fds: Some(server.descriptors()),
                    max_data_xfer_size: Some(data.into()),
                    max_dma_maps: both_have(asked_for.max_dma_maps, DEFAULT_WINDOWS),
                    pgsizes: asked_for.pgsizes,
                    migration,
                    twin_socket: None,
                    write_multiple: can.write_multiple.filter(|_| write_multiple),
                },
            },
            terms,
        ))
    }

    /// What a client is answered that has asked for this, by a server that stands for itself: it
    /// never asks the client for anything, and takes as many descriptors as the client does.
    ///
    /// # Errors
    /// [`VersionError::Unknown`].
    pub fn server_answer(&self) -> Result<Self, VersionError> {
        let asked_for = self.proposal()?;
        Ok(Self {
            capabilities: Capabilities {
                migration: None,
                twin_socket: None,
                ..asked_for.capabilities
            },
            ..asked_for
        })
    }

    /// Descriptors the sender takes with one message, no more than the system carries.
    fn descriptors(&self) -> u64 {
        let said = self.capabilities.max_msg_fds.unwrap_or(DEFAULT_DESCRIPTORS);
        said.min(MAX_DESCRIPTORS as u64)
    }

    /// With bitmaps no longer than a message here.
    fn migration(&self) -> Option<Migration> {
        let migration = self.capabilities.migration.clone()?;
        Some(Migration {
            max_bitmap_size: migration.max_bitmap_size.map(|n| n.min(MAX_DATA.into())),
            ..migration
        })
    }
}

fn small(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn version(minor: u16, text: &str) -> Version {
        let mut body = VersionBody {
            major: 0.into(),
            minor: minor.into(),
        }
        .as_bytes()
        .to_vec();
        body.extend(text.as_bytes());
        Version::decode(&body).expect("readable")
    }

    /// What QEMU 11.1 sends.
    const QEMU: &str = r#"{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,
        "max_data_xfer_size":1048576,"migration":{"max_bitmap_size":268435456,"pgsize":4096},
        "write_multiple":true}}"#;

    #[test]
    fn texts_may_be_missing_unended_or_longer_than_their_zero() {
        assert_eq!(version(1, "").capabilities, Capabilities::default());
        assert_eq!(version(1, "\0").capabilities, Capabilities::default());
        assert_eq!(version(1, "{}").capabilities, Capabilities::default());
        let ended = version(0, &format!("{QEMU}\0 rest"));
        assert_eq!(ended, version(0, QEMU));
        assert_eq!(ended.capabilities.max_msg_fds, Some(16));
        let broken = |text: &str| Version::decode(&[&[0; 4], text.as_bytes()].concat()).is_err();
        assert!(broken("{") && broken("7") && broken(r#"{"capabilities":{"max_msg_fds":-1}}"#));
        assert!(broken(&" ".repeat(MAX_TEXT + 1)));
        assert!(Version::decode(&[0; 3]).is_err());
    }

    #[test]
    fn each_end_hears_what_the_other_can() {
        let client = version(1, QEMU);
        let proposal = client.proposal().expect("spoken");
        assert_eq!(proposal.capabilities.max_msg_fds, Some(16));
        let twin = proposal.capabilities.twin_socket.clone().expect("offered");
        assert!(twin.supported);
        assert_eq!(Version::decode(&proposal.encode()).expect("own"), proposal);

        let server = version(
            0,
            r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536,"max_dma_maps":100,
                "new":{"thing":1},"twin_socket":{"supported":true,"fd_index":0}}}"#,
        );
        let (answer, terms) = client.answer(&server, 1).expect("agreed");
        assert_eq!(answer.minor, 0);
        assert_eq!(answer.capabilities.max_msg_fds, Some(8));
        assert_eq!(answer.capabilities.max_data_xfer_size, Some(65536));
        assert_eq!(answer.capabilities.max_dma_maps, Some(65535));
        assert_eq!(answer.capabilities.write_multiple, None);
        assert_eq!(answer.capabilities.twin_socket, None);
        assert_eq!(
            terms,
            Terms {
                server_descriptors: 8,
                client_descriptors: 16,
                server_data: 65536,
                windows: 100,
                twin: Some(0),
            }
        );
    }

    #[test]
    fn what_nobody_asked_for_is_refused() {
        let client = version(0, QEMU);
        assert!(client.answer(&version(1, ""), 0).is_err(), "a higher minor");
        let twin = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":1}}}"#;
        assert!(client.answer(&version(0, twin), 1).is_err());
        assert!(client.answer(&version(0, twin), 2).is_ok());
        let other = Version {
            major: 1,
            ..Version::default()
        };
        assert!(other.proposal().is_err());
        assert!(client.answer(&other, 0).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Version::decode(&body);
        }

        #[test]
        fn any_numbers_are_negotiated(text in "[{}:,\"a-z_0-9]{0,80}", n: u64, m: u64) {
            let text = format!(
                r#"{{"capabilities":{{"max_msg_fds":{n},"max_data_xfer_size":{m},"max_dma_maps":{m}}}}}"#
            ) + &text;
            if let Ok(server) = Version::decode(&[&[0; 4], text.as_bytes()].concat()) {
                let (_, terms) = Version::default().answer(&server, 0).expect("agreed");
                prop_assert!(terms.server_data <= MAX_DATA);
                prop_assert!(terms.server_descriptors <= MAX_DESCRIPTORS);
            }
        }
    }
}
