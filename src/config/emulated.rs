//! Emulated devices: endpoints with `vfio-user`.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::bounds::{MAX_DEADLINE_MS, MAX_WINDOWS, MIN_DEADLINE_MS};
use super::checker::Checker;
use super::draft::{Draft, EmulatedDraft, Located, Origin, Scalar};
use super::error::ProblemKind;
use super::kind::{ConfiguredDevice, DeviceKind};
use super::passthrough::range_in;
use super::text::shown;
use crate::topology::PciAddress;

/// The default of a deadline of a server or a reader.
pub(super) const DEFAULT_DEADLINE: Duration = Duration::from_secs(1);
const DEFAULT_TOTAL_DEADLINE: Duration = Duration::from_secs(20);
const DEFAULT_CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// An endpoint whose device another process emulates, over vfio-user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulated {
    /// The address the device has in the guest.
    pub endpoint: PciAddress,
    /// Where the daemon listens for the VMM's vfio-user client.
    pub listen: PathBuf,
    /// Where the device's server listens.
    pub connect: PathBuf,
    /// The server's access to guest RAM.
    pub isolation: ServerIsolation,
    /// The most windows that the server is told, if it supports so many: `1..=`[`MAX_WINDOWS`].
    pub max_windows: u64,
    /// How long the server may take to answer.
    pub deadlines: ServerDeadlines,
}

impl Emulated {
    /// Whether the server gets guest memory of its own. It may use that until it notices the end of its connection.
    pub fn shares_memory(&self) -> bool {
        self.isolation == ServerIsolation::Mappings
    }
}

/// How long an emulated device's server may take to answer. Each is in [`MIN_DEADLINE_MS`]`..=`[`MAX_DEADLINE_MS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerDeadlines {
    /// The time for an answer while the guest waits for it.
    pub answer: Duration,
    /// The time for all answers to one request of the guest, at least [`Self::answer`].
    pub total: Duration,
    /// The time for each answer after the server has connected, while it is told all memory.
    pub connect: Duration,
}

/// The access of an emulated device's server to guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServerIsolation {
    /// The server never maps guest RAM: each access is a message. The server is told large regions.
    #[default]
    Messages,
    /// The same, but the server is told each mapping.
    ExactMessages,
    /// The server gets the descriptor of guest RAM with each mapping, and must be trusted with all of
    /// guest RAM.
    Mappings,
}

impl ServerIsolation {
    /// The name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::ExactMessages => "messages, announced exactly",
            Self::Mappings => "mappings",
        }
    }
}

impl ConfiguredDevice for Emulated {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Emulated
    }

    fn endpoint(&self) -> PciAddress {
        self.endpoint
    }

    fn listens_at(&self) -> Option<&PathBuf> {
        Some(&self.listen)
    }

    fn connects_to(&self) -> Option<&PathBuf> {
        Some(&self.connect)
    }

    fn summarize(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, isolation) = (self.connect.display(), self.isolation.name());
        write!(f, " vfio-user {path}, isolation {isolation}")
    }
}

