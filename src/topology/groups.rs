//! Host groups: endpoints that the host cannot isolate from each other.

use std::fmt;

use thiserror::Error;

/// The longest name of a group, in bytes.
pub const MAX_GROUP_NAME: usize = 64;

/// A host group. All endpoints of one group must always be in the same domain, because the hardware
/// cannot tell their accesses apart.
///
/// IDs count from 0, in the order in which a topology first names its groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u32);

/// The name of a host group: printable ASCII without spaces, `1..=64` bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupName(String);

impl GroupName {
    /// Checks a name.
    ///
    /// # Errors
    ///
    /// The name is empty, is longer than [`MAX_GROUP_NAME`], or contains anything but printable
    /// ASCII.
    pub fn new(name: &str) -> Result<Self, GroupNameError> {
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic());
        if (1..=MAX_GROUP_NAME).contains(&name.len()) && printable {
            Ok(Self(name.to_owned()))
        } else {
            Err(GroupNameError)
        }
    }

    /// The name of a host group that the operator did not name: `host-group-N`, followed by as many
    /// `+` as it takes to find a name that is not `taken`.
    pub(crate) fn of_host_group(number: u32, taken: impl Fn(&Self) -> bool) -> Self {
        let mut name = Self(format!("host-group-{number}"));
        while taken(&name) {
            name.0.push('+');
        }
        name
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a group name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "not a group name; use 1 to {MAX_GROUP_NAME} printable ASCII characters without spaces, \
     such as \"nic0\""
)]
pub struct GroupNameError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_printable() {
        for good in ["a", "nic0", "0000:01:00.0", &"x".repeat(64)] {
            assert_eq!(GroupName::new(good).expect("a name").as_str(), good);
        }
        for bad in ["", "two words", "tab\t", "\u{1b}[2J", "ü", &"x".repeat(65)] {
            assert_eq!(GroupName::new(bad), Err(GroupNameError), "{bad:?}");
        }
    }
}
