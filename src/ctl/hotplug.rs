//! Adding and removing endpoints: the request line, and the answer as text.

use std::fmt::{self, Write};

use serde_json::Value;

use super::fields::text;

/// The request line that adds an endpoint with these keys.
pub(super) fn add_line(endpoint: &str, keys: &[String]) -> String {
    // A line feed would end the request. TOML allows none inside a string, and between keys a blank can replace it.
    let keys: Vec<_> = keys.iter().map(|key| key.replace('\n', " ")).collect();
    let first = format!("range = {}", quoted(endpoint));
    let all: Vec<_> = std::iter::once(first).chain(keys).collect();
    format!("add-endpoint {}", all.join(", "))
}

pub(super) fn render_added(out: &mut String, answer: &Value) -> fmt::Result {
    writeln!(out, "{} is added", range(&answer["added"]))?;
    if answer["described"] != true {
        writeln!(
            out,
            "note: `hotplug` in the configuration does not name this address. The guest uses the IOMMU for \
             the endpoint only if the VIOT table lists the address for another reason"
        )?;
    }
    Ok(())
}

pub(super) fn render_removed(out: &mut String, answer: &Value) -> fmt::Result {
    writeln!(out, "{} is removed", range(&answer["removed"]))
}

fn range(value: &Value) -> String {
    let (first, last) = (text(&value["first"]), text(&value["last"]));
    if first == last {
        format!("endpoint {first}")
    } else {
        format!("endpoint {first}-{last}")
    }
}

/// A TOML string with this text.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push('?'),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_become_one_line() {
        let keys = ["group = 'a'".into(), "reserved = [\n]".into()];
        assert_eq!(
            add_line("00:07.0", &keys),
            "add-endpoint range = \"00:07.0\", group = 'a', reserved = [ ]"
        );
        assert_eq!(add_line("\"\n\\", &[]), r#"add-endpoint range = "\"?\\""#);
    }

    #[test]
    fn answers_are_rendered_as_text() {
        let mut out = String::new();
        let one = json!({ "first": "a", "last": "a" });
        let two = json!({ "first": "a", "last": "b" });
        render_added(&mut out, &json!({ "added": one, "described": true })).expect("a text");
        render_removed(&mut out, &json!({ "removed": two })).expect("a text");
        assert_eq!(out, "endpoint a is added\nendpoint a-b is removed\n");
        out.clear();
        render_added(&mut out, &json!({ "added": one })).expect("a text");
        assert!(out.contains("`hotplug` in the configuration"), "{out}");
    }
}
