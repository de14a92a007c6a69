//! Writes indented XML.

/// Spaces for each level.
const INDENT: usize = 2;

/// XML, written from the top down.
#[derive(Default)]
pub(super) struct Xml {
    text: String,
    /// The elements that are open.
    open: Vec<&'static str>,
}

impl Xml {
    /// Begins an element with other elements in it.
    pub fn open(&mut self, name: &'static str, attributes: &[(&str, &str)]) {
        let tag = tag(name, attributes);
        self.line(&format!("<{tag}>"));
        self.open.push(name);
    }

    /// Ends the last element that is open.
    pub fn close(&mut self) {
        if let Some(name) = self.open.pop() {
            self.line(&format!("</{name}>"));
        }
    }

    /// An element without content.
    pub fn empty(&mut self, name: &str, attributes: &[(&str, &str)]) {
        let tag = tag(name, attributes);
        self.line(&format!("<{tag}/>"));
    }

    /// An element with text.
    pub fn text(&mut self, name: &str, attributes: &[(&str, &str)], text: &str) {
        let tag = tag(name, attributes);
        self.line(&format!("<{tag}>{}</{name}>", escaped(text)));
    }

    /// A comment of one line or several. Two dashes would end it, so `text` must have no path.
    pub fn comment(&mut self, text: &str) {
        debug_assert!(!text.contains("--"), "{text}");
        let mut lines = text.lines().peekable();
        let mut begin = "<!-- ";
        while let Some(line) = lines.next() {
            let end = if lines.peek().is_none() { " -->" } else { "" };
            self.line(&format!("{begin}{line}{end}"));
            begin = "     ";
        }
    }

    /// The whole text.
    pub fn finish(self) -> String {
        self.text
    }

    fn line(&mut self, line: &str) {
        let spaces = " ".repeat(INDENT * self.open.len());
        self.text.push_str(&spaces);
        self.text.push_str(line);
        self.text.push('\n');
    }
}

fn tag(name: &str, attributes: &[(&str, &str)]) -> String {
    let mut tag = name.to_owned();
    for (name, value) in attributes {
        tag.push_str(&format!(" {name}='{}'", escaped(value)));
    }
    tag
}

/// Text as content or as the value of an attribute. A parser turns white space in a value into spaces.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '\t' | '\n' | '\r' => escaped.push_str(&format!("&#{};", u32::from(c))),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Whether XML can have all characters of this text.
pub(super) fn is_text(text: &str) -> bool {
    text.chars().all(|c| {
        matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
    })
}
