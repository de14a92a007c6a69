//! Keys for the operator: the VM's name, the control socket's rights, and metrics.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Socket;
use super::bounds::{MAX_INTERVAL_S, MAX_NAME, MIN_INTERVAL_S};
use super::checker::Checker;
use super::draft::{Draft, Located, MetricsDraft, Scalar};
use super::error::ProblemKind;
use super::text::shown;

const DEFAULT_INTERVAL: Duration = Duration::from_secs(15);
/// All bits of a mode.
const ALL_RIGHTS: u32 = 0o777;

/// The access rights of a socket: the mode and the group of its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// The file's mode, at most `0o777`; `None` means all rights that the daemon's umask leaves.
    pub mode: Option<u32>,
    /// The ID of the file's group; `None` means the daemon's own.
    pub group: Option<u32>,
}

impl SocketAccess {
    /// The rights of a socket for operators, where the file does not say otherwise: the owner's alone.
    const OPERATOR: Self = Self {
        mode: Some(0o600),
        group: None,
    };
}

/// Where the daemon writes metrics; nowhere by default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsOutput {
    /// The path of the socket that answers `GET /metrics`.
    pub socket: Option<PathBuf>,
    /// The access rights of that socket.
    pub access: SocketAccess,
    /// The file for node_exporter's textfile collector.
    pub textfile: Option<Textfile>,
}

impl Default for MetricsOutput {
    fn default() -> Self {
        Self {
            socket: None,
            access: SocketAccess::OPERATOR,
            textfile: None,
        }
    }
}

/// A file that the daemon rewrites at an interval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Textfile {
    /// Its path, which ends with `.prom`.
    pub path: PathBuf,
    /// The interval: [`MIN_INTERVAL_S`] to [`MAX_INTERVAL_S`] seconds.
    pub interval: Duration,
}

