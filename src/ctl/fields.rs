//! Fields of an answer. A missing field never fails: an older daemon may not send it.

use serde_json::Value;

/// The elements of an array; no elements if `value` is not an array.
pub(super) fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A text; `?` if `value` is not a text.
pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

/// A count; 0 if `value` is not a count.
pub(super) fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// `text` if the field is true, and nothing otherwise.
pub(super) fn note<'a>(field: &Value, text: &'a str) -> &'a str {
    if *field == true { text } else { "" }
}
