//! The table `readers`: which users' shadow readers may register, how many, and their patience.

use std::time::Duration;

use super::bounds::{MAX_READERS, MAX_USERS};
use super::checker::Checker;
use super::draft::{Draft, Located, ReadersDraft, Scalar};
use super::emulated::DEFAULT_DEADLINE;
use super::error::ProblemKind;
use super::text::shown;

/// Which users' shadow readers may register, how many, and how long the daemon waits for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readers {
    /// IDs of users besides the daemon's own, each once, in ascending order.
    pub users: Vec<u32>,
    /// How long a reader's access may take while the guest waits for its end:
    /// [`MIN_DEADLINE_MS`](super::MIN_DEADLINE_MS)`..=`[`MAX_DEADLINE_MS`](super::MAX_DEADLINE_MS).
    pub patience: Duration,
    /// The most readers of each endpoint: `1..=`[`MAX_READERS`].
    pub limit: usize,
}

impl Default for Readers {
    fn default() -> Self {
        Self {
            users: Vec::new(),
            patience: Duration::from_secs(1),
            limit: 16,
        }
    }
}

impl Checker<'_> {
    /// The table `readers`.
    pub(super) fn readers(&mut self, draft: &Draft) -> Option<Readers> {
        let Some(Located { value, .. }) = &draft.readers else {
            return Some(Readers::default());
        };
        let users = self.users(value);
        let patience = self.deadline(
            value.patience_ms.as_ref(),
            "readers.patience-ms",
            DEFAULT_DEADLINE,
        );
        let limit = self.reader_limit(value.limit.as_ref());
        Some(Readers {
            users: users?,
            patience: patience?,
            limit: limit?,
        })
    }

    fn users(&mut self, draft: &ReadersDraft) -> Option<Vec<u32>> {
        let Some(given) = &draft.users else {
            return Some(Vec::new());
        };
        if given.value.len() > MAX_USERS {
            let kind = ProblemKind::TooManyUsers(given.value.len());
            self.refuse(&given.origin, "readers.users", kind);
            return None;
        }
        let mut users = Vec::new();
        let mut whole = true;
        for (index, user) in given.value.iter().enumerate() {
            // The ID 2^32 - 1 means "no user".
            let number = match &user.value {
                Scalar::Integer(number) => u32::try_from(*number).ok(),
                Scalar::Bool(_) | Scalar::Text(_) | Scalar::Other(_) => None,
            };
            if let Some(number) = number.filter(|n| *n < u32::MAX) {
                users.push(number);
            } else {
                whole = false;
                let key = format!("readers.users[{index}]");
                self.refuse(&user.origin, &key, ProblemKind::User(shown(&user.value)));
            }
        }
        users.sort_unstable();
        users.dedup();
        whole.then_some(users)
    }

    fn reader_limit(&mut self, given: Option<&Located<Scalar>>) -> Option<usize> {
        let Some(given) = given else {
            return Some(Readers::default().limit);
        };
        let key = "readers.limit";
        let number = self.integer(given, key, "a number of processes, such as 16")?;
        let limit = usize::try_from(number)
            .ok()
            .filter(|limit| (1..=MAX_READERS).contains(limit));
        if limit.is_none() {
            self.refuse(&given.origin, key, ProblemKind::ReaderLimit(number));
        }
        limit
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn parse(table: &str) -> Result<Readers, String> {
        let text = format!("address = '00:05.0'\n{table}");
        let parsed = Config::from_text(Path::new("vm.toml"), &text);
        parsed.map(|c| c.readers).map_err(|e| e.to_string())
    }

    #[test]
    fn limits_are_the_configured_ones_or_defaults() {
        assert_eq!(parse(""), Ok(Readers::default()));
        assert_eq!(parse("[readers]"), Ok(Readers::default()));
        let all = "[readers]\nusers = [1001, 0, 1001]\npatience-ms = 250\nlimit = 256";
        let expected = Readers {
            users: vec![0, 1001],
            patience: Duration::from_millis(250),
            limit: 256,
        };
        assert_eq!(parse(all), Ok(expected));
    }

    #[test]
    fn bad_reader_keys_are_refused_with_a_cure() {
        for (table, place, cure) in [
            ("users = ['nvme']", "readers.users[0]", "id -u"),
            ("users = [0, -1]", "readers.users[1]", "id -u"),
            ("users = [4294967295]", "readers.users[0]", "id -u"),
            ("users = [true]", "readers.users[0]", "id -u"),
            ("users = 7", "", "a list such as [1001, 1002]"),
            ("patience-ms = 9", "readers.patience-ms", "10 to 60000"),
            ("patience-ms = 60001", "readers.patience-ms", "10 to 60000"),
            ("patience-ms = 'long'", "readers.patience-ms", "1000"),
            ("limit = 0", "readers.limit", "1 to 256"),
            ("limit = 257", "readers.limit", "1 to 256"),
            ("limit = 'many'", "readers.limit", "such as 16"),
            ("most = 3", "", "most"),
        ] {
            let message = parse(&format!("[readers]\n{table}")).expect_err(table);
            assert!(message.contains(place), "{table}: {message}");
            assert!(message.contains(cure), "{table}: {message}");
        }
        let many: Vec<_> = (0..65).map(|user| user.to_string()).collect();
        let message = parse(&format!("[readers]\nusers = [{}]", many.join(","))).expect_err("65");
        assert!(message.contains("at most 64"), "{message}");
    }
}
