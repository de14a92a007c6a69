//! Makes a [`Config`]: from a file, from options, or from a file that options override.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::bounds::MAX_FILE;
use super::checker::{Checker, SourceText};
use super::draft::Origin;
use super::error::{ConfigError, Location, Problem, ProblemKind};
use super::{Config, Machine, Summary};
use crate::args::{DescriptorArgs, RunArgs};

impl Config {
    /// The configuration in `file` alone, which need not name a socket.
    ///
    /// # Errors
    ///
    /// The file cannot be read or used; the error lists every problem.
    pub fn from_file(file: &Path) -> Result<Self, ConfigError> {
        Self::from_text(file, &read(file)?)
    }

    /// The text of `file`.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is longer than 1 MiB, or is no text.
    pub fn text_of(file: &Path) -> Result<String, ConfigError> {
        read(file)
    }

    /// The configuration in `file` for a VMM that emulates `machine`, where that is known.
    ///
    /// # Errors
    ///
    /// The file cannot be read or used, or names another machine; the error lists every problem.
    pub fn for_machine(file: &Path, machine: Option<Machine>) -> Result<Self, ConfigError> {
        Self::from_source(file, &read(file)?, machine)
    }

    /// The configuration in `file`, which need not name a socket, and inherited descriptors.
    ///
    /// # Errors
    ///
    /// The file or the descriptors cannot be used; the error lists every problem.
    pub fn with_descriptors(
        file: &Path,
        descriptors: &DescriptorArgs,
    ) -> Result<Self, ConfigError> {
        let text = read(file)?;
        let mut checker = Checker::new(Some(SourceText {
            path: file,
            text: &text,
        }));
        let draft = checker.parse()?;
        checker.config(&draft, descriptors, None, None)
    }

    /// The configuration in `text`, the content of `file`.
    ///
    /// # Errors
    ///
    /// The text cannot be used; the error lists every problem.
    pub fn from_text(file: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::from_source(file, text, None)
    }

    fn from_source(file: &Path, text: &str, machine: Option<Machine>) -> Result<Self, ConfigError> {
        let mut checker = Checker::new(Some(SourceText { path: file, text }));
        let draft = checker.parse()?;
        checker.config(&draft, &DescriptorArgs::default(), None, machine)
    }

    /// The configuration as an operator reads it.
    pub fn summary(&self) -> Summary<'_> {
        Summary::new(self)
    }
}

impl TryFrom<&RunArgs> for Config {
    type Error = ConfigError;

    /// The configuration of a daemon that is to run: the other options override the file, if one is
    /// named.
    fn try_from(args: &RunArgs) -> Result<Self, ConfigError> {
        let text = args.config.as_deref().map(read).transpose()?;
        let source = args.config.as_deref().zip(text.as_deref());
        let mut checker = Checker::new(source.map(|(path, text)| SourceText { path, text }));
        let draft = checker.parse()?;
        let draft = draft.overridden_by(args, |flag, kind| {
            checker.refuse(&Origin::Flag(flag), "", kind);
        });
        checker.config(&draft, &args.descriptors, Some(args), None)
    }
}

/// Reads a configuration file of at most [`MAX_FILE`] bytes.
fn read(path: &Path) -> Result<String, ConfigError> {
    let fail = |kind| {
        let location = Location::File {
            path: path.to_owned(),
            line: None,
            key: String::new(),
        };
        ConfigError {
            problems: vec![Problem { location, kind }],
            omitted: 0,
        }
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|source| fail(ProblemKind::Read(source)))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fail(ProblemKind::FileTooLong));
    }
    String::from_utf8(bytes).map_err(|_| fail(ProblemKind::NotUtf8))
}
