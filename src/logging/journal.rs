//! The format of log lines for systemd's journal: with a priority, and without the time, which the journal adds.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use log::{Level, Record};

/// Whether standard error goes to the journal. `JOURNAL_STREAM` (systemd.exec(5)) has the numbers of device and
/// inode of that stream; they differ if standard error was redirected.
pub fn stderr_is_journal() -> bool {
    let stderr = io::stderr().as_fd().try_clone_to_owned();
    let Ok(metadata) = stderr.and_then(|fd| File::from(fd).metadata()) else {
        return false;
    };
    let stream = std::env::var("JOURNAL_STREAM");
    stream.is_ok_and(|stream| stream == format!("{}:{}", metadata.dev(), metadata.ino()))
}

/// Writes one line in the format of sd-daemon(3).
///
/// # Errors
/// `out` cannot be written to.
pub fn write(out: &mut impl Write, record: &Record<'_>) -> io::Result<()> {
    let priority = match record.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    // One line, as a second one would have no priority.
    let text = record.args().to_string().replace('\n', " ");
    writeln!(out, "<{priority}>{text}")
}

/// Writes the error that ends the program, line by line.
///
/// # Errors
/// `out` cannot be written to.
pub fn write_error(out: &mut impl Write, text: &str) -> io::Result<()> {
    text.lines().try_for_each(|line| writeln!(out, "<3>{line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_is_one_line_with_its_priority() {
        let mut out = Vec::new();
        for (level, text) in [
            (Level::Error, "a\nb"),
            (Level::Info, "c"),
            (Level::Trace, "d"),
        ] {
            let args = format_args!("{text}");
            write(&mut out, &Record::builder().level(level).args(args).build()).expect("written");
        }
        write_error(&mut out, "e\nf").expect("written");
        assert_eq!(out, b"<3>a b\n<6>c\n<7>d\n<3>e\n<3>f\n");
    }
}
