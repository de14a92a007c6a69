//! Reads the error messages out of the sources.

use vhost_device_iommu::config;

/// Placeholder for a part of a message that varies.
const ANY: &str = "...";

/// An error's name, `Enum::Variant`, and its message with [`ANY`] for each part that varies.
#[derive(Clone, Debug)]
pub struct Message {
    pub name: String,
    pub pattern: String,
}

impl Message {
    /// The problem and the cure; `None` if the whole text is another error's.
    pub fn halves(&self) -> Option<(String, String)> {
        let own = self.pattern.replace(ANY, "");
        if !own.replace(" is ", "").contains(char::is_alphabetic) {
            return None;
        }
        let (what, cure) = match self.pattern.split_once("; ") {
            Some((what, cure)) if cure != ANY => (what, cure),
            Some((what, _)) => (what, "as the message says"),
            None => (self.pattern.as_str(), "as the message says"),
        };
        let cell = |text: &str| text.replace('|', "\\|").replace('<', "\\<");
        Some((cell(what), cell(cure)))
    }
}

/// Whether `text` contains a message of this pattern.
pub fn matches(pattern: &str, text: &str) -> bool {
    let mut rest = text;
    pattern.split(ANY).all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

/// The messages in a source file, except those that only forward another error's.
pub fn in_source(text: &str) -> Vec<Message> {
    let mut found = Vec::new();
    let text = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .expect("a first part");
    let mut owner = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("#[error(") {
        if let Some(line) = rest[..at].lines().rfind(|l| l.starts_with("pub enum ")) {
            owner = word(line.trim_start_matches("pub enum "));
        }
        let inside = &rest[at + "#[error(".len()..];
        rest = inside;
        let literal = inside.trim_start().strip_prefix('"').map(literal_of);
        // The first line after the attributes that is no comment.
        let after = inside.split_once(")]\n").expect("an end").1;
        let item = after.lines().map(str::trim);
        let item = item
            .clone()
            .find(|l| !l.starts_with("//") && !l.starts_with('#') && !l.is_empty())
            .expect("an item");
        let name = match item.strip_prefix("pub struct ") {
            Some(name) => word(name),
            None if item.starts_with("pub enum ") => continue,
            None => format!("{owner}::{}", word(item)),
        };
        if let Some(literal) = literal {
            let pattern = pattern_of(&literal);
            found.push(Message { name, pattern });
        }
    }
    found
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric()).collect()
}

/// The value of a Rust string literal; `text` begins after its first quotation mark.
fn literal_of(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => match chars.next().expect("something is escaped") {
                '\n' => while chars.next_if(|c| c.is_whitespace()).is_some() {},
                'n' => out.push('\n'),
                other => out.push(other),
            },
            c => out.push(c),
        }
    }
    out
}

/// The pattern of a format string, with constants filled in.
fn pattern_of(format: &str) -> String {
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if matches!(c, '{' | '}') && chars.next_if_eq(&c).is_some() {
            out.push(c);
        } else if c == '{' {
            let name: String = chars.by_ref().take_while(|c| *c != '}').collect();
            out += &constant(&name).unwrap_or_else(|| ANY.into());
        } else {
            out.push(c);
        }
    }
    out
}

fn constant(name: &str) -> Option<String> {
    Some(match name {
        "MAX_FILE" => config::MAX_FILE.to_string(),
        "MAX_SOCKET_PATH" => config::MAX_SOCKET_PATH.to_string(),
        "MIN_WIDTH" => config::MIN_WIDTH.to_string(),
        "MAX_WIDTH" => config::MAX_WIDTH.to_string(),
        "MAX_POLL_US" => config::MAX_POLL_US.to_string(),
        "MAX_PRIORITY" => config::MAX_PRIORITY.to_string(),
        "MAX_DOMAINS" => config::MAX_DOMAINS.to_string(),
        "MIN_DEADLINE_MS" => config::MIN_DEADLINE_MS.to_string(),
        "MAX_DEADLINE_MS" => config::MAX_DEADLINE_MS.to_string(),
        "MAX_WINDOWS" => config::MAX_WINDOWS.to_string(),
        "MAX_READERS" => config::MAX_READERS.to_string(),
        "MAX_USERS" => config::MAX_USERS.to_string(),
        _ => return None,
    })
}

#[test]
fn messages_are_read_as_they_are_written() {
    let text = "pub enum E {\n    /// A.\n    #[error(\n        \"{0} is \\\"x\\\"; \\\n         use {{y}}\"\n    \
                )]\n    A(u8),\n    #[error(transparent)]\n    B(#[from] C),\n}\n#[error(\"no; yes\")]\n\
                pub struct S;\n";
    let found = in_source(text);
    let names: Vec<_> = found
        .iter()
        .map(|m| (m.name.as_str(), m.pattern.as_str()))
        .collect();
    assert_eq!(names, [("E::A", "... is \"x\"; use {y}"), ("S", "no; yes")]);
    assert!(matches("a ... c", "x a b c y") && !matches("a ... c", "c a"));
}
