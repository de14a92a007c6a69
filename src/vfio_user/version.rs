//! VERSION: how client and server negotiate, and how the interposer negotiates with each of them.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::message::{Command, MAX_DATA, MAX_DESCRIPTORS, Malformed, VersionBody, take};

/// The only major version.
const MAJOR: u16 = 0;
/// The highest minor version that is supported here.
const MINOR: u16 = 1;
/// The maximum size of the text, in bytes.
const MAX_TEXT: usize = 16 << 10;
/// The number of windows that a peer can have at once if it names none.
const DEFAULT_WINDOWS: u64 = 65535;
/// The number of descriptors that a peer can receive with a message if it names none.
const DEFAULT_DESCRIPTORS: u64 = 1;
/// The page sizes of a peer that names none: 4 KiB.
const DEFAULT_PAGES: u64 = 4096;

/// A version and the capabilities of its sender.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Version {
    /// Client and server must have the same.
    pub major: u16,
    /// The lower one of client and server applies.
    pub minor: u16,
    /// The sender's capabilities.
    pub capabilities: Capabilities,
}

/// The capabilities of a sender. Each one that it does not name has a default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Capabilities {
    /// The number of descriptors that it can receive with one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// The maximum number of bytes of one transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// The number of windows that can exist at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// The page sizes of windows, as bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// How it logs the pages that DMA writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
    /// Whether it can have a second socket for the server's commands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// Whether it can handle REGION_WRITE_MULTI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
}

/// See [`Capabilities::migration`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Migration {
    /// Bytes per bit of a bitmap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsize: Option<u64>,
    /// The maximum size of a bitmap, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bitmap_size: Option<u64>,
}

/// See [`Capabilities::twin_socket`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct TwinSocket {
    /// The client can have a second socket; in a reply, the server has opened one.
    pub supported: bool,
    /// The index of the socket in the reply's descriptors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u64>,
}

/// The terms that the interposer, the client and the server have agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Terms {
    /// The number of descriptors that the server can receive with one message.
    pub server_descriptors: usize,
    /// The number of descriptors that the client can receive with one message.
    pub client_descriptors: usize,
    /// The maximum number of bytes of one transfer that the server handles.
    pub server_data: u32,
    /// The number of windows that the server can have at once.
    pub windows: u64,
    /// The index, in the reply's descriptors, of the socket for the server's commands.
    pub twin: Option<usize>,
}

/// Why a negotiation fails.
#[derive(Debug, Error)]
pub enum VersionError {
    /// The body is too short.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The text is too long.
    #[error("the capabilities have {0} bytes; at most {MAX_TEXT} are supported")]
    TooLong(usize),
    /// The text is not JSON of the expected form.
    #[error("cannot decode the capabilities: {0}")]
    Text(#[from] serde_json::Error),
    /// The peer has another major version.
    #[error("version {major}.{minor} is not supported; {MAJOR}.0 to {MAJOR}.{MINOR} are")]
    Unknown {
        /// The peer's major version.
        major: u16,
        /// The peer's minor version.
        minor: u16,
    },
    /// The server's version is not one that was proposed.
    #[error("the server answered with version {major}.{minor}; {MAJOR}.{asked} was proposed")]
    Answer {
        /// The server's major version.
        major: u16,
        /// The server's minor version.
        minor: u16,
        /// The minor version that was proposed.
        asked: u16,
    },
    /// The server names a socket that it has not sent.
    #[error("the server names descriptor {0} as its socket for commands and has not sent it")]
    NoTwin(u64),
}

#[derive(Deserialize, Serialize)]
struct Document {
    #[serde(default)]
    capabilities: Capabilities,
}

impl Version {
    /// Decodes the body of VERSION. The text may be missing, and so may its final zero.
    ///
    /// # Errors
    /// The body cannot be decoded.
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

    /// Encodes the body of VERSION.
    pub fn encode(&self) -> Vec<u8> {
        let head = VersionBody {
            major: self.major.into(),
            minor: self.minor.into(),
        };
        let document = Document {
            capabilities: self.capabilities.clone(),
        };
        let mut body = head.as_bytes().to_vec();
        // Serialization cannot fail: the document has only numbers and booleans.
        body.extend(serde_json::to_vec(&document).unwrap_or_default());
        body.push(0);
        body
    }

