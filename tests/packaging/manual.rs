//! Converts a page of the documentation to a manual page: headings, paragraphs, tables of keys, code.

/// Converts the page `text`, in the Markdown that `docs/` uses, for `man`.
pub fn page(text: &str, title: &str, name: &str) -> String {
    let mut out = format!(
        ".\\\" Made from docs/configuration.md by tests/packaging.\n{title}\n.SH NAME\n{name}\n"
    );
    // A manual page begins with a description; the table of keys follows.
    out.push_str(".SH DESCRIPTION\n");
    let mut lines = text.lines().skip(1).peekable();
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        if let Some(heading) = line.strip_prefix("### ") {
            out.push_str(&format!(".SS {}\n", inline(heading)));
        } else if let Some(heading) = line.strip_prefix("## ") {
            out.push_str(&format!(".SH {}\n", inline(heading).to_uppercase()));
        } else if line.starts_with('|') {
            let mut rows = vec![line];
            rows.extend(std::iter::from_fn(|| {
                lines.next_if(|line| line.starts_with('|'))
            }));
            table(&rows, &mut out);
        } else if line.starts_with("    ") {
            let mut code = vec![line];
            code.extend(std::iter::from_fn(|| {
                lines.next_if(|line| line.starts_with("    "))
            }));
            out.push_str(".PP\n.RS 4\n.nf\n");
            for line in code {
                out.push_str(&guarded(&escaped(&line[4..])));
            }
            out.push_str(".fi\n.RE\n");
        } else {
            let mut words = vec![line];
            words.extend(std::iter::from_fn(|| {
                lines.next_if(|line| !line.is_empty() && !line.starts_with(['|', '#']))
            }));
            out.push_str(".PP\n");
            for line in inline(&words.join("\n")).lines() {
                out.push_str(&guarded(line.trim_start()));
            }
        }
    }
    out
}

/// Writes rows as a list: the first cell as the term, the other cells as its description.
fn table(rows: &[&str], out: &mut String) {
    let cells = |row: &str| -> Vec<String> {
        let row = row.trim_matches('|').trim().replace("\\|", "\u{1}");
        row.split('|')
            .map(|cell| inline(&cell.trim().replace('\u{1}', "|")))
            .collect()
    };
    let Some((heading, rows)) = rows.split_first() else {
        return;
    };
    let heading = cells(heading);
    for row in rows.iter().filter(|row| !row.starts_with("|---")) {
        let row = cells(row);
        out.push_str(&format!(".TP\n{}", guarded(&row[0])));
        let cells = row.iter().zip(&heading).skip(1).map(|(cell, name)| {
            if name == "default" {
                format!("Default: {cell}.")
            } else {
                format!("{cell}.")
            }
        });
        out.push_str(&guarded(&cells.collect::<Vec<_>>().join(" ")));
    }
}

/// Converts inline Markdown: code and emphasis become bold, links lose their address.
fn inline(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    let mut bold = false;
    while let Some(at) = rest.find(['`', '*', '[']) {
        let (before, found) = rest.split_at(at);
        out.push_str(&escaped(before));
        if let Some(code) = found.strip_prefix('`')
            && let Some((code, after)) = code.split_once('`')
        {
            out.push_str(&format!("\\fB{}\\fR", escaped(code)));
            rest = after;
        } else if let Some(after) = found.strip_prefix("**") {
            out.push_str(if bold { "\\fR" } else { "\\fB" });
            bold = !bold;
            rest = after;
        } else if let Some((words, link)) = found.split_once("](")
            && let Some((_, after)) = link.split_once(')')
            && !words.contains('\n')
        {
            out.push_str(&inline(&words[1..]));
            rest = after;
        } else {
            let (one, after) = found.split_at(1);
            out.push_str(one);
            rest = after;
        }
    }
    out.push_str(&escaped(rest));
    out
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// Escapes a line that roff would take for a request.
fn guarded(line: &str) -> String {
    let guard = if line.starts_with(['.', '\'']) {
        "\\&"
    } else {
        ""
    };
    format!("{guard}{line}\n")
}