impl Checker<'_> {
    /// The name of the VM in messages: the key, or else the name of the file, or else of the socket.
    pub(super) fn name(
        &mut self,
        given: Option<&Located<Scalar>>,
        socket: Option<&Socket>,
    ) -> Option<String> {
        let Some(given) = given else {
            let path = match (self.source, socket) {
                (Some(source), _) => Some(source.path),
                (None, Some(Socket::Path(path))) => Some(path.as_path()),
                (None, Some(Socket::Fd(_)) | None) => None,
            };
            return Some(path.map_or_else(|| "vm".to_owned(), name_of));
        };
        let text = self.text(given, "name", "a text, such as \"vm1\"")?;
        if text.is_empty() || text.len() > MAX_NAME || !text.bytes().all(|b| b.is_ascii_graphic()) {
            self.refuse(
                &given.origin,
                "name",
                ProblemKind::Name(shown(&given.value)),
            );
            return None;
        }
        Some(text.to_owned())
    }

    /// The access rights of the control socket.
    pub(super) fn control_access(&mut self, draft: &Draft) -> Option<SocketAccess> {
        let (mode, group) = (draft.control_mode.as_ref(), draft.control_group.as_ref());
        let usual = SocketAccess::OPERATOR;
        self.access(usual, (mode, "control-mode"), (group, "control-group"))
    }

    /// The access rights of the sockets for VMMs and device processes.
    pub(super) fn socket_access(&mut self, draft: &Draft) -> Option<SocketAccess> {
        let (mode, group) = (draft.socket_mode.as_ref(), draft.socket_group.as_ref());
        let usual = SocketAccess::default();
        self.access(usual, (mode, "socket-mode"), (group, "socket-group"))
    }

    /// The table `metrics`. `taken` are the paths of other sockets.
    pub(super) fn metrics(&mut self, draft: &Draft, taken: &[&PathBuf]) -> Option<MetricsOutput> {
        let Some(Located { value, origin }) = &draft.metrics else {
            return Some(MetricsOutput::default());
        };
        if value.socket.is_none() && value.textfile.is_none() {
            self.refuse(origin, "metrics", ProblemKind::MetricsNowhere);
            return None;
        }
        let socket = match &value.socket {
            None => Some(None),
            Some(given) => {
                let path = self.socket_path(Some(given), "metrics.socket");
                if path.as_ref().is_some_and(|path| taken.contains(&path)) {
                    self.refuse(&given.origin, "metrics.socket", ProblemKind::MetricsPath);
                    None
                } else {
                    path.map(Some)
                }
            }
        };
        let (mode, group) = (value.mode.as_ref(), value.group.as_ref());
        let usual = SocketAccess::OPERATOR;
        let access = self.access(usual, (mode, "metrics.mode"), (group, "metrics.group"));
        let textfile = self.textfile(value);
        Some(MetricsOutput {
            socket: socket?,
            access: access?,
            textfile: textfile?,
        })
    }

    fn access(
        &mut self,
        usual: SocketAccess,
        (mode, mode_key): (Option<&Located<Scalar>>, &str),
        (group, group_key): (Option<&Located<Scalar>>, &str),
    ) -> Option<SocketAccess> {
        let mode = match mode {
            None => Some(usual.mode),
            Some(given) => {
                let text = self.text(given, mode_key, "a text in octal, such as \"0660\"");
                let digits =
                    text.filter(|t| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit()));
                let mode = digits.and_then(|text| u32::from_str_radix(text, 8).ok());
                let mode = mode.filter(|mode| *mode <= ALL_RIGHTS);
                if mode.is_none() && text.is_some() {
                    self.refuse(
                        &given.origin,
                        mode_key,
                        ProblemKind::SocketMode(shown(&given.value)),
                    );
                }
                mode.map(Some)
            }
        };
        let group = match group {
            None => Some(usual.group),
            Some(given) => {
                let number = match &given.value {
                    Scalar::Integer(number) => u32::try_from(*number).ok(),
                    Scalar::Bool(_) | Scalar::Text(_) | Scalar::Other(_) => None,
                };
                // The ID 2^32 - 1 means "no group".
                let number = number.filter(|number| *number < u32::MAX);
                if number.is_none() {
                    self.refuse(
                        &given.origin,
                        group_key,
                        ProblemKind::SocketGroup(shown(&given.value)),
                    );
                }
                number.map(Some)
            }
        };
        Some(SocketAccess {
            mode: mode?,
            group: group?,
        })
    }

    /// `Some(None)` if no textfile is wanted.
    fn textfile(&mut self, draft: &MetricsDraft) -> Option<Option<Textfile>> {
        let interval = match &draft.interval_s {
            None => Some(DEFAULT_INTERVAL),
            Some(given) => {
                let key = "metrics.interval-s";
                let seconds = self.integer(given, key, "a number of seconds, such as 15")?;
                let fits = u64::try_from(seconds)
                    .ok()
                    .filter(|s| (MIN_INTERVAL_S..=MAX_INTERVAL_S).contains(s));
                if fits.is_none() {
                    self.refuse(&given.origin, key, ProblemKind::Interval(seconds));
                }
                fits.map(Duration::from_secs)
            }
        };
        let Some(given) = &draft.textfile else {
            return interval.map(|_| None);
        };
        let key = "metrics.textfile";
        let text = self.text(
            given,
            key,
            "a path as a text, such as \"/var/lib/prometheus/node-exporter/vm1.prom\"",
        )?;
        let path = Path::new(text);
        let ends = path.extension().is_some_and(|ending| ending == "prom");
        if !ends || text.chars().any(char::is_control) {
            self.refuse(
                &given.origin,
                key,
                ProblemKind::Textfile(shown(&given.value)),
            );
            return None;
        }
        Some(Some(Textfile {
            path: path.to_owned(),
            interval: interval?,
        }))
    }
}

/// The name of a file without its extension. Two file names never give one name: bytes that a name cannot have
/// become `%` and two hexadecimal digits, and the end of a long name becomes `~` and a hash of the whole.
fn name_of(path: &Path) -> String {
    use std::fmt::Write;

    const HASH_DIGITS: usize = 16;
    let stem = path.file_stem().unwrap_or_default().as_bytes();
    let mut name = String::new();
    for &byte in stem {
        if byte.is_ascii_graphic() && byte != b'%' && byte != b'~' {
            name.push(byte.into());
        } else {
            // Cannot fail, here and below.
            let _ = write!(name, "%{byte:02X}");
        }
    }
    if name.len() > MAX_NAME {
        name.truncate(MAX_NAME - HASH_DIGITS - 1);
        let _ = write!(name, "~{:016x}", hash(stem));
    }
    if name.is_empty() { "vm".into() } else { name }
}