    /// The version that the interposer proposes to the server of a client that proposed `self`.
    ///
    /// The interposer handles the windows and the accesses to memory itself. For these, the proposal has
    /// the interposer's capabilities, not the client's. It omits capabilities that the interposer does
    /// not know, because they might change the messages.
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

    /// The answer to a client that proposed `self`, and the terms of the connection, after the server
    /// has answered `server` with `descriptors` descriptors.
    ///
    /// # Errors
    /// The server's answer does not match the proposal.
    pub fn answer(&self, server: &Self, descriptors: usize) -> Result<(Self, Terms), VersionError> {
        let asked = self.minor.min(MINOR);
        if server.major != MAJOR || server.minor > asked {
            return Err(VersionError::Answer {
                major: server.major,
                minor: server.minor,
                asked,
            });
        }
        let capabilities = &server.capabilities;
        let twin = match &capabilities.twin_socket {
            Some(TwinSocket {
                supported: true,
                fd_index: Some(index),
            }) => {
                let at = usize::try_from(*index).ok().filter(|at| *at < descriptors);
                Some(at.ok_or(VersionError::NoTwin(*index))?)
            }
            Some(_) | None => None,
        };
        let data = capabilities
            .max_data_xfer_size
            .map_or(MAX_DATA, |n| u32::try_from(n).unwrap_or(MAX_DATA))
            .min(MAX_DATA);
        let terms = Terms {
            server_descriptors: saturate(server.descriptors()),
            client_descriptors: saturate(self.descriptors()),
            server_data: data,
            windows: capabilities.max_dma_maps.unwrap_or(DEFAULT_WINDOWS),
            twin,
        };
        let limit = |number: Option<u64>, most: u64| number.map(|number| number.min(most));
        let wanted = &self.capabilities;
        let migration = self
            .migration()
            .zip(server.migration())
            .map(|(_, server)| server);
        let write_multiple = wanted.write_multiple == Some(true);
        Ok((
            Self {
                major: MAJOR,
                minor: server.minor,
                capabilities: Capabilities {
                    max_msg_fds: Some(server.descriptors()),
                    max_data_xfer_size: Some(data.into()),
                    max_dma_maps: limit(wanted.max_dma_maps, DEFAULT_WINDOWS),
                    pgsizes: wanted.pgsizes,
                    migration,
                    twin_socket: None,
                    write_multiple: capabilities.write_multiple.filter(|_| write_multiple),
                },
            },
            terms,
        ))
    }

    /// The answer of a server of this process to a client that proposed `self`. The server can receive
    /// as many descriptors as the client, and needs neither migration nor a second socket.
    ///
    /// # Errors
    /// [`VersionError::Unknown`].
    pub fn server_answer(&self) -> Result<Self, VersionError> {
        let proposal = self.proposal()?;
        Ok(Self {
            capabilities: Capabilities {
                migration: None,
                twin_socket: None,
                ..proposal.capabilities
            },
            ..proposal
        })
    }

    /// The number of descriptors that the sender can receive with one message, limited to that of the
    /// kernel.
    fn descriptors(&self) -> u64 {
        let named = self.capabilities.max_msg_fds.unwrap_or(DEFAULT_DESCRIPTORS);
        named.min(MAX_DESCRIPTORS as u64)
    }

    /// The sender's migration capability, with bitmaps that fit into a message.
    fn migration(&self) -> Option<Migration> {
        let migration = self.capabilities.migration.clone()?;
        Some(Migration {
            max_bitmap_size: migration.max_bitmap_size.map(|n| n.min(MAX_DATA.into())),
            ..migration
        })
    }
}

fn saturate(number: u64) -> usize {
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

    /// The text of QEMU 11.1.
    const QEMU: &str = r#"{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,
        "max_data_xfer_size":1048576,"migration":{"max_bitmap_size":268435456,"pgsize":4096},
        "write_multiple":true}}"#;

    #[test]
    fn texts_may_be_missing_unterminated_or_continue_after_their_zero() {
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
    fn capabilities_are_negotiated_with_client_and_server() {
        let client = version(1, QEMU);
        let proposal = client.proposal().expect("supported");
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
    fn answers_that_were_not_proposed_are_refused() {
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
        fn any_text_is_decoded_or_refused(body in proptest::collection::vec(any::<u8>(), 0..200)) {
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
