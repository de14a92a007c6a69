//! Reads numbers and sizes from texts, and prepares values and lines for messages.

use super::draft::Scalar;

/// Reads a decimal or, after `0x`, hexadecimal number; `_` may stand between digits.
pub(super) fn parse_number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let well_formed = digits.starts_with(|c: char| c.is_ascii_hexdigit())
        && digits.bytes().all(|b| b.is_ascii_hexdigit() || b == b'_');
    well_formed.then(|| u64::from_str_radix(&digits.replace('_', ""), radix).ok())?
}

/// Reads a number of bytes with an optional binary suffix: `4096`, `64k`, `2G`, `2GiB`.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(split);
    let suffix = suffix.trim_start().to_ascii_lowercase();
    let shift = match suffix.strip_suffix("ib").unwrap_or(&suffix) {
        "" if suffix.is_empty() => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A value as a message shows it, shortened.
pub(super) fn shown(value: &Scalar) -> String {
    match value {
        Scalar::Text(text) => shorten(text),
        Scalar::Integer(value) => value.to_string(),
        other => other.found().to_owned(),
    }
}

pub(super) fn shorten(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}...", &text[..at]),
    }
}

/// Rewrites a message of the TOML parser in this program's terms, and adds a cure and the faulty line. Control
/// characters in message and line are escaped.
pub(super) fn syntax_message(message: &str, line: &str) -> String {
    let message = message.replace("unknown field", "unknown key");
    let message = printable(&message);
    let cure = if message.starts_with("unknown key") {
        "correct or remove it"
    } else if message.starts_with("duplicate key") {
        "keep one of the two"
    } else if message.contains("expected a sequence") {
        "write `reserved` as a list of tables and each endpoint under its own [[endpoint]]"
    } else if message.starts_with("invalid type") {
        "write a table, such as { first = 0x0, last = 0xfff } for a reserved region"
    } else {
        "correct the TOML"
    };
    let line = line.trim();
    if line.is_empty() {
        format!("{message}; {cure}")
    } else {
        format!("{message}; {cure} (in {:?})", shorten(line))
    }
}

fn printable(message: &str) -> String {
    const MOST: usize = 400;
    let mut text = String::new();
    for c in message.chars().take(MOST) {
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text
}

/// The number of the line that byte `at` is on, counted from 1.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().iter().take(at);
    before.filter(|&&byte| byte == b'\n').count() + 1
}

/// The line that byte `at` is on.
pub(super) fn line_text(text: &str, at: usize) -> &str {
    text.lines().nth(line_of(text, at) - 1).unwrap_or_default()
}
