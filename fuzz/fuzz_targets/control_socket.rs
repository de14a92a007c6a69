//! Any bytes on the control socket and the socket with the metrics.
#![no_main]

mod common;

use std::io::Write;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, &[u8])| {
    let (metrics, bytes) = input;
    let mut stream = common::connect(if metrics { "metrics" } else { "control" });
    // The daemon closes the connection before it has read a line that is too long.
    let _ = stream.write_all(bytes);
    let answer = common::finish(stream);
    let answer = String::from_utf8(answer).expect("text");
    if metrics {
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 "),
            "{answer}"
        );
    } else if let Some(line) = answer.lines().next() {
        assert!(line.starts_with('{') && line.ends_with('}'), "{answer}");
    }
});
