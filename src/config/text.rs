//! Reads numbers and sizes from texts, and prepares values and lines for messages.

use serde::de::DeserializeOwned;

use super::draft::{
    Draft, EmulatedDraft, EndpointDraft, MetricsDraft, ReadersDraft, RegionDraft, Scalar,
};

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
    let line = line.trim();
    let text = if let Some(rest) = message.strip_prefix("unknown field ") {
        unknown_key(rest)
    } else if let Some((found, expected)) = message
        .strip_prefix("invalid type: ")
        .and_then(|rest| rest.split_once(", expected "))
    {
        wrong_type(&found_type(found), expected, line)
    } else if let Some((_, expected)) = message
        .strip_prefix("invalid length ")
        .and_then(|rest| rest.split_once(", expected "))
    {
        // The parser fills the fields of a structure from a list, too.
        wrong_type("a list", expected, line)
    } else if message.starts_with("duplicate key") {
        format!("{message}; keep one of the two")
    } else {
        format!("{message}; correct the TOML")
    };
    let text = printable(&text);
    if line.is_empty() || may_have_secret(line) {
        text
    } else {
        format!("{text} (in {:?})", shorten(line))
    }
}

/// A value with as many hexadecimal digits may be a VF token, which has 32.
const LIKE_A_TOKEN: usize = 16;

/// Whether a line of a configuration may have a VF token, also one under a mistyped key, or a mistyped one.
fn may_have_secret(line: &str) -> bool {
    let is_like_token = |value: &str| {
        let digits = value.bytes().filter(u8::is_ascii_hexdigit).count();
        digits >= LIKE_A_TOKEN && digits * 4 >= value.len() * 3
    };
    line.to_ascii_lowercase().contains("token")
        || line.split(['"', '\'', '=', ',', '#']).any(is_like_token)
}

/// The message for an unknown key. `rest` is the key between backticks, and the keys that are known there.
fn unknown_key(rest: &str) -> String {
    let (key, known) = rest.split_once(", ").unwrap_or((rest, ""));
    let name = key.trim_matches('`');
    let here = between_backticks(known);
    let homes = [
        (
            keys_of::<Draft>(),
            "it belongs to the file as a whole: move it above the first `[[endpoint]]` and the first table",
        ),
        (
            keys_of::<EndpointDraft>(),
            "move it under the `[[endpoint]]` that it is for",
        ),
        (
            keys_of::<EmulatedDraft>(),
            "move it into the table of `vfio-user`",
        ),
        (keys_of::<MetricsDraft>(), "move it under `[metrics]`"),
        (keys_of::<ReadersDraft>(), "move it under `[readers]`"),
        (
            keys_of::<RegionDraft>(),
            "move it into a table in the list `reserved`",
        ),
    ];
    let has_name = |keys: &[String]| keys.iter().any(|key| key == name);
    match homes.iter().find(|(keys, _)| has_name(keys)) {
        Some((_, cure)) => format!("the key {key} cannot stand here; {cure}"),
        None => {
            let here: Vec<_> = here.iter().map(|key| format!("`{key}`")).collect();
            let here = here.join(", ");
            format!("unknown key {key}; correct or remove it: the keys here are {here}")
        }
    }
}

/// The message for a value of another type than the parser wants.
fn wrong_type(found: &str, expected: &str, line: &str) -> String {
    let starts = |key: &str| line.trim_start_matches('[').trim_start().starts_with(key);
    let wanted = match expected {
        "a sequence" if starts("endpoint") => {
            "a list of tables: write `[[endpoint]]` with two brackets for each endpoint"
        }
        "a sequence" if starts("hotplug") => "a list such as [\"01:00.0-01:00.7\"]",
        "a sequence" if starts("readers") => "a table: `[readers]`, and under it `users = [1001]`",
        "a sequence" if starts("users") => "a list such as [1001, 1002]",
        "a sequence" => "a list such as [{ first = 0x0, last = 0xfff }]",
        other => other,
    };
    format!("must be {wanted}, not {found}")
}

/// The type that the parser found, as messages name it.
fn found_type(found: &str) -> String {
    let (kind, value) = found.split_once(' ').unwrap_or((found, ""));
    match kind {
        "string" => format!("the text {value}"),
        "integer" => format!("the number {}", value.trim_matches('`')),
        "boolean" => value.trim_matches('`').to_owned(),
        "floating" => "a fraction".to_owned(),
        "map" => "a table".to_owned(),
        "sequence" => "a list".to_owned(),
        _ => found.to_owned(),
    }
}

/// The keys of a table, as the parser knows them. It names them when it meets another one.
fn keys_of<T: DeserializeOwned>() -> Vec<String> {
    let error = toml::from_str::<T>("\"?\" = 0").err();
    let message = error.map(|error| error.message().to_owned());
    let known = message
        .as_deref()
        .and_then(|text| text.split_once("expected "));
    known.map_or_else(Vec::new, |(_, known)| between_backticks(known))
}

fn between_backticks(text: &str) -> Vec<String> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.map(str::to_owned).collect()
}

fn printable(message: &str) -> String {
    const MOST: usize = 800;
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
