//! The parts that all answers of the control protocol share.

use serde_json::{Map, Value, json};

/// Version of the protocol.
pub(super) const VERSION: u32 = 1;

/// Formats a number in hexadecimal with `0x`, the form of addresses in every answer.
pub(super) fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// The answer to a request that is refused.
pub(super) fn refusal(message: &str) -> Value {
    json!({ "version": VERSION, "error": message })
}

/// The document with the version of the protocol.
pub(super) fn versioned(mut document: Map<String, Value>) -> Value {
    document.insert("version".into(), VERSION.into());
    document.into()
}
