//! The part of HTTP that a metrics collector needs: `GET /metrics`, one request in each connection.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use super::client::{answer_writer, read_request};
use super::figures::Figures;
use super::prometheus;
use super::subjects::Subjects;

/// The longest head of a request in bytes.
const MAX_HEAD: u64 = 4096;

/// Answers one client.
///
/// # Errors
/// The client is too slow, or has hung up.
pub(super) fn answer(stream: &UnixStream, subjects: &Subjects) -> io::Result<()> {
    let head = read_request(stream, MAX_HEAD, |head| {
        head.ends_with(b"\r\n\r\n") || head.ends_with(b"\n\n")
    })?;
    let (status, kind, body) = match target(&head) {
        Ok("/metrics") => (
            "200 OK",
            "text/plain; version=0.0.4; charset=utf-8",
            prometheus::render(&Figures::gather(subjects)),
        ),
        Ok(_) => (
            "404 Not Found",
            "text/plain; charset=utf-8",
            "the metrics are at /metrics\n".into(),
        ),
        Err(status) => (
            status,
            "text/plain; charset=utf-8",
            "ask with GET /metrics HTTP/1.1\n".into(),
        ),
    };
    let mut out = answer_writer(stream);
    write!(
        out,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    out.flush()
}

/// The path of a GET request, without its query.
fn target(head: &[u8]) -> Result<&str, &'static str> {
    if head.len() as u64 > MAX_HEAD {
        return Err("431 Request Header Fields Too Large");
    }
    let bad = "400 Bad Request";
    let line = head.split(|&byte| byte == b'\n').next().unwrap_or(head);
    let line = str::from_utf8(line).map_err(|_| bad)?;
    let mut words = line.split_ascii_whitespace();
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(bad);
    };
    if !version.starts_with("HTTP/1.") {
        return Err(bad);
    }
    if method != "GET" {
        return Err("405 Method Not Allowed");
    }
    Ok(target.split('?').next().unwrap_or(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_get_has_a_target() {
        let long = [b'a'; 5000];
        for (head, expected) in [
            (
                &b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..],
                Ok("/metrics"),
            ),
            (b"GET /metrics?name=a HTTP/1.0\n\n", Ok("/metrics")),
            (b"GET / HTTP/1.1\r\n\r\n", Ok("/")),
            (
                b"POST /metrics HTTP/1.1\r\n\r\n",
                Err("405 Method Not Allowed"),
            ),
            (b"GET /metrics", Err("400 Bad Request")),
            (b"GET /metrics HTTP/2\r\n\r\n", Err("400 Bad Request")),
            (b"GET /a b HTTP/1.1\r\n\r\n", Err("400 Bad Request")),
            (b"", Err("400 Bad Request")),
            (b"\xff\xfe\n\n", Err("400 Bad Request")),
            (&long, Err("431 Request Header Fields Too Large")),
        ] {
            assert_eq!(
                target(head),
                expected,
                "{:?}",
                String::from_utf8_lossy(head)
            );
        }
    }
}
