//! Checks a draft as a whole and collects every problem with its place.

use std::path::{Path, PathBuf};

use super::bounds::{MAX_PROBLEMS, MAX_SOCKET_PATH};
use super::draft::{Draft, Located, Origin, Scalar};
use super::error::{ConfigError, Location, Problem, ProblemKind};
use super::text::{line_of, line_text, parse_size, shown, syntax_message};

#[derive(Clone, Copy)]
pub(super) struct SourceText<'a> {
    pub path: &'a Path,
    pub text: &'a str,
}

/// Checks a draft and collects its problems. A refused value is `None`, and the checks that depend on it
/// are skipped.
pub(super) struct Checker<'a> {
    pub source: Option<SourceText<'a>>,
    pub problems: Vec<Problem>,
    omitted: usize,
}

impl<'a> Checker<'a> {
    pub(super) fn new(source: Option<SourceText<'a>>) -> Self {
        Self {
            source,
            problems: Vec::new(),
            omitted: 0,
        }
    }

    pub(super) fn refuse(&mut self, origin: &Origin, key: &str, kind: ProblemKind) {
        if self.problems.len() >= MAX_PROBLEMS {
            // Only counted: the line number of each kept problem takes a pass over the file.
            self.omitted += 1;
            return;
        }
        let location = match (origin, self.source) {
            (Origin::Flag(name), _) => Location::Flag(name),
            (Origin::File(span), source) => Location::File {
                path: source.map_or_else(PathBuf::new, |source| source.path.to_owned()),
                line: source.map(|source| line_of(source.text, span.start)),
                key: key.to_owned(),
            },
        };
        self.push(location, kind);
    }

    /// Adds the problem that a required value is missing. Names `key` if there is a file, and otherwise the option
    /// `flag`.
    pub(super) fn refuse_missing(&mut self, key: &str, flag: &'static str, cure: &'static str) {
        let location = match self.source {
            None => Location::Flag(flag),
            Some(source) => Location::File {
                path: source.path.to_owned(),
                line: None,
                key: key.to_owned(),
            },
        };
        self.push(location, ProblemKind::Missing(cure));
    }

    fn push(&mut self, location: Location, kind: ProblemKind) {
        self.problems.push(Problem { location, kind });
    }

    pub(super) fn finish(self) -> ConfigError {
        ConfigError {
            problems: self.problems,
            omitted: self.omitted,
        }
    }

    /// The file as a draft; an empty draft without a file.
    pub(super) fn parse(&mut self) -> Result<Draft, ConfigError> {
        let Some(source) = self.source else {
            return Ok(Draft::default());
        };
        toml::from_str(source.text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            let kind = ProblemKind::Syntax(syntax_message(
                error.message(),
                line_text(source.text, span.start),
            ));
            let mut checker = Checker::new(self.source);
            checker.refuse(&Origin::File(span), "", kind);
            checker.finish()
        })
    }

    pub(super) fn socket_path(
        &mut self,
        given: Option<&Located<Scalar>>,
        key: &str,
    ) -> Option<PathBuf> {
        let given = given?;
        let text = self.text(
            given,
            key,
            "a path as a text, such as \"/run/vm0/iommu.sock\"",
        )?;
        let kind = if text.is_empty() {
            ProblemKind::PathEmpty
        } else if text.len() > MAX_SOCKET_PATH {
            ProblemKind::PathTooLong(text.len())
        } else if text.chars().any(char::is_control) {
            ProblemKind::PathControl
        } else {
            return Some(PathBuf::from(text));
        };
        self.refuse(&given.origin, key, kind);
        None
    }

    pub(super) fn text<'g>(
        &mut self,
        given: &'g Located<Scalar>,
        key: &str,
        wanted: &'static str,
    ) -> Option<&'g str> {
        if let Scalar::Text(text) = &given.value {
            return Some(text);
        }
        self.wrong_type(given, key, given.value.found(), wanted);
        None
    }

    pub(super) fn integer(
        &mut self,
        given: &Located<Scalar>,
        key: &str,
        wanted: &'static str,
    ) -> Option<i128> {
        if let Scalar::Integer(value) = given.value {
            return Some(value);
        }
        self.wrong_type(given, key, given.value.found(), wanted);
        None
    }

    pub(super) fn size(&mut self, given: &Located<Scalar>, key: &str) -> Option<u64> {
        let size = match &given.value {
            Scalar::Text(text) => parse_size(text),
            Scalar::Integer(bytes) => u64::try_from(*bytes).ok(),
            other => {
                let wanted = "a size: bytes as a number, or a text such as \"2G\"";
                self.wrong_type(given, key, other.found(), wanted);
                return None;
            }
        };
        if size.is_none() {
            self.refuse(&given.origin, key, ProblemKind::Size(shown(&given.value)));
        }
        size
    }

    pub(super) fn wrong_type(
        &mut self,
        given: &Located<Scalar>,
        key: &str,
        found: &'static str,
        wanted: &'static str,
    ) {
        self.refuse(&given.origin, key, ProblemKind::WrongType { found, wanted });
    }
}
