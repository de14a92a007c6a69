//! Reads small files below a root, up to a limit, and replaces control characters.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The most bytes read of one file: files of sysfs and procfs are far shorter.
const MAX_FILE: u64 = 1 << 18;
/// The most characters of a name or a line.
const MAX_NAME: usize = 120;

/// The folder with `sys`, `proc` and `dev`: the root of this host, or of a fake one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoot {
    root: PathBuf,
}

impl Default for HostRoot {
    /// This host.
    fn default() -> Self {
        Self::new("/")
    }
}

impl HostRoot {
    /// A host whose `sys`, `proc` and `dev` are in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The path of `below`, such as `sys/module`.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.root.join(below)
    }

    /// The content of the file `below`.
    ///
    /// # Errors
    ///
    /// The file cannot be read. Bytes that are not UTF-8 are replaced, and only the start of an
    /// oversized file is returned.
    pub fn text(&self, below: impl AsRef<Path>) -> io::Result<String> {
        self.text_up_to(below, MAX_FILE)
    }

    /// As [`Self::text`], with the largest size to read in bytes.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn text_up_to(&self, below: impl AsRef<Path>, limit: u64) -> io::Result<String> {
        let mut bytes = Vec::new();
        let file = File::open(self.path(below))?;
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes of the file `below`, as far as [`Self::text`] reads.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn bytes(&self, below: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        read_bytes(&self.path(below))
    }

    /// The first line of the file `below`; `None` if it cannot be read.
    pub fn value(&self, below: impl AsRef<Path>) -> Option<String> {
        read_value(&self.path(below))
    }
}

pub(super) fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The first line of a file, trimmed; `None` if it is empty or cannot be read.
pub(super) fn read_value(path: &Path) -> Option<String> {
    let bytes = read_bytes(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| printable(line))
}

/// A number in hexadecimal with `0x`.
pub(super) fn read_hex(path: &Path) -> Option<u32> {
    let value = read_value(path)?;
    let digits = value.strip_prefix("0x")?;
    u32::from_str_radix(digits, 16).ok()
}

/// The last component of a link's target.
pub(super) fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(printable(&target.file_name()?.to_string_lossy()))
}

/// The sorted names in a folder; empty if it cannot be read.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
}

/// The text, shortened, with `?` in place of control characters.
pub(super) fn printable(text: &str) -> String {
    let visible = |c: char| if c.is_control() { '?' } else { c };
    text.chars().take(MAX_NAME).map(visible).collect()
}
