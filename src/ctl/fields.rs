//! Fields of an answer. A missing field never fails: an older daemon may not send it.

use serde_json::Value;

/// The elements of an array; none where it is not one.
pub(super) fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A text; `?` where it is not one.
pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

/// A count; 0 where it is not one.
pub(super) fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}