impl Checker<'_> {
    /// The endpoints with `vfio-user`, in ascending order. `taken` are the paths of other sockets.
    pub(super) fn emulated(&mut self, draft: &Draft, taken: &[&PathBuf]) -> Option<Vec<Emulated>> {
        let mut found = Vec::new();
        let mut listening: HashMap<PathBuf, Option<PciAddress>> =
            taken.iter().map(|path| ((*path).clone(), None)).collect();
        let mut whole = true;
        for (index, endpoint) in draft.endpoint.iter().enumerate() {
            let value = &endpoint.value;
            let Some(given) = &value.vfio_user else {
                continue;
            };
            let key = format!("endpoint[{index}].vfio-user");
            let parts = self.emulated_parts(given, &key);
            let range = value.address.as_ref().or(value.range.as_ref());
            let (Some(parts), Some(range)) = (parts, range.and_then(range_in)) else {
                whole = false;
                continue;
            };
            let first = range.first();
            let kind = if range.count() > 1 {
                ProblemKind::EmulatedOnRange { range }
            } else if value.vfio.is_some() {
                ProblemKind::EmulatedAndVfio
            } else if parts.listen == parts.connect {
                ProblemKind::ListenIsConnect
            } else if let Some(other) = listening.insert(parts.listen.clone(), Some(first)) {
                ProblemKind::ListenTwice { other }
            } else {
                found.push(Emulated {
                    endpoint: first,
                    ..parts
                });
                continue;
            };
            whole = false;
            self.refuse(&given.origin, &key, kind);
        }
        found.sort_by_key(|entry| entry.endpoint);
        whole.then_some(found)
    }

    /// The device, still without the address of its endpoint.
    fn emulated_parts(&mut self, given: &Located<EmulatedDraft>, key: &str) -> Option<Emulated> {
        let value = &given.value;
        let listen = self.emulated_path(&given.origin, value.listen.as_ref(), key, "listen");
        let connect = self.emulated_path(&given.origin, value.connect.as_ref(), key, "connect");
        let isolation = self.isolation(value.isolation.as_ref(), &format!("{key}.isolation"));
        let isolation = isolation.and_then(|isolation| {
            let key = format!("{key}.announce");
            self.announced(isolation, value.announce.as_ref(), &key)
        });
        let max_windows =
            self.max_windows(value.max_windows.as_ref(), &format!("{key}.max-windows"));
        let deadlines = self.server_deadlines(value, key);
        Some(Emulated {
            // The caller replaces it.
            endpoint: PciAddress::new(0, 0, 0, 0)?,
            listen: listen?,
            connect: connect?,
            isolation: isolation?,
            max_windows: max_windows?,
            deadlines: deadlines?,
        })
    }

    fn emulated_path(
        &mut self,
        origin: &Origin,
        given: Option<&Located<Scalar>>,
        key: &str,
        name: &'static str,
    ) -> Option<PathBuf> {
        if given.is_none() {
            self.refuse(origin, key, ProblemKind::EmulatedMissing(name));
        }
        self.socket_path(given, &format!("{key}.{name}"))
    }

    fn isolation(&mut self, given: Option<&Located<Scalar>>, key: &str) -> Option<ServerIsolation> {
        let Some(given) = given else {
            return Some(ServerIsolation::default());
        };
        match self.text(given, key, "\"messages\" or \"mappings\"")? {
            "messages" => Some(ServerIsolation::Messages),
            "mappings" => Some(ServerIsolation::Mappings),
            _ => {
                let kind = ProblemKind::Isolation(shown(&given.value));
                self.refuse(&given.origin, key, kind);
                None
            }
        }
    }

    fn max_windows(&mut self, given: Option<&Located<Scalar>>, key: &str) -> Option<u64> {
        let Some(given) = given else {
            return Some(MAX_WINDOWS);
        };
        let number = self.integer(given, key, "a number of windows, such as 1000")?;
        let windows = u64::try_from(number).ok();
        let windows = windows.filter(|windows| (1..=MAX_WINDOWS).contains(windows));
        if windows.is_none() {
            self.refuse(&given.origin, key, ProblemKind::MaxWindows(number));
        }
        windows
    }

    /// `isolation` with the way in which the server is told of memory.
    fn announced(
        &mut self,
        isolation: ServerIsolation,
        given: Option<&Located<Scalar>>,
        key: &str,
    ) -> Option<ServerIsolation> {
        let Some(given) = given else {
            return Some(isolation);
        };
        let kind = match (self.text(given, key, "\"coarse\" or \"exact\"")?, isolation) {
            ("exact", ServerIsolation::Messages) => return Some(ServerIsolation::ExactMessages),
            ("coarse", ServerIsolation::Mappings) => ProblemKind::CoarseMappings,
            ("coarse" | "exact", _) => return Some(isolation),
            _ => ProblemKind::Announce(shown(&given.value)),
        };
        self.refuse(&given.origin, key, kind);
        None
    }

    fn server_deadlines(&mut self, value: &EmulatedDraft, key: &str) -> Option<ServerDeadlines> {
        let (total_key, connect_key) = (
            format!("{key}.total-deadline-ms"),
            format!("{key}.connect-deadline-ms"),
        );
        let total = value.total_deadline_ms.as_ref();
        let connect = value.connect_deadline_ms.as_ref();
        let answer = self.deadline(
            value.deadline_ms.as_ref(),
            &format!("{key}.deadline-ms"),
            DEFAULT_DEADLINE,
        );
        let by_default = DEFAULT_TOTAL_DEADLINE.max(answer.unwrap_or_default());
        let sum = self.deadline(total, &total_key, by_default);
        let connect = self.deadline(connect, &connect_key, DEFAULT_CONNECT_DEADLINE);
        let deadlines = ServerDeadlines {
            answer: answer?,
            total: sum?,
            connect: connect?,
        };
        if deadlines.total >= deadlines.answer {
            return Some(deadlines);
        }
        if let Some(given) = total {
            let kind = ProblemKind::TotalDeadline {
                total: deadlines.total.as_millis(),
                answer: deadlines.answer.as_millis(),
            };
            self.refuse(&given.origin, &total_key, kind);
        }
        None
    }

    /// A number of milliseconds, or `by_default`.
    pub(super) fn deadline(
        &mut self,
        given: Option<&Located<Scalar>>,
        key: &str,
        by_default: Duration,
    ) -> Option<Duration> {
        let Some(given) = given else {
            return Some(by_default);
        };
        let wanted = "a number of milliseconds, such as 1000";
        let number = self.integer(given, key, wanted)?;
        let deadline = u64::try_from(number)
            .ok()
            .filter(|ms| (MIN_DEADLINE_MS..=MAX_DEADLINE_MS).contains(ms));
        if deadline.is_none() {
            self.refuse(&given.origin, key, ProblemKind::Deadline(number));
        }
        deadline.map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    /// An IOMMU and these endpoints.
    fn parse(endpoints: &str) -> Result<Vec<Emulated>, String> {
        let text = format!("socket = '/s'\ncontrol = '/c'\naddress = '00:05.0'\n{endpoints}");
        let parsed = Config::from_text(Path::new("vm.toml"), &text);
        parsed
            .map(|c| c.devices.emulated)
            .map_err(|e| e.to_string())
    }

    fn one(address: &str, table: &str) -> String {
        format!("[[endpoint]]\naddress = '{address}'\nvfio-user = {{ {table} }}\n")
    }

    #[test]
    fn emulated_devices_are_endpoints() {
        let text = one("00:07.0", "listen = '/a', connect = '/b'")
            + &one(
                "00:06.0",
                "listen = '/d', connect = '/b', isolation = 'mappings', deadline-ms = 60000, \
                 connect-deadline-ms = 50",
            )
            + &one(
                "00:08.0",
                "listen = '/e', connect = '/b', announce = 'exact', max-windows = 64, \
                 total-deadline-ms = 1000",
            );
        let address = |text: &str| text.parse().expect("an address");
        let deadlines = |answer, total, connect| ServerDeadlines {
            answer: Duration::from_millis(answer),
            total: Duration::from_millis(total),
            connect: Duration::from_millis(connect),
        };
        let expected = [
            Emulated {
                endpoint: address("00:06.0"),
                listen: "/d".into(),
                connect: "/b".into(),
                isolation: ServerIsolation::Mappings,
                max_windows: MAX_WINDOWS,
                deadlines: deadlines(60_000, 60_000, 50),
            },
            Emulated {
                endpoint: address("00:07.0"),
                listen: "/a".into(),
                connect: "/b".into(),
                isolation: ServerIsolation::Messages,
                max_windows: MAX_WINDOWS,
                deadlines: deadlines(1000, 20_000, 10_000),
            },
            Emulated {
                endpoint: address("00:08.0"),
                listen: "/e".into(),
                connect: "/b".into(),
                isolation: ServerIsolation::ExactMessages,
                max_windows: 64,
                deadlines: deadlines(1000, 1000, 10_000),
            },
        ];
        assert_eq!(parse(&text), Ok(expected.to_vec()));
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn bad_emulated_devices_are_refused_with_a_cure() {
        let fine = "listen = '/a', connect = '/b'";
        let two = one("00:06.0", fine) + &one("00:07.0", fine);
        let both = one("00:06.0", fine) + "vfio = '65:00.0'\n";
        let range = format!("[[endpoint]]\nrange = '00:06.0-00:06.7'\nvfio-user = {{ {fine} }}\n");
        for (text, cure) in [
            (two, "give each endpoint"),
            (both, "remove one of the two keys"),
            (range, "its own [[endpoint]]"),
            (one("00:06.0", "listen = '/a'"), "connect = "),
            (one("00:06.0", "connect = '/a'"), "listen = "),
            (
                one("00:06.0", "listen = '/a', connect = '/a'"),
                "use two paths",
            ),
            (
                one("00:06.0", "listen = '/s', connect = '/a'"),
                "another path",
            ),
            (
                one("00:06.0", "listen = '/c', connect = '/a'"),
                "another path",
            ),
            (one("00:06.0", "listen = '', connect = '/a'"), "path"),
            (one("00:06.0", "listen = 7, connect = '/a'"), "path"),
            (
                one("00:06.0", &format!("{fine}, isolation = 'none'")),
                "\"messages\"",
            ),
            (
                one("00:06.0", &format!("{fine}, announce = 'all'")),
                "\"coarse\"",
            ),
            (
                one("00:06.0", &format!("{fine}, max-windows = 0")),
                "1 to 4294967295",
            ),
            (
                one("00:06.0", &format!("{fine}, max-windows = 4294967296")),
                "1 to 4294967295",
            ),
            (
                one(
                    "00:06.0",
                    &format!("{fine}, isolation = 'mappings', announce = 'coarse'"),
                ),
                "remove `announce`",
            ),
            (
                one("00:06.0", &format!("{fine}, deadline-ms = 9")),
                "10 to 60000",
            ),
            (
                one("00:06.0", &format!("{fine}, deadline-ms = 60001")),
                "10 to 60000",
            ),
            (
                one("00:06.0", &format!("{fine}, deadline-ms = -1")),
                "10 to 60000",
            ),
            (
                one("00:06.0", &format!("{fine}, total-deadline-ms = 999")),
                "use 1000 or more",
            ),
            (
                one("00:06.0", &format!("{fine}, total-deadline-ms = 60001")),
                "10 to 60000",
            ),
            (
                one("00:06.0", &format!("{fine}, connect-deadline-ms = 9")),
                "10 to 60000",
            ),
            (one("00:06.0", &format!("{fine}, fast = true")), "fast"),
        ] {
            let message = parse(&text).expect_err(&text);
            assert!(message.contains(cure), "{text}: {message}");
        }
    }
}