/// The 64-bit FNV-1a hash, which is the same in every version of this program.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(file: &str, text: &str) -> Result<Config, String> {
        let text = format!("address = '00:05.0'\n{text}");
        Config::from_text(Path::new(file), &text).map_err(|e| e.to_string())
    }

    #[test]
    fn a_vm_has_the_configured_name_or_that_of_its_file() {
        let long = |last| format!("/{}{last}.toml", "x".repeat(200));
        let name = |file: &str| parse(file, "").expect("good").name;
        let (one, other) = (name(&long('a')), name(&long('b')));
        assert!(one != other && one.len() == MAX_NAME && one.starts_with("xxx"));
        assert_ne!(name("a b.toml"), name("a?b.toml"));
        assert_ne!(name("a b.toml"), name("a%20b.toml"));
        for (file, text, name) in [
            ("/etc/vm1.toml", "", "vm1"),
            ("a b\n\u{e9}.toml", "", "a%20b%0A%C3%A9"),
            ("50%~.toml", "", "50%25%7E"),
            ("", "", "vm"),
            ("vm1.toml", "name = 'web-3'", "web-3"),
        ] {
            assert_eq!(parse(file, text).map(|c| c.name), Ok(name.to_owned()));
        }
    }

    #[test]
    fn metrics_are_written_where_configured() {
        let usual = parse("a", "").expect("good");
        assert_eq!(usual.metrics, MetricsOutput::default());
        assert_eq!(usual.control_access.mode, Some(0o600));
        assert_eq!(usual.socket_access, SocketAccess::default());
        let vmms = parse("a", "socket-mode = '0660'\nsocket-group = 12").expect("good");
        let expected = SocketAccess {
            mode: Some(0o660),
            group: Some(12),
        };
        assert_eq!(vmms.socket_access, expected);
        assert_eq!(vmms.control_access, SocketAccess::OPERATOR);
        let all = "control = '/c'\ncontrol-mode = '660'\ncontrol-group = 0\n[metrics]\nsocket = \
                   '/m'\nmode = '0666'\ngroup = 7\ntextfile = '/t/vm.prom'\ninterval-s = 3600";
        let config = parse("a", all).expect("good");
        let expected = MetricsOutput {
            socket: Some("/m".into()),
            access: SocketAccess {
                mode: Some(0o666),
                group: Some(7),
            },
            textfile: Some(Textfile {
                path: "/t/vm.prom".into(),
                interval: Duration::from_secs(3600),
            }),
        };
        assert_eq!(config.metrics, expected);
        let access = config.control_access;
        assert_eq!((access.mode, access.group), (Some(0o660), Some(0)));
        let file = parse("a", "[metrics]\ntextfile = 't.prom'").expect("good");
        let interval = file.metrics.textfile.map(|file| file.interval);
        assert_eq!(interval, Some(DEFAULT_INTERVAL));
    }

    #[test]
    fn bad_operator_keys_are_refused_with_a_cure() {
        for (text, place, cure) in [
            ("name = ''", "name", "1 to 64"),
            ("name = 'a b'", "name", "1 to 64"),
            ("name = 3", "name", "such as"),
            ("control-mode = '0800'", "control-mode", "0660"),
            ("control-mode = '+660'", "control-mode", "0660"),
            ("control-mode = '1777'", "control-mode", "0660"),
            ("control-mode = 432", "control-mode", "0660"),
            ("socket-mode = '0999'", "socket-mode", "0660"),
            ("socket-group = 'kvm'", "socket-group", "getent group"),
            ("control-group = 'adm'", "control-group", "getent group"),
            ("control-group = -1", "control-group", "getent group"),
            ("[metrics]", "metrics", "textfile"),
            ("[metrics]\nsocket = ''", "metrics.socket", "is empty"),
            (
                "control = '/m'\n[metrics]\nsocket = '/m'",
                "metrics.socket",
                "another path",
            ),
            ("[metrics]\ntextfile = '/t/vm'", "metrics.textfile", ".prom"),
            (
                "[metrics]\ntextfile = \"t\\n.prom\"",
                "metrics.textfile",
                ".prom",
            ),
            (
                "[metrics]\nsocket = '/m'\ninterval-s = 0",
                "metrics.interval-s",
                "1 to 3600",
            ),
            (
                "[metrics]\nsocket = '/m'\nmode = 'rw'",
                "metrics.mode",
                "0660",
            ),
            (
                "[metrics]\nsocket = '/m'\ngroup = true",
                "metrics.group",
                "getent group",
            ),
        ] {
            let message = parse("vm.toml", text).expect_err(text);
            assert!(message.contains(place), "{text}: {message}");
            assert!(message.contains(cure), "{text}: {message}");
        }
        let shared = "[metrics]\nsocket = '/m'\n[[endpoint]]\naddress = '00:06.0'\nexport = '/m'\nvfio \
                      = '65:00.0'";
        assert!(parse("vm.toml", shared).is_err());
    }
}
